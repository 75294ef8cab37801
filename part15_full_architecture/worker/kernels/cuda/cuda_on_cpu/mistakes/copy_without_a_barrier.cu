// Each thread waits for its own copies, and then reads what another thread has copied: a barrier is missing.
#include "outcome.h"

__global__ void copy_without_a_barrier(const float* input, float* output) {
    __shared__ float values[64];
    __pipeline_memcpy_async(&values[threadIdx.x], &input[threadIdx.x], sizeof(float));
    __pipeline_commit();
    __pipeline_wait_prior(0);
    output[threadIdx.x] = values[63 - threadIdx.x];
}

int main() {
    float *input = allocate<float>(64), *output = allocate<float>(64);
    for (int i = 0; i < 64; i++) input[i] = i;
    LAUNCH(copy_without_a_barrier, 1, 64, 0, 0)(input, output);
    return outcome(output, 4);
}
