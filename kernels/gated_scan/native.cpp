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
// with q_t * P_t: two multiply-adds an element instead of three operations. A run ends before any P gets too small, where the state is scaled and P starts at 1 again, so gates of any strength are exact.
//
// The gradient of the log decays takes the chunk-end form: within a block, from its last token to its first,
// dg_t = sum_{r >= t} (q_r dq_r - k_r dk_r) + sum_v S_end * dS_end, dq and dk being this direction's own.
//
// "Scan order" s counts tokens as the direction sees them: token t = s forward, t = N - 1 - s backward.

#include <omp.h>

#include "scan.h"

namespace {

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
        output.write(from, to - from, 1, first + from * v, second ? second + from * v : nullptr);
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
            const int64_t start = offset + from * padded<T>(width);
            target.write(from, to - from, 1, first + start, second ? second + start : nullptr);
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
