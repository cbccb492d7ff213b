// Products of small packed matrices, and how rows of tokens reach them and leave.
#pragma once

#include <algorithm>

#include "tensor.h"

using namespace simd;

constexpr int64_t BLOCK = 64;  // tokens whose packed rows stay in the nearest caches
constexpr int64_t ROWS = 4;    // of the product in registers
constexpr int64_t WIDEST = STATE_REGISTERS >= 16 ? 4 : 2;  // vectors of one of its rows

constexpr int64_t whole_tiles(int64_t rows) { return (rows + ROWS - 1) / ROWS * ROWS; }

// How wide rows of `n` elements are when packed: whole vectors, and whole tiles when they are rows of a state.
template <typename T> constexpr int64_t padded(int64_t n) {
    constexpr int64_t unit = LANES<T> > ROWS ? LANES<T> : ROWS;
    return (n + unit - 1) / unit * unit;
}

// Keeps a vector that is used several times in its register: compilers prefer to load it again for each use, and loads
// are what a product of this size is short of.
template <typename V> INLINE void keep_in_register(V& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
}

// Rows that will be wanted next, fetched a few at a time between the tiles of a product: they lie too far apart for the
// processor to foresee them.
class Ahead {
    static constexpr int MOST_SETS = 4;

  public:
    void add(const void* first, int64_t stride, int64_t count, int64_t width) {  // in bytes
        if (sets_added_ == MOST_SETS) return;  // left over by products without tiles
        sets_[sets_added_++] = {static_cast<const char*>(first), stride, count, width};
        rows_ += count;
    }
    void start(int64_t tiles) { rows_at_once_ = (rows_ + tiles - 1) / std::max<int64_t>(tiles, 1); }
    void step() {
        for (int64_t left = std::min(rows_at_once_, rows_); left > 0; left--, rows_--) {
            while (sets_[sets_added_ - 1].count == 0) sets_added_--;
            Set& set = sets_[sets_added_ - 1];
            for (int64_t byte = 0; byte < set.width; byte += 64) __builtin_prefetch(set.next + byte, 0, 2);
            set.next += set.stride, set.count--;
        }
        if (rows_ == 0) sets_added_ = 0;
    }

  private:
    struct Set {
        const char* next;
        int64_t stride, count, width;
    };
    Set sets_[MOST_SETS];
    int sets_added_ = 0;
    int64_t rows_ = 0, rows_at_once_ = 0;
};

// The left operand of a product: element (i, k) lies at data[i * row + k * step].
template <typename T> struct Left {
    const T* data;
    int64_t row, step;
};

// ROWS x COLUMNS vectors of the product in registers.
template <typename T, int COLUMNS, bool ADD>
INLINE void multiply_tile(int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row) {
    constexpr int L = LANES<T>;
    Vector<T> sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < COLUMNS; v++) sum[r][v] = ADD ? load(c + r * c_row + v * L) : Vector<T>{};
    for (int64_t k = 0; k < depth; k++) {
        Vector<T> right[COLUMNS];
#pragma GCC unroll 4
        for (int v = 0; v < COLUMNS; v++) {
            right[v] = load(b + v * L);
            keep_in_register(right[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Vector<T> left = broadcast(a.data[r * a.row]);
#pragma GCC unroll 4
            for (int v = 0; v < COLUMNS; v++) sum[r][v] += left * right[v];
        }
        a.data += a.step;
        b += b_row;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < COLUMNS; v++) store(c + r * c_row + v * L, sum[r][v]);
}

template <typename T, int COLUMNS, bool ADD>
void multiply_columns(
    int64_t rows, int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, Ahead& ahead
) {
    for (int64_t r = 0; r < rows; r += ROWS) {
        ahead.step();
        const Left<T> from{a.data + r * a.row, a.row, a.step};
        multiply_tile<T, COLUMNS, ADD>(depth, from, b, b_row, c + r * c_row, c_row);
    }
}

// c = a b, or c += a b, for `rows` rows rounded up to whole tiles and `width` columns, whole vectors.
template <typename T, bool ADD>
void multiply(
    int64_t rows, int64_t width, int64_t depth, Left<T> a, const T* b, int64_t b_row, T* c, int64_t c_row, Ahead& ahead
) {
    constexpr int64_t L = LANES<T>;
    ahead.start(whole_tiles(rows) / ROWS);
    for (int64_t first = 0; first < width;) {
        const int64_t left = (width - first) / L;
        // Five or six vectors are cut in even halves: a narrow tile loads more for each product.
        const int64_t vectors = left > WIDEST && left < 2 * WIDEST ? (left + 1) / 2 : std::min(WIDEST, left);
        if constexpr (WIDEST >= 4) {
            if (vectors == 4) multiply_columns<T, 4, ADD>(rows, depth, a, b + first, b_row, c + first, c_row, ahead);
            if (vectors == 3) multiply_columns<T, 3, ADD>(rows, depth, a, b + first, b_row, c + first, c_row, ahead);
        }
        if (vectors == 2) multiply_columns<T, 2, ADD>(rows, depth, a, b + first, b_row, c + first, c_row, ahead);
        if (vectors == 1) multiply_columns<T, 1, ADD>(rows, depth, a, b + first, b_row, c + first, c_row, ahead);
        first += vectors * L;
    }
}

template <typename T> INLINE T dot(const T* a, const T* b, int64_t width) {
    Vector<T> total{};
    for (int64_t c = 0; c < width; c += LANES<T>) total += load(a + c) * load(b + c);
    return sum<T>(total);
}

// to [columns][to_row] = from [rows][from_row] turned on its side; beyond `rows`, a row of `to` becomes zero.
template <typename T>
void transpose(const T* from, int64_t rows, int64_t columns, int64_t from_row, T* to, int64_t to_row) {
    for (int64_t c = 0; c < columns; c++, to += to_row) {
        for (int64_t r = 0; r < rows; r++) to[r] = from[r * from_row + c];
        std::fill(to + rows, to + to_row, T(0));
    }
}

// The tokens of one tensor (batch, tokens, heads, width) for one batch element and head.
template <typename T> class Rows {
  public:
    Rows(const Tensor& tensor, int64_t batch, int64_t head, int64_t width)
        : tensor_(tensor), offset_(batch * tensor.strides[0] + head * tensor.strides[2]), width_(width) {}

    // Packs `count` rows from `token` on, each vector as map(vector, row, column) makes it and with zeros after the
    // last column; adds the packed rows to `total`, unless that is null.
    template <typename F> void read(int64_t token, int64_t count, T* to, T* total, F&& map) const {
        with_type(tensor_.dtype, [&](auto* type) {
            constexpr int64_t L = LANES<T>;
            const auto* from = static_cast<decltype(type)>(tensor_.data) + offset_ + token * tensor_.strides[1];
            int64_t c = 0;
            for (; c + 4 * L <= width_; c += 4 * L) read_columns<4, false>(from, c, count, to, total, map);
            for (; c + L <= width_; c += L) read_columns<1, false>(from, c, count, to, total, map);
            if (c < width_) read_columns<1, true>(from, c, count, to, total, map), c += L;
            for (; c < padded<T>(width_); c += L)
                for (int64_t i = 0; i < count; i++) store(to + i * padded<T>(width_) + c, Vector<T>{});
        });
    }
    // The reverse: each vector as map(vector, row, column) makes it of the packed one.
    template <typename F> void write(int64_t token, int64_t count, const T* from, F&& map) const {
        with_type(tensor_.dtype, [&](auto* type) {
            constexpr int64_t L = LANES<T>;
            auto* to = static_cast<decltype(type)>(tensor_.data) + offset_ + token * tensor_.strides[1];
            const int64_t whole = width_ / L * L;
            for (int64_t i = 0; i < count; i++, to += tensor_.strides[1], from += padded<T>(width_)) {
                for (int64_t c = 0; c < whole; c += L) store_as(to + c, map(load(from + c), i, c));
                if (whole < width_) store_part(to + whole, map(load(from + whole), i, whole), int(width_ - whole));
            }
        });
    }
    // Has `count` rows from `token` on, and no row beyond the first `tokens`, fetched.
    void fetch(int64_t token, int64_t count, int64_t tokens, Ahead& ahead) const {
        with_type(tensor_.dtype, [&](auto* type) {
            if (token >= tokens) return;
            const int64_t size = sizeof(*type), stride = tensor_.strides[1];
            const auto* from = static_cast<decltype(type)>(tensor_.data) + offset_ + token * stride;
            ahead.add(from, stride * size, std::min(count, tokens - token), width_ * size);
        });
    }

  private:
    template <int GROUP, bool PART, typename M, typename F>
    INLINE void read_columns(const M* from, int64_t first, int64_t count, T* to, T* total, F&& map) const {
        constexpr int L = LANES<T>;
        const int lanes = PART ? int(width_ - first) : L;
        const int64_t width = padded<T>(width_);
        Vector<T> sums[GROUP] = {};
        from += first, to += first;
        for (int64_t i = 0; i < count; i++, from += tensor_.strides[1], to += width)
#pragma GCC unroll 4
            for (int v = 0; v < GROUP; v++) {
                const Vector<T> read = PART ? load_part<T>(from, lanes) : load_as<T>(from + v * L);
                Vector<T> x = map(read, i, first + v * L);
                if (PART)
                    for (int lane = lanes; lane < L; lane++) x[lane] = 0;
                store(to + v * L, x);
                sums[v] += x;
            }
        if (total)
            for (int v = 0; v < GROUP; v++) store(total + first + v * L, load(total + first + v * L) + sums[v]);
    }

    Tensor tensor_;
    int64_t offset_, width_;
};
