// 128 KiB of local variables per thread. A GPU puts them into slow local memory; here they do not fit on a stack.
#include "outcome.h"

__global__ void large_local_array(float* output) {
    volatile float values[32 << 10];
    for (int i = 0; i < 32 << 10; i++) values[i] = threadIdx.x;
    output[threadIdx.x] = values[threadIdx.x];
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(large_local_array, 1, 1, 0, 0)(output);
    return outcome(output, 4);
}
