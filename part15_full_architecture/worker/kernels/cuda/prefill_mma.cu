// Paged attention for prefill as FlashAttention-2 computes it (Dao, 2023): scores, weights and output never leave the
// registers.
//
// prefill_wmma.cu sends every score through shared memory, because WMMA does not say which lane holds it. The
// instruction below WMMA does. With mma.sync m16n8k16, lane l holds four numbers of the 16 x 8 result: row l / 4 at two
// neighboring columns, and row l / 4 + 8 at the same columns (see ptx.h). So four neighboring lanes share a row, and
// its largest score takes two shuffles. And two results side by side have the layout of a 16 x 16 left operand: the
// weights are rounded to 16 bits and multiplied with the values where they are.
//
// A block has 4 warps with 32 rows each; a row is a query head of a token (see QueryTile). A warp handles its rows as
// two matrices of 16, so that each fragment of keys or values that it reads from shared memory takes part in two
// products: with one, the reads would take as long as the products. ldmatrix reads four 8 x 8 matrices in the layout
// that mma needs, and transposes those of the values on the way.
//
// The pipeline has two stages, keys and values, with a buffer each. While the warps multiply with the keys, cp.async
// copies the values of the tile, without passing through registers; while they multiply with the values, it copies the
// keys of the next tile. A cache of codes must pass through registers, to be converted, and its loads are waited for.
//
// Shared memory for head_dim d: queries (128 x (d + 8), 16 bits each), keys and values (64 x (d + 8) each), and where
// two tiles of tokens are in the cache (1 KiB): 69 KiB for 128 dimensions. Rows are padded by 16 bytes: the eight rows
// that ldmatrix reads at once then lie in different banks.
// Reads: with twice the rows per tile, half as much as prefill_wmma.cu. Operations of a prompt of n tokens: about
// 2 n^2 head_dim per query head (half of 4 n^2 head_dim, because of the causal mask).
#include "cuda_on_cpu/ptx.h"
#include "paged_cache.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP, TILE_KEYS = 64;
constexpr int SIDE = 16;    // rows of an mma, and columns of its left operand
constexpr int COLUMNS = 8;  // of an mma's result
constexpr int ROW_TILES = 2, WARP_ROWS = ROW_TILES * SIDE, TILE_ROWS = WARPS * WARP_ROWS;
constexpr float LOG2_E = 1.44269504f;

// ldmatrix and cp.async need addresses that are multiples of 16 bytes.
template <class T, int HEAD_DIM> struct SharedTiles {
    static constexpr int ROW = HEAD_DIM + 8;
    alignas(16) T queries[TILE_ROWS][ROW];  // at the end: the output
    alignas(16) T keys[TILE_KEYS][ROW];
    alignas(16) T values[TILE_KEYS][ROW];
    index_t offsets[2][TILE_KEYS];  // where the tokens of a tile are in the cache; for tiles with even and odd numbers
};

// What the mma of a warp hold. Index [m][n][i]: the i-th register of the lane in the n-th of the results that lie side
// by side, for the m-th 16 rows. Registers 0 and 1 belong to row l / 4, 2 and 3 to row l / 4 + 8.
template <int N> using Results = float[ROW_TILES][N / COLUMNS][4];

// The weights of a tile as left operands: [m][k] of the m-th 16 rows and the k-th 16 keys.
typedef unsigned Weights[ROW_TILES][TILE_KEYS / SIDE][4];

// The softmax of the rows of a lane: [m][0] of row l / 4, [m][1] of row l / 4 + 8. maximum: of the scores before they
// are multiplied by scale. sum: of the lane's own columns.
struct RowStates {
    float maximum[ROW_TILES][2], sum[ROW_TILES][2];
};

// 2^x, in one instruction. exp2f adds three, to be exact for results below 2^-126, which are 0 here.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDACC__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

__device__ __forceinline__ unsigned as_bits(__half2 pair) { return *reinterpret_cast<const unsigned*>(&pair); }
__device__ __forceinline__ unsigned as_bits(__nv_bfloat162 pair) { return *reinterpret_cast<const unsigned*>(&pair); }

// Two floats, rounded to 16 bits, in one register.
template <class T> __device__ __forceinline__ unsigned round_pair(float low, float high) {
    if constexpr (std::is_same<T, half_t>::value) return as_bits(__floats2half2_rn(low, high));
    else return as_bits(__floats2bfloat162_rn(low, high));
}

template <class T>
__device__ __forceinline__ void multiply(float (&result)[4], const unsigned (&left)[4], unsigned right0,
                                         unsigned right1) {
    const unsigned right[2] = {right0, right1};
    ptx::mma_m16n8k16<T>(result, left, right);
}

// Starts to copy 8 numbers to shared memory. Those of a cache of codes are there at once.
template <class T, class C> __device__ __forceinline__ void copy_vector(T* to, const C* from) {
    if constexpr (std::is_same<T, C>::value) {
        __pipeline_memcpy_async(to, from, sizeof(Pack<T, VECTOR_SIZE>));
    } else {
        CacheVector<C> stored;
        stored.load(from);
        store_pack(to, stored.template convert<T>());
    }
}

// Rows that don't exist become copies of the last one; nothing is stored for them.
template <class T, int HEAD_DIM>
__device__ void copy_queries(SharedTiles<T, HEAD_DIM>& tiles, const PagedBatch& batch, const QueryTile& tile) {
    constexpr int VECTORS = HEAD_DIM / VECTOR_SIZE;  // of a row
    for (int i = threadIdx.x; i < TILE_ROWS * VECTORS; i += THREADS) {
        const int row = i / VECTORS, dim = i % VECTORS * VECTOR_SIZE;
        const index_t offset = tile.offset(batch, min(row, tile.num_rows - 1)) + dim;
        copy_vector(&tiles.queries[row][dim], static_cast<const T*>(batch.query) + offset);
    }
}

// Looks up where the tokens of a tile are. Past the causal limit, the last token takes their places: later slots may
// not have been written yet, and what they hold may be NaN, which is NaN times any weight.
__device__ __forceinline__ void find_tokens(index_t (&offsets)[TILE_KEYS], const PagedBatch& batch,
                                            const QueryTile& tile, int first_key) {
    const int token = threadIdx.x;
    if (token < TILE_KEYS)
        offsets[token] = batch.key_offset(tile.seq, min(first_key + token, tile.num_keys - 1), tile.kv_head);
}

// Starts to copy the keys or the values of a tile. cache: where the first token's would be at offset 0.
template <class C, class T, int ROW>
__device__ __forceinline__ void copy_tokens(T (&to)[TILE_KEYS][ROW], const C* cache,
                                            const index_t (&offsets)[TILE_KEYS]) {
    constexpr int VECTORS = (ROW - 8) / VECTOR_SIZE;  // of a token
    const int first_token = threadIdx.x / VECTORS, dim = threadIdx.x % VECTORS * VECTOR_SIZE;
#pragma unroll
    for (int i = 0; i < TILE_KEYS; i += THREADS / VECTORS)
        copy_vector(&to[first_token + i][dim], cache + offsets[first_token + i] + dim);
    __pipeline_commit();
}

// scores = queries · keysᵀ, for the rows of a warp.
template <class T, int HEAD_DIM>
__device__ __forceinline__ void multiply_keys(const SharedTiles<T, HEAD_DIM>& tiles, int first_row,
                                              Results<TILE_KEYS>& scores) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int dim = 0; dim < HEAD_DIM; dim += SIDE) {
        unsigned queries[ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++)
            ptx::ldmatrix_x4<false>(queries[m], &tiles.queries[first_row + m * SIDE + lane % 16][dim + lane / 16 * 8]);
#pragma unroll
        for (int key = 0; key < TILE_KEYS; key += 2 * COLUMNS) {
            unsigned keys[4];  // two right operands: a row of keys is a column of keysᵀ
            ptx::ldmatrix_x4<false>(keys, &tiles.keys[key + lane / 16 * 8 + lane % 8][dim + lane / 8 % 2 * 8]);
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                multiply<T>(scores[m][key / COLUMNS], queries[m], keys[0], keys[1]);
                multiply<T>(scores[m][key / COLUMNS + 1], queries[m], keys[2], keys[3]);
            }
        }
    }
}

// output += weights · values, for the rows of a warp.
template <class T, int HEAD_DIM>
__device__ __forceinline__ void multiply_values(const SharedTiles<T, HEAD_DIM>& tiles, const Weights& weights,
                                                Results<HEAD_DIM>& output) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int key = 0; key < TILE_KEYS; key += SIDE) {
#pragma unroll
        for (int dim = 0; dim < HEAD_DIM; dim += 2 * COLUMNS) {
            unsigned values[4];  // two right operands
            ptx::ldmatrix_x4<true>(values, &tiles.values[key + lane % 16][dim + lane / 16 * 8]);
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                multiply<T>(output[m][dim / COLUMNS], weights[m][key / SIDE], values[0], values[1]);
                multiply<T>(output[m][dim / COLUMNS + 1], weights[m][key / SIDE], values[2], values[3]);
            }
        }
    }
}

// Hides the keys that a row does not see. Only the last tiles need it.
__device__ __forceinline__ void apply_mask(Results<TILE_KEYS>& scores, const PagedBatch& batch, const QueryTile& tile,
                                           int first_row, int first_key) {
    const int lane = threadIdx.x % WARP, first_column = first_key + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
        for (int half = 0; half < 2; half++) {
            const int num_visible = tile.num_visible(batch, first_row + m * SIDE + half * 8 + lane / 4);
            for (int n = 0; n < TILE_KEYS / COLUMNS; n++)
                for (int i = 0; i < 2; i++)
                    if (first_column + n * COLUMNS + i >= num_visible) scores[m][n][2 * half + i] = -INFINITY;
        }
}

// Turns scores into weights, relative to the largest score so far, and makes the output so far relative to it, too.
template <class T, int HEAD_DIM>
__device__ __forceinline__ void apply_softmax(const Results<TILE_KEYS>& scores, RowStates& states,
                                              Results<HEAD_DIM>& output, float scale, Weights& weights) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
        for (int half = 0; half < 2; half++) {
            float maximum = states.maximum[m][half];
            for (int n = 0; n < TILE_KEYS / COLUMNS; n++)
                maximum = fmaxf(maximum, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 1));
            maximum = fmaxf(maximum, __shfl_xor_sync(ALL_LANES, maximum, 2));
            // Now it is the row's, and never -infinity, because each row sees the first key.

            const float scaled_maximum = maximum * scale;
            const float factor = fast_exp2(states.maximum[m][half] * scale - scaled_maximum);
            states.maximum[m][half] = maximum;
            float sum = states.sum[m][half] * factor;
            for (int n = 0; n < TILE_KEYS / COLUMNS; n++) {
                const float left = fast_exp2(scores[m][n][2 * half] * scale - scaled_maximum);  // one multiply-add
                const float right = fast_exp2(scores[m][n][2 * half + 1] * scale - scaled_maximum);
                sum += left + right;
                weights[m][n / 2][n % 2 * 2 + half] = round_pair<T>(left, right);
            }
            states.sum[m][half] = sum;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / COLUMNS; d++)
                for (int i = 2 * half; i < 2 * half + 2; i++) output[m][d][i] *= factor;
        }
}

// Divides the output by the sums, and writes it in pieces of 16 bytes, by way of the warp's part of the queries'
// buffer.
template <class T, int HEAD_DIM>
__device__ void store_output(SharedTiles<T, HEAD_DIM>& tiles, const PagedBatch& batch, const QueryTile& tile,
                             int first_row, const RowStates& states, const Results<HEAD_DIM>& output) {
    constexpr int VECTORS = HEAD_DIM / VECTOR_SIZE;  // of a row
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
        for (int half = 0; half < 2; half++) {
            float sum = states.sum[m][half];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            const float inverse = 1.f / sum;
            T* row = tiles.queries[first_row + m * SIDE + half * 8 + lane / 4];
#pragma unroll
            for (int d = 0; d < HEAD_DIM / COLUMNS; d++)
                *reinterpret_cast<unsigned*>(row + d * COLUMNS + lane % 4 * 2) =
                    round_pair<T>(output[m][d][2 * half] * inverse, output[m][d][2 * half + 1] * inverse);
        }
    __syncwarp();
    for (int i = lane; i < WARP_ROWS * VECTORS; i += WARP) {
        const int row = first_row + i / VECTORS, dim = i % VECTORS * VECTOR_SIZE;
        if (row >= tile.num_rows) break;
        T* to = static_cast<T*>(batch.output) + tile.offset(batch, row) + dim;
        store_pack(to, load_pack<VECTOR_SIZE>(&tiles.queries[row][dim]));
    }
}

// Grid: see query_tile(). T: the type of queries and outputs, C: of the cache.
template <class T, class C, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS) prefill_mma_kernel(const PagedBatch batch) {
    typedef SharedTiles<T, HEAD_DIM> Tiles;
    DYNAMIC_SHARED(Tiles, shared);
    Tiles& tiles = *shared;
    const QueryTile tile = query_tile<TILE_ROWS>(batch);
    if (tile.num_rows == 0) return;
    const C *keys = static_cast<const C*>(batch.kv_cache), *values = keys + batch.value_offset();
    copy_queries(tiles, batch, tile);
    find_tokens(tiles.offsets[0], batch, tile, 0);
    __syncthreads();
    copy_tokens(tiles.keys, keys, tiles.offsets[0]);

    const int first_row = threadIdx.x / WARP * WARP_ROWS, last_row = min(first_row + WARP_ROWS, tile.num_rows) - 1;
    const int num_warp_keys = last_row < first_row ? 0 : tile.num_visible(batch, last_row);  // that the warp's rows see
    const int num_common_keys = tile.num_visible(batch, 0);                                  // that all rows see
    // exp(x) is 2^(x · log2 e)
    const float scale = batch.scale * LOG2_E;
    RowStates states;
    for (int i = 0; i < ROW_TILES * 2; i++) states.maximum[i / 2][i % 2] = -INFINITY, states.sum[i / 2][i % 2] = 0.f;
    Results<HEAD_DIM> output = {};
    for (int first_key = 0; first_key < tile.num_keys; first_key += TILE_KEYS) {
        Weights weights;
        const bool sees_tile = first_key < num_warp_keys;  // the same for all lanes of the warp
        const int parity = first_key / TILE_KEYS % 2;
        __pipeline_wait_prior(0);
        __syncthreads();  // the keys are there, and all warps are done with the values of the tile before
        copy_tokens(tiles.values, values, tiles.offsets[parity]);
        find_tokens(tiles.offsets[1 - parity], batch, tile, first_key + TILE_KEYS);
        if (sees_tile) {
            Results<TILE_KEYS> scores = {};
            multiply_keys(tiles, first_row, scores);
            if (first_key + TILE_KEYS > num_common_keys) apply_mask(scores, batch, tile, first_row, first_key);
            apply_softmax<T, HEAD_DIM>(scores, states, output, scale, weights);
        }
        __pipeline_wait_prior(0);
        __syncthreads();  // the values are there, and all warps are done with the keys
        if (first_key + TILE_KEYS < tile.num_keys) copy_tokens(tiles.keys, keys, tiles.offsets[1 - parity]);
        if (sees_tile) multiply_values(tiles, weights, output);
    }
    store_output(tiles, batch, tile, first_row, states, output);
}

template <class T, class C, int HEAD_DIM>
int launch_prefill_mma(const PagedBatch& batch, index_t max_query_len, void* stream) {
    constexpr int BYTES = sizeof(SharedTiles<T, HEAD_DIM>);
    cudaFuncSetAttribute(prefill_mma_kernel<T, C, HEAD_DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    const dim3 grid = prefill_grid(batch, max_query_len, TILE_ROWS);
    LAUNCH((prefill_mma_kernel<T, C, HEAD_DIM>), grid, THREADS, BYTES, stream)(batch);
    return cudaGetLastError();
}

template <class T> int dispatch_prefill(const PagedBatch& batch, int cache_dtype, index_t max_query_len, void* stream) {
    return dispatch_cache<T>(cache_dtype, [&](auto stored) {
        typedef decltype(stored) C;
        switch (batch.head_dim) {
            case 32: return launch_prefill_mma<T, C, 32>(batch, max_query_len, stream);
            case 64: return launch_prefill_mma<T, C, 64>(batch, max_query_len, stream);
            case 128: return launch_prefill_mma<T, C, 128>(batch, max_query_len, stream);
        }
        return UNSUPPORTED;
    });
}

extern "C" int prefill_mma(const void* query, const void* kv_cache, const void* block_tables,
                           const void* query_start_loc, const void* context_lens, void* output, int dtype,
                           int cache_dtype, index_t num_seqs, index_t num_heads, index_t num_kv_heads, index_t head_dim,
                           index_t block_size, index_t table_stride, index_t max_query_len, float scale, void* stream) {
    const PagedBatch batch = paged_batch(query, kv_cache, block_tables, query_start_loc, context_lens, output, dtype,
                                         num_seqs, num_heads, num_kv_heads, head_dim, block_size, table_stride, scale);
    if (dtype == FLOAT16) return dispatch_prefill<half_t>(batch, cache_dtype, max_query_len, stream);
    if (dtype == BFLOAT16) return dispatch_prefill<bfloat_t>(batch, cache_dtype, max_query_len, stream);
    return UNSUPPORTED;
}
