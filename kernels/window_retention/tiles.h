// Tiles: eight neighbours of one row of a map with their channels, channel by channel ([channels][8]), so that a SIMD
// lane is a token. How they are read from memory, rotated, and written back.
#pragma once

#include <algorithm>

#include "tensor.h"

using namespace simd;

constexpr int64_t LANE_TOKENS = 8;

template <typename T> struct OctetOf {
    typedef T type __attribute__((vector_size(LANE_TOKENS * sizeof(T))));
    typedef T in_memory __attribute__((vector_size(LANE_TOKENS * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <typename T> using Octet = typename OctetOf<T>::type;
template <typename T> using OctetInMemory = typename OctetOf<T>::in_memory;

template <typename T> INLINE Octet<T> load_octet(const T* p) { return *reinterpret_cast<const OctetInMemory<T>*>(p); }
template <typename T> INLINE void store_octet(T* p, Octet<T> v) { *reinterpret_cast<OctetInMemory<T>*>(p) = v; }

template <typename T> INLINE Octet<T> broadcast_octet(T x) { return x - Octet<T>{}; }

constexpr int64_t whole_octets(int64_t count) { return (count + LANE_TOKENS - 1) / LANE_TOKENS * LANE_TOKENS; }

// The first `count` of eight channels at `p`, of memory type M, the others zero.
template <typename T, typename M> INLINE Octet<T> read_octet(const M* p, int64_t count) {
    if (count < LANE_TOKENS) {
        Octet<T> out{};
        for (int i = 0; i < count; i++) out[i] = T(widen(p[i]));
        return out;
    }
    if constexpr (std::is_same_v<M, BFloat16>) {
        const Octet<uint16_t> high = load_octet(reinterpret_cast<const uint16_t*>(p));
        const Octet<uint32_t> bits = __builtin_convertvector(high, Octet<uint32_t>) << 16;
        return __builtin_convertvector((Octet<float>)bits, Octet<T>);
    } else {
        return __builtin_convertvector(load_octet(p), Octet<T>);
    }
}
template <typename T, typename M> INLINE void write_octet(M* p, Octet<T> v, int64_t count) {
    if (count < LANE_TOKENS) {
        for (int i = 0; i < count; i++) p[i] = narrow<M>(v[i]);
    } else if constexpr (std::is_same_v<M, BFloat16>) {
        const Octet<uint32_t> bits = (Octet<uint32_t>)__builtin_convertvector(v, Octet<float>);
        store_octet(reinterpret_cast<uint16_t*>(p), __builtin_convertvector(round_to_bfloat16(bits), Octet<uint16_t>));
    } else {
        store_octet(p, __builtin_convertvector(v, Octet<M>));
    }
}

template <int... FROM, typename V> INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, FROM...);
#else
    return __builtin_shuffle(a, b, decltype(a < b){FROM...});
#endif
}

template <typename V> INLINE void transpose(V (&rows)[LANE_TOKENS]) {
    V pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        pairs[2 * i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            fours[4 * i + 2 * j] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(pairs[4 * i + j], pairs[4 * i + 2 + j]);
            fours[4 * i + 2 * j + 1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(pairs[4 * i + j], pairs[4 * i + 2 + j]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(fours[i], fours[4 + i]);
        rows[4 + i] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(fours[i], fours[4 + i]);
    }
}

// The rotation of the channel pairs of a tile's tokens: [pairs, whole fours][8] each; null for none.
template <typename T> struct Rotation {
    const T *cosine, *sine;
};

// Turn the four pairs of channels c .. c + 7, or turn them back.
template <bool BACK, typename T>
INLINE void rotate(Octet<T> (&channels)[LANE_TOKENS], Rotation<T> rotation, int64_t c) {
    if (!rotation.cosine) return;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int64_t pair = (c / 2 + i) * LANE_TOKENS;
        const Octet<T> cosine = load_octet(rotation.cosine + pair), even = channels[2 * i], odd = channels[2 * i + 1];
        const Octet<T> sine = BACK ? -load_octet(rotation.sine + pair) : load_octet(rotation.sine + pair);
        channels[2 * i] = even * cosine - odd * sine;
        channels[2 * i + 1] = odd * cosine + even * sine;
    }
}

// `count` tokens, `stride` elements of M apart, into a tile, times `factor`, rotated. Lanes beyond repeat the last
// token: what they come to is never read.
template <typename T, typename M>
void read_tile(
    const M* from, int64_t stride, int64_t count, int64_t channels, T factor, Rotation<T> rotation, T* tile
) {
    const M* tokens[LANE_TOKENS];
    for (int64_t i = 0; i < LANE_TOKENS; i++) tokens[i] = from + std::min(i, count - 1) * stride;
    for (int64_t c = 0; c < channels; c += LANE_TOKENS) {
        Octet<T> rows[LANE_TOKENS];
#pragma GCC unroll 8
        for (int i = 0; i < LANE_TOKENS; i++) rows[i] = read_octet<T>(tokens[i] + c, channels - c);
        transpose(rows);
#pragma GCC unroll 8
        for (int i = 0; i < LANE_TOKENS; i++) rows[i] *= factor;
        rotate<false>(rows, rotation, c);
#pragma GCC unroll 8
        for (int i = 0; i < LANE_TOKENS; i++) store_octet(tile + (c + i) * LANE_TOKENS, rows[i]);
    }
}

// The inverse: a tile, times `factor`, rotated back, to `count` tokens.
template <typename T, typename M>
void write_tile(const T* tile, int64_t channels, T factor, Rotation<T> rotation, M* to, int64_t stride, int64_t count) {
    for (int64_t c = 0; c < channels; c += LANE_TOKENS) {
        Octet<T> rows[LANE_TOKENS];
#pragma GCC unroll 8
        for (int i = 0; i < LANE_TOKENS; i++) rows[i] = load_octet(tile + (c + i) * LANE_TOKENS) * factor;
        rotate<true>(rows, rotation, c);
        transpose(rows);
#pragma GCC unroll 8
        for (int i = 0; i < LANE_TOKENS; i++)
            if (i < count) write_octet<T>(to + i * stride + c, rows[i], channels - c);
    }
}
