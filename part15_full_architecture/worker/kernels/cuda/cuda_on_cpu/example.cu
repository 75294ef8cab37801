// The softmax of each row of a matrix, one block per row: a first kernel, and a whole program.
//
//     g++ -std=c++17 -O2 -fno-strict-aliasing -pthread -x c++ example.cu -o example && ./example     on this CPU
//     nvcc -std=c++17 example.cu -o example && ./example                                             on a GPU
#include "cuda_on_cpu.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

constexpr int NUM_ROWS = 8, SIZE = 1000, NUM_THREADS = 128;

// The largest (or the sum) of all threads' numbers, for all threads.
template <class Op> __device__ float block_reduce(float x, Op op) {
    __shared__ float of_warp[NUM_THREADS / 32];
    for (int offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
    __syncthreads();  // an earlier call may still be reading of_warp
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp[0];
    for (int warp = 1; warp < NUM_THREADS / 32; warp++) x = op(x, of_warp[warp]);
    return x;
}

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

__global__ void softmax(const float* input, float* output) {
    const float* row = input + blockIdx.x * SIZE;
    float largest = -INFINITY, sum = 0.f;
    for (int i = threadIdx.x; i < SIZE; i += NUM_THREADS) largest = fmaxf(largest, row[i]);
    largest = block_reduce(largest, Max());
    for (int i = threadIdx.x; i < SIZE; i += NUM_THREADS) sum += __expf(row[i] - largest);
    sum = block_reduce(sum, Add());
    for (int i = threadIdx.x; i < SIZE; i += NUM_THREADS) {
        output[blockIdx.x * SIZE + i] = __expf(row[i] - largest) / sum;
    }
}

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    printf("error: %s\n", cudaGetErrorString(error));
    exit(1);
}

int main() {
    float *input, *output;
    check(cudaMallocManaged(&input, NUM_ROWS * SIZE * sizeof(float)));
    check(cudaMallocManaged(&output, NUM_ROWS * SIZE * sizeof(float)));
    for (int i = 0; i < NUM_ROWS * SIZE; i++) input[i] = sinf((float)i);

    LAUNCH(softmax, NUM_ROWS, NUM_THREADS, 0, 0)(input, output);
    check(cudaGetLastError());
    check(cudaDeviceSynchronize());
    for (int row = 0; row < NUM_ROWS; row++) {
        double sum = 0;
        for (int i = 0; i < SIZE; i++) sum += output[row * SIZE + i];
        printf("row %d: probabilities add up to %.6f\n", row, sum);
        if (fabs(sum - 1) > 1e-5) return 1;
    }
    cudaFree(input);
    cudaFree(output);
}
