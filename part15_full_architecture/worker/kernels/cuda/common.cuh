// What all kernels share: number types, 16-byte loads, reductions, and the choice of a template by a dtype code.
#pragma once
#include "cuda_on_cpu/cuda_on_cpu.h"

enum DType { FLOAT32, FLOAT16, BFLOAT16, INT8, FP8 };  // library.py::DTYPE_CODES
constexpr int UNSUPPORTED = -1;                        // library.py::UNSUPPORTED
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;
constexpr int MAX_SHARED_BYTES = 99 << 10;  // of a block, on every GPU from compute capability 8.0 on
constexpr float LOWEST = -3.402823466e38f;  // the lowest finite number: exp(-inf - LOWEST) is 0, exp(-inf + inf) NaN

typedef __half half_t;
typedef __nv_bfloat16 bfloat_t;
typedef long long index_t;  // sizes and offsets: an int overflows at 2^31 elements

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat_t x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float(float x) { return x; }
template <> __device__ __forceinline__ half_t from_float(float x) { return __float2half(x); }
template <> __device__ __forceinline__ bfloat_t from_float(float x) { return __float2bfloat16(x); }

// FP8 in the e4m3 format: a sign, 4 bits of exponent with bias 7, 3 of mantissa. It has no infinity; 0x7f is NaN.
struct fp8_t {
    unsigned char bits;
};

__device__ __forceinline__ float to_float(signed char x) { return x; }

// The bits take their place in a float, whose exponent has bias 127: the product with 2^(127 - 7) corrects for that,
// for subnormal numbers too.
__device__ __forceinline__ float to_float(fp8_t x) {
    const unsigned sign = (x.bits & 0x80u) << 24, magnitude = x.bits & 0x7fu;
    if (magnitude == 0x7f) return NAN;
    return __int_as_float((int)(sign | magnitude << 20)) * 0x1p120f;
}

// Rounds to the nearest even code, and clamps: the smallest code is -127, not -128, so that the codes are symmetric.
template <> __device__ __forceinline__ signed char from_float(float x) {
    if (x != x) return 0;
    return (signed char)rintf(fminf(fmaxf(x, -127.f), 127.f));
}

// Rounds to the nearest, ties to even; numbers above 448, the largest, become 448.
template <> __device__ __forceinline__ fp8_t from_float(float x) {
    constexpr unsigned NAN_CODE = 0x7f, INFINITE = 0x7f800000, SMALLEST_NORMAL = 0x3c800000;  // the last is 2^-6
    const unsigned bits = (unsigned)__float_as_int(x), sign = bits >> 24 & 0x80u;
    if ((bits & 0x7fffffffu) > INFINITE) return {(unsigned char)(sign | NAN_CODE)};
    const float clamped = fminf(fabsf(x), 448.f);
    unsigned magnitude = (unsigned)__float_as_int(clamped);
    if (magnitude < SMALLEST_NORMAL) {
        // Subnormal codes are multiples of 2^-9, as far apart as floats from 2^14 on: the addition rounds.
        magnitude = (unsigned)(__float_as_int(clamped + 0x1p14f) - __float_as_int(0x1p14f));
    } else {
        magnitude += 0x7ffff + (magnitude >> 20 & 1);  // half of the last bit that stays, less one if that bit is even
        magnitude = (magnitude >> 20) - ((127 - 7) << 3);
    }
    return {(unsigned char)(sign | magnitude)};
}

// N numbers that are loaded and stored with one instruction; N * sizeof(T) is 4, 8 or 16.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T values[N];
};

template <int N, class T> __device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <class T, int N> __device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Whether rows of row_bytes bytes that begin at these addresses can be read and written in packs of 16 bytes.
template <class... P> bool is_aligned(index_t row_bytes, const P*... rows) {
    return (row_bytes % 16 == 0) && (((size_t)rows % 16 == 0) && ...);
}

__host__ __device__ inline index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// The threads of a block that has num_items things to do: one for each, but whole warps, and no more than most.
inline unsigned num_threads_for(index_t num_items, index_t most) {
    const index_t threads = ceil_div(num_items, WARP) * WARP;
    return (unsigned)(threads < most ? threads : most);
}

struct Add {
    __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The result reaches every lane. All 32 lanes of the warp must call this.
template <class Op> __device__ __forceinline__ float warp_reduce(float x, Op op) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// The result reaches every thread. All threads of the block must call this; their number is a multiple of 32.
// neutral: what changes nothing, 0 for Add and -INFINITY for Max.
template <class Op> __device__ float block_reduce(float x, float neutral, Op op) {
    __shared__ float of_warp[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, num_warps = blockDim.x / WARP;
    x = warp_reduce(x, op);
    __syncthreads();  // an earlier call may still be reading of_warp
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_reduce(lane < num_warps ? of_warp[lane] : neutral, op);
}

// A library is compiled for the dtypes of a call (library.py): with kernels for all of them, a file takes three to nine
// times as long. Without these macros, for example for the tables of nvcc, it has kernels for all.
#ifndef ONLY_DTYPE
#define ONLY_DTYPE -1
#endif
#ifndef ONLY_CACHE_DTYPE
#define ONLY_CACHE_DTYPE -1
#endif
constexpr bool is_compiled(int dtype, int only) { return only == -1 || dtype == only; }

// Calls launch with a value of the type that a dtype code stands for.
template <class F> int dispatch_float(index_t dtype, F launch) {
    if constexpr (is_compiled(FLOAT32, ONLY_DTYPE)) {
        if (dtype == FLOAT32) return launch(float{});
    }
    if constexpr (is_compiled(FLOAT16, ONLY_DTYPE)) {
        if (dtype == FLOAT16) return launch(half_t{});
    }
    if constexpr (is_compiled(BFLOAT16, ONLY_DTYPE)) {
        if (dtype == BFLOAT16) return launch(bfloat_t{});
    }
    return UNSUPPORTED;
}

template <class T> struct DTypeOf;
template <> struct DTypeOf<float> { static constexpr DType value = FLOAT32; };
template <> struct DTypeOf<half_t> { static constexpr DType value = FLOAT16; };
template <> struct DTypeOf<bfloat_t> { static constexpr DType value = BFLOAT16; };

// The same for a KV cache: its numbers are of the model's dtype T, or codes.
template <class T, class F> int dispatch_cache(index_t dtype, F launch) {
    if constexpr (is_compiled(DTypeOf<T>::value, ONLY_CACHE_DTYPE)) {
        if (dtype == DTypeOf<T>::value) return launch(T{});
    }
    if constexpr (is_compiled(INT8, ONLY_CACHE_DTYPE)) {
        if (dtype == INT8) return launch((signed char)0);
    }
    if constexpr (is_compiled(FP8, ONLY_CACHE_DTYPE)) {
        if (dtype == FP8) return launch(fp8_t{});
    }
    return UNSUPPORTED;
}

// What an unwritten exercise does: it ends the launch with its task as the error.
#if defined(__CUDACC__)
#define EXERCISE(task) __trap()
#else
#define EXERCISE(task) (emulation::stop(task), __builtin_unreachable())
#endif

extern "C" const char* kernel_error(int code) { return cudaGetErrorString((cudaError_t)code); }
