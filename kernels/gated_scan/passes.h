// Passes over runs of tokens with a few rows of the state in registers, and how rows of tokens reach them.
#pragma once

#include <algorithm>

#include "tensor.h"

using namespace simd;

constexpr int BLOCK = 32;  // tokens whose packed operands stay in the first-level cache
constexpr int ROWS_PADDED_TO = 8;
// The smallest product of decays in a run: its inverse must leave room in T's range.
template <typename T> constexpr T SMALLEST = sizeof(T) == 4 ? T(9.0949470177292824e-13) : T(1e-60);  // 2^-40 in float

template <typename T> constexpr int64_t padded(int64_t n) {
    constexpr int64_t unit = LANES<T> > ROWS_PADDED_TO ? LANES<T> : ROWS_PADDED_TO;
    return (n + unit - 1) / unit * unit;
}

// `rows` x `columns` (in vectors) of the state in registers, over `count` tokens. `first` overwrites the output.
template <typename T, int ROWS, int COLUMNS, bool READS>
INLINE void pass_tokens(
    int64_t count, const T* x, int64_t x_stride, const T* y, int64_t y_stride, const T* w, int64_t w_stride, T* out, int64_t out_stride,
    T* state, int64_t state_stride, const T* row_scale, const T* column_scale, bool first
) {
    constexpr int L = LANES<T>;
    Vector<T> s[ROWS][COLUMNS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            s[r][c] = load(state + r * state_stride + c * L);
            s[r][c] *= row_scale ? broadcast(row_scale[r]) : load(column_scale + c * L);
        }
    for (int64_t t = 0; t < count; t++) {
        Vector<T> source[COLUMNS], sum[COLUMNS];
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) {
            source[c] = load(w + c * L);
            if (READS) sum[c] = first ? Vector<T>{} : load(out + c * L);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            const Vector<T> write = broadcast(y[r]);
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c++) s[r][c] += write * source[c];
            if (READS) {
                const Vector<T> read = broadcast(x[r]);
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; c++) sum[c] += read * s[r][c];
            }
        }
        if (READS)
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c++) store(out + c * L, sum[c]);
        y += y_stride;
        w += w_stride;
        if (READS) {
            x += x_stride;
            out += out_stride;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) store(state + r * state_stride + c * L, s[r][c]);
}

// Rows of consecutive tokens in the order a scan meets them; the stride is negative where they lie the other way round.
template <typename T> struct Operand {
    T* data;
    int64_t stride;

    T* row(int64_t i) const { return data ? data + i * stride : nullptr; }
    Operand from(int64_t i) const { return {row(i), stride}; }
};

// The operands of one run of tokens, and what the state is multiplied by before it: one factor a row, or one a column.
template <typename T> struct Run {
    int64_t count;
    Operand<const T> x, y, w;
    Operand<T> out;
    const T *row_scale, *column_scale;  // one of them null
};

template <typename T, int COLUMNS, bool READS>
void pass_rows(const Run<T>& run, int64_t rows, int64_t column, T* state, int64_t state_stride, bool accumulate) {
    constexpr int ROWS = std::min(STATE_REGISTERS / (COLUMNS == 3 ? 4 : COLUMNS), ROWS_PADDED_TO);
    for (int64_t r = 0; r < rows; r += ROWS)
        pass_tokens<T, ROWS, COLUMNS, READS>(
            run.count, READS ? run.x.data + r : nullptr, run.x.stride, run.y.data + r, run.y.stride, run.w.data + column, run.w.stride,
            READS ? run.out.data + column : nullptr, run.out.stride, state + r * state_stride + column, state_stride,
            run.row_scale ? run.row_scale + r : nullptr, run.column_scale ? run.column_scale + column : nullptr, r == 0 && !accumulate
        );
}

// The whole state (rows x columns) over one run. `accumulate` adds to the output instead of overwriting it.
template <typename T, bool READS>
void scan_run(const Run<T>& run, int64_t rows, int64_t columns, T* state, bool accumulate) {
    constexpr int64_t L = LANES<T>;
    constexpr int64_t WIDEST = STATE_REGISTERS >= 16 ? 4 : 2;
    for (int64_t c = 0; c < columns;) {
        const int64_t vectors = std::min(WIDEST, (columns - c) / L);
        if (vectors == 4) pass_rows<T, 4, READS>(run, rows, c, state, columns, accumulate);
        if (vectors == 3) pass_rows<T, 3, READS>(run, rows, c, state, columns, accumulate);
        if (vectors == 2) pass_rows<T, 2, READS>(run, rows, c, state, columns, accumulate);
        if (vectors == 1) pass_rows<T, 1, READS>(run, rows, c, state, columns, accumulate);
        c += vectors * L;
    }
}

// One tensor's rows for one (batch, head), read as T with zero (or `fill`) padding.
template <typename T> class Rows {
  public:
    Rows(const Tensor& tensor, int64_t batch, int64_t head, int64_t width)
        : tensor_(tensor), offset_(batch * tensor.strides[0] + head * tensor.strides[2]), width_(width) {}

    // `count` rows from `token` on, or back from it where `step` is -1, into rows of the padded width.
    void read(int64_t token, int64_t count, int step, T* to) const {
        with_type(tensor_.dtype, [&](auto* type) {
            constexpr int64_t L = LANES<T>;
            const auto* row = static_cast<decltype(type)>(tensor_.data) + offset_ + token * tensor_.strides[1];
            const int64_t whole = width_ / L * L, stored = padded<T>(width_), stride = step * tensor_.strides[1];
            for (int64_t i = 0; i < count; i++, row += stride, to += stored) {
                for (int64_t c = 0; c < whole; c += L) store(to + c, load_as<T>(row + c));
                for (int64_t c = whole; c < stored; c += L)
                    store(to + c, load_part<T>(row + c, int(std::max<int64_t>(width_ - c, 0))));
            }
        });
    }
    // The reverse of read, adding the rows of `addend` (if any) on the way.
    void write(int64_t token, int64_t count, int step, const T* from, const T* addend = nullptr) const {
        with_type(tensor_.dtype, [&](auto* type) {
            using M = std::remove_pointer_t<decltype(type)>;
            M* row = static_cast<M*>(tensor_.data) + offset_ + token * tensor_.strides[1];
            const int64_t stored = padded<T>(width_), stride = step * tensor_.strides[1];
            for (int64_t i = 0; i < count; i++, row += stride, from += stored) {
                for (int64_t c = 0; c < width_; c += LANES<T>) {
                    const Vector<T> sum = addend ? load(from + c) + load(addend + c) : load(from + c);
                    store_part(row + c, sum, int(std::min<int64_t>(width_ - c, LANES<T>)));
                }
                if (addend) addend += stored;
            }
        });
    }
    // The rows from `token` on as they lie, if they are T already and need no padding; copied to `buffer` otherwise.
    Operand<const T> operand(int64_t token, int64_t count, int step, T* buffer) const {
        if (const T* first = direct()) return {first + token * stride(), step * stride()};
        read(token, count, step, buffer);
        return {buffer, padded<T>(width_)};
    }
    // Where token 0's row can be used as it lies: T already and no padding needed; null otherwise.
    T* direct() const {
        const int32_t own = sizeof(T) == 8 ? 1 : 0;
        if (tensor_.dtype != own || width_ != padded<T>(width_)) return nullptr;
        return static_cast<T*>(tensor_.data) + offset_;
    }
    int64_t stride() const { return tensor_.strides[1]; }

  private:
    Tensor tensor_;
    int64_t offset_, width_;
};

// Runs of a block of tokens and the decay P since each run's first token. `carry` is what earlier tokens have still to
// multiply the state by.
template <typename T> struct Runs {
    int count = 0;
    int64_t start[BLOCK + 1];
    T* entry;       // [BLOCK][Kp] factor on the state before each run
    T* decay;       // [BLOCK][Kp] P
    T* carry;       // [Kp]
    int64_t width;  // Kp

    // `step` [tokens][Kp] are the decays on entering each token. Products only shrink, so the last one tells whether one
    // run will do; where it will not, every token is looked at.
    void divide(int64_t tokens, const T* step) {
        const T* previous = carry;
        for (const bool each : {false, true}) {
            count = 0;
            previous = carry;
            for (int64_t t = 0; t < tokens; t++) {
                const T* now = step + t * width;
                T* p = decay + t * width;
                const bool fresh = t == 0 || (each && too_small(previous, now));
                T* product = fresh ? entry + count * width : p;
                for (int64_t c = 0; c < width; c += LANES<T>) store(product + c, load(previous + c) * load(now + c));
                if (fresh) {
                    start[count++] = t;
                    std::fill(p, p + width, T(1));
                }
                previous = p;
            }
            if (!too_small(previous, nullptr)) break;
        }
        start[count] = tokens;
        std::copy(previous, previous + width, carry);
    }

  private:
    bool too_small(const T* product, const T* factor) const {
        for (int64_t c = 0; c < width; c += LANES<T>)
            if (any<T>((factor ? load(product + c) * load(factor + c) : load(product + c)) < SMALLEST<T>)) return true;
        return false;
    }
};
