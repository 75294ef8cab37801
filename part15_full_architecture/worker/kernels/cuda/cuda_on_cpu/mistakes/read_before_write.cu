// A sum starts from shared memory that nobody has set to zero. A GPU often has zeros there; here it is a NaN.
#include "outcome.h"

__global__ void read_before_write(float* output) {
    DYNAMIC_SHARED(float, total);
    atomicAdd(total, 1.f);
    __syncthreads();
    output[threadIdx.x] = *total;
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(read_before_write, 1, 32, sizeof(float), 0)(output);
    return outcome(output, 4);
}
