// The inner loops of depthwise convolutions: tiles of neighbouring pixels of a row, one vector of channels at a time.
//
// A tile of P outputs loads each of the P + K - 1 inputs of a window row once and multiplies it with all K taps of that
// row, so that loads are fewer than multiplications. Sums run over the window row by row in the order of memory, whatever
// the tile.
#pragma once

#include <array>
#include <type_traits>

#include "maps.h"

#define ALWAYS __attribute__((always_inline))  // of lambdas: where one is not inlined, the arrays it sees leave the registers

namespace {

// How many rows of outputs a tile has: two share the loads of the rows between them, but need 32 registers.
constexpr int MOST_ROWS = STATE_REGISTERS > 8 ? 2 : 1;

// The rows under the windows around the tile's rows, null outside of the map, their pixels `stride` apart.
template <typename T> struct Neighbours {
    const T* const* rows;
    int64_t stride, width, lanes, kernel;
    const T* zeros;  // [lanes]: a pixel outside of the map
};

// Replaces `count` vectors by an activation of them.
template <typename T> using Activation = void (*)(Vector<T>* vectors, int count);
template <typename T> void silu_all(Vector<T>* vectors, int count) {
    for (int i = 0; i < count; i++) vectors[i] = silu<T>(vectors[i]);
}
template <typename T> void silu_slope_all(Vector<T>* vectors, int count) {
    for (int i = 0; i < count; i++) vectors[i] = silu_slope<T>(vectors[i]);
}

// A row of outputs, `lanes` a pixel, what is added to it, and a row of inputs to be fetched into the cache for the tiles
// that follow, or null.
template <typename T> struct Target {
    T* row = nullptr;
    Row<T> added{};
    const T* ahead = nullptr;
};

// The inputs of a tile in one row: all on the map, or each by its pointer.
template <typename T> struct InsideInputs {
    const T* first;
    int64_t stride;
    INLINE Vector<T> operator()(int64_t i, int64_t c) const { return load(first + i * stride + c); }
};
template <typename T> struct BorderInputs {
    const T* const* pixels;
    INLINE Vector<T> operator()(int64_t i, int64_t c) const { return load(pixels[i] + c); }
};

// `v`, in a register by now: else the compiler loads it again for each multiplication.
template <typename V> INLINE V in_register(V v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
}

// `i`, of which the compiler knows nothing: else it steps a pointer for every pixel of a tile, more than fit in registers.
INLINE int64_t opaque(int64_t i) {
    asm("" : "+r"(i));
    return i;
}

// Calls f(p) for p = 0 .. P - 1, unrolled, so that arrays indexed by p can lie in registers.
template <int P, typename F> INLINE void over_outputs(F&& f) {
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) f(p);
}

// sums[r][p] += sum over d of input[p + d] * tap d of R rows of outputs, the second's taps a row before the first's. K is the
// kernel where it is known, else 0.
template <typename T, int K, int P, int R, typename I>
INLINE void add_row(
    const I& inputs, int64_t c, const T* taps, int64_t row_of_taps, int64_t lanes, int64_t kernel, Vector<T> (*sums)[P]
) {
    if constexpr (K > 0) {
        Vector<T> tap[R][K];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int d = 0; d < K; d++) tap[r][d] = load(taps - r * row_of_taps + d * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < P + K - 1; i++) {
            const Vector<T> input = in_register(inputs(i, c));
#pragma GCC unroll 8
            for (int d = 0; d < K; d++)
#pragma GCC unroll 2
                for (int r = 0; r < R; r++)
                    if (i - d >= 0 && i - d < P) sums[r][i - d] += input * tap[r][d];
        }
    } else {
        for (int64_t d = 0; d < kernel; d++)
            for (int r = 0; r < R; r++) {
                const Vector<T> tap = load(taps - r * row_of_taps + d * lanes);
                over_outputs<P>([&](int p) ALWAYS { sums[r][p] += inputs(p + d, c) * tap; });
            }
    }
}

// products[d] += sum over p of input[p + d] * centre[p]
template <typename T, int K, int P, typename I>
INLINE void add_products(const I& inputs, int64_t c, const Vector<T>* centre, int64_t lanes, int64_t kernel, T* products) {
    if constexpr (K > 0) {
        Vector<T> product[K];
#pragma GCC unroll 8
        for (int d = 0; d < K; d++) product[d] = load(products + d * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < P + K - 1; i++) {
            const Vector<T> input = in_register(inputs(i, c));
#pragma GCC unroll 8
            for (int d = 0; d < K; d++)
                if (i - d >= 0 && i - d < P) product[d] += input * centre[i - d];
        }
#pragma GCC unroll 8
        for (int d = 0; d < K; d++) store(products + d * lanes, product[d]);
    } else {
        for (int64_t d = 0; d < kernel; d++) {
            Vector<T> product = load(products + d * lanes);
            over_outputs<P>([&](int p) ALWAYS { product += inputs(p + d, c) * centre[p]; });
            store(products + d * lanes, product);
        }
    }
}

// Calls f(inputs of window row k for any k with a row, how many of the tile's outputs are on the map).
template <typename T, int K, int P, int R, typename F> INLINE void over_tile(const Neighbours<T> near, int64_t first, F&& f) {
    const int64_t kernel = K > 0 ? K : near.kernel, pad = kernel / 2, inputs = P + kernel - 1, rows = kernel + R - 1;
    const int64_t start = (first - pad) * near.stride;
    if (first >= pad && first + P + pad <= near.width) {
        f([=](int64_t k) ALWAYS { return InsideInputs<T>{near.rows[k] + start, near.stride}; }, P);
        return;
    }
    std::conditional_t<(K > 0), std::array<const T*, (K + R - 1) * (P + K - 1)>, std::vector<const T*>> pixels;
    if constexpr (K == 0) pixels.resize(rows * inputs);
    const int64_t begin = pad - first, end = near.width + pad - first;
    for (int64_t k = 0; k < rows; k++)
        if (near.rows[k])
#pragma GCC unroll 16
            for (int64_t i = 0; i < inputs; i++)
                pixels[k * inputs + i] = i >= begin && i < end ? near.rows[k] + start + i * near.stride : near.zeros;
    const T* const* of_rows = pixels.data();
    f([=](int64_t k) ALWAYS { return BorderInputs<T>{of_rows + k * inputs}; }, int(std::min<int64_t>(P, near.width - first)));
}

// Writes the tile's `sums` of one vector of channels, plus what is added to them.
template <typename T, int P, int R>
INLINE void write_sums(
    const Vector<T> (*sums)[P], T* const* rows, int64_t lanes, const Row<T>* added, int64_t first, int64_t c, int count
) {
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
        T* to = rows[r] + first * lanes + c;
        const T* from = added[r].pixels ? added[r].pixels + first * added[r].stride + c : nullptr;
        over_outputs<P>([&](int p) ALWAYS {
            if (p < count) store(to + p * lanes, from ? sums[r][p] + load(from + p * added[r].stride) : sums[r][p]);
        });
    }
}

// Pixels `first` .. `first + P - 1` (those on the map) of R rows: activation(convolution + bias) + what is added; null for no
// activation, no bias. taps [kernel * kernel][lanes].
template <typename T, int K, int P, int R>
void convolve_tile(
    const Neighbours<T>& near, int64_t first, const T* taps, const T* bias, Activation<T> activation, const Target<T>* targets
) {
    const int64_t kernel = K > 0 ? K : near.kernel, lanes = near.lanes, stride = near.stride, width = near.width;
    const T* const* rows = near.rows;
    T* out[R];
    const T* ahead[R];
    Row<T> added[R];
    for (int r = 0; r < R; r++) out[r] = targets[r].row, ahead[r] = targets[r].ahead, added[r] = targets[r].added;
    over_tile<T, K, P, R>(near, first, [=](auto inputs_of, int count) ALWAYS {
        for (int64_t channel = 0; channel < lanes; channel += LANES<T>) {
            const int64_t c = opaque(channel);
            Vector<T> sums[R][P];
            const Vector<T> start = bias ? load(bias + c) : Vector<T>{};
            for (int r = 0; r < R; r++) over_outputs<P>([&](int p) ALWAYS { sums[r][p] = start; });
            // Window row k lies under row k of the first output's taps and row k - 1 of the second's.
            const int64_t row_of_taps = kernel * lanes;
            const T* at = taps + c;
            if (R == 2 && rows[0]) add_row<T, K, P, 1>(inputs_of(0), c, at, 0, lanes, kernel, sums);
            at += (R - 1) * row_of_taps;
#pragma GCC unroll 1
            for (int64_t k = R - 1; k < kernel; k++, at += row_of_taps)
                if (rows[k]) add_row<T, K, P, R>(inputs_of(k), c, at, row_of_taps, lanes, kernel, sums);
            at -= row_of_taps;
            if (R == 2 && rows[kernel]) add_row<T, K, P, 1>(inputs_of(kernel), c, at, 0, lanes, kernel, sums + 1);
            if (activation) {
                Vector<T> all[R][P];  // in memory, so that `sums` can be in registers
                for (int r = 0; r < R; r++) over_outputs<P>([&](int p) ALWAYS { all[r][p] = sums[r][p]; });
                activation(all[0], R * P);
                write_sums<T, P, R>(all, out, lanes, added, first, c, count);
            } else {
                write_sums<T, P, R>(sums, out, lanes, added, first, c, count);
            }
            for (int r = 0; r < R; r++) {
                if (!ahead[r]) continue;
                over_outputs<P>([&](int p) ALWAYS { __builtin_prefetch(ahead[r] + (first + p) * stride + c); });
                if (!added[r].pixels) continue;
                const T* next = added[r].pixels + (first + R * width) * added[r].stride + c;  // of the rows made next
                over_outputs<P>([&](int p) ALWAYS { __builtin_prefetch(next + p * added[r].stride); });
            }
        }
    });
}

// Adds to products [kernel * kernel][lanes] those of a tile of the row `centre` and what lies under the window around each
// of its pixels; `ahead` as in Target.
template <typename T, int K, int P>
void correlate_tile(const Neighbours<T>& near, int64_t first, Row<T> centre, const T* ahead, T* products) {
    const int64_t kernel = K > 0 ? K : near.kernel, lanes = near.lanes;
    const T *const *rows = near.rows, *zeros = near.zeros;
    over_tile<T, K, P, 1>(near, first, [=](auto inputs_of, int count) ALWAYS {
        const T* pixels[P];
        over_outputs<P>([&](int p) ALWAYS { pixels[p] = p < count ? centre.pixels + (first + p) * centre.stride : zeros; });
        for (int64_t channel = 0; channel < lanes; channel += LANES<T>) {
            const int64_t c = opaque(channel);
            Vector<T> values[P];
            over_outputs<P>([&](int p) ALWAYS { values[p] = load(pixels[p] + c); });
            T* at = products + c;
#pragma GCC unroll 1
            for (int64_t k = 0; k < kernel; k++, at += kernel * lanes)
                if (rows[k]) add_products<T, K, P>(inputs_of(k), c, values, lanes, kernel, at);
            if (ahead) over_outputs<P>([&](int p) ALWAYS { __builtin_prefetch(ahead + (first + p) * centre.stride + c); });
        }
    });
}

template <typename T> struct Tile {
    using Convolve = void (*)(const Neighbours<T>&, int64_t, const T*, const T*, Activation<T>, const Target<T>*);

    Convolve convolve, convolve_rows;  // one row, or MOST_ROWS at once (null where that has no form)
    void (*correlate)(const Neighbours<T>&, int64_t, Row<T>, const T*, T*);
    int64_t size;
};

template <typename T, int K, int P>
constexpr Tile<T> TILE{convolve_tile<T, K, P, 1>, convolve_tile<T, K, P, MOST_ROWS>, correlate_tile<T, K, P>, P};
template <typename T> constexpr Tile<T> ANY_KERNEL{convolve_tile<T, 0, 7, 1>, nullptr, correlate_tile<T, 0, 7>, 7};

// A tile that leaves little of a row's last tile unused: maps are often 7, 14, 28, ... or a power of two wide.
template <typename T, int K> Tile<T> tile_for_width(int64_t width) {
    if (width <= 2) return TILE<T, K, 2>;
    if (width <= 4) return TILE<T, K, 4>;
    return (width + 7) / 8 * 8 < (width + 6) / 7 * 7 ? TILE<T, K, 8> : TILE<T, K, 7>;
}
// Tiles of their own have the usual kernels in float; double, for checks, takes the general one and compiles sooner.
template <typename T> Tile<T> tile_for(const Shape& shape) {
    if constexpr (std::is_same_v<T, float>) {
        if (shape.kernel == 3) return tile_for_width<T, 3>(shape.width);
        if (shape.kernel == 5) return tile_for_width<T, 5>(shape.width);
    }
    return ANY_KERNEL<T>;
}

}  // namespace
