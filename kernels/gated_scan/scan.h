// One (batch, head, direction) of the gated scan: the passes forward and back over its blocks of tokens.
#pragma once

#include "passes.h"

struct Sizes {
    int64_t batch, tokens, heads, key_dim, value_dim;
};

// Everything a kernel is told. Gates are log decays if `normalizer` is 0, logits otherwise.
struct Problem {
    Sizes sizes;
    double scale, normalizer;
    int32_t directions;  // bit 0: forward, bit 1: backward
    Tensor query, key, value, gate[2];
    Tensor initial_state;                  // [B, H, K, V]; null data: zeros
    Tensor output, final_state;            // forward
    Tensor grad_output, grad_final_state;  // gradient
    Tensor grad_query, grad_key, grad_value, grad_gate[2], grad_initial_state;
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

    T* state(int i) { return states_[i]; }

    void choose(int64_t batch, int64_t head, int direction) {
        batch_ = batch, head_ = head, direction_ = direction;
    }
    void zero(T* state) const { std::fill(state, state + k_ * v_, T(0)); }
    void unit_carry() { std::fill(runs_.carry, runs_.carry + k_, T(1)); }
    // One bit a direction where a log decay was positive or NaN.
    int bad_decays() const { return bad_decays_; }

    // state [Kp][Vp] over tokens s0..s1 of the scan; `out` has the rows by token (null: no output).
    void forward(int64_t s0, int64_t s1, T* state, Operand<T> out, bool accumulate) {
        unit_carry();
        for (int64_t b0 = s0; b0 < s1; b0 += BLOCK) {
            const int64_t n = std::min<int64_t>(BLOCK, s1 - b0);
            read_decays(b0, n, step_);
            runs_.divide(n, step_);
            if (out.data) rows(p_.query, p_.sizes.key_dim).read(token(b0), n, step(), x_);
            rows(p_.key, p_.sizes.key_dim).read(token(b0), n, step(), y_);
            for (int64_t c = 0; c < n * k_; c += LANES<T>) {
                const Vector<T> decay = load(runs_.decay + c);
                if (out.data) store(x_ + c, load(x_ + c) * (decay * T(p_.scale)));
                store(y_ + c, load(y_ + c) / decay);
            }
            const Operand<const T> value = rows(p_.value, p_.sizes.value_dim).operand(token(b0), n, step(), value_);
            const Operand<T> to{out.row(token(b0)), step() * out.stride};
            for (int r = 0; r < runs_.count; r++) {
                const int64_t i = runs_.start[r];
                const Run<T> run{runs_.start[r + 1] - i, {x_ + i * k_, k_}, {y_ + i * k_, k_}, value.from(i), to.from(i),
                                 runs_.entry + r * k_, nullptr};
                if (out.data)
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
            rows(p_.key, p_.sizes.key_dim).read(token(b0), n, step(), key_);
            divide_by_decay(key_, n);
            const auto [value, grad] = value_and_grad(token(b0), n, step());
            transposed_runs(grad, value, grad_query ? grad_query + b0 * k_ : nullptr, state);
            if (!grad_query) continue;
            multiply(grad_query + b0 * k_, runs_.decay, n, T(p_.scale));
            T* after = block_states + (b0 - s0) / BLOCK * k_ * v_;
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
            const int64_t last = token(b0 + n - 1);
            rows(p_.query, p_.sizes.key_dim).read(last, n, -step(), query_);
            divide_by_decay(query_, n, T(p_.scale));
            const auto [value, grad] = value_and_grad(last, n, -step());
            transposed_runs(value, grad, nullptr, grad_state);
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
            const int64_t last = token(b0 + n - 1);
            rows(p_.query, p_.sizes.key_dim).read(last, n, -step(), query_);
            rows(p_.key, p_.sizes.key_dim).read(last, n, -step(), key_);
            if (p_.normalizer > 0) gate.read(last, n, -step(), gate_);
            const auto [value, grad] = value_and_grad(last, n, -step());
            start_tail(block_states + (b0 - s0) / BLOCK * k_ * v_, across);
            divide_by_decay(query_, n, T(p_.scale));
            for (int64_t c = 0; c < n * k_; c += LANES<T>) store(x_ + c, load(key_ + c) * load(runs_.decay + c));
            transposed_runs(value, grad, block_out_, across);
            multiply(block_out_, runs_.decay, n, T(1));
            const Operand<T> to{value_sum + last * v_, -step() * v_};
            for (int r = 0; r < runs_.count; r++) {
                const int64_t i = runs_.start[r];
                const Run<T> run{runs_.start[r + 1] - i, {x_ + i * k_, k_}, {y_ + i * k_, k_}, grad.from(i), to.from(i),
                                 runs_.entry + r * k_, nullptr};
                scan_run<T, true>(run, k_, v_, along, accumulate);
            }
            for (int64_t i = 0; i < n; i++) {
                const int64_t s = b0 + n - 1 - i, t = token(s), row = i * k_;
                const bool unused = s == 0 && !p_.initial_state.data;  // the first token's decay has nothing to act on
                for (int64_t c = 0; c < k_; c += LANES<T>) {
                    const Vector<T> dq = load(grad_query + s * k_ + c), dk = load(block_out_ + row + c);
                    Vector<T> sum = load(tail_ + c) + (load(query_ + row + c) * dq - load(key_ + row + c) * dk);
                    // Nothing passes a decay this strong, so what the sum holds there is rounding.
                    sum = load(step_ + row + k_ + c) < SMALLEST<T> ? Vector<T>{} : sum;
                    store(tail_ + c, sum);
                    Vector<T> dg = unused ? Vector<T>{} : sum;
                    if (p_.normalizer > 0) dg *= sigmoid<T>(-load(gate_ + row + c)) * T(1 / p_.normalizer);
                    store(gate_ + row + c, dg);
                    T *query_to = query_sum + t * k_ + c, *key_to = key_sum + t * k_ + c;
                    store(query_to, accumulate ? load(query_to) + dq : dq);
                    store(key_to, accumulate ? load(key_to) + dk : dk);
                }
            }
            grad_gate.write(last, n, -step(), gate_);
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
            multiply(total, step_, 1, T(1));
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
        to.write(0, p_.sizes.key_dim, 1, state);
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

    void read_decays(int64_t s, int64_t n, T* to) {
        if (n <= 0) return;
        rows(p_.gate[direction_], p_.sizes.key_dim).read(token(s), n, step(), to);
        const T inverse = p_.normalizer > 0 ? T(1 / p_.normalizer) : T(0);
        Mask<T> good = Vector<T>{} == Vector<T>{};
        for (int64_t c = 0; c < n * k_; c += LANES<T>) {
            const Vector<T> g = load(to + c);
            good &= g <= 0;
            store(to + c, exponential(inverse > 0 ? log_sigmoid<T>(g) * inverse : g));
        }
        if (inverse == 0 && any<T>(~good)) bad_decays_ |= 1 << direction_;
    }
    // Running back, the state gradient meets the decay of the token it has just left (none after the last token). Row i of
    // step_ is that of token b0 + n - i; row n is the first token's own.
    void read_gradient_decays(int64_t b0, int64_t n) {
        const int64_t count = std::min<int64_t>(n + 1, n_ - b0);
        T* ascending = block_out_;
        read_decays(b0, count, ascending);
        std::fill(ascending + count * k_, ascending + (n + 1) * k_, T(1));
        for (int64_t i = 0; i <= n; i++) std::copy(ascending + (n - i) * k_, ascending + (n - i + 1) * k_, step_ + i * k_);
    }
    struct ValueAndGrad {
        Operand<const T> value, grad;
    };
    ValueAndGrad value_and_grad(int64_t first, int64_t n, int order) {
        return {rows(p_.value, p_.sizes.value_dim).operand(first, n, order, value_),
                rows(p_.grad_output, p_.sizes.value_dim).operand(first, n, order, grad_)};
    }
    void divide_by_decay(const T* rows, int64_t n, T factor = 1) {
        for (int64_t c = 0; c < n * k_; c += LANES<T>) store(y_ + c, load(rows + c) * factor / load(runs_.decay + c));
    }
    void multiply(T* rows, const T* factors, int64_t n, T factor) const {
        for (int64_t c = 0; c < n * k_; c += LANES<T>) store(rows + c, load(rows + c) * load(factors + c) * factor);
    }
    // Runs of a state^T: y_ holds the operand of the key dimension, x and y have the value dimension.
    void transposed_runs(Operand<const T> x, Operand<const T> y, T* out, T* state) {
        for (int r = 0; r < runs_.count; r++) {
            const int64_t i = runs_.start[r];
            const Operand<T> to{out, k_};
            const Run<T> run{runs_.start[r + 1] - i, x.from(i), y.from(i), {y_ + i * k_, k_}, to.from(i), nullptr, runs_.entry + r * k_};
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
    int direction_ = 0, bad_decays_ = 0;
    T *step_, *gate_, *query_, *key_, *x_, *y_, *block_out_, *tail_, *value_, *grad_;
    T* states_[3];
    Runs<T> runs_;
};
