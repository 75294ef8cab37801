// Softmax, second rung: one warp per row.
//
// The 32 lanes of a warp read neighboring numbers, so a load of the warp covers whole sectors of memory: it is
// coalesced. Each lane finds the maximum of what it has read, and the lanes exchange their maxima by shuffles, from
// register to register (warp_reduce in common.cuh); then the same for the sum. A block is 4 warps, for 4 rows.
//
// Memory traffic: a row is read three times, as in softmax_naive.cu, and written once. No shared memory.
#include "common.cuh"

constexpr int ROWS_PER_BLOCK = 4;

// rows, output: [num_rows, size]. A row that has only -inf becomes zeros.
template <class T>
__global__ void
softmax_warp_kernel(const T* __restrict__ rows, T* __restrict__ output, index_t num_rows, index_t size) {
    const int lane = threadIdx.x % WARP;
    const index_t row = blockIdx.x * (index_t)ROWS_PER_BLOCK + threadIdx.x / WARP;
    if (row >= num_rows) return;  // the whole warp leaves, so the shuffles of other warps don't miss it
    const T* input = rows + row * size;
    T* result = output + row * size;
    float maximum = LOWEST;
    for (index_t i = lane; i < size; i += WARP) maximum = fmaxf(maximum, to_float(input[i]));
    maximum = warp_reduce(maximum, Max());
    float sum = 0.f;
    for (index_t i = lane; i < size; i += WARP) sum += __expf(to_float(input[i]) - maximum);
    sum = warp_reduce(sum, Add());
    const float factor = sum == 0.f ? 0.f : 1.f / sum;
    for (index_t i = lane; i < size; i += WARP) {
        result[i] = from_float<T>(__expf(to_float(input[i]) - maximum) * factor);
    }
}

extern "C" int softmax_warp(const void* rows, void* output, int dtype, index_t num_rows, index_t size, void* stream) {
    if (num_rows == 0) return cudaSuccess;
    return dispatch_float(dtype, [=](auto tag) {
        typedef decltype(tag) T;
        const unsigned threads = ROWS_PER_BLOCK * WARP, blocks = (unsigned)ceil_div(num_rows, ROWS_PER_BLOCK);
        LAUNCH(softmax_warp_kernel<T>, blocks, threads, 0, stream)((const T*)rows, (T*)output, num_rows, size);
        return cudaGetLastError();
    });
}
