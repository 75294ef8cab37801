// Odd and even lanes shuffle in different branches, each with the mask of all lanes. The result on a GPU is undefined.
#include "outcome.h"

__global__ void shuffle_in_a_branch(float* output) {
    const float x = threadIdx.x;
    if (threadIdx.x % 2 == 0) {
        output[threadIdx.x] = __shfl_down_sync(0xffffffffu, x, 2);
    } else {
        output[threadIdx.x] = __shfl_up_sync(0xffffffffu, x, 2);
    }
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(shuffle_in_a_branch, 1, 32, 0, 0)(output);
    return outcome(output, 4);
}
