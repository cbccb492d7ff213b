// The gated scan on CPU.
//
// One kernel serves the forward pass and all three gradients: with a state S (R rows, C columns), for every token
//
//     S[r, :] += y[r] * w[:],      out[:] += sum_r x[r] * S[r, :]
//
// where S, y, w and x are  (state, key, value, query)  for the output,  (state^T, value, key, grad_output)  for the query's
// gradient,  (grad_state^T, grad_output, query, value)  for the key's and  (grad_state, query, grad_output, key)  for the
// value's. A few rows of S stay in registers while a block of tokens passes; SIMD runs over the columns, so that no sum
// crosses lanes.
//
// The decays are folded into the operands that have the key dimension. Within a run of tokens let P_t be the product of
// the decays since the run's first token; then S_t = P_t * S'_t where S' decays no more, writing with k_t / P_t and reading
// with q_t * P_t: two multiply-adds an element instead of three operations. A run ends before any P falls below 2^-40,
// where the state is scaled and P starts at 1 again, so gates of any strength are exact.
//
// The gradient of the log decays takes the chunk-end form: within a block, from its last token to its first,
// dg_t = sum_{r >= t} (q_r dq_r - k_r dk_r) + sum_v S_end * dS_end, dq and dk being this direction's own.
//
// "Scan order" s counts tokens as the direction sees them: token t = s forward, t = N - 1 - s backward.

#include <omp.h>

#include <algorithm>

#include "tensor.h"

namespace {

using namespace simd;

constexpr int BLOCK = 32;  // tokens whose packed operands stay in the first-level cache
constexpr int ROWS_PADDED_TO = 8;

template <typename T> constexpr int64_t padded(int64_t n) {
    constexpr int64_t unit = LANES<T> > ROWS_PADDED_TO ? LANES<T> : ROWS_PADDED_TO;
    return (n + unit - 1) / unit * unit;
}

// `rows` x `columns` (in vectors) of the state in registers, over `count` tokens. `first` overwrites the output.
template <typename T, int ROWS, int COLUMNS, bool READS>
INLINE void pass_tokens(
    int64_t count, const T* x, const T* y, int64_t xy_stride, const T* w, int64_t w_stride, T* out, int64_t out_stride,
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
        x += xy_stride;
        y += xy_stride;
        w += w_stride;
        out += out_stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; c++) store(state + r * state_stride + c * L, s[r][c]);
}

// The operands of one run of tokens; strides in elements between tokens, negative where the scan runs backwards.
template <typename T> struct Run {
    int64_t count;
    const T *x, *y;
    int64_t xy_stride;
    const T* w;
    int64_t w_stride;
    T* out;
    int64_t out_stride;
    const T *row_scale, *column_scale;  // one of them null: what the state is multiplied by before the run
};

template <typename T, int COLUMNS, bool READS>
void pass_rows(const Run<T>& run, int64_t rows, int64_t column, T* state, int64_t state_stride, bool accumulate) {
    constexpr int ROWS = std::min(STATE_REGISTERS / (COLUMNS == 3 ? 4 : COLUMNS), ROWS_PADDED_TO);
    for (int64_t r = 0; r < rows; r += ROWS)
        pass_tokens<T, ROWS, COLUMNS, READS>(
            run.count, READS ? run.x + r : run.y, run.y + r, run.xy_stride, run.w + column, run.w_stride, run.out + column,
            run.out_stride, state + r * state_stride + column, state_stride, run.row_scale ? run.row_scale + r : nullptr,
            run.column_scale ? run.column_scale + column : nullptr, r == 0 && !accumulate
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
    // `addend` (if any) is added on the way.
    void write(int64_t token, const T* from, const T* addend = nullptr) const {
        with_type(tensor_.dtype, [&](auto* type) {
            using M = std::remove_pointer_t<decltype(type)>;
            M* row = static_cast<M*>(tensor_.data) + offset_ + token * tensor_.strides[1];
            for (int64_t c = 0; c < width_; c += LANES<T>) {
                const Vector<T> sum = addend ? load(from + c) + load(addend + c) : load(from + c);
                store_part(row + c, sum, int(std::min<int64_t>(width_ - c, LANES<T>)));
            }
        });
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

struct Sizes {
    int64_t batch, tokens, heads, key_dim, value_dim;
};

// Everything a kernel is told. Gates are log decays if `normalizer` is 0, logits otherwise.
struct Problem {
    Sizes sizes;
    double scale, normalizer;
    int32_t directions;  // bit 0: forward, bit 1: backward
    Tensor query, key, value, gate[2];
    Tensor initial_state;               // [B, H, K, V], strides of the first three; null data: zeros
    Tensor output, final_state;         // forward
    Tensor grad_output, grad_final_state;  // gradient
    Tensor grad_query, grad_key, grad_value, grad_gate[2], grad_initial_state;
};

// How the work is divided: a task is one (batch, head) with all its directions, or one (batch, head, direction, segment).
struct Division {
    int directions, segments, threads;
    bool paired;

    Division(const Problem& p, int threads) : directions(p.directions == 3 ? 2 : 1), segments(1), threads(threads), paired(true) {
        const int64_t heads = p.sizes.batch * p.sizes.heads;
        if (heads >= 4 * threads || threads == 1) return;
        // A second segment costs half as much again: its entry state needs a pass without outputs.
        const auto rounds = [&](int64_t tasks) { return double((tasks + threads - 1) / threads); };
        double best = rounds(heads) * directions;
        if (const double split = rounds(heads * directions); split < best) {
            best = split;
            paired = false;
        }
        for (int n = 2; p.sizes.tokens / n >= 4 * BLOCK && n <= 4 * threads; n *= 2)
            if (const double time = 1.5 * rounds(heads * directions * n) / n; time < best) {
                best = time;
                segments = n;
                paired = false;
            }
    }
    int64_t segment_start(int64_t tokens, int segment) const {
        const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
        return std::min(tokens, blocks * segment / segments * BLOCK);
    }
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
        constexpr T SMALLEST = T(9.0949470177292824e-13);  // 2^-40
        for (int64_t c = 0; c < width; c += LANES<T>)
            if (any<T>((factor ? load(product + c) * load(factor + c) : load(product + c)) < SMALLEST)) return true;
        return false;
    }
};

// Scratch of one thread, and the passes over one (batch, head, direction).
template <typename T> class Scan {
  public:
    static size_t scratch(const Sizes& z) {
        const int64_t k = padded<T>(z.key_dim), v = padded<T>(z.value_dim);
        return (BLOCK + 1) * (10 * k + 2 * v) + 3 * k * v + 64;
    }

    Scan(const Problem& p, T* memory) : p_(p), n_(p.sizes.tokens), k_(padded<T>(p.sizes.key_dim)), v_(padded<T>(p.sizes.value_dim)) {
        const auto take = [&](int64_t count) {
            T* taken = memory;
            memory += count;
            return taken;
        };
        for (T** array : {&step_, &gate_, &query_, &key_, &x_, &y_, &block_out_, &runs_.entry, &runs_.decay})
            *array = take((BLOCK + 1) * k_);
        runs_.carry = take(k_);
        tail_ = take(k_);
        value_ = take(BLOCK * v_);
        grad_ = take(BLOCK * v_);
        for (T*& state : states_) state = take(k_ * v_);
        runs_.width = k_;
    }

    int64_t key_width() const { return k_; }
    int64_t value_width() const { return v_; }
    T* state(int i) { return states_[i]; }

    void choose(int64_t batch, int64_t head, int direction) {
        batch_ = batch, head_ = head, direction_ = direction;
    }
    void zero(T* state) const { std::fill(state, state + k_ * v_, T(0)); }
    void unit_carry() { std::fill(runs_.carry, runs_.carry + k_, T(1)); }
    const T* carry() const { return runs_.carry; }

    // state [Kp][Vp] over tokens s0..s1 of the scan; `out` is the row of token 0 (null: no output).
    void forward(int64_t s0, int64_t s1, T* state, T* out, int64_t out_stride, bool accumulate) {
        unit_carry();
        const Rows<T> value = rows(p_.value, p_.sizes.value_dim);
        const T* direct = value.direct();
        const int64_t sign = step();
        for (int64_t b0 = s0; b0 < s1; b0 += BLOCK) {
            const int64_t n = std::min<int64_t>(BLOCK, s1 - b0);
            read_decays(b0, n, step_);
            runs_.divide(n, step_);
            if (out) rows(p_.query, p_.sizes.key_dim).read(token(b0), n, step(), x_);
            rows(p_.key, p_.sizes.key_dim).read(token(b0), n, step(), y_);
            if (!direct) value.read(token(b0), n, step(), value_);
            for (int64_t c = 0; c < n * k_; c += LANES<T>) {
                const Vector<T> decay = load(runs_.decay + c);
                if (out) store(x_ + c, load(x_ + c) * (decay * T(p_.scale)));
                store(y_ + c, load(y_ + c) / decay);
            }
            for (int r = 0; r < runs_.count; r++) {
                const int64_t i = runs_.start[r];
                const T* w = direct ? direct + token(b0 + i) * value.stride() : value_ + i * v_;
                const int64_t w_stride = direct ? sign * value.stride() : v_;
                T* to = out ? out + token(b0 + i) * out_stride : nullptr;
                const Run<T> run{runs_.start[r + 1] - i, x_ + i * k_, y_ + i * k_, k_, w, w_stride, to, sign * out_stride,
                                 runs_.entry + r * k_, nullptr};
                if (out)
                    scan_run<T, true>(run, k_, v_, state, accumulate);
                else
                    scan_run<T, false>(run, k_, v_, state, true);
            }
        }
        scale_rows(state, runs_.carry);
    }

    // state^T [Vp][Kp] over tokens s0..s1. With `grad_query` ([N][Kp] in scan order) the query's own gradient is written,
    // and `block_states` receives state^T after each block.
    void forward_transposed(int64_t s0, int64_t s1, T* state, T* grad_query, T* block_states) {
        unit_carry();
        for (int64_t b0 = s0; b0 < s1; b0 += BLOCK) {
            const int64_t n = std::min<int64_t>(BLOCK, s1 - b0);
            read_decays(b0, n, step_);
            runs_.divide(n, step_);
            read_block(b0, n, false);
            divide_by_decay(key_, n);
            transposed_runs(y_, grad_, value_, grad_query ? grad_query + b0 * k_ : nullptr, state);
            if (!grad_query) continue;
            multiply(grad_query + b0 * k_, runs_.decay, n);
            T* after = block_states + b0 / BLOCK * k_ * v_;
            for (int64_t r = 0; r < v_; r++)
                for (int64_t c = 0; c < k_; c += LANES<T>)
                    store(after + r * k_ + c, load(state + r * k_ + c) * load(runs_.carry + c));
        }
        scale_columns(state, runs_.carry);
    }

    // grad_state^T [Vp][Kp] from token s1 - 1 back to s0, without gradients: what a later segment hands to an earlier one.
    void backward_state(int64_t s0, int64_t s1, T* grad_state) {
        unit_carry();
        for (int64_t b0 = last_block(s0, s1); b0 >= s0; b0 -= BLOCK) {
            const int64_t n = std::min<int64_t>(BLOCK, s1 - b0);
            read_gradient_decays(b0, n);
            runs_.divide(n, step_);
            read_block(b0, n, true);
            divide_by_decay(query_, n);
            transposed_runs(y_, value_, grad_, nullptr, grad_state);
        }
        scale_columns(grad_state, runs_.carry);
    }

    // All gradients of tokens s1 - 1 back to s0. grad_state^T in `across`, grad_state in `along`; `grad_query` and
    // `block_states` from forward_transposed; sums over directions go to the three buffers (rows by token).
    void backward(
        int64_t s0, int64_t s1, T* across, T* along, const T* grad_query, const T* block_states, T* query_sum, T* key_sum,
        T* value_sum, bool accumulate
    ) {
        unit_carry();
        const Rows<T> gate = rows(p_.gate[direction_], p_.sizes.key_dim);
        const Rows<T> grad_gate = rows(p_.grad_gate[direction_], p_.sizes.key_dim);
        for (int64_t b0 = last_block(s0, s1); b0 >= s0; b0 -= BLOCK) {
            const int64_t n = std::min<int64_t>(BLOCK, s1 - b0);
            read_gradient_decays(b0, n);
            runs_.divide(n, step_);
            read_block(b0, n, true);
            start_tail(block_states + b0 / BLOCK * k_ * v_, across);
            divide_by_decay(query_, n);
            for (int64_t c = 0; c < n * k_; c += LANES<T>) store(x_ + c, load(key_ + c) * load(runs_.decay + c));
            transposed_runs(y_, value_, grad_, block_out_, across);
            multiply(block_out_, runs_.decay, n);
            gate.read(token(b0 + n - 1), n, -step(), gate_);
            for (int r = 0; r < runs_.count; r++) {
                const int64_t i = runs_.start[r];
                const Run<T> run{runs_.start[r + 1] - i, x_ + i * k_, y_ + i * k_, k_, grad_ + i * v_, v_,
                                 value_sum + token(b0 + n - 1 - i) * v_, -step() * v_, runs_.entry + r * k_, nullptr};
                scan_run<T, true>(run, k_, v_, along, accumulate);
            }
            for (int64_t i = 0; i < n; i++) {
                const int64_t s = b0 + n - 1 - i, t = token(s), row = i * k_;
                const bool unused = s == 0 && !p_.initial_state.data;  // the first token's decay has nothing to act on
                for (int64_t c = 0; c < k_; c += LANES<T>) {
                    const Vector<T> dq = load(grad_query + s * k_ + c), dk = load(block_out_ + row + c);
                    const Vector<T> sum = load(tail_ + c) + (load(query_ + row + c) * dq - load(key_ + row + c) * dk);
                    store(tail_ + c, sum);
                    Vector<T> dg = unused ? Vector<T>{} : sum;
                    if (p_.normalizer > 0) dg *= sigmoid<T>(-load(gate_ + row + c)) * T(1 / p_.normalizer);
                    store(gate_ + row + c, dg);
                    T *query_to = query_sum + t * k_ + c, *key_to = key_sum + t * k_ + c;
                    store(query_to, accumulate ? load(query_to) + dq : dq);
                    store(key_to, accumulate ? load(key_to) + dk : dk);
                }
                grad_gate.write(t, gate_ + row);
            }
        }
        scale_columns(across, runs_.carry);
    }

    void scale_rows(T* state, const T* factor) const {
        for (int64_t r = 0; r < k_; r++)
            for (int64_t c = 0; c < v_; c += LANES<T>) store(state + r * v_ + c, load(state + r * v_ + c) * factor[r]);
    }
    void scale_columns(T* state, const T* factor) const {
        for (int64_t r = 0; r < v_; r++)
            for (int64_t c = 0; c < k_; c += LANES<T>) store(state + r * k_ + c, load(state + r * k_ + c) * load(factor + c));
    }
    void transpose(const T* state, int64_t rows, int64_t columns, T* to) const {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) to[c * rows + r] = state[r * columns + c];
    }
    // Product of all decays of tokens s0..s1.
    void total_decay(int64_t s0, int64_t s1, T* total) {
        std::fill(total, total + k_, T(1));
        for (int64_t s = s0; s < s1; s++) {
            read_decays(s, 1, step_);
            multiply(total, step_, 1);
        }
    }
    void read_state(const Tensor& tensor, T* state) const {  // [Kp][Vp]
        zero(state);
        if (!tensor.data) return;
        const Rows<T> from = state_rows(tensor);
        from.read(0, p_.sizes.key_dim, 1, state);
    }
    void write_state(const Tensor& tensor, const T* state) const {
        const Rows<T> to = state_rows(tensor);
        for (int64_t k = 0; k < p_.sizes.key_dim; k++) to.write(k, state + k * v_);
    }
    void decay_of_first(T* to) { read_decays(0, 1, to); }
    Rows<T> rows(const Tensor& tensor, int64_t width) const { return Rows<T>(tensor, batch_, head_, width); }

  private:
    int64_t token(int64_t s) const { return direction_ ? n_ - 1 - s : s; }
    int step() const { return direction_ ? -1 : 1; }
    static int64_t last_block(int64_t s0, int64_t s1) { return s0 + (s1 - s0 - 1) / BLOCK * BLOCK; }

    Rows<T> state_rows(const Tensor& tensor) const {  // a state's rows are key channels: [B, H, K, V]
        Tensor view = tensor;
        std::swap(view.strides[1], view.strides[2]);
        return Rows<T>(view, batch_, head_, p_.sizes.value_dim);
    }

    void read_decays(int64_t s, int64_t n, T* to) const {
        if (n <= 0) return;
        rows(p_.gate[direction_], p_.sizes.key_dim).read(token(s), n, step(), to);
        const T inverse = p_.normalizer > 0 ? T(1 / p_.normalizer) : T(0);
        for (int64_t c = 0; c < n * k_; c += LANES<T>) {
            const Vector<T> g = load(to + c);
            store(to + c, exponential(inverse > 0 ? log_sigmoid<T>(g) * inverse : g));
        }
    }
    // Running back, the state gradient meets the decay of the token it has just left; none after the last token.
    void read_gradient_decays(int64_t b0, int64_t n) {
        const int64_t after = std::min<int64_t>(n, n_ - 1 - b0);  // decays of tokens b0+1 .. b0+n that exist
        T* forward = block_out_;
        read_decays(b0 + 1, after, forward);
        for (int64_t i = 0; i < n; i++) {
            const int64_t j = n - 1 - i;
            for (int64_t c = 0; c < k_; c += LANES<T>)
                store(step_ + i * k_ + c, j < after ? load(forward + j * k_ + c) : broadcast(T(1)));
        }
    }
    // The block's operands in the order of processing; query and grad_output carry one factor `scale` between them.
    void read_block(int64_t b0, int64_t n, bool back) {
        const int64_t first = token(back ? b0 + n - 1 : b0);
        const int order = back ? -step() : step();
        rows(p_.query, p_.sizes.key_dim).read(first, n, order, query_);
        rows(p_.key, p_.sizes.key_dim).read(first, n, order, key_);
        rows(p_.value, p_.sizes.value_dim).read(first, n, order, value_);
        rows(p_.grad_output, p_.sizes.value_dim).read(first, n, order, grad_);
        for (int64_t c = 0; c < n * v_; c += LANES<T>) store(grad_ + c, load(grad_ + c) * T(p_.scale));
    }
    void divide_by_decay(const T* rows, int64_t n) {
        for (int64_t c = 0; c < n * k_; c += LANES<T>) store(y_ + c, load(rows + c) / load(runs_.decay + c));
    }
    void multiply(T* rows, const T* factors, int64_t n) const {
        for (int64_t c = 0; c < n * k_; c += LANES<T>) store(rows + c, load(rows + c) * load(factors + c));
    }
    // Runs of a state^T: `w` has the key dimension (folded), `x` and `y` the value dimension.
    void transposed_runs(const T* w, const T* x, const T* y, T* out, T* state) {
        for (int r = 0; r < runs_.count; r++) {
            const int64_t i = runs_.start[r];
            const Run<T> run{runs_.start[r + 1] - i, x + i * v_, y + i * v_, v_, w + i * k_, k_, out ? out + i * k_ : nullptr,
                             k_, nullptr, runs_.entry + r * k_};
            if (out)
                scan_run<T, true>(run, v_, k_, state, false);
            else
                scan_run<T, false>(run, v_, k_, state, true);
        }
    }
    // dg's part from beyond the block: the state after the block times the gradient that reaches it.
    void start_tail(const T* after, const T* grad_state) {
        for (int64_t c = 0; c < k_; c += LANES<T>) {
            Vector<T> total{};
            for (int64_t r = 0; r < v_; r++) total += load(after + r * k_ + c) * load(grad_state + r * k_ + c);
            store(tail_ + c, total * load(runs_.entry + c));
        }
    }

    const Problem& p_;
    int64_t n_, k_, v_, batch_ = 0, head_ = 0;
    int direction_ = 0;
    T *step_, *gate_, *query_, *key_, *x_, *y_, *block_out_, *tail_, *value_, *grad_;
    T* states_[3];
    Runs<T> runs_;
};

// Entry states of all segments: `local` holds each segment's state from a zero entry, `decay` its total decay by key
// channel; on return `local` holds what enters each segment. In a transposed state the key channels are columns.
template <typename T>
void carry_between_segments(T* local, const T* decay, T* entry, int64_t key, int64_t value, int segments, bool ascending, bool transposed) {
    const int64_t size = key * value;
    for (int i = 0; i < segments; i++) {
        const int segment = ascending ? i : segments - 1 - i;
        T* state = local + segment * size;
        const T* factor = decay + segment * key;
        for (int64_t j = 0; j < size; j++) {
            const T leaving = state[j] + entry[j] * factor[transposed ? j % key : j / value];
            state[j] = entry[j];
            entry[j] = leaving;
        }
    }
}

template <typename T> bool run_forward(const Problem& p, int threads) {
    const Sizes& z = p.sizes;
    const Division division(p, threads);
    const int64_t heads = z.batch * z.heads, k = padded<T>(z.key_dim), v = padded<T>(z.value_dim);
    const int64_t per_thread = Scan<T>::scratch(z) + (division.paired ? z.tokens * v : 0);
    const int64_t tasks = heads * division.directions * division.segments;
    const int64_t segment_states = division.segments > 1 ? tasks * (k * v + k) : 0;
    const int64_t buffers = division.paired ? 0 : division.directions * heads * z.tokens * v;
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(threads * per_thread + segment_states + buffers);
    if (!memory) return false;
    T* states = memory + threads * per_thread;
    T* decays = states + (division.segments > 1 ? tasks * k * v : 0);
    T* sums = states + segment_states;
    const auto direction_of = [&](int64_t i) { return p.directions == 3 ? int(i) : int(p.directions == 2); };

    const auto write_output = [&](const Scan<T>& scan, const T* first, const T* second, int64_t from, int64_t to) {
        const Rows<T> output = scan.rows(p.output, z.value_dim);
        for (int64_t t = from; t < to; t++) output.write(t, first + t * v, second ? second + t * v : nullptr);
    };

#pragma omp parallel num_threads(threads)
    {
        T* own = memory + omp_get_thread_num() * per_thread;
        Scan<T> scan(p, own);
        if (division.paired) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t bh = 0; bh < heads; bh++) {
                const int64_t batch = bh / z.heads, head = bh % z.heads;
                T* out = own + Scan<T>::scratch(z);
                int64_t stride = v;
                scan.choose(batch, head, 0);
                const Rows<T> output = scan.rows(p.output, z.value_dim);
                const bool direct = output.direct() != nullptr;
                if (direct) out = output.direct(), stride = output.stride();
                for (int d = 0; d < division.directions; d++) {
                    scan.choose(batch, head, direction_of(d));
                    scan.read_state(p.initial_state, scan.state(0));
                    scan.forward(0, z.tokens, scan.state(0), out, stride, d > 0);
                    if (p.final_state.data) scan.write_state(p.final_state, scan.state(0));
                }
                if (!direct) write_output(scan, out, nullptr, 0, z.tokens);
            }
        } else {
            if (division.segments > 1) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < tasks; i++) {
                    const int64_t chain = i / division.segments, bh = chain / division.directions;
                    const int segment = int(i % division.segments);
                    const int64_t s0 = division.segment_start(z.tokens, segment), s1 = division.segment_start(z.tokens, segment + 1);
                    scan.choose(bh / z.heads, bh % z.heads, direction_of(chain % division.directions));
                    scan.zero(states + i * k * v);
                    if (segment + 1 < division.segments) scan.forward(s0, s1, states + i * k * v, nullptr, 0, true);
                    scan.total_decay(s0, s1, decays + i * k);
                }
#pragma omp for
                for (int64_t chain = 0; chain < heads * division.directions; chain++) {
                    const int64_t bh = chain / division.directions, i = chain * division.segments;
                    scan.choose(bh / z.heads, bh % z.heads, direction_of(chain % division.directions));
                    scan.read_state(p.initial_state, scan.state(0));
                    carry_between_segments(states + i * k * v, decays + i * k, scan.state(0), k, v, division.segments, true, false);
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks; i++) {
                const int64_t chain = i / division.segments, bh = chain / division.directions, d = chain % division.directions;
                const int segment = int(i % division.segments);
                T* state = scan.state(0);
                scan.choose(bh / z.heads, bh % z.heads, direction_of(d));
                if (division.segments > 1)
                    std::copy(states + i * k * v, states + (i + 1) * k * v, state);
                else
                    scan.read_state(p.initial_state, state);
                T* out = sums + (d * heads + bh) * z.tokens * v;
                scan.forward(division.segment_start(z.tokens, segment), division.segment_start(z.tokens, segment + 1), state, out, v, false);
                if (p.final_state.data && segment + 1 == division.segments) scan.write_state(p.final_state, state);
            }
            const int64_t pieces = (z.tokens + 255) / 256;
#pragma omp for
            for (int64_t i = 0; i < heads * pieces; i++) {
                const int64_t bh = i / pieces, from = i % pieces * 256;
                scan.choose(bh / z.heads, bh % z.heads, 0);
                const T* first = sums + bh * z.tokens * v;
                write_output(scan, first, division.directions == 2 ? first + heads * z.tokens * v : nullptr, from,
                             std::min(z.tokens, from + 256));
            }
        }
    }
    return true;
}

template <typename T> bool run_backward(const Problem& p, int threads) {
    const Sizes& z = p.sizes;
    const Division division(p, threads);
    const int64_t heads = z.batch * z.heads, k = padded<T>(z.key_dim), v = padded<T>(z.value_dim);
    const int64_t blocks = (z.tokens + BLOCK - 1) / BLOCK, size = k * v;
    const int64_t own_query = z.tokens * k, sums_of_one = z.tokens * (2 * k + v);
    const int64_t per_thread = Scan<T>::scratch(z) + own_query + blocks * size + (division.paired ? sums_of_one : 0);
    const int64_t tasks = heads * division.directions * division.segments;
    const int64_t segment_states = division.segments > 1 ? tasks * 2 * (size + k) : 0;
    const int64_t buffers = division.paired ? 0 : division.directions * heads * sums_of_one;
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(threads * per_thread + segment_states + buffers);
    if (!memory) return false;
    T* entries = memory + threads * per_thread;            // state^T that enters each segment
    T* grad_entries = entries + (segment_states ? tasks * size : 0);  // grad_state^T that reaches its last token
    T* decays = entries + (segment_states ? 2 * tasks * size : 0);
    T* grad_decays = decays + (segment_states ? tasks * k : 0);
    T* sums = entries + segment_states;
    const auto direction_of = [&](int64_t i) { return p.directions == 3 ? int(i) : int(p.directions == 2); };

    const auto read_transposed = [&](Scan<T>& scan, const Tensor& tensor, T* state, T* buffer) {
        scan.read_state(tensor, buffer);
        scan.transpose(buffer, k, v, state);
    };
    // Gradients of one chain's tokens s0..s1; on entry state(0) is state^T, state(1) grad_state^T.
    const auto gradients = [&](Scan<T>& scan, T* own, int64_t s0, int64_t s1, T* to, bool accumulate) {
        T *grad_query = own + Scan<T>::scratch(z), *block_states = grad_query + own_query;
        scan.forward_transposed(s0, s1, scan.state(0), grad_query, block_states);
        scan.transpose(scan.state(1), v, k, scan.state(2));
        scan.backward(s0, s1, scan.state(1), scan.state(2), grad_query, block_states, to, to + z.tokens * k, to + 2 * z.tokens * k,
                      accumulate);
        if (s0 == 0 && p.grad_initial_state.data) {
            if (z.tokens) {
                scan.decay_of_first(scan.state(0));
                scan.scale_columns(scan.state(1), scan.state(0));
            }
            scan.transpose(scan.state(1), v, k, scan.state(2));
            scan.write_state(p.grad_initial_state, scan.state(2));
        }
    };
    const auto write_gradients = [&](const Scan<T>& scan, const T* first, const T* second, int64_t from, int64_t to) {
        const auto write = [&](const Tensor& tensor, int64_t width, int64_t offset) {
            const Rows<T> target = scan.rows(tensor, width);
            const int64_t w = padded<T>(width);
            for (int64_t t = from; t < to; t++)
                target.write(t, first + offset + t * w, second ? second + offset + t * w : nullptr);
        };
        write(p.grad_query, z.key_dim, 0);
        write(p.grad_key, z.key_dim, z.tokens * k);
        write(p.grad_value, z.value_dim, 2 * z.tokens * k);
    };

#pragma omp parallel num_threads(threads)
    {
        T* own = memory + omp_get_thread_num() * per_thread;
        Scan<T> scan(p, own);
        if (division.paired) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t bh = 0; bh < heads; bh++) {
                T* to = own + per_thread - sums_of_one;
                for (int d = 0; d < division.directions; d++) {
                    scan.choose(bh / z.heads, bh % z.heads, direction_of(d));
                    read_transposed(scan, p.initial_state, scan.state(0), scan.state(2));
                    read_transposed(scan, p.grad_final_state, scan.state(1), scan.state(2));
                    gradients(scan, own, 0, z.tokens, to, d > 0);
                }
                write_gradients(scan, to, nullptr, 0, z.tokens);
            }
        } else {
            if (division.segments > 1) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < tasks; i++) {
                    const int64_t chain = i / division.segments, bh = chain / division.directions;
                    const int segment = int(i % division.segments);
                    const int64_t s0 = division.segment_start(z.tokens, segment), s1 = division.segment_start(z.tokens, segment + 1);
                    scan.choose(bh / z.heads, bh % z.heads, direction_of(chain % division.directions));
                    scan.zero(entries + i * size);
                    scan.zero(grad_entries + i * size);
                    if (segment + 1 < division.segments) scan.forward_transposed(s0, s1, entries + i * size, nullptr, nullptr);
                    if (segment > 0) scan.backward_state(s0, s1, grad_entries + i * size);
                    scan.total_decay(s0, s1, decays + i * k);
                    scan.total_decay(s0 + 1, std::min(s1 + 1, z.tokens), grad_decays + i * k);
                }
#pragma omp for
                for (int64_t chain = 0; chain < heads * division.directions; chain++) {
                    const int64_t bh = chain / division.directions, i = chain * division.segments;
                    scan.choose(bh / z.heads, bh % z.heads, direction_of(chain % division.directions));
                    read_transposed(scan, p.initial_state, scan.state(0), scan.state(2));
                    carry_between_segments(entries + i * size, decays + i * k, scan.state(0), k, v, division.segments, true, true);
                    read_transposed(scan, p.grad_final_state, scan.state(0), scan.state(2));
                    carry_between_segments(grad_entries + i * size, grad_decays + i * k, scan.state(0), k, v, division.segments, false, true);
                }
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks; i++) {
                const int64_t chain = i / division.segments, bh = chain / division.directions, d = chain % division.directions;
                const int segment = int(i % division.segments);
                scan.choose(bh / z.heads, bh % z.heads, direction_of(d));
                if (division.segments > 1) {
                    std::copy(entries + i * size, entries + (i + 1) * size, scan.state(0));
                    std::copy(grad_entries + i * size, grad_entries + (i + 1) * size, scan.state(1));
                } else {
                    read_transposed(scan, p.initial_state, scan.state(0), scan.state(2));
                    read_transposed(scan, p.grad_final_state, scan.state(1), scan.state(2));
                }
                gradients(scan, own, division.segment_start(z.tokens, segment), division.segment_start(z.tokens, segment + 1),
                          sums + (d * heads + bh) * sums_of_one, false);
            }
            const int64_t pieces = (z.tokens + 255) / 256;
#pragma omp for
            for (int64_t i = 0; i < heads * pieces; i++) {
                const int64_t bh = i / pieces, from = i % pieces * 256;
                scan.choose(bh / z.heads, bh % z.heads, 0);
                const T* first = sums + bh * sums_of_one;
                write_gradients(scan, first, division.directions == 2 ? first + heads * sums_of_one : nullptr, from,
                                std::min(z.tokens, from + 256));
            }
        }
    }
    return true;
}

}  // namespace

// Both return 0, or 1 where memory ran out. `wide` computes in double.
extern "C" int gated_scan_forward(const Problem* problem, int wide, int threads) {
    return (wide ? run_forward<double>(*problem, threads) : run_forward<float>(*problem, threads)) ? 0 : 1;
}
extern "C" int gated_scan_backward(const Problem* problem, int wide, int threads) {
    return (wide ? run_backward<double>(*problem, threads) : run_backward<float>(*problem, threads)) ? 0 : 1;
}
