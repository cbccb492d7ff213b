// Depthwise convolutions of channels-last maps on CPU, with what stands before and after them, in one pass over memory.
//
// Threads take fixed ranges of rows. What a row of the result needs of the rows around it (in the arithmetic's type, or
// after an activation) lies in a ring of rows of the thread's own and never in memory.

#include <new>

#include "tiles.h"

namespace {

// Room for `count` elements that a thread keeps between calls.
template <typename T> T* thread_room(int64_t count) {
    static thread_local Workspace workspace;
    T* room = workspace.get<T>(count);
    if (!room) throw std::bad_alloc();
    return room;
}

// [channels][window] -> [window][lanes], backwards if `flip`; the lanes past the channels are zero.
template <typename T> std::vector<T> by_lanes(const T* from, int64_t channels, int64_t window, bool flip = false) {
    const int64_t lanes = lanes_of<T>(channels);
    std::vector<T> to(window * lanes);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < window; i++) to[(flip ? window - 1 - i : i) * lanes + c] = from[c * window + i];
    return to;
}

// One call's constants: what the tiles need besides the rows.
template <typename T> struct Convolution {
    const Shape shape;
    const Tile<T> tile = tile_for<T>(shape);
    const int64_t lanes = lanes_of<T>(shape.channels), window = shape.kernel * shape.kernel;
    const int64_t row_size = shape.width * lanes, ring_size = (shape.kernel + 1) * row_size;
    const std::vector<T> zeros = std::vector<T>(lanes);
    std::vector<T> taps, flipped, biases;

    Convolution(const Shape& shape, const void* weight, const void* bias, bool convolves, bool transposes) : shape(shape) {
        if (convolves) taps = by_lanes(static_cast<const T*>(weight), shape.channels, window);
        if (transposes) flipped = by_lanes(static_cast<const T*>(weight), shape.channels, window, true);
        if (bias) biases = by_lanes(static_cast<const T*>(bias), shape.channels, 1);
    }

    // Calls f(i, how many rows from row i on to make at once) for this thread's rows: several only where they and what they
    // are made of fit in the core's own cache.
    template <typename F> void over_rows(F&& f) const {
        constexpr int64_t CACHE_BYTES = 384 << 10;
        const bool fit = (shape.kernel - 1 + 2 * MOST_ROWS) * row_size * int64_t(sizeof(T)) <= CACHE_BYTES;
        const Range range = share(shape.rows());
        for (int64_t i = range.begin, count; i < range.end; i += count) {
            count = std::min({int64_t(fit ? MOST_ROWS : 1), range.end - i, shape.height - i % shape.height});
            f(i, count);
        }
    }
    // `count` rows of the convolution of the rows under their windows, after `activation` where it is not null.
    void convolve(
        const T* const* under, int64_t stride, Activation<T> activation, const Target<T>* targets, int64_t count
    ) const {
        apply(under, stride, taps, biases.empty() ? nullptr : biases.data(), activation, targets, count);
    }
    // The same of its transpose: from gradients of the result to those of the input.
    void transpose(const T* const* under, int64_t stride, const Target<T>* targets, int64_t count) const {
        apply(under, stride, flipped, nullptr, nullptr, targets, count);
    }
    // Adds to products [window][lanes] those of a row and the rows under its window.
    void correlate(const T* const* under, int64_t stride, Row<T> centre, const T* ahead, T* products) const {
        const Neighbours<T> near = neighbours(under, stride);
        for (int64_t x = 0; x < shape.width; x += tile.size) tile.correlate(near, x, centre, ahead, products);
    }
    // Multiplies a row by another.
    void multiply(T* row, Row<T> factor) const {
        for (int64_t x = 0; x < shape.width; x++)
            for (int64_t c = 0; c < lanes; c += LANES<T>) {
                T* at = row + x * lanes + c;
                store(at, load(at) * load(factor.pixels + x * factor.stride + c));
            }
    }

  private:
    Neighbours<T> neighbours(const T* const* rows, int64_t stride) const {
        return {rows, stride, shape.width, lanes, shape.kernel, zeros.data()};
    }
    void apply(
        const T* const* under, int64_t stride, const std::vector<T>& its_taps, const T* bias, Activation<T> activation,
        const Target<T>* targets, int64_t count
    ) const {
        const bool together = count == MOST_ROWS && tile.convolve_rows;
        for (int64_t x = 0; x < shape.width; x += tile.size)
            if (together)
                tile.convolve_rows(neighbours(under, stride), x, its_taps.data(), bias, activation, targets);
            else
                for (int64_t r = 0; r < count; r++)
                    tile.convolve(neighbours(under + r, stride), x, its_taps.data(), bias, activation, targets + r);
    }
};

// The gradients of weight and bias as sums of each thread, the taps' in the order in which a window sees them from the
// input: backwards.
template <typename T> class WeightGradients {
  public:
    WeightGradients(const Convolution<T>& layer, int threads)
        : layer_(layer), size_((layer.window + 1) * layer.lanes), sums_(threads * size_) {}

    T* products() { return sums_.data() + omp_get_thread_num() * size_; }
    void add_pixels(Row<T> row) {
        T* sums = products() + layer_.window * layer_.lanes;
        for (int64_t c = 0; c < layer_.lanes; c += LANES<T>) {
            Vector<T> sum{};
            for (int64_t x = 0; x < layer_.shape.width; x++) sum += load(row.pixels + x * row.stride + c);
            store(sums + c, load(sums + c) + sum);
        }
    }
    void write(void* weight, void* bias) const {
        const int64_t window = layer_.window, channels = layer_.shape.channels;
        T *to = static_cast<T*>(weight), *to_bias = static_cast<T*>(bias);
        std::fill(to, to + channels * window, T(0));
        std::fill(to_bias, to_bias + channels, T(0));
        for (auto sums = sums_.begin(); sums != sums_.end(); sums += size_)
            for (int64_t c = 0; c < channels; c++) {
                for (int64_t i = 0; i < window; i++) to[c * window + window - 1 - i] += sums[i * layer_.lanes + c];
                to_bias[c] += sums[window * layer_.lanes + c];
            }
    }

  private:
    const Convolution<T>& layer_;
    const int64_t size_;
    std::vector<T> sums_;
};

// A row of a convolution's input, and a row to fetch into the cache while it is used, or null.
template <typename T> struct Centre {
    Row<T> row;
    const T* ahead = nullptr;
};

template <typename T> void unchanged(T*) {}

// A thread's part of a forward pass from the Window `inputs`. added(i, r) is what to add, after the activation, to row i,
// the r-th of those made at once. `room` is for MOST_ROWS rows.
template <typename T, typename Inputs, typename Added>
void forward_rows(
    const Convolution<T>& layer, Inputs& inputs, Added&& added, Activation<T> activation, const Map<T>& out, T* room
) {
    layer.over_rows([&](int64_t i, int64_t count) {
        const T* const* under = inputs.around(i, count);
        Target<T> targets[MOST_ROWS];
        for (int64_t r = 0; r < count; r++)
            targets[r] = {out.target(i + r, room + r * layer.row_size), added(i + r, r), inputs.ahead(i + r, count)};
        layer.convolve(under, inputs.stride(), activation, targets, count);
        for (int64_t r = 0; r < count; r++) out.finish(i + r, targets[r].row);
    });
}

// A thread's part of a backward pass from `before`, the Window of the gradients of the convolution, to the gradient of its
// input, of which centre(i) gives row i. finish(row) changes a row of the gradient before it is written; the rest as in
// forward_rows.
template <typename T, typename Before, typename Added, typename CentreOf, typename Finish>
void backward_rows(
    const Convolution<T>& layer, Before& before, Added&& added, CentreOf&& centre, const Map<T>& grad_x, T* room,
    WeightGradients<T>& gradients, Finish&& finish
) {
    layer.over_rows([&](int64_t i, int64_t count) {
        const T* const* under = before.around(i, count);
        Target<T> targets[MOST_ROWS];
        for (int64_t r = 0; r < count; r++)
            targets[r] = {grad_x.target(i + r, room + r * layer.row_size), added(i + r, r), before.ahead(i + r, count)};
        layer.transpose(under, before.stride(), targets, count);
        for (int64_t r = 0; r < count; r++) {
            const auto [row, ahead] = centre(i + r);
            layer.correlate(under + r, before.stride(), row, ahead, gradients.products());
            gradients.add_pixels(before.row(i + r));
            finish(targets[r].row);
            grad_x.finish(i + r, targets[r].row);
        }
    });
}

template <typename T>
void forward(
    const Convolution<T>& layer, const Map<T>& x, const Map<T>& residual, bool activate, const Map<T>& out, int threads
) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t size = layer.row_size;
        T* room = thread_room<T>(layer.ring_size + 2 * MOST_ROWS * size);
        T *added_room = room + layer.ring_size, *out_room = added_room + MOST_ROWS * size;
        Window inputs(layer.shape, room, size, x);
        const auto addend = [&](int64_t i, int64_t r) {
            return residual.empty() ? Row<T>{} : Row<T>{residual.row(i, added_room + r * size), residual.stride()};
        };
        forward_rows<T>(layer, inputs, addend, activate ? silu_all<T> : nullptr, out, out_room);
    }
}

template <typename T>
void backward(
    const Convolution<T>& layer, const Map<T>& grad, const Map<T>& x, bool activate, bool add_input, const Map<T>& grad_x,
    WeightGradients<T>& gradients, int threads
) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t size = layer.row_size;
        T* room = thread_room<T>(2 * layer.ring_size + 2 * MOST_ROWS * size + size);
        T *x_room = room + layer.ring_size, *added_room = x_room + layer.ring_size;
        T *out_room = added_room + MOST_ROWS * size, *row_room = out_room + MOST_ROWS * size;
        const auto addend = [&](int64_t i, int64_t r) {
            return add_input ? Row<T>{grad.row(i, added_room + r * size), grad.stride()} : Row<T>{};
        };
        if (activate) {
            Window inputs(layer.shape, x_room, size, x);
            // The gradient before the activation: grad * silu'(the convolution, computed again).
            Window before(layer.shape, room, size, computed<T>(layer.lanes, [&](int64_t i, T* to) {
                const Target<T> target{to, {}, inputs.ahead(i, 1)};
                layer.convolve(inputs.around(i, 1), inputs.stride(), silu_slope_all<T>, &target, 1);
                layer.multiply(to, {grad.row(i, row_room), grad.stride()});
            }));
            const auto centre = [&](int64_t i) { return Centre<T>{inputs.row(i)}; };
            backward_rows(layer, before, addend, centre, grad_x, out_room, gradients, unchanged<T>);
        } else {
            Window before(layer.shape, room, size, grad);
            const auto centre = [&](int64_t i) {
                return Centre<T>{{x.row(i, row_room), x.stride()}, x.worth_fetching(i + 1)};
            };
            backward_rows(layer, before, addend, centre, grad_x, out_room, gradients, unchanged<T>);
        }
    }
}

// h + convolution(h) of h = gelu(x): rows of h are computed once (at the borders of threads twice) and never in memory.
template <typename T> void gelu_forward(const Convolution<T>& layer, const Map<T>& x, const Map<T>& out, int threads) {
#pragma omp parallel num_threads(threads)
    {
        T* room = thread_room<T>(layer.ring_size + MOST_ROWS * layer.row_size);
        Window inputs(layer.shape, room, layer.row_size, computed<T>(layer.lanes, [&](int64_t i, T* to) {
            x.each(i, [&](int64_t at, Vector<T> v) { store(to + at, v * normal_distribution(v)); });
        }));
        const auto addend = [&](int64_t i, int64_t) { return inputs.row(i); };
        forward_rows<T>(layer, inputs, addend, nullptr, out, room + layer.ring_size);
    }
}

template <typename T>
void gelu_backward(
    const Convolution<T>& layer, const Map<T>& grad, const Map<T>& x, const Map<T>& grad_x, WeightGradients<T>& gradients,
    int threads
) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t size = layer.row_size;
        T* room = thread_room<T>(layer.ring_size + MOST_ROWS * size + 2 * size);
        T *out_room = room + layer.ring_size, *h_room = out_room + MOST_ROWS * size, *slope_room = h_room + size;
        Window before(layer.shape, room, size, grad);
        const auto addend = [&](int64_t i, int64_t) { return before.row(i); };
        const auto centre = [&](int64_t i) {
            x.each(i, [&](int64_t at, Vector<T> v) {
                const Vector<T> below = normal_distribution(v);
                store(h_room + at, v * below);
                store(slope_room + at, below + v * normal_density(v));
            });
            return Centre<T>{{h_room, layer.lanes}, x.worth_fetching(i + 1)};
        };
        backward_rows(layer, before, addend, centre, grad_x, out_room, gradients, [&](T* row) {
            layer.multiply(row, {slope_room, layer.lanes});
        });
    }
}

// Calls f with a value of the arithmetic's type for maps of dtype code `dtype`.
template <typename F> void with_arithmetic(int32_t dtype, F&& f) {
    if (dtype == 1)
        f(double{});
    else
        f(float{});
}

}  // namespace

// Maps [batch, height, width, channels] have evenly spaced pixels in each image and evenly spaced images, those written
// no gaps between pixels; weight [channels][kernel * kernel], bias and their gradients are contiguous, of the
// arithmetic's type; bias and the data of the residual may be null. The residual may be the result's own memory, the
// input may not. `add_input`: the input is the residual too.

extern "C" void depthwise_convolution_forward(
    Tensor x, Tensor residual, Tensor out, const void* weight, const void* bias, int64_t batch, int64_t height, int64_t width,
    int64_t channels, int64_t kernel, int activate, int add_input, int threads
) {
    with_arithmetic(x.dtype, [&](auto t) {
        using T = decltype(t);
        const Shape shape{batch, height, width, channels, kernel};
        const Convolution<T> layer(shape, weight, bias, true, false);
        const Map<T> added(add_input ? x : residual, shape);
        forward(layer, Map<T>(x, shape), added, activate, Map<T>(out, shape), threads);
    });
}

extern "C" void depthwise_convolution_backward(
    Tensor grad, Tensor x, Tensor grad_x, const void* weight, const void* bias, void* grad_weight, void* grad_bias,
    int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t kernel, int activate, int add_input, int threads
) {
    with_arithmetic(x.dtype, [&](auto t) {
        using T = decltype(t);
        const Shape shape{batch, height, width, channels, kernel};
        const Convolution<T> layer(shape, weight, bias, activate, true);
        WeightGradients<T> gradients(layer, threads);
        const Map<T> of_result(grad, shape), of_input(grad_x, shape);
        backward(layer, of_result, Map<T>(x, shape), activate, add_input, of_input, gradients, threads);
        gradients.write(grad_weight, grad_bias);
    });
}

extern "C" void gelu_depthwise_residual_forward(
    Tensor x, Tensor out, const void* weight, const void* bias, int64_t batch, int64_t height, int64_t width, int64_t channels,
    int64_t kernel, int threads
) {
    with_arithmetic(x.dtype, [&](auto t) {
        using T = decltype(t);
        const Shape shape{batch, height, width, channels, kernel};
        const Convolution<T> layer(shape, weight, bias, true, false);
        gelu_forward(layer, Map<T>(x, shape), Map<T>(out, shape), threads);
    });
}

extern "C" void gelu_depthwise_residual_backward(
    Tensor grad, Tensor x, Tensor grad_x, const void* weight, void* grad_weight, void* grad_bias, int64_t batch, int64_t height,
    int64_t width, int64_t channels, int64_t kernel, int threads
) {
    with_arithmetic(x.dtype, [&](auto t) {
        using T = decltype(t);
        const Shape shape{batch, height, width, channels, kernel};
        const Convolution<T> layer(shape, weight, nullptr, false, true);
        WeightGradients<T> gradients(layer, threads);
        gelu_backward(layer, Map<T>(grad, shape), Map<T>(x, shape), Map<T>(grad_x, shape), gradients, threads);
        gradients.write(grad_weight, grad_bias);
    });
}
