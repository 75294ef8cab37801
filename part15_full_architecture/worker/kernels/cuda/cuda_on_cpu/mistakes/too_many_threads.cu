// A block of 2,048 threads. A GPU refuses the launch; a program that does not ask for the error goes on without it.
#include "outcome.h"

__global__ void too_many_threads(float* output) { output[threadIdx.x] = threadIdx.x; }

int main() {
    float* output = allocate<float>(2048);
    LAUNCH(too_many_threads, 1, 2048, 0, 0)(output);
    return outcome(output, 4);
}
