// Depthwise convolutions of channels-last maps on CPU, with what stands before and after them, in one pass over memory.
//
// Threads take fixed ranges of rows; what a row of the result needs of the rows around it is made once a thread.

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

// [channels][window] -> [window][lanes], forwards or backwards; the lanes past the channels are zero.
template <typename T> std::vector<T> by_lanes(const T* from, int64_t channels, int64_t window, bool backwards) {
    const int64_t lanes = lanes_of<T>(channels);
    std::vector<T> to(window * lanes);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t i = 0; i < window; i++) to[(backwards ? window - 1 - i : i) * lanes + c] = from[c * window + i];
    return to;
}

// What the threads' rows add up to the gradients of the taps (backwards, as the window sees them) and of the bias.
template <typename T> class WeightGradients {
  public:
    WeightGradients(const Shape& shape, int threads)
        : channels_(shape.channels), window_(shape.kernel * shape.kernel), lanes_(lanes_of<T>(shape.channels)),
          partials_(threads * (window_ + 1) * lanes_) {}

    T* products(int thread) { return partials_.data() + thread * (window_ + 1) * lanes_; }
    void add_pixels(int thread, const T* row, int64_t stride, int64_t width) {
        T* sums = products(thread) + window_ * lanes_;
        for (int64_t c = 0; c < lanes_; c += LANES<T>) {
            Vector<T> sum{};
            for (int64_t x = 0; x < width; x++) sum += load(row + x * stride + c);
            store(sums + c, load(sums + c) + sum);
        }
    }
    void write(T* weight, T* bias) const {
        std::fill(weight, weight + channels_ * window_, T(0));
        std::fill(bias, bias + channels_, T(0));
        for (size_t start = 0; start < partials_.size(); start += (window_ + 1) * lanes_)
            for (int64_t c = 0; c < channels_; c++) {
                for (int64_t i = 0; i < window_; i++) weight[c * window_ + window_ - 1 - i] += partials_[start + i * lanes_ + c];
                bias[c] += partials_[start + window_ * lanes_ + c];
            }
    }

  private:
    const int64_t channels_, window_, lanes_;
    std::vector<T> partials_;
};

// One call's constants.
template <typename T> struct Convolution {
    const Shape shape;
    const Tile<T> tile = tile_for<T>(shape);
    const int64_t lanes = lanes_of<T>(shape.channels), row_size = shape.width * lanes;
    const std::vector<T> zeros = std::vector<T>(lanes);

    // How many rows, from row i on and before `end`, to make at once.
    int64_t rows_at(int64_t i, int64_t end) const {
        return std::min({int64_t(MOST_ROWS), end - i, shape.height - i % shape.height});
    }
    Neighbours<T> neighbours(const T* const* rows, int64_t stride) const {
        return {rows, stride, shape.width, lanes, shape.kernel, zeros.data()};
    }
    // `count` rows of the convolution of the rows under their windows.
    void rows(const T* const* under, int64_t stride, const T* taps, const T* bias, const Target<T>* targets, int64_t count) const {
        const Neighbours<T> near = neighbours(under, stride);
        const auto convolve = count == 1 ? tile.convolve : tile.convolve_rows;
        for (int64_t x = 0; x < shape.width; x += tile.size) convolve(near, x, taps, bias, targets);
    }
    // Replaces the vectors v of a row by f(v, pixel, channel).
    template <typename F> INLINE void change(T* row, F&& f) const {
        for (int64_t x = 0; x < shape.width; x++)
            for (int64_t c = 0; c < lanes; c += LANES<T>) store(row + x * lanes + c, f(load(row + x * lanes + c), x, c));
    }
};

// Calls f with a value of the arithmetic's type for maps of dtype code `dtype`.
template <typename F> void with_arithmetic(int32_t dtype, F&& f) {
    if (dtype == 1)
        f(double{});
    else
        f(float{});
}

template <typename T>
void forward(
    const Convolution<T>& layer, const Map<T>& x, const T* weight, const T* bias, const Map<T>* residual, bool activate,
    const Map<T>& out, int threads
) {
    const Shape& shape = layer.shape;
    const std::vector<T> taps = by_lanes(weight, shape.channels, shape.kernel * shape.kernel, false);
    const std::vector<T> biases = bias ? by_lanes(bias, shape.channels, 1, false) : std::vector<T>{};
#pragma omp parallel num_threads(threads)
    {
        const int64_t size = layer.row_size, ring = (shape.kernel + 1) * size;
        T* room = thread_room<T>(ring + 2 * MOST_ROWS * size);
        T *residual_room = room + ring, *out_room = residual_room + MOST_ROWS * size;
        Window window(shape, room, size, [&](int64_t i, T* to) { return x.row(i, to); });
        const Range range = share(shape.rows());
        int64_t count;
        for (int64_t i = range.begin; i < range.end; i += count) {
            count = layer.rows_at(i, range.end);
            Target<T> targets[MOST_ROWS];
            Addend<T> added[MOST_ROWS];
            for (int64_t r = 0; r < count; r++) {
                if (residual) added[r] = {residual->row(i + r, residual_room + r * size), residual->stride};
                targets[r] = {out.target(i + r, out_room + r * size), activate ? Addend<T>{} : added[r], x.worth_fetching(i + r + count + shape.pad())};
            }
            layer.rows(window.around(i, count), x.stride, taps.data(), bias ? biases.data() : nullptr, targets, count);
            for (int64_t r = 0; r < count; r++) {
                if (activate)
                    layer.change(targets[r].row, [&](Vector<T> v, int64_t pixel, int64_t c) {
                        return added[r].row ? silu<T>(v) + load(added[r].row + pixel * added[r].stride + c) : silu<T>(v);
                    });
                out.finish(i + r, targets[r].row);
            }
        }
    }
}

template <typename T>
void backward(
    const Convolution<T>& layer, const Map<T>& grad, const Map<T>& x, const T* weight, const T* bias, bool activate, bool add_input,
    const Map<T>& grad_x, T* grad_weight, T* grad_bias, int threads
) {
    const Shape& shape = layer.shape;
    const int64_t window_size = shape.kernel * shape.kernel;
    const std::vector<T> flipped = by_lanes(weight, shape.channels, window_size, true);
    const std::vector<T> taps = activate ? by_lanes(weight, shape.channels, window_size, false) : std::vector<T>{};
    const std::vector<T> biases = bias ? by_lanes(bias, shape.channels, 1, false) : std::vector<T>{};
    WeightGradients<T> gradients(shape, threads);
#pragma omp parallel num_threads(threads)
    {
        const int64_t size = layer.row_size, ring = (shape.kernel + 1) * size;
        T* room = thread_room<T>(2 * ring + 2 * MOST_ROWS * size + 2 * size);
        T *grad_room = room + 2 * ring, *out_room = grad_room + MOST_ROWS * size;
        T *x_room = out_room + MOST_ROWS * size, *after_room = x_room + size;
        Window inputs(shape, room, size, [&](int64_t i, T* to) { return x.row(i, to); });
        // The gradient before the activation: grad itself, or grad * silu'(the convolution, computed again).
        Window before(shape, room + ring, size, [&](int64_t i, T* to) -> const T* {
            const T* after = grad.row(i, activate ? after_room : to);
            if (!activate) return after;
            const Target<T> target{to};
            layer.rows(inputs.around(i, 1), x.stride, taps.data(), bias ? biases.data() : nullptr, &target, 1);
            layer.change(to, [&](Vector<T> v, int64_t pixel, int64_t c) { return silu_slope<T>(v) * load(after + pixel * grad.stride + c); });
            return to;
        });
        const int64_t stride = activate ? layer.lanes : grad.stride;
        T* products = gradients.products(omp_get_thread_num());
        const Range range = share(shape.rows());
        int64_t count;
        for (int64_t i = range.begin; i < range.end; i += count) {
            count = layer.rows_at(i, range.end);
            const T* const* under = before.around(i, count);
            Target<T> targets[MOST_ROWS];
            for (int64_t r = 0; r < count; r++) {
                targets[r].row = grad_x.target(i + r, out_room + r * size);
                if (add_input) targets[r].added = {grad.row(i + r, grad_room + r * size), grad.stride};
                if (!activate) targets[r].ahead = grad.worth_fetching(i + r + count + shape.pad());
            }
            layer.rows(under, stride, flipped.data(), nullptr, targets, count);
            for (int64_t r = 0; r < count; r++) {
                grad_x.finish(i + r, targets[r].row);
                const T* centre = activate ? inputs.row(i + r) : x.row(i + r, x_room);
                const T* ahead = activate ? nullptr : x.worth_fetching(i + r + 1);
                const Neighbours<T> near = layer.neighbours(under + r, stride);
                for (int64_t first = 0; first < shape.width; first += layer.tile.size)
                    layer.tile.correlate(near, first, centre, x.stride, ahead, products);
                gradients.add_pixels(omp_get_thread_num(), before.row(i + r), stride, shape.width);
            }
        }
    }
    gradients.write(grad_weight, grad_bias);
}

}  // namespace

// Maps [batch, height, width, channels] have evenly spaced pixels, those written are contiguous; weight
// [channels][kernel * kernel], bias and their gradients are contiguous, of the arithmetic's type; bias and the data of the
// residual may be null.

extern "C" void depthwise_convolution_forward(
    Tensor x, Tensor residual, Tensor out, const void* weight, const void* bias, int64_t batch, int64_t height, int64_t width,
    int64_t channels, int64_t kernel, int activate, int, int threads
) {
    with_arithmetic(x.dtype, [&](auto t) {
        using T = decltype(t);
        const Convolution<T> layer{{batch, height, width, channels, kernel}};
        const Map<T> added(residual, layer.shape);
        forward<T>(
            layer, Map<T>(x, layer.shape), static_cast<const T*>(weight), static_cast<const T*>(bias), residual.data ? &added : nullptr,
            activate, Map<T>(out, layer.shape), threads
        );
    });
}

// `add_input`: the input was the residual too.
extern "C" void depthwise_convolution_backward(
    Tensor grad, Tensor x, Tensor grad_x, const void* weight, const void* bias, void* grad_weight, void* grad_bias, int64_t batch,
    int64_t height, int64_t width, int64_t channels, int64_t kernel, int activate, int add_input, int threads
) {
    with_arithmetic(x.dtype, [&](auto t) {
        using T = decltype(t);
        const Convolution<T> layer{{batch, height, width, channels, kernel}};
        backward<T>(
            layer, Map<T>(grad, layer.shape), Map<T>(x, layer.shape), static_cast<const T*>(weight), static_cast<const T*>(bias), activate,
            add_input, Map<T>(grad_x, layer.shape), static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), threads
        );
    });
}
