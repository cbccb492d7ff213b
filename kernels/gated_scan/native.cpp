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
// with q_t * P_t: two multiply-adds an element instead of three operations. A run ends before any P gets too small, where
// the state is scaled and P starts at 1 again, so gates of any strength are exact.
//
// The gradient of the log decays takes the chunk-end form: within a block, from its last token to its first,
// dg_t = sum_{r >= t} (q_r dq_r - k_r dk_r) + sum_v S_end * dS_end, dq and dk being this direction's own.
//
// "Scan order" s counts tokens as the direction sees them: token t = s forward, t = N - 1 - s backward.

#include <omp.h>

#include "scan.h"

namespace {

// How the work is divided; a chain is one (batch, head, direction).
//
// Whole heads: a task is one (batch, head), its directions one after the other.
// Halves, where heads are few: all chains run at once. Each takes the half of the tokens where it starts, and after a
// barrier the other half, adding to what the other direction has left there: no copies, no second buffer.
// Parts, where even chains are few: each half is cut further; a pass without outputs finds the parts' entry states.
struct Division {
    int64_t tokens, heads, chains;
    int directions, parts_in_half = 1;
    bool whole_heads = true;

    Division(const Problem& p, int threads)
        : tokens(p.sizes.tokens), heads(p.sizes.batch * p.sizes.heads), directions(p.directions == 3 ? 2 : 1), mask_(p.directions) {
        chains = heads * directions;
        const auto rounds = [&](int64_t tasks) { return double((tasks + threads - 1) / threads); };
        double best = rounds(heads) * directions;
        if (heads >= 4 * threads) return;
        for (int n = 1; n <= 4 * threads && (n == 1 || tokens / (2 * n) >= 4 * BLOCK); n *= 2)
            if (const double time = (n > 1 ? 1.5 : 1.0) * rounds(chains * n) / n; time < best) {
                best = time;
                parts_in_half = n;
                whole_heads = false;
            }
    }
    int parts() const { return 2 * parts_in_half; }
    int direction(int64_t chain) const { return mask_ == 3 ? int(chain % 2) : int(mask_ == 2); }
    // Where a part begins in scan order; part i of one direction holds the tokens of part parts() - 1 - i of the other.
    int64_t start(int64_t chain, int part) const {
        return direction(chain) ? tokens - tokens * (parts() - part) / parts() : tokens * part / parts();
    }
    int64_t blocks_in_part() const { return (tokens / parts() + 1 + BLOCK - 1) / BLOCK; }

  private:
    int mask_;
};

// What enters each part of a chain: on entry `local` holds each part's state from zero and `decay` its total decay by key
// channel, `entry` what enters the first part met. In a transposed state the key channels are columns.
template <typename T>
void carry_between_parts(T* local, const T* decay, T* entry, int64_t key, int64_t value, int parts, bool ascending, bool transposed) {
    const int64_t size = key * value;
    for (int i = 0; i < parts; i++) {
        const int part = ascending ? i : parts - 1 - i;
        T* state = local + part * size;
        const T* factor = decay + part * key;
        for (int64_t j = 0; j < size; j++) {
            const T leaving = state[j] + entry[j] * factor[transposed ? j % key : j / value];
            state[j] = entry[j];
            entry[j] = leaving;
        }
    }
}

enum Outcome { DONE = 0, NO_MEMORY = 1, BAD_DECAY = 2 };  // BAD_DECAY << direction

// Regions of one allocation.
class Plan {
  public:
    int64_t add(int64_t count) {
        const int64_t offset = total_;
        total_ += (count + 15) / 16 * 16;
        return offset;
    }
    int64_t total() const { return total_; }

  private:
    int64_t total_ = 0;
};

template <typename T> int run_forward(const Problem& p, int threads) {
    const Sizes& z = p.sizes;
    const Division division(p, threads);
    const int64_t k = padded<T>(z.key_dim), v = padded<T>(z.value_dim), size = k * v, parts = division.parts();
    const bool direct = Rows<T>(p.output, 0, 0, z.value_dim).direct() != nullptr;
    const int64_t sums_of_one = direct ? 0 : z.tokens * v, several = division.parts_in_half > 1;

    Plan plan;
    const int64_t per_thread = Scan<T>::scratch(z) + (division.whole_heads ? sums_of_one : 0);
    const int64_t at_threads = plan.add(threads * per_thread);
    const int64_t at_entries = plan.add(division.whole_heads ? 0 : division.chains * parts * size);
    const int64_t at_decays = plan.add(several ? division.chains * parts * k : 0);
    const int64_t at_sums = plan.add(division.whole_heads ? 0 : division.heads * sums_of_one);
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(plan.total());
    if (!memory) return NO_MEMORY;
    int bad_decays = 0;

#pragma omp parallel num_threads(threads)
    {
        T* own = memory + at_threads + omp_get_thread_num() * per_thread;
        Scan<T> scan(p, own);
        const auto choose = [&](int64_t chain) {
            const int64_t bh = chain / division.directions;
            scan.choose(bh / z.heads, bh % z.heads, division.direction(chain));
        };
        // Where the outputs of the chosen head go: to where they belong, or to a buffer of T.
        const auto output = [&](T* buffer) -> Operand<T> {
            const Rows<T> rows = scan.rows(p.output, z.value_dim);
            return direct ? Operand<T>{rows.direct(), rows.stride()} : Operand<T>{buffer, v};
        };

        if (division.whole_heads) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t bh = 0; bh < division.heads; bh++) {
                T* buffer = own + Scan<T>::scratch(z);
                for (int d = 0; d < division.directions; d++) {
                    choose(bh * division.directions + d);
                    scan.read_state(p.initial_state, scan.state(0));
                    scan.forward(0, z.tokens, scan.state(0), output(buffer), d > 0);
                    if (p.final_state.data) scan.write_state(p.final_state, scan.state(0));
                }
                if (!direct) scan.rows(p.output, z.value_dim).write(0, z.tokens, 1, buffer);
            }
        } else {
            T *entries = memory + at_entries, *decays = memory + at_decays, *sums = memory + at_sums;
            if (several) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < division.chains * parts; i++) {
                    const int64_t chain = i / parts, part = i % parts;
                    const int64_t s0 = division.start(chain, part), s1 = division.start(chain, part + 1);
                    choose(chain);
                    scan.zero(entries + i * size);
                    if (part + 1 < parts) scan.forward(s0, s1, entries + i * size, {nullptr, 0}, true);
                    scan.total_decay(s0, s1, decays + i * k);
                }
#pragma omp for
                for (int64_t chain = 0; chain < division.chains; chain++) {
                    choose(chain);
                    scan.read_state(p.initial_state, scan.state(0));
                    carry_between_parts(entries + chain * parts * size, decays + chain * parts * k, scan.state(0), k, v, parts, true, false);
                }
            }
            for (int half = 0; half < 2; half++) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < division.chains * division.parts_in_half; i++) {
                    const int64_t chain = i / division.parts_in_half, bh = chain / division.directions;
                    const int64_t part = half * division.parts_in_half + i % division.parts_in_half;
                    T* state = entries + (chain * parts + part) * size;
                    choose(chain);
                    if (part == 0) scan.read_state(p.initial_state, state);
                    scan.forward(division.start(chain, part), division.start(chain, part + 1), state, output(sums + bh * sums_of_one),
                                 half == 1 && division.directions == 2);
                    if (!several && part == 0) std::copy(state, state + size, state + size);
                    if (p.final_state.data && part + 1 == parts) scan.write_state(p.final_state, state);
                }
            }
            if (!direct) {
#pragma omp for
                for (int64_t bh = 0; bh < division.heads; bh++) {
                    choose(bh * division.directions);
                    scan.rows(p.output, z.value_dim).write(0, z.tokens, 1, sums + bh * sums_of_one);
                }
            }
        }
#pragma omp atomic
        bad_decays |= scan.bad_decays();
    }
    return bad_decays * BAD_DECAY;
}

template <typename T> int run_backward(const Problem& p, int threads) {
    const Sizes& z = p.sizes;
    const Division division(p, threads);
    const int64_t k = padded<T>(z.key_dim), v = padded<T>(z.value_dim), size = k * v, parts = division.parts();
    const int64_t queries = z.tokens * k, sums_of_one = z.tokens * (2 * k + v), several = division.parts_in_half > 1;
    const int64_t blocks = division.whole_heads ? (z.tokens + BLOCK - 1) / BLOCK : division.blocks_in_part();

    Plan plan;
    const int64_t per_thread = Scan<T>::scratch(z) + (division.whole_heads ? queries + blocks * size + sums_of_one : 0);
    const int64_t chains = division.whole_heads ? 0 : division.chains, all_parts = chains * parts;
    const int64_t at_threads = plan.add(threads * per_thread);
    const int64_t at_entries = plan.add(all_parts * size), at_grad_entries = plan.add(all_parts * size);
    const int64_t at_decays = plan.add(several ? all_parts * k : 0), at_grad_decays = plan.add(several ? all_parts * k : 0);
    const int64_t at_queries = plan.add(chains * queries), at_states = plan.add(all_parts * blocks * size);
    const int64_t at_sums = plan.add(division.whole_heads ? 0 : division.heads * sums_of_one);
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(plan.total());
    if (!memory) return NO_MEMORY;

#pragma omp parallel num_threads(threads)
    {
        T* own = memory + at_threads + omp_get_thread_num() * per_thread;
        Scan<T> scan(p, own);
        const auto choose = [&](int64_t chain) {
            const int64_t bh = chain / division.directions;
            scan.choose(bh / z.heads, bh % z.heads, division.direction(chain));
        };
        const auto read_transposed = [&](const Tensor& tensor, T* state) {
            scan.read_state(tensor, scan.state(2));
            scan.transpose(scan.state(2), k, v, state);
        };
        // Gradients of tokens s0..s1 of the chosen chain, given what forward_transposed left of them.
        const auto gradients = [&](int64_t s0, int64_t s1, T* grad_state, const T* own_queries, const T* states, T* to, bool accumulate) {
            scan.transpose(grad_state, v, k, scan.state(2));
            scan.backward(s0, s1, grad_state, scan.state(2), own_queries, states, to, to + queries, to + 2 * queries, accumulate);
        };
        const auto write_initial_gradient = [&](T* grad_state) {
            if (!p.grad_initial_state.data) return;
            scan.decay_of_first(scan.state(0));
            scan.scale_columns(grad_state, scan.state(0));
            scan.transpose(grad_state, v, k, scan.state(2));
            scan.write_state(p.grad_initial_state, scan.state(2));
        };
        const auto write_gradients = [&](const T* sums) {
            scan.rows(p.grad_query, z.key_dim).write(0, z.tokens, 1, sums);
            scan.rows(p.grad_key, z.key_dim).write(0, z.tokens, 1, sums + queries);
            scan.rows(p.grad_value, z.value_dim).write(0, z.tokens, 1, sums + 2 * queries);
        };

        if (division.whole_heads) {
            T *own_queries = own + Scan<T>::scratch(z), *states = own_queries + queries, *sums = states + blocks * size;
#pragma omp for schedule(dynamic, 1)
            for (int64_t bh = 0; bh < division.heads; bh++) {
                for (int d = 0; d < division.directions; d++) {
                    choose(bh * division.directions + d);
                    read_transposed(p.initial_state, scan.state(0));
                    read_transposed(p.grad_final_state, scan.state(1));
                    scan.forward_transposed(0, z.tokens, scan.state(0), own_queries, states);
                    gradients(0, z.tokens, scan.state(1), own_queries, states, sums, d > 0);
                    write_initial_gradient(scan.state(1));
                }
                write_gradients(sums);
            }
        } else {
            T *entries = memory + at_entries, *grad_entries = memory + at_grad_entries, *sums = memory + at_sums;
            if (several) {
                T *decays = memory + at_decays, *grad_decays = memory + at_grad_decays;
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < all_parts; i++) {
                    const int64_t chain = i / parts, part = i % parts;
                    const int64_t s0 = division.start(chain, part), s1 = division.start(chain, part + 1);
                    choose(chain);
                    scan.zero(entries + i * size);
                    scan.zero(grad_entries + i * size);
                    if (part + 1 < parts) scan.forward_transposed(s0, s1, entries + i * size, nullptr, nullptr);
                    if (part > 0) scan.backward_state(s0, s1, grad_entries + i * size);
                    scan.total_decay(s0, s1, decays + i * k);
                    scan.total_decay(s0 + 1, std::min(s1 + 1, z.tokens), grad_decays + i * k);
                }
#pragma omp for
                for (int64_t chain = 0; chain < chains; chain++) {
                    const int64_t i = chain * parts;
                    choose(chain);
                    read_transposed(p.initial_state, scan.state(0));
                    carry_between_parts(entries + i * size, decays + i * k, scan.state(0), k, v, parts, true, true);
                    read_transposed(p.grad_final_state, scan.state(0));
                    carry_between_parts(grad_entries + i * size, grad_decays + i * k, scan.state(0), k, v, parts, false, true);
                }
            }
            // The query's gradients and the states after each block: by parts, or a chain's two halves in turn.
            const int64_t in_turn = several ? 1 : parts;
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < all_parts / in_turn; i++)
                for (int64_t j = i * in_turn; j < (i + 1) * in_turn; j++) {
                    const int64_t chain = j / parts, part = j % parts;
                    T* state = entries + j * size;
                    choose(chain);
                    if (part == 0) read_transposed(p.initial_state, state);
                    scan.forward_transposed(division.start(chain, part), division.start(chain, part + 1), state,
                                            memory + at_queries + chain * queries, memory + at_states + j * blocks * size);
                    if (!several && part == 0) std::copy(state, state + size, state + size);
                }
            for (int half = 1; half >= 0; half--) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < chains * division.parts_in_half; i++) {
                    const int64_t chain = i / division.parts_in_half, part = half * division.parts_in_half + i % division.parts_in_half;
                    const int64_t j = chain * parts + part;
                    T* state = grad_entries + j * size;
                    choose(chain);
                    if (part + 1 == parts) read_transposed(p.grad_final_state, state);
                    gradients(division.start(chain, part), division.start(chain, part + 1), state, memory + at_queries + chain * queries,
                              memory + at_states + j * blocks * size, sums + chain / division.directions * sums_of_one,
                              half == 0 && division.directions == 2);
                    if (!several && part == 1) std::copy(state, state + size, state - size);
                    if (part == 0) write_initial_gradient(state);
                }
            }
#pragma omp for
            for (int64_t bh = 0; bh < division.heads; bh++) {
                choose(bh * division.directions);
                write_gradients(sums + bh * sums_of_one);
            }
        }
    }
    return DONE;
}

}  // namespace

// Both return an Outcome. `wide` computes in double.
extern "C" int gated_scan_forward(const Problem* problem, int wide, int threads) {
    return wide ? run_forward<double>(*problem, threads) : run_forward<float>(*problem, threads);
}
extern "C" int gated_scan_backward(const Problem* problem, int wide, int threads) {
    return wide ? run_backward<double>(*problem, threads) : run_backward<float>(*problem, threads);
}
