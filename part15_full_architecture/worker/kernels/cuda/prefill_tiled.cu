// Paged attention for prefill: sequences with several new tokens at the end of their context, each of which sees all
// tokens up to itself. Sequences lie end to end, as FlashAttention-2's varlen kernels take them (Dao, 2023). No tensor
// cores here: this kernel works on every GPU and for every dtype, with sums in float32 throughout.
//
// With n queries that see m keys each, attention is 4 n m head_dim operations on (n + m) head_dim numbers: it is bound
// by arithmetic, as long as the keys are not read again for each query. So a block takes a tile of 32 queries, and
// walks over the context in tiles of 32 keys that it holds in shared memory, where all of its queries use them. The
// scores of a tile exist only in the block: they are never written to memory (FlashAttention, Dao et al., 2022).
//
// A block has 4 warps with 8 rows each; a row is a query head of a token. In the products with keys, a lane computes
// the scores of one key; in the sums of values, it computes the dimensions lane, lane + 32, and so on of the output, in
// registers.
//
// Shared memory for head_dim d, all floats: the queries (32 x (d + 4)), one tile of keys, and later of values, in the
// same place (32 x (d + 4)), and the weights (32 x 32): 37 KiB for 128 dimensions, and 69 KiB for 256, which is more
// than the 64 KiB of compute capability 7.5. Rows are padded by 16 bytes: without, lanes that read the same columns of
// neighboring rows would all hit the same bank.
// Reads the context's keys and values once per tile of queries, most of them from the L2 cache.
#include "paged_cache.cuh"

constexpr int TILE_ROWS = 32, TILE_KEYS = 32, WARPS = 4, WARP_ROWS = TILE_ROWS / WARPS;

template <int HEAD_DIM> struct SharedTiles {
    float queries[TILE_ROWS][HEAD_DIM + 4];
    float tokens[TILE_KEYS][HEAD_DIM + 4];  // keys, then values
    float weights[TILE_ROWS][TILE_KEYS];
};

__device__ __forceinline__ float4 read_four(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Rows that don't exist become copies of the last one; nothing is stored for them.
template <int HEAD_DIM>
__device__ void load_queries(SharedTiles<HEAD_DIM>& tiles, const PagedBatch& batch, const QueryTile& tile) {
    for (int i = threadIdx.x; i < TILE_ROWS * HEAD_DIM; i += WARPS * WARP) {
        const int row = i / HEAD_DIM, dim = i % HEAD_DIM;
        const index_t offset = tile.offset(batch, min(row, tile.num_rows - 1)) + dim;
        tiles.queries[row][dim] = read_number(batch.query, batch.dtype, offset) * batch.scale;
    }
}

// The keys (offset 0) or values (offset batch.value_offset()) of TILE_KEYS tokens. Past the causal limit, the last
// token is read again: later slots may not have been written yet, and what they hold may be NaN, which is NaN times any
// weight.
template <class C, int HEAD_DIM>
__device__ void load_tokens(SharedTiles<HEAD_DIM>& tiles, const PagedBatch& batch, const QueryTile& tile, int first_key,
                            int offset) {
    constexpr int VECTORS = HEAD_DIM / VECTOR_SIZE;  // of a token
    for (int i = threadIdx.x; i < TILE_KEYS * VECTORS; i += WARPS * WARP) {
        const int token = i / VECTORS, dim = i % VECTORS * VECTOR_SIZE;
        const int position = min(first_key + token, tile.num_keys - 1);
        float numbers[VECTOR_SIZE];
        CacheVector<C> stored;
        stored.load(batch.key<C>(tile.seq, position, tile.kv_head) + offset + dim);
        stored.convert(numbers);
        for (int j = 0; j < VECTOR_SIZE; j++) tiles.tokens[token][dim + j] = numbers[j];
    }
}

// The state of an online softmax for each row of a warp, spread over its lanes: each has the sum of the weights of its own
// keys, and the dimensions of the output that are its own.
template <int HEAD_DIM> struct RowStates {
    static constexpr int LANE_DIMS = HEAD_DIM / WARP;
    float maximum[WARP_ROWS], sum[WARP_ROWS], output[WARP_ROWS][LANE_DIMS];
};

// The scores of a lane's key, one for each row of the warp.
template <int HEAD_DIM>
__device__ __forceinline__ void multiply_keys(const SharedTiles<HEAD_DIM>& tiles, int first_row,
                                              float (&scores)[WARP_ROWS]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll 4
    for (int dim = 0; dim < HEAD_DIM; dim += 4) {
        const float4 key = read_four(&tiles.tokens[lane][dim]);
        for (int r = 0; r < WARP_ROWS; r++) {
            const float4 query = read_four(&tiles.queries[first_row + r][dim]);
            scores[r] += query.x * key.x + query.y * key.y + query.z * key.z + query.w * key.w;
        }
    }
}

// Turns scores into weights, relative to the largest score so far, and makes the states relative to it, too.
template <int HEAD_DIM>
__device__ __forceinline__ void apply_softmax(SharedTiles<HEAD_DIM>& tiles, int first_row,
                                              const float (&scores)[WARP_ROWS], RowStates<HEAD_DIM>& states) {
    const int lane = threadIdx.x % WARP;
    for (int r = 0; r < WARP_ROWS; r++) {
        // Never -infinity, because each row sees the first key.
        const float maximum = fmaxf(states.maximum[r], warp_reduce(scores[r], Max()));
        const float rescale = __expf(states.maximum[r] - maximum), weight = __expf(scores[r] - maximum);
        states.maximum[r] = maximum;
        states.sum[r] = states.sum[r] * rescale + weight;
        for (float& number : states.output[r]) number *= rescale;
        tiles.weights[first_row + r][lane] = weight;
    }
}

// output += weights · values, for the rows of a warp and the dimensions of a lane.
template <int HEAD_DIM>
__device__ __forceinline__ void multiply_values(const SharedTiles<HEAD_DIM>& tiles, int first_row,
                                                RowStates<HEAD_DIM>& states) {
    const int lane = threadIdx.x % WARP;
    for (int key = 0; key < TILE_KEYS; key += 4) {
        float values[4][states.LANE_DIMS];
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < states.LANE_DIMS; i++) values[k][i] = tiles.tokens[key + k][lane + i * WARP];
        for (int r = 0; r < WARP_ROWS; r++) {
            const float4 weight = read_four(&tiles.weights[first_row + r][key]);
            for (int i = 0; i < states.LANE_DIMS; i++)
                states.output[r][i] += weight.x * values[0][i] + weight.y * values[1][i] + weight.z * values[2][i] +
                                       weight.w * values[3][i];
        }
    }
}

template <int HEAD_DIM>
__device__ void store_output(const PagedBatch& batch, const QueryTile& tile, int first_row,
                             const RowStates<HEAD_DIM>& states) {
    for (int r = 0; r < WARP_ROWS; r++) {
        const float inverse = 1.f / warp_reduce(states.sum[r], Add());
        if (first_row + r >= tile.num_rows) continue;
        const index_t offset = tile.offset(batch, first_row + r) + threadIdx.x % WARP;
        for (int i = 0; i < states.LANE_DIMS; i++)
            write_number(batch.output, batch.dtype, offset + i * WARP, states.output[r][i] * inverse);
    }
}

// Grid: see query_tile(). C: the type of the cache.
template <class C, int HEAD_DIM>
__global__ void __launch_bounds__(WARPS* WARP, HEAD_DIM > 128 ? 2 : 3) prefill_tiled_kernel(const PagedBatch batch) {
    DYNAMIC_SHARED(SharedTiles<HEAD_DIM>, shared);
    SharedTiles<HEAD_DIM>& tiles = *shared;
    const QueryTile tile = query_tile<TILE_ROWS>(batch);
    if (tile.num_rows == 0) return;
    const int lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * WARP_ROWS;
    load_queries(tiles, batch, tile);

    RowStates<HEAD_DIM> states = {};
    int num_visible[WARP_ROWS];
    for (int r = 0; r < WARP_ROWS; r++) {
        states.maximum[r] = -INFINITY;
        num_visible[r] = tile.num_visible(batch, first_row + r);
    }
    for (int first_key = 0; first_key < tile.num_keys; first_key += TILE_KEYS) {
        __syncthreads();  // all warps are done with the values of the tile before
        load_tokens<C>(tiles, batch, tile, first_key, 0);
        __syncthreads();
        float scores[WARP_ROWS] = {};
        multiply_keys(tiles, first_row, scores);
        for (int r = 0; r < WARP_ROWS; r++)
            if (first_key + lane >= num_visible[r]) scores[r] = -INFINITY;
        apply_softmax(tiles, first_row, scores, states);

        __syncthreads();  // all warps are done with the keys
        load_tokens<C>(tiles, batch, tile, first_key, batch.value_offset());
        __syncthreads();
        multiply_values(tiles, first_row, states);
    }
    store_output(batch, tile, first_row, states);
}

template <class C, int HEAD_DIM>
int launch_prefill_tiled(const PagedBatch& batch, index_t max_query_len, void* stream) {
    constexpr int BYTES = sizeof(SharedTiles<HEAD_DIM>);
    cudaFuncSetAttribute(prefill_tiled_kernel<C, HEAD_DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    const dim3 grid = prefill_grid(batch, max_query_len, TILE_ROWS);
    LAUNCH((prefill_tiled_kernel<C, HEAD_DIM>), grid, WARPS * WARP, BYTES, stream)(batch);
    return cudaGetLastError();
}

template <class C> int dispatch_head_dim(const PagedBatch& batch, index_t max_query_len, void* stream) {
    switch (batch.head_dim) {
        case 32: return launch_prefill_tiled<C, 32>(batch, max_query_len, stream);
        case 64: return launch_prefill_tiled<C, 64>(batch, max_query_len, stream);
        case 96: return launch_prefill_tiled<C, 96>(batch, max_query_len, stream);
        case 128: return launch_prefill_tiled<C, 128>(batch, max_query_len, stream);
        case 256: return launch_prefill_tiled<C, 256>(batch, max_query_len, stream);
    }
    return UNSUPPORTED;
}

extern "C" int prefill_tiled(const void* query, const void* kv_cache, const void* block_tables,
                             const void* query_start_loc, const void* context_lens, void* output, int dtype,
                             int cache_dtype, index_t num_seqs, index_t num_heads, index_t num_kv_heads,
                             index_t head_dim, index_t block_size, index_t table_stride, index_t max_query_len,
                             float scale, void* stream) {
    const PagedBatch batch = paged_batch(query, kv_cache, block_tables, query_start_loc, context_lens, output, dtype,
                                         num_seqs, num_heads, num_kv_heads, head_dim, block_size, table_stride, scale);
    return dispatch_float(dtype, [&](auto number) {
        return dispatch_cache<decltype(number)>(cache_dtype, [&](auto stored) {
            return dispatch_head_dim<decltype(stored)>(batch, max_query_len, stream);
        });
    });
}
