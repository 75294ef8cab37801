// A write one past the end of a shared array, into the variable behind it. AddressSanitizer names it.
#include "outcome.h"

__global__ void past_a_shared_array(float* output) {
    __shared__ float values[32];
    values[threadIdx.x + 1] = threadIdx.x;
    __syncthreads();
    output[threadIdx.x] = values[threadIdx.x];
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(past_a_shared_array, 1, 32, 0, 0)(output);
    return outcome(output, 4);
}
