// Two reductions use the same shared array. Between them, a barrier is missing: a fast warp writes the second one's
// numbers while a slow one still reads those of the first.
#include "outcome.h"

__device__ float block_sum(float x) {
    __shared__ float of_warp[2];
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    return of_warp[0] + of_warp[1];
}

__global__ void reduction_that_reuses_too_early(float* output) {
    const float first = block_sum(1.f);
    const float second = block_sum(2.f);
    output[threadIdx.x] = first + second;
}

int main() {
    float* output = allocate<float>(64);
    LAUNCH(reduction_that_reuses_too_early, 1, 64, 0, 0)(output);
    return outcome(output, 4);
}
