// Softmax, fourth rung: maximum and sum in one pass, for rows of any length (online softmax: Milakov and Gimelshein,
// 2018). The same trick lets FlashAttention compute a softmax whose row never exists as a whole.
//
// The sum so far belongs to the maximum so far. When a number beats the maximum, the sum is rescaled:
//
//   new_maximum = max(maximum, x);  sum = sum · exp(maximum - new_maximum) + exp(x - new_maximum)
//
// One block per row, with a thread for each pack of 16 bytes, up to 1024 threads. Each thread keeps a maximum and a sum
// for its part of the row. Two such states merge by the same rule, so the lanes of a warp merge theirs by shuffles, and
// the warps through shared memory. Then the block reads the row again and writes the result.
//
// Shared memory: one state per warp, 256 bytes. Memory traffic: a row is read twice and written once.
#include "common.cuh"

// What is known of a part of a row: its maximum, and the sum of exp(x - maximum).
struct SoftmaxState {
    float maximum, sum;
};

// What is known of two parts together. No exponential may overflow.
__device__ SoftmaxState merge(SoftmaxState a, SoftmaxState b) {
    // exercise: merge
    const float maximum = fmaxf(a.maximum, b.maximum);
    return {maximum, a.sum * __expf(a.maximum - maximum) + b.sum * __expf(b.maximum - maximum)};
    // exercise: end
}

// The result reaches every lane.
__device__ SoftmaxState merge_warp(SoftmaxState state) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const float maximum = __shfl_xor_sync(ALL_LANES, state.maximum, offset);
        const float sum = __shfl_xor_sync(ALL_LANES, state.sum, offset);
        state = merge(state, {maximum, sum});
    }
    return state;
}

// Merges the states of all threads of the block; the result reaches every thread. The block has whole warps, at most 32.
// A kernel may call this only once: unlike block_reduce, it doesn't wait until an earlier call has been read.
__device__ SoftmaxState merge_block(SoftmaxState state) {
    __shared__ SoftmaxState of_warp[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, num_warps = blockDim.x / WARP;
    // exercise: merge_block
    state = merge_warp(state);
    if (lane == 0) of_warp[warp] = state;
    __syncthreads();
    return merge_warp(lane < num_warps ? of_warp[lane] : SoftmaxState{LOWEST, 0.f});
    // exercise: end
}

// rows, output: [num_rows, size]. A row that has only -inf becomes zeros. N: numbers in a pack; size is a multiple.
template <class T, int N>
__global__ void __launch_bounds__(1024)
softmax_online_kernel(const T* __restrict__ rows, T* __restrict__ output, index_t size) {
    const T* input = rows + blockIdx.x * size;
    T* result = output + blockIdx.x * size;
    const index_t first = threadIdx.x * N, step = blockDim.x * N;
    SoftmaxState state = {LOWEST, 0.f};
    for (index_t i = first; i < size; i += step) {
        const Pack<T, N> pack = load_pack<N>(input + i);
        SoftmaxState next = {LOWEST, 0.f};  // of this pack: the sum so far is rescaled once per pack, not per number
        for (int j = 0; j < N; j++) next.maximum = fmaxf(next.maximum, to_float(pack.values[j]));
        for (int j = 0; j < N; j++) next.sum += __expf(to_float(pack.values[j]) - next.maximum);
        state = merge(state, next);
    }
    state = merge_block(state);
    const float factor = state.sum == 0.f ? 0.f : 1.f / state.sum;
    for (index_t i = first; i < size; i += step) {
        Pack<T, N> pack = load_pack<N>(input + i);
        for (int j = 0; j < N; j++) {
            pack.values[j] = from_float<T>(__expf(to_float(pack.values[j]) - state.maximum) * factor);
        }
        store_pack(result + i, pack);
    }
}

template <class T, int N>
int launch_softmax_online(const void* rows, void* output, index_t num_rows, index_t size, void* stream) {
    LAUNCH((softmax_online_kernel<T, N>), (unsigned)num_rows, num_threads_for(size / N, 1024), 0, stream)
    ((const T*)rows, (T*)output, size);
    return cudaGetLastError();
}

extern "C" int softmax_online(const void* rows, void* output, int dtype, index_t num_rows, index_t size, void* stream) {
    if (num_rows == 0) return cudaSuccess;
    return dispatch_float(dtype, [=](auto tag) {
        typedef decltype(tag) T;
        constexpr int N = 16 / sizeof(T);
        const bool aligned = is_aligned(size * sizeof(T), rows, output);
        const auto launch = aligned ? launch_softmax_online<T, N> : launch_softmax_online<T, 1>;
        return launch(rows, output, num_rows, size, stream);
    });
}
