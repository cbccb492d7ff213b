// The elementwise layers around the scan on CPU: every tensor is read once and written once, SIMD over the channels.
//
// T is the type of the arithmetic (float or double), M the type in memory. Gradients that sum over rows are summed by
// thread over fixed ranges of rows and then over threads in order: the same bits for the same thread count.

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

template <typename T, typename M> INLINE T inverse_rms(const M* row, int64_t width, T eps) {
    Vector<T> squares{};
    over_channels<T>(width, [&](int64_t c, int n) {
        const Vector<T> x = load_part<T>(row + c, n);
        squares += x * x;
    });
    return 1 / std::sqrt(sum<T>(squares) / T(width) + eps);
}

struct Range {
    int64_t begin, end;
};
INLINE Range share(int64_t count) {  // this thread's fixed part of 0..count
    const int64_t threads = omp_get_num_threads(), i = omp_get_thread_num();
    return {count * i / threads, count * (i + 1) / threads};
}

// Adds the threads' partial sums ([threads][width]) into `total`.
template <typename T> void add_partials(const std::vector<T>& partials, int64_t width, T* total) {
    std::fill(total, total + width, T(0));
    for (size_t i = 0; i < partials.size(); i++) total[i % width] += partials[i];
}

// dx = r (w dy - x r^2 mean(x w dy)), r = inverse rms; `weight_sum` collects x r dy.
template <typename T, typename M, typename O>
INLINE void rms_norm_row_backward(const M* x, const O* dy, const T* weight, int64_t width, T eps, M* dx, T* weight_sum) {
    const T r = inverse_rms<T>(x, width, eps);
    Vector<T> products{};
    over_channels<T>(width, [&](int64_t c, int n) {
        const Vector<T> xv = load_part<T>(x + c, n), g = load_part<T>(dy + c, n);
        products += xv * g * load_part<T>(weight + c, n);
        store_part(weight_sum + c, load_part<T>(weight_sum + c, n) + xv * g * r, n);
    });
    const T correction = sum<T>(products) * r * r / T(width);
    over_channels<T>(width, [&](int64_t c, int n) {
        const Vector<T> xv = load_part<T>(x + c, n), g = load_part<T>(dy + c, n);
        store_part(dx + c, (load_part<T>(weight + c, n) * g - xv * correction) * r, n);
    });
}

// A 3x3 window of a channels-last map around (y, x): the pointers of its nine pixels, null outside.
template <typename M> struct Map {
    const M* data;
    int64_t height, width, channels;

    const M* pixel(int64_t y, int64_t x) const {
        return y < 0 || y >= height || x < 0 || x >= width ? nullptr : data + (y * width + x) * channels;
    }
};

// sum over the window of pixel * weight; `weight` is [9][channels].
template <typename T, typename M>
INLINE Vector<T> window_sum(const M* const* window, const T* weight, int64_t channels, int64_t c, int n) {
    Vector<T> total{};
#pragma GCC unroll 9
    for (int i = 0; i < 9; i++)
        if (window[i]) total += load_part<T>(window[i] + c, n) * load_part<T>(weight + i * channels + c, n);
    return total;
}

template <typename M, typename F> void over_windows(const Map<M>& map, int64_t row, F&& f) {
    for (int64_t x = 0; x < map.width; x++) {
        const M* window[9];
        for (int i = 0; i < 9; i++) window[i] = map.pixel(row + i / 3 - 1, x + i % 3 - 1);
        f(x, window);
    }
}

}  // namespace

// Pointers are to contiguous tensors; `memory` is the dtype code of x and its gradient, `other` that of the output and its
// gradient; weights and their gradients have the arithmetic's type.

// x [rows, width] -> out
extern "C" void rms_norm_forward(
    const void* x, const void* weight, void* out, int memory, int other, int64_t rows, int64_t width, double eps, int threads
) {
    with_types(memory, other, [&](auto t, auto m, auto o) {
        using T = decltype(t);
        using M = decltype(m);
        using O = decltype(o);
        const T* w = static_cast<const T*>(weight);
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < rows; i++) {
            const M* row = static_cast<const M*>(x) + i * width;
            O* to = static_cast<O*>(out) + i * width;
            const T r = inverse_rms<T>(row, width, T(eps));
            over_channels<T>(width, [&](int64_t c, int n) {
                store_part(to + c, load_part<T>(row + c, n) * r * load_part<T>(w + c, n), n);
            });
        }
    });
}

extern "C" void rms_norm_backward(
    const void* grad, const void* x, const void* weight, void* grad_x, void* grad_weight, int memory, int other, int64_t rows,
    int64_t width, double eps, int threads
) {
    with_types(memory, other, [&](auto t, auto m, auto o) {
        using T = decltype(t);
        using M = decltype(m);
        using O = decltype(o);
        std::vector<T> partials(threads * width);
#pragma omp parallel num_threads(threads)
        {
            const Range range = share(rows);
            T* weight_sum = partials.data() + omp_get_thread_num() * width;
            for (int64_t i = range.begin; i < range.end; i++)
                rms_norm_row_backward<T>(
                    static_cast<const M*>(x) + i * width, static_cast<const O*>(grad) + i * width, static_cast<const T*>(weight), width,
                    T(eps), static_cast<M*>(grad_x) + i * width, weight_sum
                );
        }
        add_partials(partials, width, static_cast<T*>(grad_weight));
    });
}

// x [rows, 2 width] -> out [rows, width]: silu(first half) * second half.
extern "C" void swiglu_forward(const void* x, void* out, int memory, int64_t rows, int64_t width, int threads) {
    with_types(memory, memory, [&](auto t, auto m, auto) {
        using T = decltype(t);
        using M = decltype(m);
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < rows; i++) {
            const M* row = static_cast<const M*>(x) + i * 2 * width;
            M* to = static_cast<M*>(out) + i * width;
            over_channels<T>(width, [&](int64_t c, int n) {
                store_part(to + c, silu<T>(load_part<T>(row + c, n)) * load_part<T>(row + width + c, n), n);
            });
        }
    });
}

extern "C" void swiglu_backward(const void* grad, const void* x, void* grad_x, int memory, int64_t rows, int64_t width, int threads) {
    with_types(memory, memory, [&](auto t, auto m, auto) {
        using T = decltype(t);
        using M = decltype(m);
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < rows; i++) {
            const M* row = static_cast<const M*>(x) + i * 2 * width;
            const M* dy = static_cast<const M*>(grad) + i * width;
            M* to = static_cast<M*>(grad_x) + i * 2 * width;
            over_channels<T>(width, [&](int64_t c, int n) {
                const Vector<T> a = load_part<T>(row + c, n), b = load_part<T>(row + width + c, n), g = load_part<T>(dy + c, n);
                store_part(to + c, g * b * silu_slope<T>(a), n);
                store_part(to + width + c, g * silu<T>(a), n);
            });
        }
    });
}

// Maps [batch, height, width, channels]; weight [9][channels].
extern "C" void depthwise_convolution_forward(
    const void* x, const void* weight, void* out, int memory, int other, int64_t batch, int64_t height, int64_t width, int64_t channels,
    int activate, int threads
) {
    const int64_t image = height * width * channels;
    with_types(memory, other, [&](auto t, auto m, auto o) {
        using T = decltype(t);
        using M = decltype(m);
        using O = decltype(o);
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < batch * height; i++) {
            const Map<M> map{static_cast<const M*>(x) + i / height * image, height, width, channels};
            O* to = static_cast<O*>(out) + i * width * channels;
            over_windows(map, i % height, [&](int64_t column, const M* const* window) {
                over_channels<T>(channels, [&](int64_t c, int n) {
                    const Vector<T> sum = window_sum<T>(window, static_cast<const T*>(weight), channels, c, n);
                    store_part(to + column * channels + c, activate ? silu<T>(sum) : sum, n);
                });
            });
        }
    });
}

// `slopes` is room for [batch, height, width, channels] of the arithmetic's type, used where there is an activation.
extern "C" void depthwise_convolution_backward(
    const void* grad, const void* x, const void* weight, void* grad_x, void* grad_weight, void* slopes, int memory, int other,
    int64_t batch, int64_t height, int64_t width, int64_t channels, int activate, int threads
) {
    const int64_t image = height * width * channels;
    with_types(memory, other, [&](auto t, auto m, auto o) {
        using T = decltype(t);
        using M = decltype(m);
        using O = decltype(o);
        const T* w = static_cast<const T*>(weight);
        std::vector<T> flipped(9 * channels), partials(threads * 9 * channels);
        for (int i = 0; i < 9; i++) std::copy(w + i * channels, w + (i + 1) * channels, flipped.data() + (8 - i) * channels);
        // The gradient before the activation: grad itself, or grad * silu'(the convolution, computed again).
        if (activate) {
#pragma omp parallel for num_threads(threads)
            for (int64_t i = 0; i < batch * height; i++) {
                const Map<M> map{static_cast<const M*>(x) + i / height * image, height, width, channels};
                const O* dy = static_cast<const O*>(grad) + i * width * channels;
                T* to = static_cast<T*>(slopes) + i * width * channels;
                over_windows(map, i % height, [&](int64_t column, const M* const* window) {
                    over_channels<T>(channels, [&](int64_t c, int n) {
                        const Vector<T> sum = window_sum<T>(window, w, channels, c, n);
                        const int64_t at = column * channels + c;
                        store_part(to + at, load_part<T>(dy + at, n) * silu_slope<T>(sum), n);
                    });
                });
            }
        }
        const auto gradients = [&](const auto* before) {
            using G = std::remove_const_t<std::remove_pointer_t<decltype(before)>>;
#pragma omp parallel num_threads(threads)
            {
                const Range range = share(batch * height);
                T* weight_sum = partials.data() + omp_get_thread_num() * 9 * channels;
                for (int64_t i = range.begin; i < range.end; i++) {
                    const Map<G> map{before + i / height * image, height, width, channels};
                    const M* pixels = static_cast<const M*>(x) + i * width * channels;
                    M* to = static_cast<M*>(grad_x) + i * width * channels;
                    over_windows(map, i % height, [&](int64_t column, const G* const* window) {
                        over_channels<T>(channels, [&](int64_t c, int n) {
                            const int64_t at = column * channels + c;
                            store_part(to + at, window_sum<T>(window, flipped.data(), channels, c, n), n);
                            const Vector<T> pixel = load_part<T>(pixels + at, n);
#pragma GCC unroll 9
                            for (int j = 0; j < 9; j++)
                                if (window[j]) {
                                    T* sum = weight_sum + (8 - j) * channels + c;
                                    store_part(sum, load_part<T>(sum, n) + pixel * load_part<T>(window[j] + c, n), n);
                                }
                        });
                    });
                }
            }
        };
        if (activate)
            gradients(static_cast<const T*>(slopes));
        else
            gradients(static_cast<const O*>(grad));
        add_partials(partials, 9 * channels, static_cast<T*>(grad_weight));
    });
}

namespace {

// Rows of the mix are the heads of the tokens: [tokens, heads, width], the gate logits' tokens `token_stride` apart.
struct Heads {
    int64_t heads, width, token_stride;

    int64_t gate_row(int64_t i) const { return i / heads * token_stride + i % heads * width; }
};

}  // namespace

// y = act(G rms_norm(scan) + (1 - G) rms_norm(local)), G = sigmoid(gate)
extern "C" void gated_norm_mix_forward(
    const void* scan, const void* local, const void* gate, const void* scan_weight, const void* local_weight, void* out, int memory,
    int64_t tokens, int64_t heads, int64_t width, int64_t token_stride, double eps, int activate, int threads
) {
    const Heads layout{heads, width, token_stride};
    with_types(memory, memory, [&](auto t, auto m, auto) {
        using T = decltype(t);
        using M = decltype(m);
        const T *ws = static_cast<const T*>(scan_weight), *wl = static_cast<const T*>(local_weight);
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < tokens * heads; i++) {
            const M *s = static_cast<const M*>(scan) + i * width, *l = static_cast<const M*>(local) + i * width;
            const M* g = static_cast<const M*>(gate) + layout.gate_row(i);
            M* to = static_cast<M*>(out) + i * width;
            const T rs = inverse_rms<T>(s, width, T(eps)), rl = inverse_rms<T>(l, width, T(eps));
            over_channels<T>(width, [&](int64_t c, int n) {
                const Vector<T> a = load_part<T>(s + c, n) * rs * load_part<T>(ws + c, n);
                const Vector<T> b = load_part<T>(l + c, n) * rl * load_part<T>(wl + c, n);
                const Vector<T> mixed = b + sigmoid<T>(load_part<T>(g + c, n)) * (a - b);
                store_part(to + c, activate ? silu<T>(mixed) : mixed, n);
            });
        }
    });
}

extern "C" void gated_norm_mix_backward(
    const void* grad, const void* scan, const void* local, const void* gate, const void* scan_weight, const void* local_weight,
    void* grad_scan, void* grad_local, void* grad_gate, void* grad_scan_weight, void* grad_local_weight, int memory, int64_t tokens,
    int64_t heads, int64_t width, int64_t token_stride, double eps, int activate, int threads
) {
    const Heads layout{heads, width, token_stride};
    with_types(memory, memory, [&](auto t, auto m, auto) {
        using T = decltype(t);
        using M = decltype(m);
        const T *ws = static_cast<const T*>(scan_weight), *wl = static_cast<const T*>(local_weight);
        std::vector<T> scan_partials(threads * width), local_partials(threads * width), branches(threads * 2 * width);
#pragma omp parallel num_threads(threads)
        {
            const Range range = share(tokens * heads);
            const int64_t own = omp_get_thread_num() * width;
            T *scan_branch = branches.data() + 2 * own, *local_branch = scan_branch + width;  // gradients of the normed branches
            for (int64_t i = range.begin; i < range.end; i++) {
                const int64_t row = i * width;
                const M *s = static_cast<const M*>(scan) + row, *l = static_cast<const M*>(local) + row;
                const M *g = static_cast<const M*>(gate) + layout.gate_row(i), *dy = static_cast<const M*>(grad) + row;
                const T rs = inverse_rms<T>(s, width, T(eps)), rl = inverse_rms<T>(l, width, T(eps));
                over_channels<T>(width, [&](int64_t c, int n) {
                    const Vector<T> a = load_part<T>(s + c, n) * rs * load_part<T>(ws + c, n);
                    const Vector<T> b = load_part<T>(l + c, n) * rl * load_part<T>(wl + c, n);
                    const Vector<T> G = sigmoid<T>(load_part<T>(g + c, n));
                    Vector<T> d = load_part<T>(dy + c, n);
                    if (activate) d *= silu_slope<T>(b + G * (a - b));
                    store_part(static_cast<M*>(grad_gate) + row + c, d * (a - b) * G * (1 - G), n);
                    store_part(scan_branch + c, d * G, n);
                    store_part(local_branch + c, d * (1 - G), n);
                });
                M *ds = static_cast<M*>(grad_scan) + row, *dl = static_cast<M*>(grad_local) + row;
                rms_norm_row_backward<T>(s, scan_branch, ws, width, T(eps), ds, scan_partials.data() + own);
                rms_norm_row_backward<T>(l, local_branch, wl, width, T(eps), dl, local_partials.data() + own);
            }
        }
        add_partials(scan_partials, width, static_cast<T*>(grad_scan_weight));
        add_partials(local_partials, width, static_cast<T*>(grad_local_weight));
    });
}
