// 64 KiB of dynamic shared memory, without raising the kernel's limit of 48 KiB.
#include "outcome.h"

__global__ void too_much_shared_memory(float* output) {
    DYNAMIC_SHARED(float, values);
    values[threadIdx.x] = threadIdx.x;
    output[threadIdx.x] = values[threadIdx.x];
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(too_much_shared_memory, 1, 32, 64 << 10, 0)(output);
    return outcome(output, 4);
}
