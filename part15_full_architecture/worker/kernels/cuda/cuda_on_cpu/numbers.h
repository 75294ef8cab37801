// half and bfloat16, mathematics, atomics.
#pragma once

namespace emulation {

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// float16: a sign, 5 bits of exponent, 10 of fraction.
struct HalfFormat {
#if (defined(__aarch64__) || defined(__FLT16_MANT_DIG__)) && !defined(CUDA_ON_CPU_SOFT_HALF)
#if defined(__aarch64__)
    typedef __fp16 Native;
#else
    typedef _Float16 Native;
#endif
    static float decode(uint16_t bits) { return (float)bits_as<Native>(bits); }
    static uint16_t encode(float x) { return bits_as<uint16_t>((Native)x); }
#else
    static float decode(uint16_t bits) {
        const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
        if (exponent == 0) return bits_as<float>(sign | bits_as<uint32_t>(fraction * 0x1p-24f));
        return bits_as<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
    }
    static uint16_t encode(float x) {
        const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000;
        uint32_t magnitude = bits & 0x7fffffff;
        if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
        if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
        if (magnitude < 0x38800000) {                       // less than the smallest normal number
            return sign | (uint16_t)std::nearbyint(bits_as<float>(magnitude) * 0x1p24f);
        }
        magnitude += 0xfff + (magnitude >> 13 & 1);  // to nearest, ties to even
        return sign | ((magnitude >> 13) - (112 << 10));
    }
#endif
};

// bfloat16: the upper half of a float.
struct BfloatFormat {
    static float decode(uint16_t bits) { return bits_as<float>((uint32_t)bits << 16); }
    static uint16_t encode(float x) {
        const uint32_t bits = bits_as<uint32_t>(x);
        return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
};

// 16 bits in memory, arithmetic in float, each result rounded to nearest.
template <class Format> struct Number16 {
    uint16_t bits;
    Number16() = default;
    template <class N, class = std::enable_if_t<std::is_arithmetic<N>::value>>
    Number16(N x) : bits(Format::encode((float)x)) {}
    operator float() const { return Format::decode(bits); }
    Number16& operator+=(Number16 other) { return *this = Number16((float)*this + (float)other); }
    Number16& operator-=(Number16 other) { return *this = Number16((float)*this - (float)other); }
    Number16& operator*=(Number16 other) { return *this = Number16((float)*this * (float)other); }
};
template <class F> Number16<F> operator+(Number16<F> a, Number16<F> b) { return {(float)a + (float)b}; }
template <class F> Number16<F> operator-(Number16<F> a, Number16<F> b) { return {(float)a - (float)b}; }
template <class F> Number16<F> operator*(Number16<F> a, Number16<F> b) { return {(float)a * (float)b}; }
template <class F> Number16<F> operator/(Number16<F> a, Number16<F> b) { return {(float)a / (float)b}; }

}  // namespace emulation

typedef emulation::Number16<emulation::HalfFormat> __half, half;
typedef emulation::Number16<emulation::BfloatFormat> __nv_bfloat16;
struct alignas(4) __half2 {
    __half x, y;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __half2 half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __hadd2(__half2 a, __half2 b) { return {a.x + b.x, a.y + b.y}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {a.x - b.x, a.y - b.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {a.x * b.x, a.y * b.y}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {  // rounded once
    return {(float)a.x * (float)b.x + (float)c.x, (float)a.y * (float)b.y + (float)c.y};
}
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
inline float __int_as_float(int bits) { return emulation::bits_as<float>(bits); }
inline float __uint_as_float(unsigned bits) { return emulation::bits_as<float>(bits); }
inline int __float_as_int(float x) { return emulation::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
// Four of the eight bytes of x and y, of which x has the first four. Each 4 bits of the selector choose one, by their
// lower 3. (With the fourth, PTX's prmt would repeat the byte's sign, but nvcc clears it.)
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
template <class T> inline T __ldg(const T* pointer) { return *pointer; }

namespace emulation {
// Reads, computes, and writes if nobody has written in the meantime.
template <class T, class F> T update(T* target, F compute) {
    T old, next;
    __atomic_load(target, &old, __ATOMIC_RELAXED);
    do {
        next = compute(old);
    } while (!__atomic_compare_exchange(target, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
}  // namespace emulation
template <class T> T atomicAdd(T* target, std::common_type_t<T> x) {
    return emulation::update(target, [&](T old) { return T(old + x); });
}
template <class T> T atomicMax(T* target, std::common_type_t<T> x) {
    return emulation::update(target, [&](T old) { return old < x ? x : old; });
}
template <class T> T atomicMin(T* target, std::common_type_t<T> x) {
    return emulation::update(target, [&](T old) { return x < old ? x : old; });
}
template <class T> T atomicExch(T* target, std::common_type_t<T> x) {
    return emulation::update(target, [&](T) { return x; });
}
template <class T> T atomicCAS(T* target, std::common_type_t<T> expected, std::common_type_t<T> x) {
    return emulation::update(target, [&](T old) { return old == expected ? x : old; });
}
