// Paged attention for decode: one new query per sequence, over a context that lies in blocks of the KV cache
// (PagedAttention, Kwon et al., 2023). The simple rung: one block of 4 warps per sequence and KV head.
//
// Decode is bound by memory: a number of the cache is read once, for one multiply-add per query head. So a kernel is as
// fast as it reads the cache, and two things matter: that the query heads of a group share what is read, and that many
// loads are on their way at once. A team of head_dim / 8 neighboring lanes reads one key, in pieces of up to 16 bytes
// that lie side by side; a warp has 4 teams for 64 dimensions, 2 for 128. Every lane keeps 8 dimensions of the output
// in registers for each head of the group. Scores are summed over a team by shuffles.
//
// Shared memory: the queries of the group as floats (1 KiB per head), and the states of the warps when they are merged
// at the end (5 KiB).
// Reads num_seqs * context_len * 2 * num_kv_heads * head_dim numbers of the cache, and the queries; writes the output.
// Where it loses: a few long sequences make a few blocks, and most multiprocessors idle. See split_kv.cu.
#include "paged_decode.cuh"

// Grid: groups of query heads x sequences. C: the type of the cache.
template <class C, int HEADS>
__global__ void __launch_bounds__(DECODE_WARPS* WARP, resident_blocks(HEADS))
    paged_decode_kernel(const PagedBatch batch) {
    const int seq = blockIdx.y;
    if (!batch.is_decode(seq)) return;
    const HeadSplit split(batch.group_size);
    const int first_head = split.first_head(batch.group_size, blockIdx.x);
    const int num_heads = split.num_heads(batch.group_size, blockIdx.x);
    const auto store = [&](int head, int first_dim, const AttentionState& state) {
        const index_t offset = batch.query_offset(batch.query_start_loc[seq], first_head + head) + first_dim;
        for (int i = 0; i < VECTOR_SIZE; i++)
            write_number(batch.output, batch.dtype, offset + i, state.output[i] / state.sum);
    };
    attend_to_keys<C, HEADS>(batch, seq, first_head, num_heads, 0, batch.context_lens[seq], store);
}

template <class C, int HEADS> int launch_paged_decode(const PagedBatch& batch, void* stream) {
    const dim3 grid(batch.num_kv_heads * HeadSplit(batch.group_size).blocks_per_group, batch.num_seqs);
    LAUNCH((paged_decode_kernel<C, HEADS>), grid, DECODE_WARPS * WARP, 0, stream)(batch);
    return cudaGetLastError();
}

extern "C" int paged_decode(const void* query, const void* kv_cache, const void* block_tables,
                            const void* query_start_loc, const void* context_lens, void* output, int dtype,
                            int cache_dtype, index_t num_seqs, index_t num_heads, index_t num_kv_heads,
                            index_t head_dim, index_t block_size, index_t table_stride, float scale, void* stream) {
    const PagedBatch batch = paged_batch(query, kv_cache, block_tables, query_start_loc, context_lens, output, dtype,
                                         num_seqs, num_heads, num_kv_heads, head_dim, block_size, table_stride, scale);
    return dispatch_decode(batch, cache_dtype, [&](auto stored, auto heads) {
        return launch_paged_decode<decltype(stored), heads.value>(batch, stream);
    });
}
