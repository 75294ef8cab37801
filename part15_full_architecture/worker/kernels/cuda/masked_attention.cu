// Dense attention with any mask, fused: scores, mask, softmax and weighted sum in one kernel. The scores never go to
// memory (FlashAttention: Dao et al., 2022).
//
// One block per head and tile of 16 queries. The block walks through the keys in tiles of 32: it copies keys and values
// to shared memory, and each of its 4 warps attends to them with 4 of the queries. A warp works in two ways in turn:
//   - for the scores, a lane stands for a key: it multiplies its key with each of the 4 queries;
//   - for the weighted sum of the values, a lane stands for every 32nd dimension of the head. The weights come from the
//     lanes that have computed them, by shuffles.
// The softmax is online, as in softmax_online.cu: if a tile raises a query's maximum, the sum of its weights and its
// output so far are rescaled. Tiles in which no query of the block sees a key are skipped.
//
// Shared memory, as floats, with D = head_dim rounded up to 32, 64, 128 or 256: queries [16][D], keys [32][D + 4],
// values [32][D]; 80.5 KiB for D = 256. Rows of keys are 16 bytes longer than needed: lanes read the same dimensions of
// different keys, and with rows of D floats these would all be in the same memory banks.
// Memory traffic: for each tile of queries, all keys and values that it sees are read once.
#include "common.cuh"

constexpr int QUERIES_PER_WARP = 4, NUM_WARPS = 4, TILE_QUERIES = QUERIES_PER_WARP * NUM_WARPS, TILE_KEYS = WARP;
constexpr int NUM_THREADS = NUM_WARPS * WARP;

// query, output: [num_heads, num_queries, head_dim]; key, value: [num_heads, num_keys, head_dim]; num_heads counts the
// heads of the whole batch. mask: [num_queries, num_keys]. aligned: rows can be read in packs of 16 bytes.
template <class T> struct Arguments {
    const T *query, *key, *value;
    const bool* mask;
    T* output;
    index_t num_queries, num_keys;
    int head_dim;
    float scale;
    bool aligned;
};

// Copies num_rows rows to shared memory as floats, in packs of N numbers. The rest of the tile becomes zeros.
template <int N, int TILE_ROWS, int D, class T>
__device__ void copy_tile(float* tile, int stride, const T* rows, index_t num_rows, int head_dim) {
    for (int i = threadIdx.x * N; i < TILE_ROWS * D; i += NUM_THREADS * N) {
        const int row = i / D, dim = i % D;
        Pack<T, N> pack = {};
        if (row < num_rows && dim < head_dim) pack = load_pack<N>(rows + row * (index_t)head_dim + dim);
        for (int j = 0; j < N; j++) tile[row * stride + dim + j] = to_float(pack.values[j]);
    }
}

template <int TILE_ROWS, int D, class T>
__device__ void load_tile(float* tile, int stride, const T* rows, index_t num_rows, const Arguments<T>& args) {
    if (args.aligned) return copy_tile<16 / sizeof(T), TILE_ROWS, D>(tile, stride, rows, num_rows, args.head_dim);
    copy_tile<1, TILE_ROWS, D>(tile, stride, rows, num_rows, args.head_dim);
}

// query: 4 rows of D; key: this lane's row.
template <int D> __device__ void compute_scores(const float* query, const float* key, float scores[QUERIES_PER_WARP]) {
    for (int r = 0; r < QUERIES_PER_WARP; r++) scores[r] = 0.f;
#pragma unroll 4  // unrolled in full, the loop would need more registers than there are
    for (int dim = 0; dim < D; dim += 4) {
        const Pack<float, 4> k = load_pack<4>(key + dim);
        for (int r = 0; r < QUERIES_PER_WARP; r++) {
            const Pack<float, 4> q = load_pack<4>(query + r * D + dim);
            for (int j = 0; j < 4; j++) scores[r] += q.values[j] * k.values[j];
        }
    }
}

template <class T, int D> __global__ void __launch_bounds__(NUM_THREADS) masked_attention_kernel(Arguments<T> args) {
    constexpr int KEY_STRIDE = D + 4, DIMS_PER_LANE = D / WARP;
    DYNAMIC_SHARED(float, queries);
    float *keys = queries + TILE_QUERIES * D, *values = keys + TILE_KEYS * KEY_STRIDE;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head_dim = args.head_dim;
    const unsigned num_tiles = (unsigned)ceil_div(args.num_queries, TILE_QUERIES);
    const index_t head = blockIdx.x / num_tiles, block_query = blockIdx.x % num_tiles * TILE_QUERIES;
    const index_t first_query = block_query + warp * QUERIES_PER_WARP;  // of this warp
    const index_t query_offset = head * args.num_queries * head_dim, key_offset = head * args.num_keys * head_dim;
    load_tile<TILE_QUERIES, D>(queries, D, args.query + query_offset + block_query * head_dim,
                               args.num_queries - block_query, args);

    float maximum[QUERIES_PER_WARP], sum[QUERIES_PER_WARP];  // a lane's sum is over its own keys
    float output[QUERIES_PER_WARP][DIMS_PER_LANE] = {};
    for (int r = 0; r < QUERIES_PER_WARP; r++) {
        maximum[r] = LOWEST;
        sum[r] = 0.f;
    }
    for (index_t first_key = 0; first_key < args.num_keys; first_key += TILE_KEYS) {
        bool sees[QUERIES_PER_WARP], sees_any = false;  // whether the queries of the warp see the key of this lane
        for (int r = 0; r < QUERIES_PER_WARP; r++) {
            const index_t query = first_query + r, key = first_key + lane;
            sees[r] = query < args.num_queries && key < args.num_keys && args.mask[query * args.num_keys + key];
            sees_any |= sees[r];
        }
        if (!__syncthreads_or(sees_any)) continue;  // also a barrier: all warps are done with the last tile
        const index_t offset = key_offset + first_key * head_dim, keys_left = args.num_keys - first_key;
        load_tile<TILE_KEYS, D>(keys, KEY_STRIDE, args.key + offset, keys_left, args);
        load_tile<TILE_KEYS, D>(values, D, args.value + offset, keys_left, args);
        __syncthreads();

        float weights[QUERIES_PER_WARP];  // first the scores
        compute_scores<D>(queries + warp * QUERIES_PER_WARP * D, keys + lane * KEY_STRIDE, weights);
        for (int r = 0; r < QUERIES_PER_WARP; r++) {
            const float score = sees[r] ? weights[r] * args.scale : -INFINITY;
            const float new_maximum = fmaxf(maximum[r], warp_reduce(score, Max()));
            const float rescale = __expf(maximum[r] - new_maximum);
            weights[r] = __expf(score - new_maximum);
            sum[r] = sum[r] * rescale + weights[r];
            for (int i = 0; i < DIMS_PER_LANE; i++) output[r][i] *= rescale;
            maximum[r] = new_maximum;
        }
#pragma unroll 4
        for (int key = 0; key < TILE_KEYS; key++) {
            for (int r = 0; r < QUERIES_PER_WARP; r++) {
                const float weight = __shfl_sync(ALL_LANES, weights[r], key);
                for (int i = 0; i < DIMS_PER_LANE; i++) output[r][i] += weight * values[key * D + i * WARP + lane];
            }
        }
    }

    for (int r = 0; r < QUERIES_PER_WARP; r++) {
        const float total = warp_reduce(sum[r], Add());
        const float factor = total == 0.f ? 0.f : 1.f / total;  // 0: the query sees nothing
        if (first_query + r >= args.num_queries) continue;
        T* row = args.output + query_offset + (first_query + r) * head_dim;
        for (int i = 0; i < DIMS_PER_LANE; i++) {
            const int dim = i * WARP + lane;
            if (dim < head_dim) row[dim] = from_float<T>(output[r][i] * factor);
        }
    }
}

template <class T, int D> int launch_masked_attention(const Arguments<T>& args, index_t num_heads, void* stream) {
    constexpr int SHARED_BYTES = (TILE_QUERIES * D + TILE_KEYS * (D + 4) + TILE_KEYS * D) * sizeof(float);
    static_assert(SHARED_BYTES <= MAX_SHARED_BYTES, "the tiles don't fit");
    cudaFuncSetAttribute(masked_attention_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    const index_t num_blocks = num_heads * ceil_div(args.num_queries, TILE_QUERIES);
    LAUNCH((masked_attention_kernel<T, D>), (unsigned)num_blocks, NUM_THREADS, SHARED_BYTES, stream)(args);
    return cudaGetLastError();
}

extern "C" int masked_attention(const void* query, const void* key, const void* value, const void* mask, void* output,
                                int dtype, index_t num_heads, index_t num_queries, index_t num_keys, index_t head_dim,
                                float scale, void* stream) {
    if (num_heads * num_queries == 0) return cudaSuccess;
    return dispatch_float(dtype, [=](auto tag) {
        typedef decltype(tag) T;
        const bool aligned = is_aligned(head_dim * sizeof(T), query, key, value);
        const Arguments<T> args = {(const T*)query, (const T*)key, (const T*)value, (const bool*)mask, (T*)output,
                                   num_queries,     num_keys,      (int)head_dim,   scale,             aligned};
        if (head_dim <= 32) return launch_masked_attention<T, 32>(args, num_heads, stream);
        if (head_dim <= 64) return launch_masked_attention<T, 64>(args, num_heads, stream);
        if (head_dim <= 128) return launch_masked_attention<T, 128>(args, num_heads, stream);
        if (head_dim <= 256) return launch_masked_attention<T, 256>(args, num_heads, stream);
        return UNSUPPORTED;
    });
}
