// RMSNorm (Zhang and Sennrich, 2019), and before it the addition to the residual stream: two operations of a layer in
// one pass over memory.
//
//   residual += row;  output = residual / sqrt(mean(residual²) + eps) · weight
//
// Several threads work on a row, and each of them takes packs of 16 bytes. A row of up to 32 packs, such as an
// attention head, gets 1, 2, 4, … or 32 threads, part of a warp: a block of 128 threads handles 4 to 128 such rows.
// A longer row gets a block of its own, with up to 1024 threads. threadIdx.x is the thread's place in its row,
// threadIdx.y the row's place in its block.
//
// Shared memory: the sums, as floats, of all rows of the block, at most 99 KiB. A thread reads back only what it has
// written: it would keep that in registers if a loop of unknown length could index registers.
// Memory traffic: row, residual and weight are read once, residual and output written once.
#include <climits>

#include "common.cuh"

constexpr unsigned SHORT_ROWS_THREADS = 128;               // of a block with several rows
constexpr index_t REDUCTION_BYTES = WARP * sizeof(float);  // block_reduce's own shared memory

// The sum over the threads of a row. All threads of the block must call this.
__device__ float sum_over_row(float x) {
    if (blockDim.x > WARP) return block_reduce(x, 0.f, Add());
    for (int offset = blockDim.x / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

// rows: num_rows rows of size numbers. They come in groups, the heads of a token: group_size neighbors, and from a
// group to the next are group_stride numbers. residual: [num_rows, size], changed in place, or null. weight: [size].
// output: [num_rows, size]. N: numbers in a pack; size is a multiple.
template <class T, int N>
__global__ void __launch_bounds__(1024)
add_rms_norm_kernel(const T* __restrict__ rows, T* __restrict__ residual, const T* __restrict__ weight,
                    T* __restrict__ output, unsigned num_rows, index_t size, unsigned group_size,
                    index_t group_stride, float eps) {
    DYNAMIC_SHARED(float, shared);
    float* total = shared + threadIdx.y * size;
    const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
    // In the last block, threads without a row take part in the shuffles, but read and write nothing.
    const int end = row < num_rows ? (int)size : 0, first = threadIdx.x * N, step = blockDim.x * N;
    const T* input = rows + (index_t)(row / group_size) * group_stride + row % group_size * size;
    const index_t offset = row * size;  // in residual and output
    float squares = 0.f;
    for (int i = first; i < end; i += step) {
        const Pack<T, N> pack = load_pack<N>(input + i);
        Pack<float, N> sums;
        for (int j = 0; j < N; j++) sums.values[j] = to_float(pack.values[j]);
        if (residual) {
            Pack<T, N> stream = load_pack<N>(residual + offset + i);
            for (int j = 0; j < N; j++) {
                sums.values[j] += to_float(stream.values[j]);
                stream.values[j] = from_float<T>(sums.values[j]);
            }
            store_pack(residual + offset + i, stream);
        }
        for (int j = 0; j < N; j++) squares += sums.values[j] * sums.values[j];
        store_pack(total + i, sums);  // before rounding to T: the norm reads the exact sum
    }
    const float factor = rsqrtf(sum_over_row(squares) / size + eps);
    for (int i = first; i < end; i += step) {
        const Pack<float, N> sums = load_pack<N>(total + i);
        const Pack<T, N> weights = load_pack<N>(weight + i);
        Pack<T, N> result;
        for (int j = 0; j < N; j++) {
            result.values[j] = from_float<T>(sums.values[j] * factor * to_float(weights.values[j]));
        }
        store_pack(output + offset + i, result);
    }
}

// threadIdx.x: threads of a row; threadIdx.y: rows of a block.
inline dim3 choose_block(index_t packs_per_row) {
    if (packs_per_row > WARP) return dim3(num_threads_for(packs_per_row, 1024), 1);
    unsigned threads_per_row = 1;
    while (threads_per_row < packs_per_row) threads_per_row *= 2;
    return dim3(threads_per_row, SHORT_ROWS_THREADS / threads_per_row);
}

template <class T, int N>
int launch_add_rms_norm(const void* rows, void* residual, const void* weight, void* output, index_t num_rows,
                        index_t size, index_t group_size, index_t group_stride, float eps, void* stream) {
    const dim3 block = choose_block(size / N);
    const index_t shared_bytes = block.y * size * sizeof(float);
    if (shared_bytes + REDUCTION_BYTES > MAX_SHARED_BYTES || num_rows > INT_MAX) return UNSUPPORTED;
    cudaFuncSetAttribute(add_rms_norm_kernel<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    LAUNCH((add_rms_norm_kernel<T, N>), (unsigned)ceil_div(num_rows, block.y), block, shared_bytes, stream)
    ((const T*)rows, (T*)residual, (const T*)weight, (T*)output, num_rows, size, group_size, group_stride, eps);
    return cudaGetLastError();
}

extern "C" int add_rms_norm(const void* rows, void* residual, const void* weight, void* output, int dtype,
                            index_t num_rows, index_t size, index_t group_size, index_t group_stride, float eps,
                            void* stream) {
    if (num_rows == 0) return cudaSuccess;
    return dispatch_float(dtype, [=](auto tag) {
        typedef decltype(tag) T;
        constexpr int N = 16 / sizeof(T);
        const bool aligned = is_aligned(size * sizeof(T), rows, residual, weight, output) &&
                             is_aligned(group_stride * sizeof(T));
        const auto launch = aligned ? launch_add_rms_norm<T, N> : launch_add_rms_norm<T, 1>;
        return launch(rows, residual, weight, output, num_rows, size, group_size, group_stride, eps, stream);
    });
}
