// Rows of a table, F numbers each, as short vectors; two that are neighbours along the first dimension as one.
#pragma once

#include "simd.h"

namespace {

using namespace simd;

template <typename T, int N> struct Row {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
    typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// Two rows of F numbers as one vector, and its halves.
template <int F, typename V> INLINE auto join(V low, V high) {
    if constexpr (F == 2) return __builtin_shufflevector(low, high, 0, 1, 2, 3);
    else if constexpr (F == 4) return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    else return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
template <int F, typename V> INLINE auto low_half(V v) {
    if constexpr (F == 2) return __builtin_shufflevector(v, v, 0, 1);
    else if constexpr (F == 4) return __builtin_shufflevector(v, v, 0, 1, 2, 3);
    else return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
}
template <int F, typename V> INLINE auto high_half(V v) {
    if constexpr (F == 2) return __builtin_shufflevector(v, v, 2, 3);
    else if constexpr (F == 4) return __builtin_shufflevector(v, v, 4, 5, 6, 7);
    else return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}

template <int F, typename T, typename M> INLINE typename Row<T, 2 * F>::type load_pair(const M* low, const M* high) {
    if constexpr (F == 1) {
        return typename Row<T, 2>::type{T(widen(*low)), T(widen(*high))};
    } else if constexpr (std::is_same_v<M, T>) {
        using Part = typename Row<T, F>::unaligned;
        const typename Row<T, F>::type a = *reinterpret_cast<const Part*>(low);
        const typename Row<T, F>::type b = *reinterpret_cast<const Part*>(high);
        return join<F>(a, b);
    } else {
        typename Row<T, 2 * F>::type out{};
        for (int f = 0; f < F; f++) out[f] = T(widen(low[f])), out[F + f] = T(widen(high[f]));
        return out;
    }
}

// The rows must be two.
template <int F, typename T> INLINE void store_pair(T* low, T* high, typename Row<T, 2 * F>::type pair) {
    if constexpr (F == 1) {
        *low = pair[0], *high = pair[1];
    } else {
        using Part = typename Row<T, F>::unaligned;
        *reinterpret_cast<Part*>(low) = low_half<F>(pair);
        *reinterpret_cast<Part*>(high) = high_half<F>(pair);
    }
}

}  // namespace
