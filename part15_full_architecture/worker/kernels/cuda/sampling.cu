// Sampling without a sort: the limit that min-p, top-k and top-p set is found by counting, as in FlashInfer and vLLM.
//
// The tokens that these three keep are always the likeliest ones, so one number describes them: a limit for the scaled
// logits, logit / temperature. One block per row, with up to 1024 threads, which walk over the row several times:
//
//   1. The largest logit. A row with temperature 0 takes its token and is done.
//   2. top-k, if it is less than the vocabulary: the limit is the k-th largest scaled logit. It is found by a radix
//      search on the bits of the floats: 4 passes, each of which counts tokens by 8 more bits of their scaled logit.
//   3. top-p, if it is less than 1: the same search, but tokens count by their probability. 4 passes.
//   4. The draw: the argmax of weight / noise over the tokens that are left, where weight = exp(scaled - maximum) and
//      noise has the exponential distribution, is a random token with probabilities in proportion to the weights.
//
// Probabilities are added as 64-bit integers, multiples of 2^-44 of the likeliest token's. So the sum does not depend
// on the order in which the threads add, and neither does the token.
//
// Shared memory: 18.5 KiB. The counters of 256 bins, 8 copies of each: logits are so close together that most
// tokens fall into a few bins, and threads that add to the same counter at the same time wait for each other.
// Memory traffic: a row of V tokens is 4 V bytes. It is read once if the temperature is 0, else 2 to 10 times: from
// the L2 cache, after the first time.
#include "common.cuh"

typedef unsigned long long uint64;

constexpr int BIN_BITS = 8, NUM_BINS = 1 << BIN_BITS, NUM_COPIES = 8;
constexpr int COPY_SIZE = NUM_BINS + 1;     // one more, so that the copies of a counter are in different banks
constexpr float MASS_OF_LIKELIEST = 0x1p44f;   // the integer that stands for the likeliest token's probability
constexpr index_t MAX_VOCAB_SIZE = 1 << 19;    // so many of these integers add up to 2^63, which 64 bits can hold
constexpr uint64 GOLDEN_RATIO = 0x9e3779b97f4a7c15ull;  // 2^64 / φ: the step between two inputs of SplitMix64

struct Row {
    const float* logits;
    int vocab_size;
    float temperature;
};

// Calls visit(token, logit) for all tokens of the row, each in one of the block's threads. N: numbers in a pack.
template <int N, class Visit> __device__ __forceinline__ void for_each_token(const Row& row, Visit visit) {
    for (int i = threadIdx.x * N; i < row.vocab_size; i += blockDim.x * N) {
        const Pack<float, N> pack = load_pack<N>(row.logits + i);
        for (int j = 0; j < N; j++) visit(i + j, pack.values[j]);
    }
}

// An integer for each float, in the same order: a > b if and only if to_key(a) > to_key(b).
__device__ unsigned to_key(float x) {
    const unsigned bits = (unsigned)__float_as_int(x + 0.f);  // -0 + 0 is +0: both zeros get the same key
    return bits >> 31 ? ~bits : bits | 0x80000000u;           // the bits of negative numbers grow downward
}

// The result reaches every thread. All threads of the block must call this.
__device__ uint64 block_max(uint64 x) {
    __shared__ uint64 of_warp[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, num_warps = blockDim.x / WARP;
    const auto warp_max = [](uint64 largest) {
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
        }
        return largest;
    };
    x = warp_max(x);
    __syncthreads();  // an earlier call may still be reading of_warp
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_max(lane < num_warps ? of_warp[lane] : 0);
}

// The token with the largest score(token, logit); of several, the first. All threads of the block must call this.
template <int N, class Score> __device__ __forceinline__ int argmax(const Row& row, Score score) {
    uint64 best = 0;  // the key of the score in the upper half; below it ~token, which is larger for smaller tokens
    for_each_token<N>(row, [&](int token, float logit) {
        best = max(best, (uint64)to_key(score(token, logit)) << 32 | ~(unsigned)token);
    });
    return (int)~(unsigned)block_max(best);
}

// 64-bit counters as two halves: GPUs add 32-bit integers in shared memory in hardware, 64-bit ones only in a loop of
// compare and swap. A thread whose addition overflows the lower half carries to the upper one, which is rarely needed
// otherwise: only for the likeliest tokens.
struct Counters {
    unsigned lower[NUM_COPIES * COPY_SIZE], upper[NUM_COPIES * COPY_SIZE];

    __device__ void clear() {
        for (int i = threadIdx.x; i < NUM_COPIES * COPY_SIZE; i += blockDim.x) lower[i] = upper[i] = 0;
    }
    __device__ void add(unsigned bin, uint64 amount) {
        const unsigned at = threadIdx.x % NUM_COPIES * COPY_SIZE + bin, low = (unsigned)amount;
        const unsigned before = atomicAdd(&lower[at], low), carry = before + low < low;
        const unsigned high = (unsigned)(amount >> 32) + carry;
        if (high) atomicAdd(&upper[at], high);
    }
    __device__ uint64 sum_of_copies(int bin) const {
        uint64 sum = 0;
        for (int copy = 0; copy < NUM_COPIES; copy++) {
            const int at = copy * COPY_SIZE + bin;
            sum += ((uint64)upper[at] << 32) + lower[at];
        }
        return sum;
    }
};

// The shared memory of a search. The last three are what a step finds: the bin in which the target is reached,
// counted from the highest bin down, the part of the target that is left for it, and whether the target is reached.
struct Search {
    Counters counters;
    uint64 amounts[NUM_BINS];  // the counters, with their copies added up
    uint64 target_left;
    unsigned bin;
    bool is_reached;
};

// Finds the bin from search->amounts. Only the first warp calls this; each lane takes 8 neighboring bins.
template <class TargetOf> __device__ void choose_bin(Search* search, TargetOf target_of) {
    constexpr int BINS_PER_LANE = NUM_BINS / WARP;
    const int lane = threadIdx.x, begin = lane * BINS_PER_LANE;
    uint64 own = 0;
    for (int i = 0; i < BINS_PER_LANE; i++) own += search->amounts[begin + i];
    uint64 from_here = own;  // becomes the sum over this lane and all higher ones
    for (int offset = 1; offset < WARP; offset *= 2) {
        const uint64 higher = __shfl_down_sync(ALL_LANES, from_here, offset);
        if (lane + offset < WARP) from_here += higher;
    }
    const uint64 total = __shfl_sync(ALL_LANES, from_here, 0), target = target_of(total);
    if (lane == 0) search->is_reached = total >= target;
    uint64 above = from_here - own;
    if (above >= target || from_here < target) return;  // another lane has the bin
    int bin = begin + BINS_PER_LANE - 1;
    while (above + search->amounts[bin] < target) above += search->amounts[bin--];
    search->bin = bin;
    search->target_left = target - above;
}

// The largest key of a token such that all tokens from it on amount to the target. Only tokens from limit on count; if
// even all of them don't reach the target, limit stays the limit. amount_of(scaled): what a token counts.
// target_of(total): the target, where total is what all tokens amount to. All threads of the block must call this.
template <int N, class AmountOf, class TargetOf>
__device__ unsigned find_limit(const Row& row, unsigned limit, Search* search, AmountOf amount_of, TargetOf target_of) {
    constexpr int FIRST_SHIFT = 32 - BIN_BITS;
    unsigned known = 0;  // the upper bits of the result, as far as they are known, then zeros
    uint64 target = 0;   // what the tokens that agree in these bits must amount to
    for (int shift = FIRST_SHIFT; shift >= 0; shift -= BIN_BITS) {
        search->counters.clear();
        __syncthreads();
        for_each_token<N>(row, [&](int, float logit) {
            const float scaled = logit / row.temperature;
            const unsigned key = to_key(scaled), bin = (key ^ known) >> shift;
            const bool agrees = bin < NUM_BINS;  // else the known bits differ
            if (agrees && key >= limit) search->counters.add(bin, amount_of(scaled));
        });
        __syncthreads();
        for (int i = threadIdx.x; i < NUM_BINS; i += blockDim.x) {
            search->amounts[i] = search->counters.sum_of_copies(i);
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            choose_bin(search, [=](uint64 total) { return shift == FIRST_SHIFT ? target_of(total) : target; });
        }
        __syncthreads();
        if (!search->is_reached) return limit;
        known |= search->bin << shift;
        target = search->target_left;
    }
    return known;
}

// SplitMix64's output function (Steele, Lea and Flood, 2014), as in noise.py.
__device__ uint64 mix(uint64 x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

// The noise of a token, from the stream of its row: the same number as noise.py::exponential_noise, except for the last
// bit of the logarithm.
__device__ float exponential_noise(uint64 stream, int token) {
    const unsigned bits = (unsigned)(mix(stream + (token + 1) * GOLDEN_RATIO) >> 33);
    const float uniform = fminf(fmaxf(bits * 0x1p-31f, 0x1p-33f), 1.f - 0x1p-24f);  // the noise is never 0 or infinite
    return -log1pf(-uniform);
}

// logits: [num_rows, vocab_size]; token_ids and all others: [num_rows]. N: numbers in a pack; vocab_size is a multiple.
template <int N>
__global__ void __launch_bounds__(1024)
sample_kernel(const float* __restrict__ logits, const float* __restrict__ temperatures, const int* __restrict__ top_ks,
              const float* __restrict__ top_ps, const float* __restrict__ min_ps, const index_t* __restrict__ seeds,
              const index_t* __restrict__ positions, index_t* __restrict__ token_ids, int vocab_size) {
    const Row row = {logits + blockIdx.x * (index_t)vocab_size, vocab_size, temperatures[blockIdx.x]};
    const float temperature = row.temperature;
    index_t* token_id = token_ids + blockIdx.x;
    if (!(temperature > 0.f)) {
        const int greedy = argmax<N>(row, [](int, float logit) { return logit; });
        if (threadIdx.x == 0) *token_id = greedy;
        return;
    }
    const int likeliest = argmax<N>(row, [=](int, float logit) { return logit / temperature; });
    const float maximum = row.logits[likeliest] / temperature;
    if (!(fabsf(maximum) < INFINITY)) {  // there are no weights: all logits are -inf, or the temperature is tiny
        if (threadIdx.x == 0) *token_id = likeliest;
        return;
    }
    __shared__ Search search;
    unsigned limit = to_key(fmaxf(maximum + logf(min_ps[blockIdx.x]), LOWEST));  // -inf is never kept
    const int top_k = top_ks[blockIdx.x];
    if (top_k < vocab_size) {
        const auto count_one = [](float) { return (uint64)1; };
        limit = find_limit<N>(row, limit, &search, count_one, [=](uint64) { return (uint64)top_k; });
    }
    const float top_p = top_ps[blockIdx.x];
    if (top_p < 1.f) {
        const auto mass_of = [=](float scaled) { return (uint64)(expf(scaled - maximum) * MASS_OF_LIKELIEST); };
        const auto part_of = [=](uint64 total) { return (uint64)ceil(top_p * (double)total); };
        limit = find_limit<N>(row, limit, &search, mass_of, part_of);
    }
    const uint64 stream = mix(mix(seeds[blockIdx.x]) + positions[blockIdx.x] * GOLDEN_RATIO);
    const int drawn = argmax<N>(row, [=](int token, float logit) {
        const float scaled = logit / temperature;
        return to_key(scaled) < limit ? -1.f : expf(scaled - maximum) / exponential_noise(stream, token);
    });
    if (threadIdx.x == 0) *token_id = drawn;
}

extern "C" int sample(const void* logits, const void* temperatures, const void* top_k, const void* top_p,
                      const void* min_p, const void* seeds, const void* positions, void* token_ids, index_t num_rows,
                      index_t vocab_size, void* stream) {
    if (num_rows == 0) return cudaSuccess;
    if (vocab_size > MAX_VOCAB_SIZE) return UNSUPPORTED;
    const int num_per_pack = is_aligned(vocab_size * sizeof(float), logits) ? 4 : 1;
    const auto kernel = num_per_pack == 4 ? sample_kernel<4> : sample_kernel<1>;
    LAUNCH(kernel, (unsigned)num_rows, num_threads_for(vocab_size / num_per_pack, 1024), 0, stream)
    ((const float*)logits, (const float*)temperatures, (const int*)top_k, (const float*)top_p, (const float*)min_p,
     (const index_t*)seeds, (const index_t*)positions, (index_t*)token_ids, (int)vocab_size);
    return cudaGetLastError();
}
