// What CUDA adds to C++: keywords, vector types, the built-in variables.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef __has_feature
#define CUDA_ON_CPU_HAS(feature) __has_feature(feature)
#else
#define CUDA_ON_CPU_HAS(feature) 0
#endif
#if defined(__SANITIZE_THREAD__) || CUDA_ON_CPU_HAS(thread_sanitizer)
#define CUDA_ON_CPU_TSAN 1
#else
#define CUDA_ON_CPU_TSAN 0
#endif
#if defined(__SANITIZE_ADDRESS__) || CUDA_ON_CPU_HAS(address_sanitizer)
#define CUDA_ON_CPU_ASAN 1
#else
#define CUDA_ON_CPU_ASAN 0
#endif

// The emulation itself is not checked: it moves data between threads that a kernel may not touch without a barrier.
#define UNCHECKED __attribute__((no_sanitize("thread"), no_sanitize("address")))
// One copy per library, whatever else is loaded: libraries with and without a sanitizer have different layouts.
#define PER_LIBRARY inline __attribute__((visibility("hidden")))

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __restrict__ __restrict

// A block's shared variables: one set per operating-system thread, which runs a block at a time. AddressSanitizer
// watches plain statics, but not thread-locals; with it, a single operating-system thread runs all blocks.
#if defined(__GNUC__) && !defined(__clang__)
#define CUDA_ON_CPU_CONSTINIT __constinit  // else GCC guards the variable as if it had an initializer
#else
#define CUDA_ON_CPU_CONSTINIT
#endif
#if CUDA_ON_CPU_ASAN
#define __shared__ static CUDA_ON_CPU_CONSTINIT
#else
#define __shared__ static thread_local CUDA_ON_CPU_CONSTINIT
#endif

#define VECTOR_2(T, name, alignment)       \
    struct alignas(alignment) name {       \
        T x, y;                            \
    };                                     \
    inline name make_##name(T x, T y) { return {x, y}; }
#define VECTOR_4(T, name, alignment)       \
    struct alignas(alignment) name {       \
        T x, y, z, w;                      \
    };                                     \
    inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR_2(float, float2, 8)
VECTOR_2(double, double2, 16)
VECTOR_2(int, int2, 8)
VECTOR_2(unsigned, uint2, 8)
VECTOR_4(float, float4, 16)
VECTOR_4(int, int4, 16)
VECTOR_4(unsigned, uint4, 16)
VECTOR_4(signed char, char4, 4)
VECTOR_4(unsigned char, uchar4, 4)
#undef VECTOR_2
#undef VECTOR_4

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
constexpr int warpSize = 32;
PER_LIBRARY thread_local uint3 threadIdx{}, blockIdx{};
PER_LIBRARY thread_local dim3 blockDim, gridDim;
