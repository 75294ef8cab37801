// Grouped products, for a mixture of experts: the first counts[0] rows times weight[0], the next counts[1] rows times
// weight[1], and so on, in one launch, without the host knowing the counts.
//
// A block computes a tile: up to ROWS rows of one group, times 64 outputs. Blocks with blockIdx.x = 0, 1, ... take the
// tiles of the first group, then those of the second, and so on. How many a group has depends on its count; the host
// knows a limit, and launches as many blocks as there can be. A block finds its group in tile_ends, the number of tiles
// up to the end of each group; the blocks that are left over return at once. Example: counts 20, 0, 5 and ROWS = 16:
// tile_ends are 2, 2, 3. Tile 2 comes after the ends of two groups, so it belongs to group 2, and is its first.
//
// ROWS is 16, 32 or 64, from the mean number of rows of a group: a tile takes as long with 1 row as with all.
//
// tensor_core_kernel, for float16 and bfloat16: 4 warps; each has 16 outputs and all rows. It walks over the columns,
// 64 at a time. In shared memory, 3 stages, each with the rows, [ROWS, 64], and the weights, [64, 64]: one is used, two
// are on their way (cp.async). Rows are padded from 64 to 72 numbers, which spreads a column over the banks.
// fp32_kernel: 256 threads; each has 4 outputs of ROWS / 16 rows. Tiles of 32 columns in shared memory, no pipeline.
//
// A block reads ROWS * in_features numbers of rows and 64 * in_features of weights. With few rows per group, the time
// is that of reading the weights, once: out_features * in_features numbers for each group that has rows.
#include "common.cuh"
using namespace nvcuda;

constexpr int OUTPUTS = 64;  // of a tile

// The sizes of the tensors, and where groups end.
struct Problem {
    const index_t* row_ends;   // [num_groups]: rows up to the end of each group
    const index_t* tile_ends;  // [num_groups]: tiles of ROWS rows up to the end of each group
    index_t num_groups, out_features, in_features;
};

// What a block has: some rows of a group.
struct Tile {
    index_t group, first_row;
    int num_rows;  // 0: nothing
};

// All threads of the block must call this. Each looks at other groups; together they count those that end before.
template <int ROWS> __device__ __forceinline__ Tile find_tile(const Problem& problem, index_t tile) {
    index_t group = 0;
    for (index_t first = 0; first < problem.num_groups; first += blockDim.x) {
        const index_t g = first + threadIdx.x;
        group += __syncthreads_count(g < problem.num_groups && problem.tile_ends[g] <= tile);
    }
    if (group == problem.num_groups) return {group, 0, 0};
    const index_t first_tile = group ? problem.tile_ends[group - 1] : 0;
    const index_t group_start = group ? problem.row_ends[group - 1] : 0;
    const index_t first_row = group_start + (tile - first_tile) * ROWS;
    return {group, first_row, (int)min((index_t)ROWS, problem.row_ends[group] - first_row)};
}

// ---- tensor cores

constexpr int THREADS = 128, FRAGMENT = 16;  // a tensor core multiplies 16 x 16 numbers
constexpr int COLUMNS = 64, RUN = 8;         // numbers that are loaded at once: 16 bytes
constexpr int STRIDE = COLUMNS + RUN, SUMS_STRIDE = OUTPUTS + 8, STAGES = 3;

template <int ROWS> constexpr int STAGE_SIZE = (ROWS + OUTPUTS) * STRIDE;  // in numbers

// Starts to copy COLUMNS columns of SIZE rows of a matrix, zeros where there are none.
template <class T, int SIZE, bool IS_ALIGNED>
__device__ __forceinline__ void fetch_tile(const T* matrix, index_t num_rows, index_t num_columns, index_t first_column,
                                           T* to) {
    constexpr int RUNS = COLUMNS / RUN;  // of a row
    static_assert(SIZE * RUNS % THREADS == 0, "all threads copy equally many runs");
#pragma unroll
    for (int i = 0; i < SIZE * RUNS / THREADS; i++) {
        const int row = (threadIdx.x + i * THREADS) / RUNS, place = threadIdx.x % RUNS * RUN;
        const index_t column = first_column + place;
        T* target = to + row * STRIDE + place;
        const T* source = matrix + row * num_columns + column;
        if (row >= num_rows || column >= num_columns) {
            *reinterpret_cast<Pack<T, RUN>*>(target) = Pack<T, RUN>{};
        } else if constexpr (IS_ALIGNED) {
            __pipeline_memcpy_async(target, source, RUN * sizeof(T));
        } else {
            for (int j = 0; j < RUN; j++) target[j] = column + j < num_columns ? source[j] : from_float<T>(0.f);
        }
    }
}

typedef wmma::fragment<wmma::accumulator, FRAGMENT, FRAGMENT, FRAGMENT, float> Sums;

// Adds the products of a tile's rows with this warp's 16 outputs to the sums.
template <class T, int ROWS>
__device__ __forceinline__ void multiply(const T* rows, const T* weight, Sums (&sums)[ROWS / FRAGMENT]) {
    const int warp = threadIdx.x / WARP;
#pragma unroll
    for (int column = 0; column < COLUMNS; column += FRAGMENT) {
        wmma::fragment<wmma::matrix_b, FRAGMENT, FRAGMENT, FRAGMENT, T, wmma::col_major> right;  // transposed
        wmma::load_matrix_sync(right, weight + warp * FRAGMENT * STRIDE + column, STRIDE);
#pragma unroll
        for (int f = 0; f < ROWS / FRAGMENT; f++) {
            wmma::fragment<wmma::matrix_a, FRAGMENT, FRAGMENT, FRAGMENT, T, wmma::row_major> left;
            wmma::load_matrix_sync(left, rows + f * FRAGMENT * STRIDE + column, STRIDE);
            wmma::mma_sync(sums[f], left, right, sums[f]);
        }
    }
}

// rows: [n, in_features]; weight: [num_groups, out_features, in_features]; output: [n, out_features].
template <class T, int ROWS, bool IS_ALIGNED>
__global__ void __launch_bounds__(THREADS)
tensor_core_kernel(const T* __restrict__ rows, const T* __restrict__ weight, T* __restrict__ output,
                   const Problem problem) {
    DYNAMIC_SHARED(unsigned char, shared);
    const Tile tile = find_tile<ROWS>(problem, blockIdx.x);
    if (tile.num_rows == 0) return;
    const index_t first_output = blockIdx.y * (index_t)OUTPUTS, num_outputs = problem.out_features - first_output;
    const index_t in_features = problem.in_features;
    rows += tile.first_row * in_features;
    weight += (tile.group * problem.out_features + first_output) * in_features;
    output += tile.first_row * problem.out_features + first_output;
    const int num_steps = (int)((in_features + COLUMNS - 1) / COLUMNS);
    auto rows_of = [&](int step) { return reinterpret_cast<T*>(shared) + step % STAGES * STAGE_SIZE<ROWS>; };
    auto weight_of = [&](int step) { return rows_of(step) + ROWS * STRIDE; };
    auto fetch = [&](int step) {
        if (step < num_steps) {
            const index_t column = step * (index_t)COLUMNS;
            fetch_tile<T, ROWS, IS_ALIGNED>(rows, tile.num_rows, in_features, column, rows_of(step));
            fetch_tile<T, OUTPUTS, IS_ALIGNED>(weight, num_outputs, in_features, column, weight_of(step));
        }
        __pipeline_commit();  // also when there is nothing: each step has a group of copies, so they can be counted
    };

    Sums sums[ROWS / FRAGMENT];
#pragma unroll
    for (int f = 0; f < ROWS / FRAGMENT; f++) wmma::fill_fragment(sums[f], 0.f);
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < num_steps; step++) {
        __pipeline_wait_prior(STAGES - 2);  // until this thread's copies of this step are there
        __syncthreads();                    // now those of all threads are, and no warp uses the step before this one
        fetch(step + STAGES - 1);           // in its place
        multiply<T, ROWS>(rows_of(step), weight_of(step), sums);
    }

    __syncthreads();  // other warps may still be multiplying what is in this memory
    float* result = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int f = 0; f < ROWS / FRAGMENT; f++) {
        float* target = result + f * FRAGMENT * SUMS_STRIDE + threadIdx.x / WARP * FRAGMENT;
        wmma::store_matrix_sync(target, sums[f], SUMS_STRIDE, wmma::mem_row_major);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile.num_rows * OUTPUTS; i += THREADS) {
        const int row = i / OUTPUTS, o = i % OUTPUTS;
        if (o < num_outputs) output[row * problem.out_features + o] = from_float<T>(result[row * SUMS_STRIDE + o]);
    }
}

// ---- float32

constexpr int FP32_THREADS = 256, FP32_COLUMNS = 32;
constexpr int SIDE = 16;                    // threads are a square: 16 x 16
constexpr int PER_THREAD = OUTPUTS / SIDE;  // outputs

// Copies FP32_COLUMNS columns of SIZE rows of a matrix, zeros where there are none. Neighboring threads copy neighbors.
template <int SIZE>
__device__ __forceinline__ void load_tile(const float* matrix, index_t num_rows, index_t num_columns,
                                          index_t first_column, float (&to)[SIZE][FP32_COLUMNS + 1]) {
    for (int i = threadIdx.x; i < SIZE * FP32_COLUMNS; i += FP32_THREADS) {
        const int row = i / FP32_COLUMNS, place = i % FP32_COLUMNS;
        const bool exists = row < num_rows && first_column + place < num_columns;
        to[row][place] = exists ? matrix[row * num_columns + first_column + place] : 0.f;
    }
}

// The same as tensor_core_kernel, with a thread for every 16th row and every 16th output of the tile.
template <int ROWS>
__global__ void __launch_bounds__(FP32_THREADS)
fp32_kernel(const float* __restrict__ rows, const float* __restrict__ weight, float* __restrict__ output,
            const Problem problem) {
    __shared__ float row_tile[ROWS][FP32_COLUMNS + 1];  // one more: a column's numbers are in different banks
    __shared__ float weight_tile[OUTPUTS][FP32_COLUMNS + 1];
    const Tile tile = find_tile<ROWS>(problem, blockIdx.x);
    if (tile.num_rows == 0) return;
    const index_t first_output = blockIdx.y * (index_t)OUTPUTS, num_outputs = problem.out_features - first_output;
    const index_t in_features = problem.in_features;
    rows += tile.first_row * in_features;
    weight += (tile.group * problem.out_features + first_output) * in_features;
    output += tile.first_row * problem.out_features + first_output;
    const int own_output = threadIdx.x % SIDE, own_row = threadIdx.x / SIDE;

    float sums[ROWS / SIDE][PER_THREAD] = {};
    for (index_t column = 0; column < in_features; column += FP32_COLUMNS) {
        __syncthreads();  // other threads may still be using the tiles before
        load_tile(rows, tile.num_rows, in_features, column, row_tile);
        load_tile(weight, num_outputs, in_features, column, weight_tile);
        __syncthreads();
#pragma unroll 4
        for (int c = 0; c < FP32_COLUMNS; c++) {
#pragma unroll
            for (int i = 0; i < ROWS / SIDE; i++)
#pragma unroll
                for (int j = 0; j < PER_THREAD; j++)
                    sums[i][j] += row_tile[own_row + i * SIDE][c] * weight_tile[own_output + j * SIDE][c];
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS / SIDE; i++)
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++) {
            const int row = own_row + i * SIDE, o = own_output + j * SIDE;
            if (row < tile.num_rows && o < num_outputs) output[row * problem.out_features + o] = sums[i][j];
        }
}

// ---- launchers

template <class T, int ROWS>
int launch(const void* rows, const void* weight, void* output, const Problem& problem, index_t num_rows, void* stream) {
    // Each group has at most one tile that isn't full.
    const dim3 grid((unsigned)(num_rows / ROWS + min(problem.num_groups, num_rows)),
                    (unsigned)((problem.out_features + OUTPUTS - 1) / OUTPUTS));
    if constexpr (sizeof(T) == 4) {
        LAUNCH((fp32_kernel<ROWS>), grid, FP32_THREADS, 0, stream)
        ((const T*)rows, (const T*)weight, (T*)output, problem);
    } else {
        constexpr int SHARED = STAGES * STAGE_SIZE<ROWS> * sizeof(T);
        static_assert(ROWS * SUMS_STRIDE * (int)sizeof(float) <= SHARED, "the sums take the place of the stages");
        const bool is_aligned = problem.in_features % RUN == 0 && ((uintptr_t)rows | (uintptr_t)weight) % 16 == 0;
        auto* kernel = is_aligned ? tensor_core_kernel<T, ROWS, true> : tensor_core_kernel<T, ROWS, false>;
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
        LAUNCH(kernel, grid, THREADS, SHARED, stream)((const T*)rows, (const T*)weight, (T*)output, problem);
    }
    return cudaGetLastError();
}

// row_ends, tile_ends: see Problem; tile_rows: the number of rows that tile_ends counts with, 16, 32 or 64.
extern "C" int grouped_linear(const void* rows, const void* weight, const void* row_ends, const void* tile_ends,
                              void* output, int dtype, index_t num_rows, index_t num_groups, index_t out_features,
                              index_t in_features, index_t tile_rows, void* stream) {
    const Problem problem = {(const index_t*)row_ends, (const index_t*)tile_ends, num_groups, out_features,
                             in_features};
    return dispatch_float(dtype, [=](auto number) {
        typedef decltype(number) T;
        switch (tile_rows) {
            case 16: return launch<T, 16>(rows, weight, output, problem, num_rows, stream);
            case 32: return launch<T, 32>(rows, weight, output, problem, num_rows, stream);
            case 64: return launch<T, 64>(rows, weight, output, problem, num_rows, stream);
        }
        return UNSUPPORTED;
    });
}
