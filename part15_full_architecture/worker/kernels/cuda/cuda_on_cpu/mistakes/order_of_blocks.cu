// Each block needs what the one before it has written, but blocks run in any order. CUDA_ON_CPU_ORDER=reverse shows it.
#include "outcome.h"

__global__ void order_of_blocks(float* output) {
    if (threadIdx.x == 0) output[blockIdx.x] = blockIdx.x == 0 ? 1.f : output[blockIdx.x - 1] + 1.f;
}

int main() {
    float* output = allocate<float>(4);
    LAUNCH(order_of_blocks, 4, 32, 0, 0)(output);
    return outcome(output, 4);
}
