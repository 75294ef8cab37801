// The bytes of an asynchronous copy are read before the copy was waited for.
#include "outcome.h"

__global__ void copy_not_waited_for(const float* input, float* output) {
    DYNAMIC_SHARED(float, values);
    __pipeline_memcpy_async(&values[threadIdx.x], &input[threadIdx.x], sizeof(float));
    __pipeline_commit();
    output[threadIdx.x] = values[threadIdx.x];
    __pipeline_wait_prior(0);
}

int main() {
    float *input = allocate<float>(32), *output = allocate<float>(32);
    for (int i = 0; i < 32; i++) input[i] = i;
    LAUNCH(copy_not_waited_for, 1, 32, 32 * sizeof(float), 0)(input, output);
    return outcome(output, 4);
}
