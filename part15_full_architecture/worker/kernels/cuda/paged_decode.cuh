// What the decode kernels share: attention of one query per sequence, whether a block has the whole context or a part.
#pragma once
#include "paged_cache.cuh"

constexpr int MAX_HEAD_DIM = 256, MAX_GROUP_SIZE = 16;
constexpr int DECODE_WARPS = 4;
constexpr int MAX_BLOCK_HEADS = 8;  // query heads of a block: 16 would need all registers that a thread can have

// Blocks that a multiprocessor holds at once. The compiler limits a thread's registers accordingly: 65,536 are shared.
constexpr int resident_blocks(int num_heads) { return num_heads > 4 ? 2 : num_heads > 2 ? 3 : 4; }

// Attention over some keys, of which a lane holds VECTOR_SIZE dimensions: the result is output / sum. All exponentials
// are relative to the largest score, so that none overflows (online softmax, Milakov and Gimelshein, 2018).
struct AttentionState {
    float maximum, sum, output[VECTOR_SIZE];
};

__device__ __forceinline__ AttentionState empty_state() { return {-INFINITY, 0.f, {}}; }

// exp(x - maximum) for x <= maximum. Both are -infinity where no key was seen yet; their difference would be NaN.
__device__ __forceinline__ float exp_below(float x, float maximum) {
    return x == -INFINITY ? 0.f : __expf(x - maximum);
}

// Makes a state relative to a larger maximum.
__device__ __forceinline__ void raise_maximum(AttentionState& state, float maximum) {
    const float rescale = exp_below(state.maximum, maximum);
    state.maximum = maximum;
    state.sum *= rescale;
    for (int i = 0; i < VECTOR_SIZE; i++) state.output[i] *= rescale;
}

template <int KEYS>
__device__ __forceinline__ void add_keys(AttentionState& state, const float (&scores)[KEYS],
                                         const float (&values)[KEYS][VECTOR_SIZE]) {
    float maximum = state.maximum;
    for (int k = 0; k < KEYS; k++) maximum = fmaxf(maximum, scores[k]);
    raise_maximum(state, maximum);
    for (int k = 0; k < KEYS; k++) {
        const float weight = exp_below(scores[k], maximum);
        state.sum += weight;
        for (int i = 0; i < VECTOR_SIZE; i++) state.output[i] += weight * values[k][i];
    }
}

// Adds the keys of another state, which has seen different ones.
__device__ __forceinline__ void merge(AttentionState& state, AttentionState other) {
    const float maximum = fmaxf(state.maximum, other.maximum);
    raise_maximum(state, maximum);
    raise_maximum(other, maximum);
    state.sum += other.sum;
    for (int i = 0; i < VECTOR_SIZE; i++) state.output[i] += other.output[i];
}

// The state of the lane whose number differs in one bit.
__device__ __forceinline__ AttentionState exchange(const AttentionState& state, int bit) {
    AttentionState other;
    other.maximum = __shfl_xor_sync(ALL_LANES, state.maximum, bit);
    other.sum = __shfl_xor_sync(ALL_LANES, state.sum, bit);
    for (int i = 0; i < VECTOR_SIZE; i++) other.output[i] = __shfl_xor_sync(ALL_LANES, state.output[i], bit);
    return other;
}

// The lanes that share a key: one for every VECTOR_SIZE dimensions, rounded up to a power of two. The lanes of a warp
// form several such teams, unless a head has more than 128 dimensions.
struct Team {
    int size, index, num_teams, first_dim;
    bool has_dims;  // false for the lanes that are there only because 96 / 8 is not a power of two

    __device__ explicit Team(int head_dim) {
        const int lane = threadIdx.x % WARP;
        size = 1;
        while (size * VECTOR_SIZE < head_dim) size *= 2;
        index = lane / size, num_teams = WARP / size, first_dim = lane % size * VECTOR_SIZE;
        has_dims = first_dim < head_dim;
    }
    // The sum over the lanes of a team reaches all of them.
    template <int HEADS, int KEYS> __device__ __forceinline__ void add_up(float (&scores)[HEADS][KEYS]) const {
        for (int offset = size / 2; offset > 0; offset /= 2) {
            for (int i = 0; i < HEADS * KEYS; i++) {
                float& score = scores[i / KEYS][i % KEYS];
                score += __shfl_xor_sync(ALL_LANES, score, offset);
            }
        }
    }
};

// The queries of a block, times scale, with zeros for heads and dimensions that don't exist.
template <int HEADS> struct SharedQueries {
    float heads[HEADS][MAX_HEAD_DIM];
};

template <int HEADS>
__device__ void load_queries(SharedQueries<HEADS>& queries, const PagedBatch& batch, int seq, int first_head,
                             int num_heads) {
    const index_t start = batch.query_offset(batch.query_start_loc[seq], first_head);
    for (int i = threadIdx.x; i < HEADS * MAX_HEAD_DIM; i += DECODE_WARPS * WARP) {
        const int head = i / MAX_HEAD_DIM, dim = i % MAX_HEAD_DIM;
        float number = 0.f;
        if (head < num_heads && dim < batch.head_dim)
            number = read_number(batch.query, batch.dtype, start + head * batch.head_dim + dim) * batch.scale;
        queries.heads[head][dim] = number;
    }
}

// The products of each head with each key that a team reads.
template <int HEADS, int KEYS>
__device__ __forceinline__ void multiply_keys(const SharedQueries<HEADS>& queries, const Team& team,
                                              const float (&keys)[KEYS][VECTOR_SIZE], float (&scores)[HEADS][KEYS]) {
#pragma unroll
    for (int head = 0; head < HEADS; head++)
        for (int i = 0; i < VECTOR_SIZE; i++) {
            const float number = queries.heads[head][team.first_dim + i];
            for (int k = 0; k < KEYS; k++) scores[head][k] += number * keys[k][i];
        }
    team.add_up(scores);
}

// Puts the states of all teams and warps together. The lanes of one team call store(head, first_dim, state).
template <int HEADS, class Store>
__device__ __forceinline__ void merge_block(AttentionState (&states)[HEADS], const Team& team, int num_heads,
                                            Store store) {
    __shared__ AttentionState state_of_warp[DECODE_WARPS][WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int head = 0; head < HEADS; head++) {
        if (head >= num_heads) break;
        for (int offset = team.size; offset < WARP; offset *= 2) merge(states[head], exchange(states[head], offset));
        __syncthreads();  // the states of the head before have been read
        state_of_warp[warp][lane] = states[head];
        __syncthreads();
        if (warp == 0 && lane < team.size && team.has_dims) {
            for (int other = 1; other < DECODE_WARPS; other++) merge(states[head], state_of_warp[other][lane]);
            store(head, team.first_dim, states[head]);
        }
    }
}

// Attention of a sequence's query over the keys from first_key up to, but not including, last_key, for num_heads
// neighboring query heads, at most HEADS, that share a KV head. Warps take turns: each reads the keys and values of KEYS
// tokens per team, keeps them in registers, and uses them for all heads. store(head, first_dim, state) gets the results;
// head is counted from first_head.
//
// Loops over heads must be unrolled: an array can be in registers only if all its indices are known to the compiler.
template <class C, int HEADS, class Store>
__device__ void attend_to_keys(const PagedBatch& batch, int seq, int first_head, int num_heads, int first_key,
                               int last_key, Store store) {
    constexpr int KEYS = sizeof(C) > 2 ? 2 : 4;
    __shared__ __align__(16) SharedQueries<HEADS> queries;
    load_queries(queries, batch, seq, first_head, num_heads);
    __syncthreads();

    const int warp = threadIdx.x / WARP, kv_head = first_head / batch.group_size;
    const Team team(batch.head_dim);
    const int step = KEYS * team.num_teams, own_dim = team.has_dims ? team.first_dim : 0;
    AttentionState states[HEADS];
#pragma unroll
    for (int head = 0; head < HEADS; head++) states[head] = empty_state();

    for (int first = first_key + warp * step; first < last_key; first += DECODE_WARPS * step) {
        CacheVector<C> keys[KEYS], values[KEYS];
        for (int k = 0; k < KEYS; k++) {
            // Past the end, a lane reads the last key again: without a branch, all loads are on their way at once.
            const int position = min(first + k * team.num_teams + team.index, last_key - 1);
            const C* key = batch.key<C>(seq, position, kv_head) + own_dim;
            keys[k].load(key);
            values[k].load(key + batch.value_offset());
        }
        float scores[HEADS][KEYS] = {}, numbers[KEYS][VECTOR_SIZE];
        for (int k = 0; k < KEYS; k++) keys[k].convert(numbers[k]);
        multiply_keys(queries, team, numbers, scores);
        for (int k = 0; k < KEYS; k++) values[k].convert(numbers[k]);
#pragma unroll
        for (int head = 0; head < HEADS; head++) {
            for (int k = 0; k < KEYS; k++)
                if (first + k * team.num_teams + team.index >= last_key) scores[head][k] = -INFINITY;
            add_keys(states[head], scores[head], numbers);
        }
    }
    merge_block(states, team, num_heads, store);
}

// The query heads of a block: all of a group, or half of them if there are more than MAX_BLOCK_HEADS. (The block with
// the other half reads the same keys at about the same time, and finds most of them in the L2 cache.)
struct HeadSplit {
    int blocks_per_group, heads_per_block;

    __host__ __device__ explicit HeadSplit(int group_size) {
        blocks_per_group = (int)ceil_div(group_size, MAX_BLOCK_HEADS);
        heads_per_block = (int)ceil_div(group_size, blocks_per_group);
    }
    __device__ int first_head(int group_size, int block) const {
        return block / blocks_per_group * group_size + block % blocks_per_group * heads_per_block;
    }
    __device__ int num_heads(int group_size, int block) const {
        return min(heads_per_block, group_size - block % blocks_per_group * heads_per_block);
    }
};

// Calls launch with a number of the cache's type, and with the number of heads that a kernel is compiled for.
template <class F> int dispatch_decode(const PagedBatch& batch, int cache_dtype, F launch) {
    if (batch.head_dim % VECTOR_SIZE || batch.head_dim > MAX_HEAD_DIM || batch.group_size > MAX_GROUP_SIZE)
        return UNSUPPORTED;
    const int num_heads = HeadSplit(batch.group_size).heads_per_block;
    return dispatch_float(batch.dtype, [&](auto number) {
        return dispatch_cache<decltype(number)>(cache_dtype, [&](auto stored) {
            if (num_heads == 1) return launch(stored, std::integral_constant<int, 1>{});
            if (num_heads == 2) return launch(stored, std::integral_constant<int, 2>{});
            if (num_heads <= 4) return launch(stored, std::integral_constant<int, 4>{});
            return launch(stored, std::integral_constant<int, MAX_BLOCK_HEADS>{});
        });
    });
}
