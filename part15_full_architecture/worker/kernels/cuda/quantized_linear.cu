// Products with matrices of codes (W8A16, W4A16): output = rows * matrix^T, where number = (code - zero) * scale.
//
// With few rows, as in decode, the time is that of reading the codes, so each should be read once. For 1 row and a
// 4096 x 4096 matrix of 4-bit codes in groups of 128: 8.4 MB of codes, 0.5 MB of scales, and 16 KB of the row and the
// outputs, for 34 MFLOP. That is less than 4 FLOP per byte; an H100 can do 20 of float32, or 300 on tensor cores.
//
// gemv_kernel, for up to 8 rows: no shared memory. A warp computes 2 outputs for all rows. Its lanes read neighboring
// chunks of 16 bytes, decode them in registers, and add up the products in float32; then the lanes' sums are added.
//
// gemm_kernel, for more rows: tensor cores. A block of 8 warps computes a tile of 16, 32 or 64 rows and 32 or 64
// outputs. It walks over the columns, a tile of 256 or 128 at a time. In shared memory:
//   stages   [2 or 3]: of each tile the rows, [ROWS, COLUMNS], and the codes, [OUTPUTS, BYTES]; while one is used, the
//                      next ones are on their way (cp.async)
//   numbers  [2]:      the decoded codes, [OUTPUTS, COLUMNS]; while slow warps multiply one, fast ones write the other
// A block reads the codes of its outputs once, and its rows once: rows are read out_features / OUTPUTS times in total,
// codes num_rows / ROWS times, most of that from the L2 cache.
//
// Order of columns: byte i of a group of 4-bit codes has code i in its lower half and code i + group_size / 2 in its
// upper half (packing.py::pack_nibbles). So a run of bytes within a group has one run of columns per code in a byte.
// A sum doesn't depend on the order of its terms: the tiles keep the order of the bytes, and rows are read to match.
//
// In the first kernel, numbers stay in float32. In the second they are rounded to the rows' type, for the tensor cores.
#include "common.cuh"
using namespace nvcuda;

constexpr int CHUNK = 16;  // bytes that are loaded at once
constexpr int RUN = 8;     // 16-bit numbers that are loaded or stored at once

// ---- codes

// A byte of a word, 0 to 255, minus a zero point. GPUs convert integers to floats slowly, four times slower than they
// add. But between 2^23 and 2^24 the last bit of a float counts 1: a byte below the bits of 2^23 gives 2^23 + byte, and
// one instruction puts it there. The difference is exact.
__device__ __forceinline__ float subtract(unsigned word, int byte, float zero) {
    constexpr unsigned BITS = 0x4b000000u;  // of 2^23
#ifdef __CUDACC__
    const unsigned sum = __byte_perm(word, BITS, 0x7440 + byte);  // bytes 7, 4 and 4 of the pair, then the one of word
#else
    const unsigned sum = BITS | (word >> 8 * byte & 0xffu);
#endif
    return __int_as_float((int)sum) - (0x1p23f + zero);
}

// What a byte of codes means. number: code - zero, of a byte in a word of 4, and of a run if a byte has two codes.
struct Int4 {
    static constexpr int PER_BYTE = 2;
    static __device__ __forceinline__ float number(unsigned word, int byte, int run, float zero) {
        return subtract(word >> 4 * run & 0x0f0f0f0fu, byte, 8.f + zero);  // codes are stored plus 8
    }
};
struct Int8 {
    static constexpr int PER_BYTE = 1;
    static __device__ __forceinline__ float number(unsigned word, int byte, int, float zero) {
        return subtract(word ^ 0x80808080u, byte, 128.f + zero);  // the other sign bit: plus 128
    }
};
struct Fp8 {
    static constexpr int PER_BYTE = 1;
    static __device__ __forceinline__ float number(unsigned word, int byte, int, float) {
        return to_float(fp8_t{(unsigned char)(word >> 8 * byte)});
    }
};

struct Affine {
    float scale, zero;
};

struct Matrix {
    const unsigned char* codes;  // [out_features, row_bytes]
    const float* scale;          // [out_features, num_groups]
    const signed char* zero;     // the same shape, or null: all are 0
    index_t out_features, num_columns;
    int num_groups, group_bytes, row_bytes;

    // The scale and the zero point of a group.
    __device__ __forceinline__ Affine affine(index_t output, int group) const {
        const index_t place = output * num_groups + group;
        return {scale[place], zero ? to_float(zero[place]) : 0.f};
    }

    // The column of a byte's code: of its lower half (run 0) or its upper half (run 1), if it has two.
    template <class Codes> __device__ __forceinline__ int column(int byte, int run) const {
        return Codes::PER_BYTE == 2 ? byte + (byte / group_bytes + run) * group_bytes : byte;
    }
};

// ---- few rows

constexpr int GEMV_THREADS = 128, GEMV_OUTPUTS = 2;  // outputs of a warp: rows are loaded and converted once for both
constexpr int GEMV_BLOCKS = 4;  // of a multiprocessor, at least: up to 128 registers for a thread, so that none spills

// BYTES bytes, as words of 4.
template <int BYTES>
__device__ __forceinline__ void load_words(const unsigned char* from, unsigned (&words)[(BYTES + 3) / 4]) {
    if constexpr (BYTES == CHUNK) {
        const Pack<unsigned, 4> pack = *reinterpret_cast<const Pack<unsigned, 4>*>(from);
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = pack.values[i];
    } else {
        static_assert(BYTES == 1, "a chunk, or a single byte");
        words[0] = *from;
    }
}

// SIZE neighboring numbers, with as few instructions as possible.
template <class T, int SIZE> __device__ __forceinline__ void load_floats(const T* from, float (&to)[SIZE]) {
    constexpr int N = SIZE * sizeof(T) < 16 ? SIZE : 16 / sizeof(T);
#pragma unroll
    for (int first = 0; first < SIZE; first += N) {
        const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from + first);
#pragma unroll
        for (int i = 0; i < N; i++) to[first + i] = to_float(pack.values[i]);
    }
}

// What a lane has of the matrix at a time: BYTES bytes of each of its outputs. BYTES: 16, or 1 without alignment.
template <int BYTES> struct Chunk {
    unsigned words[GEMV_OUTPUTS][(BYTES + 3) / 4];
    Affine affine[GEMV_OUTPUTS];

    __device__ __forceinline__ void load(const Matrix& matrix, index_t first_output, int byte) {
        const int group = byte / matrix.group_bytes;
#pragma unroll
        for (int o = 0; o < GEMV_OUTPUTS; o++) {
            const index_t output = min(first_output + o, matrix.out_features - 1);  // what is read twice isn't stored
            load_words<BYTES>(matrix.codes + output * matrix.row_bytes + byte, words[o]);
            affine[o] = matrix.affine(output, group);
        }
    }
};

// Adds the products of a chunk with rows to the sums. columns: in the first row, of the chunk's run 0.
template <class T, class Codes, int ROWS, int BYTES>
__device__ __forceinline__ void add_products(const Chunk<BYTES>& chunk, const T* columns, int num_rows,
                                             const Matrix& matrix, float (&sums)[GEMV_OUTPUTS][ROWS]) {
#pragma unroll
    for (int run = 0; run < Codes::PER_BYTE; run++) {
        float numbers[GEMV_OUTPUTS][BYTES];
#pragma unroll
        for (int o = 0; o < GEMV_OUTPUTS; o++)
#pragma unroll
            for (int b = 0; b < BYTES; b++)
                numbers[o][b] = Codes::number(chunk.words[o][b / 4], b % 4, run, chunk.affine[o].zero);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (ROWS > 1 && row >= num_rows) break;  // the same for all threads
            float x[BYTES];
            load_floats(columns + row * matrix.num_columns + run * matrix.group_bytes, x);
#pragma unroll
            for (int o = 0; o < GEMV_OUTPUTS; o++) {
                float sum = 0.f;
#pragma unroll
                for (int b = 0; b < BYTES; b++) sum += x[b] * numbers[o][b];
                sums[o][row] += sum * chunk.affine[o].scale;  // once instead of 16 times
            }
        }
    }
}

// rows: [num_rows, num_columns]; output: [num_rows, out_features]. blockIdx.x: outputs; blockIdx.y: ROWS rows.
template <class T, class Codes, int ROWS, int BYTES>
__global__ void __launch_bounds__(GEMV_THREADS, GEMV_BLOCKS)
gemv_kernel(const T* __restrict__ rows, const Matrix matrix, T* __restrict__ output, index_t num_rows) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const index_t first_output = (blockIdx.x * (index_t)(GEMV_THREADS / WARP) + warp) * GEMV_OUTPUTS;
    const index_t first_row = blockIdx.y * (index_t)ROWS;
    if (first_output >= matrix.out_features) return;  // all lanes of a warp return together
    rows += first_row * matrix.num_columns;
    const int rows_here = (int)min((index_t)ROWS, num_rows - first_row);

    float sums[GEMV_OUTPUTS][ROWS] = {};
    const int last = matrix.row_bytes - BYTES;  // past it, the last chunk is loaded again, and not used
    Chunk<BYTES> next;
    next.load(matrix, first_output, min(lane * BYTES, last));
    for (int byte = lane * BYTES; byte <= last; byte += WARP * BYTES) {
        const Chunk<BYTES> chunk = next;  // the next one is on its way while this one is used
        next.load(matrix, first_output, min(byte + WARP * BYTES, last));
        const T* columns = rows + matrix.template column<Codes>(byte, 0);
        add_products<T, Codes, ROWS, BYTES>(chunk, columns, rows_here, matrix, sums);
    }
#pragma unroll
    for (int o = 0; o < GEMV_OUTPUTS; o++)
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            const float sum = warp_reduce(sums[o][row], Add());
            if (lane == 0 && row < rows_here && first_output + o < matrix.out_features)
                output[(first_row + row) * matrix.out_features + first_output + o] = from_float<T>(sum);
        }
}

// ---- more rows

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

// ---- launchers

inline unsigned cdiv(index_t a, index_t b) { return (unsigned)((a + b - 1) / b); }

inline Matrix make_matrix(const void* codes, const void* scale, const void* zero, index_t codes_per_byte,
                          index_t out_features, index_t num_groups, index_t group_size) {
    const index_t group_bytes = group_size / codes_per_byte;
    return {(const unsigned char*)codes, (const float*)scale,       (const signed char*)zero,
            out_features,                num_groups * group_size,   (int)num_groups,
            (int)group_bytes,            (int)(num_groups * group_bytes)};
}

// Whether all chunks of codes, and the runs of rows beside them, are aligned to 16 bytes, and each is in one group.
inline bool is_aligned(const void* rows, const Matrix& matrix) {
    return matrix.group_bytes % CHUNK == 0 && ((uintptr_t)matrix.codes | (uintptr_t)rows) % 16 == 0;
}

// Calls launch with a value of the type that decodes the codes. code_type: INT8, for integers of 8 or 4 bits, or FP8.
template <class F> int dispatch_codes(int code_type, index_t codes_per_byte, F launch) {
    if constexpr (is_compiled(INT8, ONLY_CACHE_DTYPE)) {  // the second dtype of a call: see common.cuh
        if (code_type == INT8 && codes_per_byte == 2) return launch(Int4{});
        if (code_type == INT8 && codes_per_byte == 1) return launch(Int8{});
    }
    if constexpr (is_compiled(FP8, ONLY_CACHE_DTYPE)) {
        if (code_type == FP8 && codes_per_byte == 1) return launch(Fp8{});
    }
    return UNSUPPORTED;
}

template <class T, class Codes, int ROWS, int BYTES>
int launch_gemv(const void* rows, const Matrix& matrix, void* output, index_t num_rows, void* stream) {
    const dim3 grid(cdiv(matrix.out_features, GEMV_THREADS / WARP * GEMV_OUTPUTS), cdiv(num_rows, ROWS));
    LAUNCH((gemv_kernel<T, Codes, ROWS, BYTES>), grid, GEMV_THREADS, 0, stream)
    ((const T*)rows, matrix, (T*)output, num_rows);
    return cudaGetLastError();
}

template <class T, class Codes, int ROWS, bool IS_ALIGNED>
int launch_gemm(const void* rows, const Matrix& matrix, void* output, index_t num_rows, void* stream) {
    typedef Tile<T, Codes, ROWS> Shape;
    const dim3 grid(cdiv(matrix.out_features, Shape::OUTPUTS), cdiv(num_rows, ROWS));
    auto* kernel = gemm_kernel<T, Codes, ROWS, IS_ALIGNED>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::SHARED);
    LAUNCH(kernel, grid, GEMM_THREADS, Shape::SHARED, stream)((const T*)rows, matrix, (T*)output, num_rows);
    return cudaGetLastError();
}

// Any number of rows, of float32 too: 8 at a time. dtype: of rows and output.
extern "C" int quantized_gemv(const void* rows, const void* codes, const void* scale, const void* zero, void* output,
                              int dtype, int code_type, index_t codes_per_byte, index_t num_rows, index_t out_features,
                              index_t num_groups, index_t group_size, void* stream) {
    const Matrix matrix = make_matrix(codes, scale, zero, codes_per_byte, out_features, num_groups, group_size);
    return dispatch_float(dtype, [=](auto number) {
        return dispatch_codes(code_type, codes_per_byte, [=](auto code) {
            typedef decltype(number) T;
            typedef decltype(code) Codes;
            if (!is_aligned(rows, matrix)) return launch_gemv<T, Codes, 8, 1>(rows, matrix, output, num_rows, stream);
            if (num_rows == 1) return launch_gemv<T, Codes, 1, CHUNK>(rows, matrix, output, num_rows, stream);
            if (num_rows <= 4) return launch_gemv<T, Codes, 4, CHUNK>(rows, matrix, output, num_rows, stream);
            return launch_gemv<T, Codes, 8, CHUNK>(rows, matrix, output, num_rows, stream);
        });
    });
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
