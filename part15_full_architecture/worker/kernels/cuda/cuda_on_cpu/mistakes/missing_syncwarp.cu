// Lanes of one warp exchange numbers through shared memory. Since Volta, they need not run in lockstep: __syncwarp() is
// missing between the write and the read.
#include "outcome.h"

__global__ void missing_syncwarp(float* output) {
    __shared__ float values[32];
    values[threadIdx.x] = threadIdx.x;
    output[threadIdx.x] = values[threadIdx.x ^ 1];
}

int main() {
    float* output = allocate<float>(32);
    LAUNCH(missing_syncwarp, 1, 32, 0, 0)(output);
    return outcome(output, 4);
}
