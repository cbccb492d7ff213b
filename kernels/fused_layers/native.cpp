// The elementwise layers around the scan on CPU: every tensor is read once and written once, SIMD over the channels.

#include "layers.h"

namespace {

template <typename T, typename M> INLINE T inverse_rms(const M* row, int64_t width, T eps) {
    Vector<T> squares{};
    over_channels<T>(width, [&](int64_t c, int n) {
        const Vector<T> x = load_part<T>(row + c, n);
        squares += x * x;
    });
    return 1 / std::sqrt(sum<T>(squares) / T(width) + eps);
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

// x, logits [rows, width] with evenly spaced rows -> out [rows, width], contiguous: x * sigmoid(logits) or x * silu(logits).
extern "C" void gated_product_forward(Tensor x, Tensor logits, Tensor out, int64_t rows, int64_t width, int with_silu, int threads) {
    with_types(x.dtype, logits.dtype, [&](auto t, auto m, auto o) {
        using T = decltype(t);
        using M = decltype(m);
        using O = decltype(o);
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < rows; i++) {
            const M* from = static_cast<const M*>(x.data) + i * x.strides[0];
            const O* gate = static_cast<const O*>(logits.data) + i * logits.strides[0];
            M* to = static_cast<M*>(out.data) + i * width;
            over_channels<T>(width, [&](int64_t c, int n) {
                const Vector<T> logit = load_part<T>(gate + c, n);
                store_part(to + c, load_part<T>(from + c, n) * (with_silu ? silu<T>(logit) : sigmoid<T>(logit)), n);
            });
        }
    });
}

// The gradients have the types of their tensors and are contiguous; grad has the type of x.
extern "C" void gated_product_backward(
    Tensor grad, Tensor x, Tensor logits, Tensor grad_x, Tensor grad_logits, int64_t rows, int64_t width, int with_silu, int threads
) {
    with_types(x.dtype, logits.dtype, [&](auto t, auto m, auto o) {
        using T = decltype(t);
        using M = decltype(m);
        using O = decltype(o);
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < rows; i++) {
            const M* dy = static_cast<const M*>(grad.data) + i * grad.strides[0];
            const M* from = static_cast<const M*>(x.data) + i * x.strides[0];
            const O* gate = static_cast<const O*>(logits.data) + i * logits.strides[0];
            M* to = static_cast<M*>(grad_x.data) + i * width;
            O* to_logits = static_cast<O*>(grad_logits.data) + i * width;
            over_channels<T>(width, [&](int64_t c, int n) {
                const Vector<T> logit = load_part<T>(gate + c, n), g = load_part<T>(dy + c, n), s = sigmoid<T>(logit);
                const Vector<T> slope = with_silu ? s * (1 + logit * (1 - s)) : s * (1 - s);
                store_part(to + c, g * (with_silu ? logit * s : s), n);
                store_part(to_logits + c, g * load_part<T>(from + c, n) * slope, n);
            });
        }
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
