// Rotary position embedding (RoPE: Su et al., 2021) of queries and keys, and the write to the KV cache: between the
// projection of a layer and its attention, this is all that happens, in one kernel.
//
//   first' = first · cos - second · sin;  second' = second · cos + first · sin
//
// where first is dimension i of a head and second is dimension i + head_dim / 2. All heads of a token turn by the same
// angles. One block per token, up to 256 threads. The block first copies the token's cosines and sines to shared
// memory. Then a thread rotates packs of queries: 16 bytes from the first half of a head, and 16 from the second. The
// same with keys, which go to the token's slot of the cache, and last the values, which are only copied. A cache of
// codes has a scale for the keys and one for the values of each KV head: code = round(number / scale).
//
// Shared memory: head_dim floats. Memory traffic: queries, keys and values are read once and written once, the angles
// of a token are read once.
#include <type_traits>

#include "common.cuh"

// T: dtype of the numbers, C: dtype of the cache, the same or codes.
template <class T, class C> struct Tokens {
    const T *query, *key, *value;  // [num_tokens, num_heads or num_kv_heads, head_dim]; a token's heads are neighbors
    index_t query_stride, key_stride, value_stride;  // from a token to the next
    const index_t *positions, *slots;                // [num_tokens]; a token with slot -1 is not stored
    const void* table;                               // [max_positions, head_dim]: cosines, then sines
    bool table_is_float;                             // else the table is of T
    const float* scales;                             // [2, num_kv_heads], of keys and values, if C is for codes
    T* rotated_query;                                // [num_tokens, num_heads, head_dim]
    C* kv_cache;                                     // [num_slots, 2, num_kv_heads, head_dim]
    int num_heads, num_kv_heads, head_dim;
};

template <class T, int N>
__device__ void rotate(Pack<T, N>& first, Pack<T, N>& second, const Pack<float, N>& cos, const Pack<float, N>& sin) {
    for (int j = 0; j < N; j++) {
        const float a = to_float(first.values[j]), b = to_float(second.values[j]);
        first.values[j] = from_float<T>(a * cos.values[j] - b * sin.values[j]);
        second.values[j] = from_float<T>(b * cos.values[j] + a * sin.values[j]);
    }
}

// Converts numbers to codes if C is for codes. scale: where their scale is, which only codes have.
template <class C, class T, int N>
__device__ void store_numbers(C* to, const Pack<T, N>& pack, const float* scales, int scale) {
    if constexpr (std::is_same<C, T>::value) {
        store_pack(to, pack);
    } else {
        Pack<C, N> codes;
        for (int j = 0; j < N; j++) codes.values[j] = from_float<C>(to_float(pack.values[j]) / scales[scale]);
        store_pack(to, codes);
    }
}

// N: numbers in a pack; head_dim / 2 is a multiple.
template <class T, class C, int N>
__global__ void __launch_bounds__(256) rotate_and_store_kernel(Tokens<T, C> tokens) {
    DYNAMIC_SHARED(float, cos);
    const index_t token = blockIdx.x, slot = tokens.slots[token];
    const int head_dim = tokens.head_dim, half = head_dim / 2, packs_per_half = half / N;
    const index_t angles = tokens.positions[token] * head_dim;
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        cos[i] = tokens.table_is_float ? ((const float*)tokens.table)[angles + i]
                                       : to_float(((const T*)tokens.table)[angles + i]);
    }
    const float* sin = cos + half;
    __syncthreads();

    const T* query = tokens.query + token * tokens.query_stride;
    T* rotated_query = tokens.rotated_query + token * tokens.num_heads * head_dim;
    for (int item = threadIdx.x; item < tokens.num_heads * packs_per_half; item += blockDim.x) {
        const int head = item / packs_per_half, i = item % packs_per_half * N, at = head * head_dim + i;
        Pack<T, N> first = load_pack<N>(query + at), second = load_pack<N>(query + at + half);
        rotate(first, second, load_pack<N>(cos + i), load_pack<N>(sin + i));
        store_pack(rotated_query + at, first);
        store_pack(rotated_query + at + half, second);
    }
    if (slot < 0) return;

    const int kv_size = tokens.num_kv_heads * head_dim;
    C* stored_key = tokens.kv_cache + slot * 2 * kv_size;
    const T* key = tokens.key + token * tokens.key_stride;
    for (int item = threadIdx.x; item < tokens.num_kv_heads * packs_per_half; item += blockDim.x) {
        const int head = item / packs_per_half, i = item % packs_per_half * N, at = head * head_dim + i;
        Pack<T, N> first = load_pack<N>(key + at), second = load_pack<N>(key + at + half);
        rotate(first, second, load_pack<N>(cos + i), load_pack<N>(sin + i));
        store_numbers(stored_key + at, first, tokens.scales, head);
        store_numbers(stored_key + at + half, second, tokens.scales, head);
    }

    C* stored_value = stored_key + kv_size;
    const T* value = tokens.value + token * tokens.value_stride;
    for (int at = threadIdx.x * N; at < kv_size; at += blockDim.x * N) {
        const int head = at / head_dim;
        store_numbers(stored_value + at, load_pack<N>(value + at), tokens.scales, tokens.num_kv_heads + head);
    }
}

template <class T, class C, int N>
int launch_rotate_and_store(const Tokens<T, C>& tokens, index_t num_tokens, void* stream) {
    const unsigned threads = num_threads_for(tokens.num_heads * (tokens.head_dim / 2 / N), 256);
    const size_t shared_bytes = tokens.head_dim * sizeof(float);
    LAUNCH((rotate_and_store_kernel<T, C, N>), (unsigned)num_tokens, threads, shared_bytes, stream)(tokens);
    return cudaGetLastError();
}

extern "C" int rotate_and_store(const void* query, const void* key, const void* value, const void* positions,
                                const void* table, void* kv_cache, const void* slot_mapping, const void* scales,
                                void* rotated_query, int dtype, int cache_dtype, int table_dtype, index_t num_tokens,
                                index_t num_heads, index_t num_kv_heads, index_t head_dim, index_t query_stride,
                                index_t key_stride, index_t value_stride, void* stream) {
    if (num_tokens == 0) return cudaSuccess;
    return dispatch_float(dtype, [=](auto number) {
        typedef decltype(number) T;
        return dispatch_cache<T>(cache_dtype, [=](auto stored) {
            typedef decltype(stored) C;
            const Tokens<T, C> tokens = {
                (const T*)query, (const T*)key, (const T*)value, query_stride, key_stride, value_stride,
                (const index_t*)positions, (const index_t*)slot_mapping, table, table_dtype == FLOAT32,
                (const float*)scales, (T*)rotated_query, (C*)kv_cache, (int)num_heads, (int)num_kv_heads, (int)head_dim,
            };
            constexpr int N = 16 / sizeof(T);
            constexpr index_t bytes = sizeof(T);
            const bool aligned = is_aligned(head_dim / 2 * bytes, query, key, value, kv_cache, rotated_query) &&
                                 is_aligned(query_stride * bytes) && is_aligned(key_stride * bytes) &&
                                 is_aligned(value_stride * bytes);
            const auto launch = aligned ? launch_rotate_and_store<T, C, N> : launch_rotate_and_store<T, C, 1>;
            return launch(tokens, num_tokens, stream);
        });
    });
}
