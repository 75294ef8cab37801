// Both halves of the block wait, but at different barriers. A GPU pairs them, and the halves run on as if they had met.
#include "outcome.h"

__global__ void barrier_in_a_branch(float* output) {
    __shared__ float values[64];
    const int i = threadIdx.x;
    if (i < 32) {
        values[i] = i;
        __syncthreads();
    } else {
        values[i] = -i;
        __syncthreads();
    }
    output[i] = values[63 - i];
}

int main() {
    float* output = allocate<float>(64);
    LAUNCH(barrier_in_a_branch, 1, 64, 0, 0)(output);
    return outcome(output, 4);
}
