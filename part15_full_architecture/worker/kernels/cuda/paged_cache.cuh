// What all attention kernels share: a batch and its KV cache, as they see them; and the tile of queries that a block of
// a prefill kernel works on.
#pragma once
#include <type_traits>

#include "common.cuh"

constexpr int VECTOR_SIZE = 8;  // neighboring numbers of a key or value that a thread reads at once

// Read and write an array of a dtype that is known only when the kernel runs. Queries and outputs are read and written
// once, so a branch costs nothing there; with a template, there would be three times as many kernels to compile.
__device__ __forceinline__ float read_number(const void* numbers, int dtype, index_t i) {
    if (dtype == FLOAT16) return to_float(static_cast<const half_t*>(numbers)[i]);
    if (dtype == BFLOAT16) return to_float(static_cast<const bfloat_t*>(numbers)[i]);
    return static_cast<const float*>(numbers)[i];
}
__device__ __forceinline__ void write_number(void* numbers, int dtype, index_t i, float number) {
    if (dtype == FLOAT16) static_cast<half_t*>(numbers)[i] = from_float<half_t>(number);
    else if (dtype == BFLOAT16) static_cast<bfloat_t*>(numbers)[i] = from_float<bfloat_t>(number);
    else static_cast<float*>(numbers)[i] = number;
}

// VECTOR_SIZE numbers as the cache has them: read with one or two loads of up to 16 bytes.
template <class C> struct CacheVector {
    static constexpr int N = VECTOR_SIZE * sizeof(C) > 16 ? 16 / sizeof(C) : VECTOR_SIZE;
    Pack<C, N> packs[VECTOR_SIZE / N];

    __device__ __forceinline__ void load(const C* from) {
        for (int i = 0; i < VECTOR_SIZE / N; i++) packs[i] = load_pack<N>(from + i * N);
    }
    __device__ __forceinline__ void convert(float (&to)[VECTOR_SIZE]) const {
        for (int i = 0; i < VECTOR_SIZE; i++) to[i] = to_float(packs[i / N].values[i % N]);
    }
    // As 16-bit numbers, for tensor cores. Codes of the cache are exact in both 16-bit types.
    template <class T> __device__ __forceinline__ Pack<T, VECTOR_SIZE> convert() const {
        if constexpr (std::is_same<T, C>::value) return packs[0];
        float numbers[VECTOR_SIZE];
        convert(numbers);
        Pack<T, VECTOR_SIZE> converted;
        for (int i = 0; i < VECTOR_SIZE; i++) converted.values[i] = from_float<T>(numbers[i]);
        return converted;
    }
};

// The arguments of reference.py::paged_attention. Query heads that share a KV head are a group of neighbors.
struct PagedBatch {
    const void* query;           // [num_tokens, num_heads, head_dim], of dtype
    const void* kv_cache;        // [num_blocks, block_size, 2, num_kv_heads, head_dim], keys at 0 and values at 1
    const int* block_tables;     // [num_seqs, …], rows table_stride apart; entries past a context's end may be anything
    const int* query_start_loc;  // [num_seqs + 1]
    const int* context_lens;     // [num_seqs]
    void* output;                // as query
    int dtype;
    int num_seqs, num_heads, num_kv_heads, group_size, head_dim;
    int block_bits;  // block_size is 2^block_bits: a shift and a mask take the place of slow divisions
    index_t table_stride;
    float scale;

    __device__ int query_len(int seq) const { return query_start_loc[seq + 1] - query_start_loc[seq]; }

    // The decode kernels take the sequences with one query, the prefill kernels those with more. A step that is padded
    // for a CUDA graph has further sequences: in a step of decodes, each has one query and a context of one token, in
    // the null block; in a mixed step they have no queries and no context, and there is nothing to compute.
    __device__ bool is_decode(int seq) const { return query_len(seq) == 1 && context_lens[seq] > 0; }
    __device__ bool is_prefill(int seq) const { return query_len(seq) > 1; }

    // Where a head's numbers begin in query and output.
    __device__ index_t query_offset(index_t token, int head) const { return (token * num_heads + head) * head_dim; }

    // Where the key at a position of a sequence begins in the cache, found through the block table. Its value is
    // value_offset() numbers further.
    __device__ index_t key_offset(int seq, int position, int kv_head) const {
        const index_t block = block_tables[seq * table_stride + (position >> block_bits)];
        const index_t slot = (block << block_bits) + (position & ((1 << block_bits) - 1));
        return (slot * 2 * num_kv_heads + kv_head) * head_dim;
    }
    template <class C> __device__ const C* key(int seq, int position, int kv_head) const {
        return static_cast<const C*>(kv_cache) + key_offset(seq, position, kv_head);
    }
    __device__ int value_offset() const { return num_kv_heads * head_dim; }
};

inline PagedBatch paged_batch(const void* query, const void* kv_cache, const void* block_tables,
                              const void* query_start_loc, const void* context_lens, void* output, int dtype,
                              index_t num_seqs, index_t num_heads, index_t num_kv_heads, index_t head_dim,
                              index_t block_size, index_t table_stride, float scale) {
    int block_bits = 0;
    while ((index_t)1 << block_bits < block_size) block_bits++;
    return {query, kv_cache, (const int*)block_tables, (const int*)query_start_loc, (const int*)context_lens, output,
            dtype, (int)num_seqs, (int)num_heads, (int)num_kv_heads, (int)(num_heads / num_kv_heads), (int)head_dim,
            block_bits, table_stride, scale};
}

// The work of a block of a prefill kernel: TILE_ROWS rows of one sequence and KV head. A row is one query head of one
// token. The heads of a group are neighboring rows: so they share the keys that the block reads, and a chunk of a few
// tokens still fills a tile. The last tile of a sequence may have fewer rows.
struct QueryTile {
    int seq, kv_head;
    int first_row, num_rows;  // num_rows: 0 if there is nothing to do
    int query_start;          // the sequence's first query
    int num_past;             // tokens of the context before it
    int num_keys;             // keys that the last row sees: the causal limit of the tile

    // How many keys a row sees: those of all tokens up to its own.
    __device__ int num_visible(const PagedBatch& batch, int row) const {
        // exercise: num_visible
        return num_past + (first_row + row) / batch.group_size + 1;
        // exercise: end
    }
    // Where a row's numbers begin in query and output.
    __device__ index_t offset(const PagedBatch& batch, int row) const {
        const int token = (first_row + row) / batch.group_size, head = (first_row + row) % batch.group_size;
        return batch.query_offset((index_t)query_start + token, kv_head * batch.group_size + head);
    }
};

// The grid is tiles x KV heads x sequences, with as many tiles as the longest sequence needs: for shorter ones, some
// blocks have nothing to do. The last tiles of a sequence see the most keys: they come first, so that a GPU does not
// end with a few long blocks while the other multiprocessors idle.
template <int TILE_ROWS> __device__ QueryTile query_tile(const PagedBatch& batch) {
    const int tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y, seq = blockIdx.z;
    const int query_len = batch.query_len(seq), first_row = tile * TILE_ROWS;
    const int num_rows = batch.is_prefill(seq) ? min(TILE_ROWS, query_len * batch.group_size - first_row) : 0;
    const int query_start = batch.query_start_loc[seq], num_past = batch.context_lens[seq] - query_len;
    QueryTile found = {seq, kv_head, first_row, max(num_rows, 0), query_start, num_past, 0};
    if (found.num_rows > 0) found.num_keys = found.num_visible(batch, found.num_rows - 1);
    return found;
}

inline dim3 prefill_grid(const PagedBatch& batch, index_t max_query_len, int tile_rows) {
    return dim3((unsigned)ceil_div(max_query_len * batch.group_size, tile_rows), batch.num_kv_heads, batch.num_seqs);
}
