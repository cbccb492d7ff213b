// What the layers share: types, loops over channels, activations, a thread's part of the rows.
//
// T is the type of the arithmetic (float or double), M the type in memory. Gradients that sum over rows are summed by
// thread over fixed ranges of rows and then over threads in order: the same bits for the same thread count.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "tensor.h"

namespace {

using namespace simd;

// Calls f(T, M, O): arithmetic, memory and second memory type (the output's, or its gradient's).
template <typename F> void with_types(int32_t memory, int32_t other, F&& f) {
    with_type(memory, [&](auto* m) {
        with_type(other, [&](auto* o) {
            using M = std::remove_pointer_t<decltype(m)>;
            using O = std::remove_pointer_t<decltype(o)>;
            if constexpr (std::is_same_v<M, double> && std::is_same_v<O, double>) f(double{}, M{}, O{});
            if constexpr (!std::is_same_v<M, double> && !std::is_same_v<O, double>) f(float{}, M{}, O{});
        });
    });
}

// f(vector of channel c, number of valid lanes) over 0..width
template <typename T, typename F> INLINE void over_channels(int64_t width, F&& f) {
    constexpr int L = LANES<T>;
    int64_t c = 0;
    for (; c + L <= width; c += L) f(c, L);
    if (c < width) f(c, int(width - c));
}

template <typename T> INLINE Vector<T> silu(Vector<T> x) { return x * sigmoid<T>(x); }
template <typename T> INLINE Vector<T> silu_slope(Vector<T> x) {
    const Vector<T> s = sigmoid<T>(x);
    return s * (1 + x * (1 - s));
}

struct Range {
    int64_t begin, end;
};
INLINE Range share(int64_t count) {  // this thread's fixed part of 0..count
    const int64_t threads = omp_get_num_threads(), i = omp_get_thread_num();
    return {count * i / threads, count * (i + 1) / threads};
}

}  // namespace
