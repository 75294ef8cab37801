// Each thread reads what another thread of the block has written, without a barrier between. ThreadSanitizer names both
// lines, and another order of the threads gives another result.
#include "outcome.h"

__global__ void missing_barrier(float* output) {
    __shared__ float values[64];
    values[threadIdx.x] = threadIdx.x;
    output[threadIdx.x] = values[63 - threadIdx.x];
}

int main() {
    float* output = allocate<float>(64);
    LAUNCH(missing_barrier, 1, 64, 0, 0)(output);
    return outcome(output, 4);
}
