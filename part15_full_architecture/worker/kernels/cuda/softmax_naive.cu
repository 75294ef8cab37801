// Softmax, first rung: the three loops of the formula, one thread per row.
//
//   maximum = max(row);  sum = Σ exp(row[i] - maximum);  output[i] = exp(row[i] - maximum) / sum
//
// A block is 128 threads, and each of them walks through a row of its own. That is the slow way to use a GPU: the 32
// threads of a warp run in step, so at any moment they read 32 numbers that are a row apart. Such a load is called
// uncoalesced: each number is in another 32-byte sector, so one instruction needs 32 sectors, where 32 neighboring
// floats are in 4. The next instructions read the rest of the same sectors: a cache may still have them, but only as
// long as the sectors of all rows that are being read fit.
//
// It is also the least exact way: one thread adds all the numbers of a row, one after another, and each of so many
// additions rounds. In the other rungs each thread adds a part of the row.
//
// Memory traffic: a row is read three times and written once. No shared memory.
#include "common.cuh"

// rows, output: [num_rows, size]. A row that has only -inf becomes zeros.
template <class T>
__global__ void
softmax_naive_kernel(const T* __restrict__ rows, T* __restrict__ output, index_t num_rows, index_t size) {
    const index_t row = blockIdx.x * (index_t)blockDim.x + threadIdx.x;
    if (row >= num_rows) return;
    const T* input = rows + row * size;
    T* result = output + row * size;
    float maximum = LOWEST;
    for (index_t i = 0; i < size; i++) maximum = fmaxf(maximum, to_float(input[i]));
    float sum = 0.f;
    for (index_t i = 0; i < size; i++) sum += __expf(to_float(input[i]) - maximum);
    const float factor = sum == 0.f ? 0.f : 1.f / sum;
    for (index_t i = 0; i < size; i++) result[i] = from_float<T>(__expf(to_float(input[i]) - maximum) * factor);
}

extern "C" int softmax_naive(const void* rows, void* output, int dtype, index_t num_rows, index_t size, void* stream) {
    if (num_rows == 0) return cudaSuccess;
    return dispatch_float(dtype, [=](auto tag) {
        typedef decltype(tag) T;
        const unsigned threads = 128, blocks = (unsigned)ceil_div(num_rows, threads);
        LAUNCH(softmax_naive_kernel<T>, blocks, threads, 0, stream)((const T*)rows, (T*)output, num_rows, size);
        return cudaGetLastError();
    });
}
