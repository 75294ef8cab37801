// Half of a warp waits at the barrier of the block, the other half at a shuffle for all lanes: a deadlock.
#include "outcome.h"

__global__ void barrier_that_not_all_reach(float* output) {
    if (threadIdx.x < 16) __syncthreads();
    output[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(barrier_that_not_all_reach, 1, 32, 0, 0)(output);
    return outcome(output, 4);
}
