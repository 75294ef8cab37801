// Products of up to 8 rows with matrices of codes (W8A16, W4A16): output = rows * matrix^T.
//
// With few rows, as in decode, the time is that of reading the codes, so each should be read once. For 1 row and a
// 4096 x 4096 matrix of 4-bit codes in groups of 128: 8.4 MB of codes, 0.5 MB of scales, and 16 KB of the row and the
// outputs, for 34 MFLOP. That is less than 4 FLOP per byte; an H100 can do 20 of float32, or 300 on tensor cores.
//
// No shared memory. A warp computes 2 outputs for all rows. Its lanes read neighboring chunks of 16 bytes, decode them
// in registers, and add up the products in float32; then the lanes' sums are added. Numbers stay in float32.
#include "quantized_matrix.cuh"

constexpr int GEMV_THREADS = 128, GEMV_OUTPUTS = 2;  // outputs of a warp: rows are loaded and converted once for both
constexpr int GEMV_BLOCKS = 4;  // of a multiprocessor, at least: up to 128 registers for a thread, so that none spills

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

template <class T, class Codes, int ROWS, int BYTES>
int launch_gemv(const void* rows, const Matrix& matrix, void* output, index_t num_rows, void* stream) {
    constexpr int BLOCK_OUTPUTS = GEMV_THREADS / WARP * GEMV_OUTPUTS;
    const dim3 grid((unsigned)ceil_div(matrix.out_features, BLOCK_OUTPUTS), (unsigned)ceil_div(num_rows, ROWS));
    LAUNCH((gemv_kernel<T, Codes, ROWS, BYTES>), grid, GEMV_THREADS, 0, stream)
    ((const T*)rows, matrix, (T*)output, num_rows);
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
