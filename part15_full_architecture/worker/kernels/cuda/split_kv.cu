// Paged attention for decode with the context split over several blocks (Flash-Decoding, Dao et al., 2023).
//
// paged_decode.cu has one block per sequence and KV head: 8 for a single sequence of a model with 8 KV heads, while the
// other 124 multiprocessors of an H100 idle. Here each context is cut into parts, and each part has a block of its own,
// which works like one of paged_decode.cu. It leaves two results in a workspace: the attention over its part alone, and
// the log of the sum of exp(scores), with which a second kernel weighs the parts and adds them up.
//
// The host chooses the number of parts from sizes that it knows: context_lens is on the device, and reading it would
// wait for the device. The kernel divides the length that it finds; parts that are left without keys are empty.
// Reads what paged_decode.cu reads, and writes num_parts * num_heads * (head_dim + 1) floats per sequence, which the
// second kernel reads: with parts of 128 keys or more, a few percent of the bytes.
#include "paged_decode.cuh"

constexpr int MERGE_WARPS = 4;

// outputs: [num_parts, num_rows, head_dim]; log_sums: [num_parts, num_rows]: -infinity for an empty part, whose output
// does not count.
struct Parts {
    float *outputs, *log_sums;
    int num_parts, min_part_len, head_dim;
    index_t num_rows;

    __device__ index_t index(int part, index_t row) const { return part * num_rows + row; }
};

// Grid: groups of query heads x sequences x parts. Row seq * num_heads + head of the workspace is a query head.
template <class C, int HEADS>
__global__ void __launch_bounds__(DECODE_WARPS* WARP, resident_blocks(HEADS))
    attend_to_part_kernel(const PagedBatch batch, const Parts parts) {
    const int seq = blockIdx.y, part = blockIdx.z;
    if (!batch.is_decode(seq)) return;
    const HeadSplit split(batch.group_size);
    const int first_head = split.first_head(batch.group_size, blockIdx.x);
    const int num_heads = split.num_heads(batch.group_size, blockIdx.x);
    const index_t first_row = parts.index(part, (index_t)seq * batch.num_heads + first_head);

    const int context_len = batch.context_lens[seq];
    const int part_len = max(parts.min_part_len, (int)ceil_div(context_len, parts.num_parts));
    const int first_key = min(part * part_len, context_len), last_key = min(first_key + part_len, context_len);
    if (first_key == last_key) {
        if ((int)threadIdx.x < num_heads) parts.log_sums[first_row + threadIdx.x] = -INFINITY;
        return;
    }
    const auto store = [&](int head, int first_dim, const AttentionState& state) {
        float* output = parts.outputs + (first_row + head) * parts.head_dim + first_dim;
        for (int i = 0; i < VECTOR_SIZE; i++) output[i] = state.output[i] / state.sum;
        if (first_dim == 0) parts.log_sums[first_row + head] = state.maximum + logf(state.sum);
    };
    attend_to_keys<C, HEADS>(batch, seq, first_head, num_heads, first_key, last_key, store);
}

// One warp merges the parts of one row, and calls store(dim, number). Returns the log of the sum over all parts.
template <class Store> __device__ float merge_parts(const Parts& parts, index_t row, Store store) {
    const int lane = threadIdx.x % WARP;
    const auto log_sum = [&](int part) { return parts.log_sums[parts.index(part, row)]; };
    // exercise: merge_parts
    float maximum = -INFINITY, sum = 0.f;
    for (int part = lane; part < parts.num_parts; part += WARP) maximum = fmaxf(maximum, log_sum(part));
    maximum = warp_reduce(maximum, Max());
    for (int part = lane; part < parts.num_parts; part += WARP) sum += exp_below(log_sum(part), maximum);
    sum = warp_reduce(sum, Add());
    const float total = sum == 0.f ? -INFINITY : maximum + logf(sum);
    for (int dim = lane; dim < parts.head_dim; dim += WARP) {
        float merged = 0.f;
        for (int part = 0; part < parts.num_parts; part++) {
            const float weight = exp_below(log_sum(part), total);
            if (weight != 0.f) merged += weight * parts.outputs[parts.index(part, row) * parts.head_dim + dim];
        }
        store(dim, merged);
    }
    return total;
    // exercise: end
}

__device__ __forceinline__ index_t row_of_warp() { return blockIdx.x * (index_t)MERGE_WARPS + threadIdx.x / WARP; }

__global__ void __launch_bounds__(MERGE_WARPS* WARP) merge_decode_kernel(const PagedBatch batch, const Parts parts) {
    const index_t row = row_of_warp();
    if (row >= parts.num_rows) return;
    const int seq = (int)(row / batch.num_heads), head = (int)(row % batch.num_heads);
    if (!batch.is_decode(seq)) return;
    const index_t offset = batch.query_offset(batch.query_start_loc[seq], head);
    const auto store = [&](int dim, float number) { write_number(batch.output, batch.dtype, offset + dim, number); };
    merge_parts(parts, row, store);
}

__global__ void __launch_bounds__(MERGE_WARPS* WARP)
    merge_states_kernel(const Parts parts, float* output, float* total) {
    const index_t row = row_of_warp();
    if (row >= parts.num_rows) return;
    const auto store = [&](int dim, float number) { output[row * parts.head_dim + dim] = number; };
    const float log_sum = merge_parts(parts, row, store);
    if (threadIdx.x % WARP == 0) total[row] = log_sum;
}

inline unsigned merge_grid(const Parts& parts) { return (unsigned)ceil_div(parts.num_rows, MERGE_WARPS); }

template <class C, int HEADS> int launch_split_kv(const PagedBatch& batch, const Parts& parts, void* stream) {
    const dim3 grid(batch.num_kv_heads * HeadSplit(batch.group_size).blocks_per_group, batch.num_seqs, parts.num_parts);
    LAUNCH((attend_to_part_kernel<C, HEADS>), grid, DECODE_WARPS * WARP, 0, stream)(batch, parts);
    LAUNCH(merge_decode_kernel, merge_grid(parts), MERGE_WARPS * WARP, 0, stream)(batch, parts);
    return cudaGetLastError();
}

extern "C" int split_kv(const void* query, const void* kv_cache, const void* block_tables, const void* query_start_loc,
                        const void* context_lens, void* output, void* outputs, void* log_sums, int dtype,
                        int cache_dtype, index_t num_seqs, index_t num_heads, index_t num_kv_heads, index_t head_dim,
                        index_t block_size, index_t table_stride, index_t num_parts, index_t min_part_len, float scale,
                        void* stream) {
    const PagedBatch batch = paged_batch(query, kv_cache, block_tables, query_start_loc, context_lens, output, dtype,
                                         num_seqs, num_heads, num_kv_heads, head_dim, block_size, table_stride, scale);
    const Parts parts = {(float*)outputs,   (float*)log_sums, (int)num_parts,
                         (int)min_part_len, (int)head_dim,    num_seqs * num_heads};
    return dispatch_decode(batch, cache_dtype, [&](auto stored, auto heads) {
        return launch_split_kv<decltype(stored), heads.value>(batch, parts, stream);
    });
}

// outputs: [num_parts, num_rows, head_dim]; log_sums: [num_parts, num_rows]; output: [num_rows, head_dim];
// total: [num_rows].
extern "C" int merge_states(void* outputs, void* log_sums, void* output, void* total, index_t num_parts,
                            index_t num_rows, index_t head_dim, void* stream) {
    const Parts parts = {(float*)outputs, (float*)log_sums, (int)num_parts, 0, (int)head_dim, num_rows};
    LAUNCH(merge_states_kernel, merge_grid(parts), MERGE_WARPS * WARP, 0, stream)(parts, (float*)output, (float*)total);
    return cudaGetLastError();
}
