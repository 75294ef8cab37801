// Paged attention for prefill on tensor cores, through CUDA's portable interface to them: WMMA.
//
// The algorithm is that of prefill_tiled.cu; the products are computed by tensor cores. A warp multiplies two 16 x 16
// matrices of 16-bit numbers with one instruction, and adds the product to a float32 matrix, a fragment, that is spread
// over the registers of its lanes. This is about 16 times as fast as CUDA cores are, so a tile of keys must be used
// more often to be worth the time it takes to load: tiles have 64 queries and 64 keys.
//
// A block has 4 warps with 16 rows each. For a tile of 64 keys, a warp computes its 16 x 64 scores in fragments and
// stores them to shared memory, where two lanes share a row for the softmax. The weights go back to shared memory as
// 16-bit numbers, and are multiplied with the values. The output stays in fragments all the time.
//
// WMMA does not say which element of a matrix a lane holds, but online softmax multiplies each row of the output by a
// factor of its own. So a lane finds out at the start: it loads a matrix in which each element is its row number. All
// fragments of the same type are laid out alike.
//
// Shared memory for head_dim d: queries, keys and values (64 x (d + 8), 16 bits each), the scores (64 x 68 floats) and
// the weights (64 x 72, 16 bits): 77 KiB for 128 dimensions. Rows are padded by 16 bytes to spread them over the banks.
// Reads: each tile of queries reads the keys and values up to its causal limit; with twice the rows, half as much in
// total as prefill_tiled.cu.
#include "paged_cache.cuh"

using namespace nvcuda;

constexpr int TILE_ROWS = 64, TILE_KEYS = 64, WARPS = 4;
constexpr int SIDE = 16;  // of the matrices that WMMA multiplies; each warp has SIDE rows

typedef wmma::fragment<wmma::accumulator, SIDE, SIDE, SIDE, float> Accumulator;
template <class T, class Layout> using LeftMatrix = wmma::fragment<wmma::matrix_a, SIDE, SIDE, SIDE, T, Layout>;
template <class T, class Layout> using RightMatrix = wmma::fragment<wmma::matrix_b, SIDE, SIDE, SIDE, T, Layout>;

// WMMA needs addresses that are multiples of 32 bytes.
template <class T, int HEAD_DIM> struct SharedTiles {
    static constexpr int ROW = HEAD_DIM + 8, SCORES = TILE_KEYS + 4, WEIGHTS = TILE_KEYS + 8;
    alignas(32) T queries[TILE_ROWS][ROW];
    alignas(32) T keys[TILE_KEYS][ROW];
    alignas(32) T values[TILE_KEYS][ROW];
    alignas(32) float scores[TILE_ROWS][SCORES];
    alignas(32) T weights[TILE_ROWS][WEIGHTS];
    float factors[TILE_ROWS];  // by which each row of the output is multiplied
};

// Rows that don't exist become copies of the last one; nothing is stored for them.
template <class T, int HEAD_DIM>
__device__ void load_queries(SharedTiles<T, HEAD_DIM>& tiles, const PagedBatch& batch, const QueryTile& tile) {
    constexpr int VECTORS = HEAD_DIM / VECTOR_SIZE;  // of a row
    for (int i = threadIdx.x; i < TILE_ROWS * VECTORS; i += WARPS * WARP) {
        const int row = i / VECTORS, dim = i % VECTORS * VECTOR_SIZE;
        CacheVector<T> query;
        query.load(static_cast<const T*>(batch.query) + tile.offset(batch, min(row, tile.num_rows - 1)) + dim);
        store_pack(&tiles.queries[row][dim], query.template convert<T>());
    }
}

// The keys and values of TILE_KEYS tokens. Past the causal limit, the last token is read again: later slots may not
// have been written yet, and what they hold may be NaN, which is NaN times any weight.
template <class T, class C, int HEAD_DIM>
__device__ void load_tokens(SharedTiles<T, HEAD_DIM>& tiles, const PagedBatch& batch, const QueryTile& tile,
                            int first_key) {
    constexpr int VECTORS = HEAD_DIM / VECTOR_SIZE;  // of a token
#pragma unroll 2
    for (int i = threadIdx.x; i < TILE_KEYS * VECTORS; i += WARPS * WARP) {
        const int token = i / VECTORS, dim = i % VECTORS * VECTOR_SIZE;
        const int position = min(first_key + token, tile.num_keys - 1);
        const C* stored = batch.key<C>(tile.seq, position, tile.kv_head) + dim;
        CacheVector<C> key, value;
        key.load(stored);
        value.load(stored + batch.value_offset());
        store_pack(&tiles.keys[token][dim], key.template convert<T>());
        store_pack(&tiles.values[token][dim], value.template convert<T>());
    }
}

// scores = queries · keysᵀ, for the 16 rows of a warp.
template <class T, int HEAD_DIM> __device__ void multiply_keys(SharedTiles<T, HEAD_DIM>& tiles, int first_row) {
    Accumulator scores[TILE_KEYS / SIDE];
    for (Accumulator& matrix : scores) wmma::fill_fragment(matrix, 0.f);
#pragma unroll 2
    for (int dim = 0; dim < HEAD_DIM; dim += SIDE) {
        LeftMatrix<T, wmma::row_major> queries;
        wmma::load_matrix_sync(queries, &tiles.queries[first_row][dim], tiles.ROW);
        for (int n = 0; n < TILE_KEYS / SIDE; n++) {
            RightMatrix<T, wmma::col_major> keys;  // a row of keys is a column of keysᵀ
            wmma::load_matrix_sync(keys, &tiles.keys[n * SIDE][dim], tiles.ROW);
            wmma::mma_sync(scores[n], queries, keys, scores[n]);
        }
    }
    for (int n = 0; n < TILE_KEYS / SIDE; n++)
        wmma::store_matrix_sync(&tiles.scores[first_row][n * SIDE], scores[n], tiles.SCORES, wmma::mem_row_major);
}

// output += weights · values, for the 16 rows of a warp.
template <class T, int HEAD_DIM>
__device__ void multiply_values(SharedTiles<T, HEAD_DIM>& tiles, int first_row,
                                Accumulator (&output)[HEAD_DIM / SIDE]) {
#pragma unroll 1
    for (int key = 0; key < TILE_KEYS; key += SIDE) {
        LeftMatrix<T, wmma::row_major> weights;
        wmma::load_matrix_sync(weights, &tiles.weights[first_row][key], tiles.WEIGHTS);
        for (int d = 0; d < HEAD_DIM / SIDE; d++) {
            RightMatrix<T, wmma::row_major> values;
            wmma::load_matrix_sync(values, &tiles.values[key][d * SIDE], tiles.ROW);
            wmma::mma_sync(output[d], weights, values, output[d]);
        }
    }
}

// Turns the scores of a warp's rows into weights, relative to the largest score so far, and leaves in factors what the
// output so far must be multiplied by. Two lanes share a row: each looks at every second column.
template <class T, int HEAD_DIM>
__device__ void apply_softmax(SharedTiles<T, HEAD_DIM>& tiles, int row, int num_visible, float scale, float& maximum,
                              float& sum) {
    constexpr int COLUMNS = TILE_KEYS / 2;
    const int first_column = threadIdx.x % 2;
    float scores[COLUMNS], new_maximum = maximum;
    for (int i = 0; i < COLUMNS; i++) {
        const int column = first_column + 2 * i;
        scores[i] = column < num_visible ? tiles.scores[row][column] * scale : -INFINITY;
        new_maximum = fmaxf(new_maximum, scores[i]);
    }
    // Never -infinity, because each row sees the first key.
    new_maximum = fmaxf(new_maximum, __shfl_xor_sync(ALL_LANES, new_maximum, 1));
    const float factor = __expf(maximum - new_maximum);
    maximum = new_maximum;
    sum *= factor;
    for (int i = 0; i < COLUMNS; i++) {
        const float weight = __expf(scores[i] - maximum);
        sum += weight;
        tiles.weights[row][first_column + 2 * i] = from_float<T>(weight);
    }
    if (first_column == 0) tiles.factors[row] = factor;
}

// Which rows of a 16 x 16 matrix a lane's elements of an accumulator belong to.
template <class T, int HEAD_DIM>
__device__ void find_rows(SharedTiles<T, HEAD_DIM>& tiles, int first_row, int (&rows)[Accumulator::num_elements]) {
    const int lane = threadIdx.x % WARP;
    for (int i = lane; i < SIDE * SIDE; i += WARP) tiles.scores[first_row + i / SIDE][i % SIDE] = (float)(i / SIDE);
    __syncwarp();
    Accumulator matrix;
    wmma::load_matrix_sync(matrix, &tiles.scores[first_row][0], tiles.SCORES, wmma::mem_row_major);
    for (int i = 0; i < matrix.num_elements; i++) rows[i] = (int)matrix.x[i];
}

template <class T, int HEAD_DIM>
__device__ void multiply_rows(const SharedTiles<T, HEAD_DIM>& tiles, int first_row,
                              const int (&rows)[Accumulator::num_elements], Accumulator (&output)[HEAD_DIM / SIDE]) {
    for (int i = 0; i < Accumulator::num_elements; i++) {
        const float factor = tiles.factors[first_row + rows[i]];
        for (int d = 0; d < HEAD_DIM / SIDE; d++) output[d].x[i] *= factor;
    }
}

// Through shared memory, 16 dimensions at a time, so that a lane knows what it holds.
template <class T, int HEAD_DIM>
__device__ void store_output(SharedTiles<T, HEAD_DIM>& tiles, const PagedBatch& batch, const QueryTile& tile,
                             int first_row, const Accumulator (&output)[HEAD_DIM / SIDE]) {
    const int lane = threadIdx.x % WARP, row = first_row + lane / 2, column = lane % 2 * VECTOR_SIZE;
    T* to = static_cast<T*>(batch.output) + tile.offset(batch, row) + column;
    for (int d = 0; d < HEAD_DIM / SIDE; d++) {
        wmma::store_matrix_sync(&tiles.scores[first_row][0], output[d], tiles.SCORES, wmma::mem_row_major);
        __syncwarp();
        Pack<T, VECTOR_SIZE> pack;
        for (int i = 0; i < VECTOR_SIZE; i++) pack.values[i] = from_float<T>(tiles.scores[row][column + i]);
        if (row < tile.num_rows) store_pack(to + d * SIDE, pack);
        __syncwarp();  // all lanes have read their numbers
    }
}

template <class T, class C, int HEAD_DIM>
__device__ void attend(const PagedBatch& batch, SharedTiles<T, HEAD_DIM>& tiles) {
    const QueryTile tile = query_tile<TILE_ROWS>(batch);
    if (tile.num_rows == 0) return;
    const int first_row = threadIdx.x / WARP * SIDE, own_row = first_row + threadIdx.x % WARP / 2;
    const int num_visible = tile.num_visible(batch, own_row);
    load_queries(tiles, batch, tile);

    int rows[Accumulator::num_elements];
    find_rows(tiles, first_row, rows);
    Accumulator output[HEAD_DIM / SIDE];
    for (Accumulator& matrix : output) wmma::fill_fragment(matrix, 0.f);
    float maximum = -INFINITY, sum = 0.f;  // of own_row; the sum is of every second key

    for (int first_key = 0; first_key < tile.num_keys; first_key += TILE_KEYS) {
        __syncthreads();  // all warps are done with the tile before
        load_tokens<T, C>(tiles, batch, tile, first_key);
        __syncthreads();
        multiply_keys(tiles, first_row);
        __syncwarp();  // from here on, a warp works on its own rows alone
        apply_softmax(tiles, own_row, num_visible - first_key, batch.scale, maximum, sum);
        __syncwarp();
        multiply_rows(tiles, first_row, rows, output);
        multiply_values(tiles, first_row, output);
    }

    __syncwarp();  // all lanes have read the factors of the last tile
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    if (threadIdx.x % 2 == 0) tiles.factors[own_row] = 1.f / sum;
    __syncwarp();
    multiply_rows(tiles, first_row, rows, output);
    store_output(tiles, batch, tile, first_row, output);
}

// Tensor cores know float16 from compute capability 7.0 on, bfloat16 from 8.0 on: for others, the kernel is empty.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T> constexpr bool HAS_TENSOR_CORES = std::is_same<T, half_t>::value;
#else
template <class T> constexpr bool HAS_TENSOR_CORES = true;
#endif

// Grid: see query_tile(). T: the type of queries and outputs, C: of the cache.
template <class T, class C, int HEAD_DIM>
__global__ void __launch_bounds__(WARPS* WARP, 2) prefill_wmma_kernel(const PagedBatch batch) {
    typedef SharedTiles<T, HEAD_DIM> Tiles;
    DYNAMIC_SHARED(Tiles, tiles);
    if constexpr (HAS_TENSOR_CORES<T>) attend<T, C, HEAD_DIM>(batch, *tiles);
}

template <class T, class C, int HEAD_DIM>
int launch_prefill_wmma(const PagedBatch& batch, index_t max_query_len, void* stream) {
    constexpr int BYTES = sizeof(SharedTiles<T, HEAD_DIM>);
    cudaFuncSetAttribute(prefill_wmma_kernel<T, C, HEAD_DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    const dim3 grid = prefill_grid(batch, max_query_len, TILE_ROWS);
    LAUNCH((prefill_wmma_kernel<T, C, HEAD_DIM>), grid, WARPS * WARP, BYTES, stream)(batch);
    return cudaGetLastError();
}

template <class T> int dispatch_prefill(const PagedBatch& batch, int cache_dtype, index_t max_query_len, void* stream) {
    return dispatch_cache<T>(cache_dtype, [&](auto stored) {
        typedef decltype(stored) C;
        switch (batch.head_dim) {
            case 32: return launch_prefill_wmma<T, C, 32>(batch, max_query_len, stream);
            case 64: return launch_prefill_wmma<T, C, 64>(batch, max_query_len, stream);
            case 96: return launch_prefill_wmma<T, C, 96>(batch, max_query_len, stream);
            case 128: return launch_prefill_wmma<T, C, 128>(batch, max_query_len, stream);
        }
        return UNSUPPORTED;
    });
}

extern "C" int prefill_wmma(const void* query, const void* kv_cache, const void* block_tables,
                            const void* query_start_loc, const void* context_lens, void* output, int dtype,
                            int cache_dtype, index_t num_seqs, index_t num_heads, index_t num_kv_heads,
                            index_t head_dim, index_t block_size, index_t table_stride, index_t max_query_len,
                            float scale, void* stream) {
    const PagedBatch batch = paged_batch(query, kv_cache, block_tables, query_start_loc, context_lens, output, dtype,
                                         num_seqs, num_heads, num_kv_heads, head_dim, block_size, table_stride, scale);
    if (dtype == FLOAT16) return dispatch_prefill<half_t>(batch, cache_dtype, max_query_len, stream);
    if (dtype == BFLOAT16) return dispatch_prefill<bfloat_t>(batch, cache_dtype, max_query_len, stream);
    return UNSUPPORTED;
}
