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

// A row of pixels `stride` apart; null for none.
template <typename T> struct Row {
    const T* pixels = nullptr;
    int64_t stride = 0;
};

// A map in memory: `tensor.strides[0]` elements from pixel to pixel, `tensor.strides[1]` from image to image, adjacent
// channels. Rows are counted over all images.
template <typename T> class Map {
  public:
    Map(const Tensor& tensor, const Shape& shape)
        : tensor_(tensor), shape_(shape), lanes_(lanes_of<T>(shape.channels)),
          in_place_(tensor.dtype == (sizeof(T) == 8) && shape.channels == lanes_) {}

    bool empty() const { return !tensor_.data; }
    // From pixel to pixel of a row as `row` gives it.
    int64_t stride() const { return in_place_ ? tensor_.strides[0] : lanes_; }
    // Row i, in place or in `room`.
    const T* row(int64_t i, T* room) const {
        if (in_place_) return own_row(i);
        each(i, [&](int64_t at, Vector<T> v) { store(room + at, v); });
        return room;
    }
    // Calls f(place in room, vector) for every vector of row i.
    template <typename F> INLINE void each(int64_t i, F&& f) const {
        over_pixels(i, [&](auto* from, int64_t to, int n) { f(to, load_part<T>(from, n)); });
    }
    // Row i in place, where fetching it early pays: the processor's own caches hold no large map.
    const T* worth_fetching(int64_t i) const {
        constexpr int64_t LARGE = 3 << 20;
        const int64_t bytes = shape_.rows() * shape_.width * shape_.channels * sizeof(T);
        return in_place_ && bytes > LARGE && i < shape_.rows() ? own_row(i) : nullptr;
    }
    // Where to write row i: in place, or `room` to hand to `finish`.
    T* target(int64_t i, T* room) const { return in_place_ ? own_row(i) : room; }
    void finish(int64_t i, const T* row) const {
        if (!in_place_) over_pixels(i, [&](auto* to, int64_t from, int n) { store_part(to, load(row + from), n); });
    }

  private:
    int64_t offset(int64_t i) const {
        return i / shape_.height * tensor_.strides[1] + i % shape_.height * shape_.width * tensor_.strides[0];
    }
    T* own_row(int64_t i) const { return static_cast<T*>(tensor_.data) + offset(i); }

    // Calls f(a vector's place in memory, its place in room, how many lanes are channels).
    template <typename F> INLINE void over_pixels(int64_t i, F&& f) const {
        with_type(tensor_.dtype, [&](auto* m) {
            using M = std::remove_pointer_t<decltype(m)>;
            if constexpr (std::is_same_v<M, double> == std::is_same_v<T, double>) {
                M* row = static_cast<M*>(tensor_.data) + offset(i);
                for (int64_t x = 0; x < shape_.width; x++, row += tensor_.strides[0])
                    over_channels<T>(shape_.channels, [&](int64_t c, int n) { f(row + c, x * lanes_ + c, n); });
            }
        });
    }

    const Tensor tensor_;
    const Shape shape_;
    const int64_t lanes_;
    const bool in_place_;
};

// Rows that are computed: make(i, room) fills `room` with row i.
template <typename T, typename Make> class Computed {
  public:
    Computed(int64_t lanes, Make make) : lanes_(lanes), make_(make) {}

    int64_t stride() const { return lanes_; }
    const T* row(int64_t i, T* room) {
        make_(i, room);
        return room;
    }
    const T* worth_fetching(int64_t) const { return nullptr; }

  private:
    const int64_t lanes_;
    Make make_;
};
template <typename T, typename Make> Computed<T, Make> computed(int64_t lanes, Make make) { return {lanes, make}; }

// The rows that windows cover while their centre moves down. Each is read from its source (Map or Computed) once.
template <typename T, typename Source> class Window {
  public:
    // `room` is for `kernel + 1` rows of `row_size` elements.
    Window(const Shape& shape, T* room, int64_t row_size, Source source)
        : shape_(shape), room_(room), row_size_(row_size), source_(source), read_(shape.kernel + 1),
          around_(shape.kernel + 1) {}

    int64_t stride() const { return source_.stride(); }
    // The rows under the windows around row i and, if `count` is two, row i + 1 of the same image, from above to below; null
    // outside of the image.
    const T* const* around(int64_t i, int64_t count) {
        const int64_t y = i % shape_.height, image = i - y;
        const int64_t from = image + std::max<int64_t>(y - shape_.pad(), 0);
        const int64_t to = image + std::min(y + count - 1 + shape_.pad(), shape_.height - 1);
        if (i != expected_ || y == 0) next_ = from;  // a new image or another part of one: nothing is read yet
        expected_ = i + count;
        for (; next_ <= to; next_++) read_[slot(next_)] = source_.row(next_, room_ + slot(next_) * row_size_);
        for (int64_t k = 0; k < shape_.kernel + count - 1; k++) {
            const int64_t row = i + k - shape_.pad();
            around_[k] = row < from || row > to ? nullptr : read_[slot(row)];
        }
        return around_.data();
    }
    // Row i, one of the last `kernel + 1` read.
    Row<T> row(int64_t i) const { return {read_[slot(i)], stride()}; }
    // What a window meets that goes on by `count` rows from row i, where fetching it early pays.
    const T* ahead(int64_t i, int64_t count) const { return source_.worth_fetching(i + count + shape_.pad()); }

  private:
    int64_t slot(int64_t i) const { return i % (shape_.kernel + 1); }

    const Shape shape_;
    T* const room_;
    const int64_t row_size_;
    Source source_;
    std::vector<const T*> read_, around_;
    int64_t expected_ = -1, next_ = 0;
};

}  // namespace
