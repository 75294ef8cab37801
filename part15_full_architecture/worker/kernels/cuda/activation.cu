// SiLU and multiplication, the middle of a gated feed-forward network (SwiGLU: Shazeer, 2020).
//
// A thread computes a pack of neighbors: it reads 16 bytes of gates and 16 bytes of ups, and writes 16 bytes. A
// block has up to 256 threads, which work on one row; a long row gets several blocks. No shared memory.
// Memory traffic: gates and ups are read once, the result is written once.
#include "common.cuh"

// gate_up: [num_rows, 2 * size], gates then ups; output: [num_rows, size]. N: numbers in a pack; size is a multiple.
template <class T, int N>
__global__ void silu_and_mul_kernel(const T* __restrict__ gate_up, T* __restrict__ output, index_t size,
                                    unsigned blocks_per_row) {
    const index_t row = blockIdx.x / blocks_per_row;  // of 32-bit numbers: a 64-bit division takes far longer
    const index_t column = (blockIdx.x % blocks_per_row * (index_t)blockDim.x + threadIdx.x) * N;
    if (column >= size) return;
    const T* gates = gate_up + row * 2 * size + column;
    const Pack<T, N> gate = load_pack<N>(gates), up = load_pack<N>(gates + size);
    Pack<T, N> result;
    for (int i = 0; i < N; i++) {
        const float x = to_float(gate.values[i]);
        result.values[i] = from_float<T>(x / (1.f + __expf(-x)) * to_float(up.values[i]));
    }
    store_pack(output + row * size + column, result);
}

template <class T, int N>
int launch_silu_and_mul(const void* gate_up, void* output, index_t num_rows, index_t size, void* stream) {
    const unsigned threads = num_threads_for(size / N, 256);
    const index_t blocks_per_row = ceil_div(size / N, threads);
    LAUNCH((silu_and_mul_kernel<T, N>), (unsigned)(num_rows * blocks_per_row), threads, 0, stream)
    ((const T*)gate_up, (T*)output, size, (unsigned)blocks_per_row);
    return cudaGetLastError();
}

extern "C" int silu_and_mul(const void* gate_up, void* output, int dtype, index_t num_rows, index_t size,
                            void* stream) {
    if (num_rows == 0) return cudaSuccess;
    return dispatch_float(dtype, [=](auto tag) {
        typedef decltype(tag) T;
        constexpr int N = 16 / sizeof(T);
        const bool aligned = is_aligned(size * sizeof(T), gate_up, output);
        const auto launch = aligned ? launch_silu_and_mul<T, N> : launch_silu_and_mul<T, 1>;
        return launch(gate_up, output, num_rows, size, stream);
    });
}
