// Portable SIMD by GCC/Clang vector extensions: one register-wide vector of float or double, its loads and stores from
// float, double and bfloat16 memory, and the few transcendental functions that gates need.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace simd {

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

// AVX2 has 16 vector registers, AVX-512 and NEON have 32: how many state vectors a kernel may keep in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int STATE_REGISTERS = 16;
#else
constexpr int STATE_REGISTERS = 8;
#endif

#define INLINE inline __attribute__((always_inline))

template <typename T> struct VectorOf {
    typedef T type __attribute__((vector_size(REGISTER_BYTES)));
    typedef T unaligned __attribute__((vector_size(REGISTER_BYTES), aligned(sizeof(T)), may_alias));
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> integer __attribute__((vector_size(REGISTER_BYTES)));
};
template <typename T> using Vector = typename VectorOf<T>::type;
template <typename T> using Mask = typename VectorOf<T>::integer;
template <typename T> constexpr int LANES = REGISTER_BYTES / sizeof(T);

struct BFloat16 {
    uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
template <typename M, typename T> INLINE M narrow(T x) {
    if constexpr (std::is_same_v<M, BFloat16>) {
        const float value = float(x);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};  // NaN stays NaN
        return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};                   // round to nearest, ties to even
    } else {
        return M(x);
    }
}

template <typename T> INLINE Vector<T> broadcast(T x) { return x - Vector<T>{}; }
template <typename T> INLINE Vector<T> load(const T* p) { return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p); }
template <typename T> INLINE void store(T* p, Vector<T> v) { *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v; }

typedef uint16_t HalfWords __attribute__((vector_size(REGISTER_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(REGISTER_BYTES)));

// Loads and stores of memory type M as vectors of the compute type T.
template <typename T, typename M> INLINE Vector<T> load_as(const M* p) {
    if constexpr (std::is_same_v<M, T>) {
        return load<T>(p);
    } else if constexpr (std::is_same_v<M, BFloat16> && std::is_same_v<T, float>) {
        const Words bits = __builtin_convertvector(*reinterpret_cast<const HalfWords*>(p), Words) << 16;
        return (Vector<float>)bits;  // a cast between vectors of one size keeps the bits
    } else {
        Vector<T> out;
        for (int i = 0; i < LANES<T>; i++) out[i] = T(widen(p[i]));
        return out;
    }
}
template <typename V> using Element = std::decay_t<decltype(V{}[0])>;

// The bits of bfloat16s nearest to the floats of which `bits` are the bits (32 each): ties to even, NaN stays NaN.
template <typename W> INLINE W round_to_bfloat16(W bits) {
    const W rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    const W not_a_number = (bits >> 16) | 0x40;
    return (bits & 0x7fffffffu) > 0x7f800000u ? not_a_number : rounded;
}

template <typename M, typename V> INLINE void store_as(M* p, V v) {
    if constexpr (std::is_same_v<M, Element<V>>) {
        store<M>(p, v);
    } else if constexpr (std::is_same_v<M, BFloat16> && std::is_same_v<Element<V>, float>) {
        *reinterpret_cast<HalfWords*>(p) = __builtin_convertvector(round_to_bfloat16((Words)v), HalfWords);
    } else {
        for (int i = 0; i < LANES<Element<V>>; i++) p[i] = narrow<M>(v[i]);
    }
}

// The first `count` lanes only; the others read as `fill` and are not written.
template <typename T, typename M> INLINE Vector<T> load_part(const M* p, int count, T fill = T(0)) {
    if (count >= LANES<T>) return load_as<T, M>(p);
    Vector<T> out = broadcast<T>(fill);
    for (int i = 0; i < count; i++) out[i] = T(widen(p[i]));
    return out;
}
template <typename M, typename V> INLINE void store_part(M* p, V v, int count) {
    if (count >= LANES<Element<V>>) return store_as(p, v);
    for (int i = 0; i < count; i++) p[i] = narrow<M>(v[i]);
}

template <typename T> INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) { return b < a ? b : a; }  // a NaN in a stays

template <typename T> INLINE bool any(Mask<T> mask) {
    bool found = false;
    for (int i = 0; i < LANES<T>; i++) found |= mask[i] != 0;
    return found;
}

// Sum of the lanes, in halves: a chain of additions lane by lane would take longer than a row's arithmetic.
template <typename T> INLINE T sum(Vector<T> v) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) return _mm512_reduce_add_ps((__m512)v);
    if constexpr (std::is_same_v<T, double>) return _mm512_reduce_add_pd((__m512d)v);
#endif
    T lanes[LANES<T>];
    store(lanes, v);
    for (int half = LANES<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// exp, to about one unit in the last place in float; 0 below -87, so never a denormal; NaN stays NaN. V is a vector of any
// number of lanes.
template <typename V> INLINE V exponential(V x) {
    if constexpr (std::is_same_v<Element<V>, float>) {
        typedef decltype(x < x) I;
        const I tiny = x < -87.0f;
        x = tiny ? V{} - 87.0f : x;
        x = x > 88.0f ? V{} + 88.0f : x;
        const V shifter = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        V n = x * 1.44269504088896341f + shifter;
        const I exponent = (I)n << 23;
        n -= shifter;
        const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
        V p = V{} + 1.9875691500e-4f;
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + r + 1.0f;
        const I scaled = (I)p + exponent;
        const V result = (V)scaled;
        return x != x ? x : (tiny ? V{} : result);
    } else {
        for (size_t i = 0; i < sizeof(V) / sizeof(Element<V>); i++) x[i] = std::exp(x[i]);
        return x;
    }
}

// log(1 + x) for 0 <= x <= 1, absolute error below 1e-7 in float.
template <typename V> INLINE V log_one_plus(V x) {
    if constexpr (std::is_same_v<Element<V>, float>) {
        const V y = x + 1.0f;
        const auto large = y > 1.41421356f;
        const V m = large ? (x - 1.0f) * 0.5f : x;  // y = 2 (1 + m) or 1 + m
        const V z = m * m;
        V p = V{} + 7.0376836292e-2f;
        p = p * m - 1.1514610310e-1f;
        p = p * m + 1.1676998740e-1f;
        p = p * m - 1.2420140846e-1f;
        p = p * m + 1.4249322787e-1f;
        p = p * m - 1.6668057665e-1f;
        p = p * m + 2.0000714765e-1f;
        p = p * m - 2.4999993993e-1f;
        p = p * m + 3.3333331174e-1f;
        const V result = m + (p * m * z - 0.5f * z);
        return large ? result + 0.69314718056f : result;
    } else {
        for (size_t i = 0; i < sizeof(V) / sizeof(Element<V>); i++) x[i] = std::log1p(x[i]);
        return x;
    }
}

template <typename T> INLINE Vector<T> absolute(Vector<T> x) { return x < 0 ? -x : x; }

template <typename T> INLINE Vector<T> sigmoid(Vector<T> x) {
    const Vector<T> e = exponential(-absolute<T>(x));
    return (x < 0 ? e : Vector<T>{} + 1) / (1 + e);
}
template <typename T> INLINE Vector<T> log_sigmoid(Vector<T> x) {
    return minimum<T>(x, Vector<T>{}) - log_one_plus(exponential(-absolute<T>(x)));
}

// The distribution function of the normal distribution, 0.5 + x P(x^2) / Q(x^2) near 0; absolute error below 2e-7 in
// float. NaN stays NaN.
template <typename V> INLINE V normal_distribution(V x) {
    if constexpr (std::is_same_v<Element<V>, float>) {
        const V s = x * x;
        V p = V{} + 2.473079519e-8f;
        p = p * s + 6.407875389e-6f;
        p = p * s + 1.568633161e-4f;
        p = p * s + 4.608654883e-3f;
        p = p * s + 3.254474699e-2f;
        p = p * s + 3.989422619e-1f;
        V q = V{} + 1.258857992e-6f;
        q = q * s + 7.049653505e-5f;
        q = q * s + 1.817212207e-3f;
        q = q * s + 2.792679518e-2f;
        q = q * s + 2.482439280e-1f;
        q = q * s + 1.0f;
        const V near = x * (p / q) + 0.5f;
        return x > 5.2f ? V{} + 1.0f : (x < -5.2f ? V{} : near);
    } else {
        for (size_t i = 0; i < sizeof(V) / sizeof(Element<V>); i++) x[i] = 0.5 * std::erfc(x[i] * -0.70710678118654752440);
        return x;
    }
}
template <typename V> INLINE V normal_density(V x) {
    return exponential(x * x * Element<V>(-0.5)) * Element<V>(0.39894228040143267794);
}

}  // namespace simd
