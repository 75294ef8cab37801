// Products of more than 8 rows with matrices of codes (W8A16, W4A16), on tensor cores: output = rows * matrix^T.
//
// A block of 8 warps computes a tile of 16, 32 or 64 rows and 32 or 64 outputs. It walks over the columns, a tile of
// 256 or 128 at a time. In shared memory:
//   stages   [2 or 3]: of each tile the rows, [ROWS, COLUMNS], and the codes, [OUTPUTS, BYTES]; while one is used, the
//                      next ones are on their way (cp.async)
//   numbers  [2]:      the decoded codes, [OUTPUTS, COLUMNS]; while slow warps multiply one, fast ones write the other
// A block reads the codes of its outputs once, and its rows once: rows are read out_features / OUTPUTS times in total,
// codes num_rows / ROWS times, most of that from the L2 cache.
//
// Tensor cores multiply 16-bit numbers: decoded codes are rounded to the rows' type.
#include "quantized_matrix.cuh"
using namespace nvcuda;

constexpr int RUN = 8;  // 16-bit numbers that are loaded or stored at once
constexpr int GEMM_THREADS = 256, GEMM_BLOCKS = 2;
constexpr int FRAGMENT = 16;              // a tensor core multiplies 16 x 16 numbers
constexpr int PIPELINE_BYTES = 96 << 10;  // three stages if all fits into this, else two; a block can have 99 KB

// A block's tile. A thread decodes 32 codes of it, so with fewer outputs it has more columns. Few rows: fewer outputs,
// since more blocks then have work.
template <class T, class Codes, int ROWS> struct Tile {
    static constexpr int OUTPUTS = ROWS == 64 ? 64 : 32, COLUMNS = GEMM_THREADS * 32 / OUTPUTS;
    static constexpr int BYTES = COLUMNS / Codes::PER_BYTE;  // of an output's codes
    static constexpr int CHUNKS = BYTES / CHUNK, CHUNKS_PER_THREAD = OUTPUTS * CHUNKS / GEMM_THREADS;
    static constexpr int STRIDE = COLUMNS + RUN;  // of rows: 16 bytes more spread a column's numbers over the banks
    static constexpr int STRIPS = OUTPUTS / FRAGMENT, PARTS = GEMM_THREADS / WARP / STRIPS;  // see multiply()
    static constexpr int SUMS_STRIDE = OUTPUTS + 8;

    static constexpr int ROWS_SIZE = ROWS * STRIDE * sizeof(T), CODES_SIZE = OUTPUTS * BYTES;  // in bytes
    static constexpr int STAGE_SIZE = ROWS_SIZE + CODES_SIZE, NUMBERS_SIZE = OUTPUTS * STRIDE * sizeof(T);
    static constexpr int STAGES = 3 * STAGE_SIZE + 2 * NUMBERS_SIZE <= PIPELINE_BYTES ? 3 : 2;
    static constexpr int SHARED = STAGES * STAGE_SIZE + 2 * NUMBERS_SIZE;
    static_assert(PARTS * ROWS * SUMS_STRIDE * (int)sizeof(float) <= SHARED, "the sums take the place of all of this");
};

// Where chunk i of a thread is: its output in the tile, and its first byte in the tile's bytes of that output.
// Neighboring threads have neighboring chunks.
template <class Shape> __device__ __forceinline__ void find_chunk(int i, int& output, int& byte) {
    const int chunk = threadIdx.x + i * GEMM_THREADS;
    output = chunk / Shape::CHUNKS;
    byte = chunk % Shape::CHUNKS * CHUNK;
}

// Starts to copy the rows of a tile, zeros where there are none. first_byte: of the tile's codes.
template <class T, class Codes, int ROWS, bool IS_ALIGNED>
__device__ __forceinline__ void fetch_rows(const T* rows, index_t first_row, index_t num_rows, const Matrix& matrix,
                                           int first_byte, T* to) {
    typedef Tile<T, Codes, ROWS> Shape;
    constexpr int RUNS = Shape::COLUMNS / RUN;   // of a row
    const int place = threadIdx.x % RUNS * RUN;  // in a row of the tile: the same for all that this thread copies
    const int run = place / Shape::BYTES, byte = first_byte + place % Shape::BYTES;
    const int column = matrix.template column<Codes>(byte, run);
    for (int r = threadIdx.x / RUNS; r < ROWS; r += GEMM_THREADS / RUNS) {
        T* target = to + r * Shape::STRIDE + place;
        const T* row = rows + (first_row + r) * matrix.num_columns;
        if (first_row + r >= num_rows || byte >= matrix.row_bytes) {
            *reinterpret_cast<Pack<T, RUN>*>(target) = Pack<T, RUN>{};
        } else if constexpr (IS_ALIGNED) {
            __pipeline_memcpy_async(target, row + column, RUN * sizeof(T));
        } else {
            for (int i = 0; i < RUN; i++) {
                const bool exists = byte + i < matrix.row_bytes;
                target[i] = exists ? row[matrix.template column<Codes>(byte + i, run)] : from_float<T>(0.f);
            }
        }
    }
}

// Starts to copy the codes of a tile, zeros where there are none.
template <class Shape, bool IS_ALIGNED>
__device__ __forceinline__ void fetch_codes(const Matrix& matrix, index_t first_output, int first_byte,
                                            unsigned char* to) {
#pragma unroll
    for (int i = 0; i < Shape::CHUNKS_PER_THREAD; i++) {
        int o, b;
        find_chunk<Shape>(i, o, b);
        const index_t output = first_output + o;
        const int byte = first_byte + b;
        unsigned char* target = to + o * Shape::BYTES + b;
        const unsigned char* source = matrix.codes + output * matrix.row_bytes + byte;
        if (output >= matrix.out_features || byte >= matrix.row_bytes) {
            *reinterpret_cast<Pack<unsigned, 4>*>(target) = Pack<unsigned, 4>{};
        } else if constexpr (IS_ALIGNED) {
            __pipeline_memcpy_async(target, source, CHUNK);
        } else {
            for (int j = 0; j < CHUNK; j++) target[j] = byte + j < matrix.row_bytes ? source[j] : 0;
        }
    }
}

// The scale and the zero point of a byte. Zeros outside of the matrix, so that any codes there count as 0.
__device__ __forceinline__ Affine affine_of(const Matrix& matrix, index_t output, int byte) {
    if (output >= matrix.out_features || byte >= matrix.row_bytes) return {0.f, 0.f};
    return matrix.affine(output, byte / matrix.group_bytes);
}

// The scales and zero points of a thread's chunks. They are loaded one tile ahead.
template <class Shape>
__device__ __forceinline__ void load_affine(const Matrix& matrix, index_t first_output, int first_byte,
                                            Affine (&affine)[Shape::CHUNKS_PER_THREAD]) {
#pragma unroll
    for (int i = 0; i < Shape::CHUNKS_PER_THREAD; i++) {
        int o, b;
        find_chunk<Shape>(i, o, b);
        affine[i] = affine_of(matrix, first_output + o, first_byte + b);
    }
}

// Decodes the chunks that this thread has copied itself: no barrier is needed before. Row o of numbers has the columns
// of the lower halves of all the tile's bytes, then those of the upper halves.
template <class T, class Codes, int ROWS, bool IS_ALIGNED>
__device__ __forceinline__ void decode(const unsigned char* codes, const Matrix& matrix, index_t first_output,
                                       int first_byte, const Affine* affine, T* numbers) {
    typedef Tile<T, Codes, ROWS> Shape;
#pragma unroll
    for (int i = 0; i < Shape::CHUNKS_PER_THREAD; i++) {
        int o, b;
        find_chunk<Shape>(i, o, b);
        unsigned words[CHUNK / 4];
        load_words<CHUNK>(codes + o * Shape::BYTES + b, words);
#pragma unroll
        for (int run = 0; run < Codes::PER_BYTE; run++)
#pragma unroll
            for (int first = 0; first < CHUNK; first += RUN) {
                Pack<T, RUN> pack;
#pragma unroll
                for (int j = 0; j < RUN; j++) {
                    const int byte = first + j;
                    const Affine own =
                        IS_ALIGNED ? affine[i] : affine_of(matrix, first_output + o, first_byte + b + byte);
                    const float number = Codes::number(words[byte / 4], byte % 4, run, own.zero) * own.scale;
                    pack.values[j] = from_float<T>(number);
                }
                T* target = numbers + o * Shape::STRIDE + run * Shape::BYTES + b + first;
                *reinterpret_cast<Pack<T, RUN>*>(target) = pack;
            }
    }
}

typedef wmma::fragment<wmma::accumulator, FRAGMENT, FRAGMENT, FRAGMENT, float> Sums;

// Adds the products of a tile to the sums. A warp has a strip of 16 outputs, and all rows. Several warps have the same
// strip: each has a part of the columns.
template <class T, class Codes, int ROWS>
__device__ __forceinline__ void multiply(const T* rows, const T* numbers, Sums (&sums)[ROWS / FRAGMENT]) {
    typedef Tile<T, Codes, ROWS> Shape;
    const int warp = threadIdx.x / WARP, strip = warp % Shape::STRIPS, part = warp / Shape::STRIPS;
#pragma unroll
    for (int i = 0; i < Shape::COLUMNS / FRAGMENT / Shape::PARTS; i++) {
        const int column = (i * Shape::PARTS + part) * FRAGMENT;
        wmma::fragment<wmma::matrix_b, FRAGMENT, FRAGMENT, FRAGMENT, T, wmma::col_major> right;  // transposed
        wmma::load_matrix_sync(right, numbers + strip * FRAGMENT * Shape::STRIDE + column, Shape::STRIDE);
#pragma unroll
        for (int f = 0; f < ROWS / FRAGMENT; f++) {
            wmma::fragment<wmma::matrix_a, FRAGMENT, FRAGMENT, FRAGMENT, T, wmma::row_major> left;
            wmma::load_matrix_sync(left, rows + f * FRAGMENT * Shape::STRIDE + column, Shape::STRIDE);
            wmma::mma_sync(sums[f], left, right, sums[f]);
        }
    }
}

// Adds up the parts of all warps, in shared memory, and stores what is inside of the output.
template <class T, class Codes, int ROWS>
__device__ __forceinline__ void store(const Sums (&sums)[ROWS / FRAGMENT], float* shared, T* output, index_t first_row,
                                      index_t num_rows, index_t first_output, index_t out_features) {
    typedef Tile<T, Codes, ROWS> Shape;
    constexpr int STRIDE = Shape::SUMS_STRIDE;
    const int warp = threadIdx.x / WARP, strip = warp % Shape::STRIPS, part = warp / Shape::STRIPS;
    __syncthreads();  // other warps may still be multiplying what was in this memory
#pragma unroll
    for (int f = 0; f < ROWS / FRAGMENT; f++) {
        float* target = shared + (part * ROWS + f * FRAGMENT) * STRIDE + strip * FRAGMENT;
        wmma::store_matrix_sync(target, sums[f], STRIDE, wmma::mem_row_major);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * Shape::OUTPUTS; i += GEMM_THREADS) {
        const int row = i / Shape::OUTPUTS, o = i % Shape::OUTPUTS;
        if (first_row + row >= num_rows || first_output + o >= out_features) continue;
        float sum = 0.f;
        for (int p = 0; p < Shape::PARTS; p++) sum += shared[(p * ROWS + row) * STRIDE + o];
        output[(first_row + row) * out_features + first_output + o] = from_float<T>(sum);
    }
}

// rows: [num_rows, num_columns]; output: [num_rows, out_features]. blockIdx.x: a tile of outputs; blockIdx.y: of rows.
template <class T, class Codes, int ROWS, bool IS_ALIGNED>
__global__ void __launch_bounds__(GEMM_THREADS, GEMM_BLOCKS)
gemm_kernel(const T* __restrict__ rows, const Matrix matrix, T* __restrict__ output, index_t num_rows) {
    typedef Tile<T, Codes, ROWS> Shape;
    constexpr int STAGES = Shape::STAGES, BYTES = Shape::BYTES;
    DYNAMIC_SHARED(unsigned char, shared);
    const index_t first_output = blockIdx.x * (index_t)Shape::OUTPUTS, first_row = blockIdx.y * (index_t)ROWS;
    const int num_tiles = (matrix.row_bytes + BYTES - 1) / BYTES;
    auto rows_of = [&](int tile) { return reinterpret_cast<T*>(shared + tile % STAGES * Shape::STAGE_SIZE); };
    auto codes_of = [&](int tile) { return shared + tile % STAGES * Shape::STAGE_SIZE + Shape::ROWS_SIZE; };
    auto numbers_of = [&](int tile) {
        return reinterpret_cast<T*>(shared + STAGES * Shape::STAGE_SIZE + tile % 2 * Shape::NUMBERS_SIZE);
    };
    auto fetch = [&](int tile) {
        if (tile < num_tiles) {
            fetch_rows<T, Codes, ROWS, IS_ALIGNED>(rows, first_row, num_rows, matrix, tile * BYTES, rows_of(tile));
            fetch_codes<Shape, IS_ALIGNED>(matrix, first_output, tile * BYTES, codes_of(tile));
        }
        __pipeline_commit();  // also when there is nothing: each tile has a group of copies, so they can be counted
    };

    Sums sums[ROWS / FRAGMENT];
#pragma unroll
    for (int f = 0; f < ROWS / FRAGMENT; f++) wmma::fill_fragment(sums[f], 0.f);
    Affine affine[Shape::CHUNKS_PER_THREAD], next[Shape::CHUNKS_PER_THREAD];
    load_affine<Shape>(matrix, first_output, 0, next);
    for (int tile = 0; tile < STAGES - 1; tile++) fetch(tile);
    for (int tile = 0; tile < num_tiles; tile++) {
#pragma unroll
        for (int i = 0; i < Shape::CHUNKS_PER_THREAD; i++) affine[i] = next[i];
        load_affine<Shape>(matrix, first_output, (tile + 1) * BYTES, next);
        __pipeline_wait_prior(STAGES - 2);  // until this thread's copies of this tile are there
        T* numbers = numbers_of(tile);
        decode<T, Codes, ROWS, IS_ALIGNED>(codes_of(tile), matrix, first_output, tile * BYTES, affine, numbers);
        __syncthreads();           // now all rows and numbers are there, and no warp uses the tile before this one
        fetch(tile + STAGES - 1);  // in its place
        multiply<T, Codes, ROWS>(rows_of(tile), numbers, sums);
    }
    float* parts = reinterpret_cast<float*>(shared);
    store<T, Codes, ROWS>(sums, parts, output, first_row, num_rows, first_output, matrix.out_features);
}

template <class T, class Codes, int ROWS, bool IS_ALIGNED>
int launch_gemm(const void* rows, const Matrix& matrix, void* output, index_t num_rows, void* stream) {
    typedef Tile<T, Codes, ROWS> Shape;
    const dim3 grid((unsigned)ceil_div(matrix.out_features, Shape::OUTPUTS), (unsigned)ceil_div(num_rows, ROWS));
    auto* kernel = gemm_kernel<T, Codes, ROWS, IS_ALIGNED>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::SHARED);
    LAUNCH(kernel, grid, GEMM_THREADS, Shape::SHARED, stream)((const T*)rows, matrix, (T*)output, num_rows);
    return cudaGetLastError();
}

// Any number of rows of float16 or bfloat16.
extern "C" int quantized_gemm(const void* rows, const void* codes, const void* scale, const void* zero, void* output,
                              int dtype, int code_type, index_t codes_per_byte, index_t num_rows, index_t out_features,
                              index_t num_groups, index_t group_size, void* stream) {
    const Matrix matrix = make_matrix(codes, scale, zero, codes_per_byte, out_features, num_groups, group_size);
    return dispatch_float(dtype, [=](auto number) {
        return dispatch_codes(code_type, codes_per_byte, [=](auto code) {
            typedef decltype(number) T;
            typedef decltype(code) Codes;
            if constexpr (sizeof(T) == 2) {
                if (!is_aligned(rows, matrix))
                    return launch_gemm<T, Codes, 32, false>(rows, matrix, output, num_rows, stream);
                if (num_rows <= 16) return launch_gemm<T, Codes, 16, true>(rows, matrix, output, num_rows, stream);
                if (num_rows <= 32) return launch_gemm<T, Codes, 32, true>(rows, matrix, output, num_rows, stream);
                return launch_gemm<T, Codes, 64, true>(rows, matrix, output, num_rows, stream);
            }
            return UNSUPPORTED;
        });
    });
}
