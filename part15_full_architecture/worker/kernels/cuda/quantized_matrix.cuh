// What the two kernels for products with matrices of codes share (W8A16, W4A16): what a code means, where the codes of
// a matrix are, and the choice of a template. number = (code - zero) * scale; output = rows * matrix^T.
//
// Order of columns: byte i of a group of 4-bit codes has code i in its lower half and code i + group_size / 2 in its
// upper half (packing.py::pack_nibbles). So a run of bytes within a group has one run of columns per code in a byte.
// A sum doesn't depend on the order of its terms: the kernels keep the order of the bytes, and rows are read to match.
#pragma once
#include "common.cuh"

constexpr int CHUNK = 16;  // bytes that are loaded at once

// A byte of a word, 0 to 255, minus a zero point. GPUs convert integers to floats slowly, four times slower than they
// add. But between 2^23 and 2^24 the last bit of a float counts 1: a byte below the bits of 2^23 gives 2^23 + byte, and
// one instruction puts it there. The difference is exact.
__device__ __forceinline__ float subtract(unsigned word, int byte, float zero) {
    constexpr unsigned BITS = 0x4b000000u;  // of 2^23
    const unsigned sum = __byte_perm(word, BITS, 0x7440 + byte);  // bytes 7, 4 and 4 of the pair, then the one of word
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
