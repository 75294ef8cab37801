// Softmax, third rung: the row is read from memory once.
//
// One block per row, with a thread for each pack of 16 bytes, up to 1024 threads. A thread copies its packs to shared
// memory as floats and finds their maximum on the way. From then on it works in shared memory: the exponentials replace
// the numbers, and the last loop scales them and writes the result. The threads of a block exchange maxima and sums
// through block_reduce (common.cuh). Each thread reads back only what it has written, so no other barrier is needed.
//
// Shared memory: size floats; block_reduce has 32 floats of its own for each of the two reductions. A row that needs
// more than 99 KiB is UNSUPPORTED: softmax_online.cu has no limit.
// Memory traffic: a row is read once and written once, the least that is possible.
#include "common.cuh"

constexpr index_t REDUCTION_BYTES = 2 * WARP * sizeof(float);

// rows, output: [num_rows, size]. A row that has only -inf becomes zeros. N: numbers in a pack; size is a multiple.
template <class T, int N>
__global__ void __launch_bounds__(1024)
softmax_fused_kernel(const T* __restrict__ rows, T* __restrict__ output, index_t size) {
    DYNAMIC_SHARED(float, row);
    const T* input = rows + blockIdx.x * size;
    T* result = output + blockIdx.x * size;
    const int first = threadIdx.x * N, step = blockDim.x * N;
    float maximum = LOWEST;
    for (int i = first; i < size; i += step) {
        const Pack<T, N> pack = load_pack<N>(input + i);
        Pack<float, N> numbers;
        for (int j = 0; j < N; j++) {
            numbers.values[j] = to_float(pack.values[j]);
            maximum = fmaxf(maximum, numbers.values[j]);
        }
        store_pack(row + i, numbers);
    }
    maximum = block_reduce(maximum, LOWEST, Max());
    float sum = 0.f;
    for (int i = first; i < size; i += step) {
        Pack<float, N> numbers = load_pack<N>(row + i);
        for (int j = 0; j < N; j++) {
            numbers.values[j] = __expf(numbers.values[j] - maximum);
            sum += numbers.values[j];
        }
        store_pack(row + i, numbers);
    }
    sum = block_reduce(sum, 0.f, Add());
    const float factor = sum == 0.f ? 0.f : 1.f / sum;
    for (int i = first; i < size; i += step) {
        const Pack<float, N> numbers = load_pack<N>(row + i);
        Pack<T, N> pack;
        for (int j = 0; j < N; j++) pack.values[j] = from_float<T>(numbers.values[j] * factor);
        store_pack(result + i, pack);
    }
}

template <class T, int N>
int launch_softmax_fused(const void* rows, void* output, index_t num_rows, index_t size, void* stream) {
    const index_t shared_bytes = size * sizeof(float);
    if (shared_bytes + REDUCTION_BYTES > MAX_SHARED_BYTES) return UNSUPPORTED;
    cudaFuncSetAttribute(softmax_fused_kernel<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    LAUNCH((softmax_fused_kernel<T, N>), (unsigned)num_rows, num_threads_for(size / N, 1024), shared_bytes, stream)
    ((const T*)rows, (T*)output, size);
    return cudaGetLastError();
}

extern "C" int softmax_fused(const void* rows, void* output, int dtype, index_t num_rows, index_t size, void* stream) {
    if (num_rows == 0) return cudaSuccess;
    return dispatch_float(dtype, [=](auto tag) {
        typedef decltype(tag) T;
        constexpr int N = 16 / sizeof(T);
        const bool aligned = is_aligned(size * sizeof(T), rows, output);
        const auto launch = aligned ? launch_softmax_fused<T, N> : launch_softmax_fused<T, 1>;
        return launch(rows, output, num_rows, size, stream);
    });
}
