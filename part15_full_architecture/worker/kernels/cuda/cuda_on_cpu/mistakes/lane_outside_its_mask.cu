// The mask names the lower half of the warp, but all lanes call the shuffle.
#include "outcome.h"

__global__ void lane_outside_its_mask(float* output) {
    output[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (float)threadIdx.x, 1);
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(lane_outside_its_mask, 1, 32, 0, 0)(output);
    return outcome(output, 4);
}
