// A write one past the end of the dynamic shared memory. A GPU writes into memory that nothing protects.
#include "outcome.h"

__global__ void past_dynamic_shared_memory(float* output) {
    DYNAMIC_SHARED(float, values);
    values[threadIdx.x + 1] = threadIdx.x;
    __syncthreads();
    output[threadIdx.x] = values[threadIdx.x];
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(past_dynamic_shared_memory, 1, 32, 32 * sizeof(float), 0)(output);
    return outcome(output, 4);
}
