// Channels-last maps on their way through the arithmetic: rows of pixels of type T, every pixel in whole vectors.
//
// A row that lies in memory as T in whole vectors is used in place. Any other is widened into room of the caller's, and
// the lanes past its channels are zero there; so nothing further on knows of memory types and of parts of vectors.
#pragma once

#include "layers.h"

namespace {

struct Shape {
    int64_t batch, height, width, channels, kernel;  // kernel: the odd side of the window

    int64_t rows() const { return batch * height; }
    int64_t pad() const { return kernel / 2; }
};

// Channels in whole vectors.
template <typename T> INLINE int64_t lanes_of(int64_t channels) { return (channels + LANES<T> - 1) / LANES<T> * LANES<T>; }

// A map in memory: `tensor.strides[0]` elements from pixel to pixel, adjacent channels. Rows are counted over all images.
template <typename T> class Map {
  public:
    const int64_t lanes;   // of a pixel in room
    const int64_t stride;  // from pixel to pixel of a row as `row` gives it

    Map(const Tensor& tensor, const Shape& shape)
        : lanes(lanes_of<T>(shape.channels)), stride(in_place(tensor, shape) ? tensor.strides[0] : lanes), tensor_(tensor), shape_(shape) {}

    // Calls f(place in room, vector) for every vector of row i.
    template <typename F> INLINE void each(int64_t i, F&& f) const {
        over_pixels(i, [&](auto* from, int64_t to, int n) { f(to, load_part<T>(from, n)); });
    }
    // Row i, in place or in `room`.
    const T* row(int64_t i, T* room) const {
        if (in_place(tensor_, shape_)) return own_row(i);
        each(i, [&](int64_t at, Vector<T> v) { store(room + at, v); });
        return room;
    }
    // Row i in place, where fetching it early pays: the processor's own caches hold no large map.
    const T* worth_fetching(int64_t i) const {
        constexpr int64_t LARGE = 2 << 20;
        const bool large = shape_.rows() * shape_.width * shape_.channels * int64_t(sizeof(T)) > LARGE;
        return large && in_place(tensor_, shape_) && i < shape_.rows() ? own_row(i) : nullptr;
    }
    // Where to write row i: in place, or `room` to hand to `finish`.
    T* target(int64_t i, T* room) const { return in_place(tensor_, shape_) ? own_row(i) : room; }
    void finish(int64_t i, const T* row) const {
        if (in_place(tensor_, shape_)) return;
        over_pixels(i, [&](auto* to, int64_t from, int n) { store_part(to, load(row + from), n); });
    }

  private:
    static bool in_place(const Tensor& tensor, const Shape& shape) {
        return tensor.dtype == (sizeof(T) == 8) && shape.channels % LANES<T> == 0;
    }
    T* own_row(int64_t i) const { return static_cast<T*>(tensor_.data) + i * shape_.width * tensor_.strides[0]; }

    template <typename F> INLINE void over_pixels(int64_t i, F&& f) const {
        with_type(tensor_.dtype, [&](auto* m) {
            using M = std::remove_pointer_t<decltype(m)>;
            if constexpr (std::is_same_v<M, double> == std::is_same_v<T, double>) {
                M* row = static_cast<M*>(tensor_.data) + i * shape_.width * tensor_.strides[0];
                for (int64_t x = 0; x < shape_.width; x++)
                    over_channels<T>(shape_.channels, [&](int64_t c, int n) { f(row + x * tensor_.strides[0] + c, x * lanes + c, n); });
            }
        });
    }

    const Tensor tensor_;
    const Shape shape_;
};

// The rows that windows cover while their centre moves down. Each is made once, by make(i, room), which returns row i in
// place or in `room`.
template <typename T, typename Make> class Window {
  public:
    // `room` is for `kernel + 1` rows of `row_size` elements.
    Window(const Shape& shape, T* room, int64_t row_size, Make make)
        : shape_(shape), room_(room), row_size_(row_size), make_(make), made_(shape.kernel + 1), around_(shape.kernel + 1) {}

    // The rows under the windows around row i and, if `count` is two, row i + 1 of the same image, from above to below; null
    // outside of the image.
    const T* const* around(int64_t i, int64_t count) {
        const int64_t y = i % shape_.height, image = i - y;
        const int64_t from = image + std::max<int64_t>(y - shape_.pad(), 0);
        const int64_t to = image + std::min(y + count - 1 + shape_.pad(), shape_.height - 1);
        if (i != expected_ || y == 0) next_ = from;  // a new image or another part of one: nothing is made yet
        expected_ = i + count;
        for (; next_ <= to; next_++) made_[slot(next_)] = make_(next_, room_ + slot(next_) * row_size_);
        for (int64_t k = 0; k < shape_.kernel + count - 1; k++) {
            const int64_t row = i + k - shape_.pad();
            around_[k] = row < from || row > to ? nullptr : made_[slot(row)];
        }
        return around_.data();
    }
    // Row i, one of the last `kernel + 1` made.
    const T* row(int64_t i) const { return made_[slot(i)]; }

  private:
    int64_t slot(int64_t i) const { return i % (shape_.kernel + 1); }

    const Shape shape_;
    T* const room_;
    const int64_t row_size_;
    Make make_;
    std::vector<const T*> made_, around_;
    int64_t expected_ = -1, next_ = 0;
};

}  // namespace
