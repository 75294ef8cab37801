// Sixteen bytes are loaded at once from an address that is no multiple of 16. -fsanitize=alignment names it.
#include "outcome.h"

__global__ void misaligned_load(const float* input, float* output) {
    const float4 four = *reinterpret_cast<const float4*>(input + 1);
    output[threadIdx.x] = four.x;
}

int main() {
    float *input = allocate<float>(32), *output = allocate<float>(32);
    LAUNCH(misaligned_load, 1, 32, 0, 0)(input, output);
    return outcome(output, 4);
}
