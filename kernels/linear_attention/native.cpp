// Linear attention on CPU.
//
// Each batch element's head is a task of its own, or, where these are few, several: ranges of its tokens, whose states
// are added in their order. Tokens are packed in blocks, mapped and gated on the way (products.h), so that the inputs
// are read as they lie; a block of outputs takes in the convolution of an image (convolution.h) before it is written.
// How tokens are divided depends on the sizes alone, and so the bits do not depend on the number of threads.
//
// T is the type of the arithmetic (float or double).

#include <omp.h>

#include <cmath>
#include <limits>

#include "convolution.h"

namespace {

constexpr int64_t ENOUGH_TASKS = 64, TOKENS_OF_A_TASK = 512;
constexpr int64_t WORTH_THREADS = 1 << 18;  // products; fewer take less time than waking a thread

struct Problem {
    int64_t batch, heads, queries, keys, key_dim, value_dim;
    double eps, floor;  // of a mean denominator; of relu's features
    int32_t relu, divides;
    Tensor query, key, value;
    Tensor key_gate, value_gate;  // (heads, keys); null: ones
    Tensor state, sums;           // T (batch, heads, D, V) and (batch, heads, D + V), or null: not wanted
    Tensor output;                // forward
    Tensor grad_output, grad_query, grad_key, grad_value;
    Tensor grad_key_gate, grad_value_gate;  // T (batch, heads, keys), or null
    Image image;                            // whose convolution is added to the outputs of the last queries

    double tokens() const { return double(std::max<int64_t>(keys, 1)); }  // without keys all sums are zero
};

enum Outcome { DONE = 0, NO_MEMORY = 1 };

// S (D x V), s and t of the mathematics, or their gradients; rows and vectors are padded with zeros.
template <typename T> struct State {
    T *matrix, *key_sum, *value_sum;
    int64_t key_width, value_width;

    static int64_t size(const Problem& p) {
        const int64_t k = padded<T>(p.key_dim), v = padded<T>(p.value_dim);
        return k * v + k + v;
    }
    State(const Problem& p, T* memory) : key_width(padded<T>(p.key_dim)), value_width(padded<T>(p.value_dim)) {
        matrix = memory, key_sum = matrix + key_width * value_width, value_sum = key_sum + key_width;
    }
    void zero() const { std::fill(matrix, value_sum + value_width, T(0)); }
    void zero_sums() const { std::fill(key_sum, value_sum + value_width, T(0)); }
    void add(const State& other) const {
        for (T *to = matrix, *from = other.matrix; to < value_sum + value_width; to += LANES<T>, from += LANES<T>)
            store(to, load(to) + load(from));
    }
};

// How the tokens of each head are cut into ranges of whole blocks.
struct Division {
    int64_t heads, parts;

    explicit Division(const Problem& p) : heads(p.batch * p.heads) {
        const int64_t longest = (std::max(p.queries, p.keys) + TOKENS_OF_A_TASK - 1) / TOKENS_OF_A_TASK;
        parts = std::max<int64_t>(1, std::min(longest, ENOUGH_TASKS / heads));
    }
    int64_t start(int64_t tokens, int64_t part) const {
        const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
        return std::min(tokens, blocks * part / parts * BLOCK);
    }
};

template <typename T> class Worker {
  public:
    static int64_t scratch(const Problem& p, bool backward) {
        const int64_t k = padded<T>(p.key_dim), v = padded<T>(p.value_dim);
        const int64_t blocks = BLOCK * (k + v) * (backward ? 3 : 1), states = State<T>::size(p) * (backward ? 2 : 1);
        const int64_t convolution = p.image.tensor.data ? BLOCK * v : 0;
        return blocks + states + (backward ? k * v : 0) + 2 * BLOCK + convolution +
               ImageConvolution<T>::scratch(p.image, p.value_dim);
    }

    Worker(const Problem& p, bool backward, T* memory)
        : p_(p), k_(padded<T>(p.key_dim)), v_(padded<T>(p.value_dim)), own(p, memory), own_gradient(p, memory),
          convolution_(p.image, p.value_dim, memory + State<T>::size(p)) {
        low_ = p.relu ? T(0) : -std::numeric_limits<T>::infinity();
        floor_ = p.relu ? T(p.floor) : T(0);
        scale_ = T(1 / std::sqrt(double(std::max<int64_t>(p.key_dim, 1))) / p.tokens());
        memory += State<T>::size(p) + ImageConvolution<T>::scratch(p.image, p.value_dim);
        const auto take = [&](int64_t count) {
            T* taken = memory;
            memory += count;
            return taken;
        };
        factors_ = take(BLOCK), other_factors_ = take(BLOCK);
        keyed_ = take(BLOCK * k_), valued_ = take(BLOCK * v_);
        if (p.image.tensor.data) local_ = take(BLOCK * v_);
        if (!backward) return;
        own_gradient = State<T>(p, take(State<T>::size(p)));
        turned_ = take(k_ * v_);
        raw_keyed_ = take(BLOCK * k_), raw_valued_ = take(BLOCK * v_);
        grad_keyed_ = take(BLOCK * k_), grad_valued_ = take(BLOCK * v_);
    }

    void choose(int64_t head) { batch_ = head / p_.heads, head_ = head % p_.heads; }

    // The state of keys and values `first` .. `last` - 1.
    void accumulate(int64_t first, int64_t last, const State<T>& state) {
        if (first == last) return state.zero();
        state.zero_sums();
        for (int64_t token = first; token < last; token += BLOCK) {
            const int64_t count = std::min(BLOCK, last - token);
            read_gate(p_.key_gate, token, count, factors_);
            read_gate(p_.value_gate, token, count, other_factors_);
            keys(p_.key).read(token, count, keyed_, state.key_sum, [&](Vector<T> x, int64_t i, int64_t) {
                return feature(x) * factors_[i];
            });
            values(p_.value).read(token, count, valued_, p_.divides ? nullptr : state.value_sum,
                                  [&](Vector<T> x, int64_t i, int64_t) { return x * other_factors_[i]; });
            keys(p_.key).fetch(token + count, BLOCK, p_.keys, ahead_);
            values(p_.value).fetch(token + count, BLOCK, p_.keys, ahead_);
            add_outer(count, token == first, state);
        }
    }

    // The outputs of queries `first` .. `last` - 1.
    void read_out(int64_t first, int64_t last, const State<T>& state) {
        const int64_t image = p_.image.tensor.data ? p_.image.before : p_.queries;  // where it begins
        for (int64_t token = first, count; token < last; token += count) {
            count = std::min(BLOCK, (token < image ? std::min(image, last) : last) - token);
            read_queries(token, count, state, [](Vector<T>, int64_t, int64_t) {});
            keys(p_.query).fetch(token + count, BLOCK, p_.queries, ahead_);
            values(p_.output).fetch(token, count, p_.queries, ahead_);
            if (token >= image) convolution_.fetch(values(p_.image.tensor), ahead_);
            multiply<T, false>(count, v_, p_.key_dim, {keyed_, k_, 1}, state.matrix, v_, valued_, v_, ahead_);
            if (token < image) {
                write_outputs(token, count, state, [](Vector<T> x, int64_t, int64_t) { return x; });
            } else {
                convolution_.convolve(batch_, head_, token - image, count, local_);
                write_outputs(token, count, state, [&](Vector<T> x, int64_t i, int64_t c) {
                    return x + load(local_ + i * v_ + c);
                });
            }
        }
    }

    // Gradients of queries `first` .. `last` - 1, and theirs of S and s; that of t holds the sum of g.
    void query_gradients(int64_t first, int64_t last, const State<T>& gradient) {
        if (first == last) return gradient.zero();
        const State<T>& state = own;
        read_state(state);
        transpose(state.matrix, p_.key_dim, p_.value_dim, v_, turned_, k_);
        gradient.zero_sums();
        for (int64_t token = first; token < last; token += BLOCK) {
            const int64_t count = std::min(BLOCK, last - token);
            read_queries(token, count, state, [&](Vector<T> x, int64_t i, int64_t c) {
                store(raw_keyed_ + i * k_ + c, x);
            });
            values(p_.grad_output).read(token, count, valued_, p_.divides ? nullptr : gradient.value_sum,
                                        [&](Vector<T> x, int64_t i, int64_t) { return x * factors_[i]; });
            keys(p_.grad_query).fetch(token, count, p_.queries, ahead_);
            multiply<T, false>(count, k_, p_.value_dim, {valued_, v_, 1}, turned_, k_, grad_keyed_, k_, ahead_);
            for (int64_t i = 0; i < count; i++) {
                const T* phi = keyed_ + i * k_;
                const T* through = grad_keyed_ + i * k_;
                const T of_sum = p_.divides ? dot(phi, through, k_) * factors_[i]
                                            : dot(valued_ + i * v_, state.value_sum, v_) / T(p_.keys);
                other_factors_[i] = of_sum;
                for (int64_t c = 0; c < k_; c += LANES<T>)
                    store(gradient.key_sum + c, load(gradient.key_sum + c) - load(phi + c) * of_sum);
            }
            keys(p_.grad_query).write(token, count, grad_keyed_, [&](Vector<T> x, int64_t i, int64_t c) {
                return through_map(x - load(state.key_sum + c) * other_factors_[i], load(raw_keyed_ + i * k_ + c));
            });
            keys(p_.query).fetch(token + count, BLOCK, p_.queries, ahead_);
            values(p_.grad_output).fetch(token + count, BLOCK, p_.queries, ahead_);
            add_outer(count, token == first, gradient);
        }
    }

    // Turns the sum of g that `query_gradients` left into the gradient of t / N.
    void finish_gradient(const State<T>& gradient) {
        if (p_.divides) return;
        read_state(own);
        for (int64_t c = 0; c < v_; c += LANES<T>) {
            Vector<T> through{};
            for (int64_t d = 0; d < p_.key_dim; d++) through += own.key_sum[d] * load(gradient.matrix + d * v_ + c);
            store(gradient.value_sum + c, (load(gradient.value_sum + c) / scale_ - through) / T(p_.keys));
        }
    }

    // Gradients of keys, values and gates `first` .. `last` - 1.
    void key_gradients(int64_t first, int64_t last, const State<T>& gradient) {
        if (first == last) return;
        transpose(gradient.matrix, p_.key_dim, p_.value_dim, v_, turned_, k_);
        for (int64_t token = first; token < last; token += BLOCK) {
            const int64_t count = std::min(BLOCK, last - token);
            read_gate(p_.key_gate, token, count, factors_);
            read_gate(p_.value_gate, token, count, other_factors_);
            keys(p_.key).read(token, count, keyed_, nullptr, [&](Vector<T> x, int64_t i, int64_t c) {
                store(raw_keyed_ + i * k_ + c, x);
                return feature(x) * factors_[i];
            });
            values(p_.value).read(token, count, valued_, nullptr, [&](Vector<T> x, int64_t i, int64_t c) {
                store(raw_valued_ + i * v_ + c, x);
                return x * other_factors_[i];
            });
            keys(p_.grad_key).fetch(token, count, p_.keys, ahead_);
            values(p_.grad_value).fetch(token, count, p_.keys, ahead_);
            multiply<T, false>(count, k_, p_.value_dim, {valued_, v_, 1}, turned_, k_, grad_keyed_, k_, ahead_);
            keys(p_.key).fetch(token + count, BLOCK, p_.keys, ahead_);
            values(p_.value).fetch(token + count, BLOCK, p_.keys, ahead_);
            multiply<T, false>(count, v_, p_.key_dim, {keyed_, k_, 1}, gradient.matrix, v_, grad_valued_, v_, ahead_);
            add_to_rows(count, grad_keyed_, gradient.key_sum, k_);
            if (!p_.divides) add_to_rows(count, grad_valued_, gradient.value_sum, v_);
            if (T* to = gate_gradient(p_.grad_key_gate, token))
                for (int64_t i = 0; i < count; i++) to[i] = feature_dot(raw_keyed_ + i * k_, grad_keyed_ + i * k_);
            if (T* to = gate_gradient(p_.grad_value_gate, token))
                for (int64_t i = 0; i < count; i++) to[i] = dot(raw_valued_ + i * v_, grad_valued_ + i * v_, v_);
            keys(p_.grad_key).write(token, count, grad_keyed_, [&](Vector<T> x, int64_t i, int64_t c) {
                return through_map(x * factors_[i], load(raw_keyed_ + i * k_ + c));
            });
            values(p_.grad_value).write(token, count, grad_valued_, [&](Vector<T> x, int64_t i, int64_t) {
                return x * other_factors_[i];
            });
        }
    }

    void write_state(const State<T>& state) const {
        if (!p_.state.data) return;
        T* to = matrix();
        for (int64_t d = 0; d < p_.key_dim; d++, to += p_.value_dim)
            std::copy(state.matrix + d * v_, state.matrix + d * v_ + p_.value_dim, to);
        std::copy(state.key_sum, state.key_sum + p_.key_dim, sums());
        std::copy(state.value_sum, state.value_sum + p_.value_dim, sums() + p_.key_dim);
    }

  private:
    const Problem& p_;
    const int64_t k_, v_;  // padded widths of keys and of values

  public:
    State<T> own, own_gradient;  // for tasks that share none

  private:
    Rows<T> keys(const Tensor& tensor) const { return Rows<T>(tensor, batch_, head_, p_.key_dim); }
    Rows<T> values(const Tensor& tensor) const { return Rows<T>(tensor, batch_, head_, p_.value_dim); }
    T* matrix() const {
        return static_cast<T*>(p_.state.data) + (batch_ * p_.heads + head_) * p_.key_dim * p_.value_dim;
    }
    T* sums() const {
        return static_cast<T*>(p_.sums.data) + (batch_ * p_.heads + head_) * (p_.key_dim + p_.value_dim);
    }
    T* gate_gradient(const Tensor& tensor, int64_t token) const {
        if (!tensor.data) return nullptr;
        return static_cast<T*>(tensor.data) + (batch_ * p_.heads + head_) * p_.keys + token;
    }

    // The comparison lets NaN through, and with an infinite `low_` everything.
    INLINE Vector<T> feature(Vector<T> x) const { return (x < low_ ? broadcast(low_) : x) + floor_; }
    INLINE Vector<T> through_map(Vector<T> gradient, Vector<T> x) const { return x <= low_ ? Vector<T>{} : gradient; }
    T feature_dot(const T* raw, const T* gradient) const {
        Vector<T> total{};
        for (int64_t c = 0; c < k_; c += LANES<T>) total += feature(load(raw + c)) * load(gradient + c);
        return sum<T>(total);
    }

    void read_gate(const Tensor& gate, int64_t token, int64_t count, T* to) const {
        if (!gate.data) return std::fill(to, to + count, T(1));
        with_type(gate.dtype, [&](auto* type) {
            const auto* from = static_cast<decltype(type)>(gate.data) + head_ * gate.strides[0] + token;
            for (int64_t i = 0; i < count; i++) to[i] = T(widen(from[i]));
        });
    }

    // Packs mapped queries; factors are what their rows of S are multiplied by, the other factors phi(q) . s.
    template <typename F> void read_queries(int64_t token, int64_t count, const State<T>& state, F&& see) {
        keys(p_.query).read(token, count, keyed_, nullptr, [&](Vector<T> x, int64_t i, int64_t c) {
            see(x, i, c);
            return feature(x);
        });
        const T constant = T(p_.eps * p_.tokens());
        for (int64_t i = 0; i < count; i++) {
            other_factors_[i] = dot(keyed_ + i * k_, state.key_sum, k_);
            factors_[i] = p_.divides ? 1 / (other_factors_[i] + constant) : scale_;
        }
    }

    // Writes the packed rows, each vector of an output as finish(vector, row, column) makes it.
    template <typename F> void write_outputs(int64_t token, int64_t count, const State<T>& state, F&& finish) const {
        const T of_mean = T(1 / p_.tokens());
        if (p_.divides) {
            values(p_.output).write(token, count, valued_, [&](Vector<T> x, int64_t i, int64_t c) {
                return finish(x * factors_[i], i, c);
            });
        } else {
            values(p_.output).write(token, count, valued_, [&](Vector<T> x, int64_t i, int64_t c) {
                const T rest = (1 - scale_ * other_factors_[i]) * of_mean;
                return finish(x * scale_ + load(state.value_sum + c) * rest, i, c);
            });
        }
    }

    // Adds the outer products of the packed rows to the matrix, or overwrites it with them.
    void add_outer(int64_t count, bool overwrite, const State<T>& state) {
        const Left<T> left{keyed_, 1, k_};
        if (overwrite) multiply<T, false>(p_.key_dim, v_, count, left, valued_, v_, state.matrix, v_, ahead_);
        else multiply<T, true>(p_.key_dim, v_, count, left, valued_, v_, state.matrix, v_, ahead_);
    }

    void add_to_rows(int64_t count, T* rows, const T* row, int64_t width) {
        for (int64_t i = 0; i < count; i++, rows += width)
            for (int64_t c = 0; c < width; c += LANES<T>) store(rows + c, load(rows + c) + load(row + c));
    }

    void read_state(const State<T>& state) const {
        const T* from = matrix();
        state.zero_sums();
        for (int64_t d = 0; d < p_.key_dim; d++, from += p_.value_dim)
            std::copy(from, from + p_.value_dim, state.matrix + d * v_);
        std::copy(sums(), sums() + p_.key_dim, state.key_sum);
        std::copy(sums() + p_.key_dim, sums() + p_.key_dim + p_.value_dim, state.value_sum);
    }

    ImageConvolution<T> convolution_;
    Ahead ahead_;
    int64_t batch_ = 0, head_ = 0;
    T low_, floor_, scale_;
    T *factors_, *other_factors_;  // of each row of a block
    T *keyed_, *valued_;           // a block, packed
    T *turned_ = nullptr, *raw_keyed_ = nullptr, *raw_valued_ = nullptr;  // backward only, as are the next
    T *grad_keyed_ = nullptr, *grad_valued_ = nullptr;
    T* local_ = nullptr;  // a block of the convolution
};

template <typename T> int run(const Problem& p, bool backward, int threads) {
    const Division division(p);
    const int64_t parts = division.parts, tasks = division.heads * parts;
    const int64_t products = division.heads * (p.queries + p.keys) * p.key_dim * p.value_dim;
    threads = products < WORTH_THREADS ? 1 : int(std::min<int64_t>(threads, tasks));
    const int64_t size = Worker<T>::scratch(p, backward), state_size = State<T>::size(p);
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(threads * size + (parts > 1 ? tasks * state_size : 0));
    if (!memory) return NO_MEMORY;
    const auto shared = [&](int64_t task) { return State<T>(p, memory + threads * size + task * state_size); };

#pragma omp parallel num_threads(threads)
    {
        Worker<T> worker(p, backward, memory + omp_get_thread_num() * size);
        if (parts == 1) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t head = 0; head < division.heads; head++) {
                worker.choose(head);
                if (backward) {
                    worker.query_gradients(0, p.queries, worker.own_gradient);
                    worker.finish_gradient(worker.own_gradient);
                    worker.key_gradients(0, p.keys, worker.own_gradient);
                } else {
                    worker.accumulate(0, p.keys, worker.own);
                    worker.write_state(worker.own);
                    worker.read_out(0, p.queries, worker.own);
                }
            }
        } else {
            // f(first token, last token, task) for every range of the tokens
            const auto over_parts = [&](int64_t tokens, auto&& f) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t task = 0; task < tasks; task++) {
                    worker.choose(task / parts);
                    f(division.start(tokens, task % parts), division.start(tokens, task % parts + 1), task);
                }
            };
            over_parts(backward ? p.queries : p.keys, [&](int64_t first, int64_t last, int64_t task) {
                const State<T> own = shared(task);
                backward ? worker.query_gradients(first, last, own) : worker.accumulate(first, last, own);
            });
#pragma omp for schedule(dynamic, 1)
            for (int64_t head = 0; head < division.heads; head++) {
                worker.choose(head);
                const State<T> whole = shared(head * parts);
                for (int64_t part = 1; part < parts; part++) whole.add(shared(head * parts + part));
                backward ? worker.finish_gradient(whole) : worker.write_state(whole);
            }
            over_parts(backward ? p.keys : p.queries, [&](int64_t first, int64_t last, int64_t task) {
                const State<T> whole = shared(task / parts * parts);
                backward ? worker.key_gradients(first, last, whole) : worker.read_out(first, last, whole);
            });
        }
    }
    return DONE;
}

}  // namespace

// Both return an Outcome. `wide` computes in double.
extern "C" int linear_attention_forward(const Problem* problem, int wide, int threads) {
    return wide ? run<double>(*problem, false, threads) : run<float>(*problem, false, threads);
}
extern "C" int linear_attention_backward(const Problem* problem, int wide, int threads) {
    return wide ? run<double>(*problem, true, threads) : run<float>(*problem, true, threads);
}
