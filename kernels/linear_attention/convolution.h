// The depthwise convolution of one head's channels of an image, for a block of pixels at a time.
//
// The image's rows under the windows lie in a ring, one vector of channels after the other, with zeros on both sides:
// what a block's sums load lies close together, and no pixel of a row is a special case. Rows above and below the image
// are left out. A row is read once, unless the block before was another head's or lay further up or down.
#pragma once

#include "products.h"

// Channels-last pixels: the last tokens of `tensor` (batch, tokens, heads, width of a head); null for none.
struct Image {
    int64_t before, height, width, kernel;  // tokens before the image; kernel: the odd side of the window
    Tensor tensor, weight, bias;            // weight (channels, kernel * kernel); bias (channels), null for none
};

template <typename T> class ImageConvolution {
    static constexpr int PIXELS = 8;  // of a tile: its sums, a row of taps and an input lie in registers
    static constexpr int L = LANES<T>;

  public:
    static int64_t scratch(const Image& image, int64_t channels) {
        if (!image.tensor.data) return 0;
        const int64_t weights = image.kernel * image.kernel + 1, pixels = slots(image) * across(image);
        return (weights + pixels) * padded<T>(channels) + PIXELS * L;  // a row's last tile reads past its end
    }
    ImageConvolution(const Image& image, int64_t channels, T* memory)
        : image_(image), channels_(channels), width_(padded<T>(channels)), pad_(image.kernel / 2),
          across_(across(image)), slots_(image.tensor.data ? slots(image) : 0), bias_(memory), taps_(bias_ + width_),
          ring_(taps_ + image.kernel * image.kernel * width_) {}

    // Sums [count][padded channels], from pixel `first` of the image on.
    void convolve(int64_t batch, int64_t head, int64_t first, int64_t count, T* sums) {
        const int64_t begin = first / image_.width, end = (first + count - 1) / image_.width + 1;
        if (batch != batch_ || head != head_) begin_ = end_ = 0;
        if (head != head_) read_weight(head);
        batch_ = batch, head_ = head;
        read_rows(std::max<int64_t>(begin - pad_, 0), std::min(end + pad_, image_.height));
        for (int64_t c = 0; c < width_; c += L)
            for (int64_t i = 0, y = begin, x = first % image_.width; i < count;) {
                const int64_t pixels = std::min({int64_t(PIXELS), image_.width - x, count - i});
                // The usual kernel has a form of its own in float; double, for checks, compiles sooner without one.
                if (sizeof(T) == 4 && image_.kernel == 5) tile<5>(c, y, x, pixels, sums + i * width_ + c);
                else tile<0>(c, y, x, pixels, sums + i * width_ + c);
                i += pixels, x += pixels;
                if (x == image_.width) x = 0, y++;
            }
    }
    // Has the image's tokens fetched that the rows of the next block begin with.
    void fetch(const Rows<T>& rows, Ahead& ahead) const {
        const int64_t tokens = image_.before + image_.height * image_.width;
        rows.fetch(image_.before + end_ * image_.width, BLOCK, tokens, ahead);
    }

  private:
    // Rows in the ring: at least those under the windows of a block, and a power of two.
    static int64_t slots(const Image& image) {
        const int64_t rows = image.kernel - 1 + (BLOCK - 2) / image.width + 2;
        int64_t slots = 1;
        while (slots < rows) slots *= 2;
        return slots;
    }
    // Pixels of a row, the zeros on both sides among them.
    static int64_t across(const Image& image) { return image.width + image.kernel - 1; }
    // Row y of the image, the vector of channel c of its pixels.
    T* row(int64_t y, int64_t c) const {
        return ring_ + (y & (slots_ - 1)) * across_ * width_ + c * across_;
    }

    void read_weight(int64_t head) {
        const int64_t window = image_.kernel * image_.kernel;
        std::fill(bias_, bias_ + (window + 1) * width_, T(0));
        with_type(image_.weight.dtype, [&](auto* type) {
            const auto* from = static_cast<decltype(type)>(image_.weight.data);
            for (int64_t c = 0; c < channels_; c++)
                for (int64_t i = 0; i < window; i++)
                    taps_[(c / L * window + i) * L + c % L] =
                        T(widen(from[(head * channels_ + c) * image_.weight.strides[0] + i]));
        });
        if (!image_.bias.data) return;
        with_type(image_.bias.dtype, [&](auto* type) {
            const auto* from = static_cast<decltype(type)>(image_.bias.data) + head * channels_;
            for (int64_t c = 0; c < channels_; c++) bias_[c] = T(widen(from[c]));
        });
    }

    // Makes rows `begin` .. `end` - 1 lie in the ring.
    void read_rows(int64_t begin, int64_t end) {
        if (begin < std::max(begin_, end_ - slots_) || begin > end_) begin_ = end_ = begin;
        const Tensor& tensor = image_.tensor;
        with_type(tensor.dtype, [&](auto* type) {
            const auto* from = static_cast<decltype(type)>(tensor.data) + batch_ * tensor.strides[0] +
                               head_ * tensor.strides[2] + (image_.before + end_ * image_.width) * tensor.strides[1];
            const int64_t whole = channels_ / L * L;
            for (; end_ < end; end_++) {
                for (int64_t c = 0; c < width_; c += L) {
                    T* const zeros = row(end_, c);
                    std::fill(zeros, zeros + pad_ * L, T(0));
                    std::fill(zeros + (pad_ + image_.width) * L, zeros + across_ * L, T(0));
                }
                T* to = row(end_, 0) + pad_ * L;
                for (int64_t x = 0; x < image_.width; x++, from += tensor.strides[1], to += L) {
                    for (int64_t c = 0; c < whole; c += L) store(to + c * across_, load_as<T>(from + c));
                    if (whole == channels_) continue;
                    store(to + whole * across_, load_part<T>(from + whole, int(channels_ - whole)));
                }
            }
        });
    }

    // One vector of the sums of up to PIXELS pixels of a row. K is the kernel where it is known, else 0.
    template <int K> void tile(int64_t c, int64_t y, int64_t x, int64_t pixels, T* to) const {
        const int64_t kernel = K > 0 ? K : image_.kernel;
        const T* taps = taps_ + c * kernel * kernel;
        const int64_t begin = std::max<int64_t>(pad_ - y, 0), end = std::min(kernel, image_.height + pad_ - y);
        const Vector<T> start = load(bias_ + c);
        Vector<T> sums[PIXELS];
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; p++) sums[p] = start;
#pragma GCC unroll 1
        for (int64_t k = begin; k < end; k++)
            add_row<K>(row(y + k - pad_, c) + x * L, taps + k * kernel * L, kernel, sums);
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; p++)
            if (p < pixels) store(to + p * width_, sums[p]);
    }

    template <int K> INLINE static void add_row(const T* from, const T* taps, int64_t kernel, Vector<T>* sums) {
        if constexpr (K > 0) {
            Vector<T> tap[K];
#pragma GCC unroll 8
            for (int d = 0; d < K; d++) {
                tap[d] = load(taps + d * L);
                keep_in_register(tap[d]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < PIXELS + K - 1; i++) {
                Vector<T> input = load(from + i * L);
                keep_in_register(input);
#pragma GCC unroll 8
                for (int d = 0; d < K; d++)
                    if (i - d >= 0 && i - d < PIXELS) sums[i - d] += input * tap[d];
            }
        } else {
            for (int64_t d = 0; d < kernel; d++) {
                const Vector<T> tap = load(taps + d * L);
#pragma GCC unroll 8
                for (int p = 0; p < PIXELS; p++) sums[p] += load(from + (d + p) * L) * tap;
            }
        }
    }

    const Image& image_;
    const int64_t channels_, width_, pad_, across_, slots_;
    T *bias_, *taps_, *ring_;         // taps [vector][kernel * kernel][lanes], ring [slot][vector][pixel][lanes]
    int64_t batch_ = -1, head_ = -1;  // of the rows in the ring: as many as it holds of
    int64_t begin_ = 0, end_ = 0;     // `begin_` .. `end_` - 1
};
