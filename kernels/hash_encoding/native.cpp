// Multiresolution hash encoding on CPU.
//
// Points are sorted by expert (a stable counting sort) into blocks of 64 of one expert, dimension by dimension. Level
// by level, so that one level's table at a time is in the caches, each block first finds the rows and factors of its
// corners with vectors over points, then reads rows, two neighbours along the first dimension to a vector. Features of
// one kind lie side by side.
//
// Gradients of the table: each (expert, level) has one owner, which adds in the order of the points. Gradients of
// points and gates: each thread has its points, and adds levels in their order. So bits do not depend on the number of
// threads.
//
// T is the type of the arithmetic (float or double), M that of table and features in memory. Integers wrap at 32 bits,
// and every row is taken modulo its level's size, whatever the point.

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "rows.h"
#include "tensor.h"

namespace {

using namespace simd;

constexpr int64_t BLOCK = 64;               // points
constexpr int64_t WORTH_THREADS = 1 << 12;  // points times levels; fewer take less time than waking a thread

struct Level {
    double scale;
    int64_t offset;
    uint32_t multipliers[4], size;
    int32_t hashed;
};

enum Outcome { DONE = 0, NO_MEMORY = 1, NOT_FINITE = 2, NO_SUCH_EXPERT = 3 };
enum Interpolation { LINEAR = 0, SMOOTHSTEP = 1, NEAREST = 2 };

struct Problem {
    int64_t points, experts, levels, active;  // levels from `active` on are zeros
    int32_t dims, features, interpolation, staggered;
    const Level* rows;  // of expert e at e * levels
    Tensor points_in;   // T (points, dims)
    Tensor table;       // M (entries, features)
    Tensor gate;        // T (points); null: ones
    const int64_t* expert;  // (points); null: zeros
    Tensor output;          // M (levels * features, points)
    Tensor grad_output;     // T, likewise
    Tensor grad_table;      // T (entries, features); this and the following null: not wanted
    Tensor grad_points;     // T (points, dims)
    Tensor grad_gate;       // T (points)
    int64_t culprit;        // out: the point that was refused
};

struct Block {
    int64_t expert, first, count;  // `first` among the sorted points
};

// f(first lane's point in the block)
template <typename T, typename F> INLINE void over_vectors(F&& f) {
    for (int64_t i = 0; i < BLOCK; i += LANES<T>) f(i);
}

// The points in order of their experts. `order` is null where they are in that order already.
template <typename T> struct Sorted {
    T *points, *gates, *gradients;  // (dims, points), (points), (dims + 1, points)
    int64_t* order;
    Block* blocks;
    int64_t *first_block, count;  // of each expert; of blocks

    static size_t bytes(const Problem& p) {
        const size_t sums = p.grad_points.data || p.grad_gate.data ? p.dims + 1 : 0;
        return (p.dims + 1 + sums) * stride(p) * sizeof(T) + (p.points + 2 * p.experts + 1) * sizeof(int64_t) +
               (p.points / BLOCK + p.experts) * sizeof(Block);
    }
    // Between dimensions; a block may read past the last point.
    static int64_t stride(const Problem& p) { return (p.points / BLOCK + 2) * BLOCK; }

    Sorted(const Problem& p, T* memory) : points(memory), order(nullptr) {
        gates = points + p.dims * stride(p), gradients = gates + stride(p);
        const int64_t sums = p.grad_points.data || p.grad_gate.data ? p.dims + 1 : 0;
        order_ = reinterpret_cast<int64_t*>(gradients + sums * stride(p));
        first_block = order_ + p.points, starts_ = first_block + p.experts + 1;
        blocks = reinterpret_cast<Block*>(starts_ + p.experts);
    }

    Outcome sort(Problem& p) {
        std::fill(starts_, starts_ + p.experts, 0);
        bool in_order = true;
        for (int64_t i = 0; p.expert && i < p.points; i++) {
            const int64_t e = p.expert[i];
            if (e < 0 || e >= p.experts) {
                p.culprit = i;
                return NO_SUCH_EXPERT;
            }
            in_order &= i == 0 || p.expert[i - 1] <= e;
            starts_[e]++;
        }
        if (!p.expert) starts_[0] = p.points;
        int64_t first = 0;
        count = 0;
        for (int64_t e = 0; e < p.experts; e++) {
            const int64_t end = first + starts_[e];
            starts_[e] = first, first_block[e] = count;
            for (; first < end; first = blocks[count - 1].first + blocks[count - 1].count)
                blocks[count++] = {e, first, std::min(BLOCK, end - first)};
        }
        first_block[p.experts] = count;
        if (in_order) return DONE;
        order = order_;
        for (int64_t i = 0; i < p.points; i++) order[starts_[p.expert[i]]++] = i;
        return DONE;
    }

    int64_t place(int64_t sorted) const { return order ? order[sorted] : sorted; }

    // Copies the points of a block; the first that is not finite, or -1.
    int64_t gather(const Problem& p, const Block& block) {
        int64_t bad = -1;
        const T* from = static_cast<const T*>(p.points_in.data);
        for (int64_t i = block.first; i < block.first + block.count; i++) {
            const T* point = from + place(i) * p.points_in.strides[0];
            T all = 0;
            for (int d = 0; d < p.dims; d++) points[d * stride(p) + i] = point[d], all += point[d] * 0;
            if (all != 0 && bad < 0) bad = place(i);
            gates[i] = p.gate.data ? static_cast<const T*>(p.gate.data)[place(i)] : T(1);
        }
        return bad;
    }

  private:
    int64_t *order_, *starts_;
};

template <typename T, typename M, int D, int F> class Encoder {
  public:
    Encoder(const Problem& p, const Sorted<T>& sorted) : p_(p), sorted_(sorted), stride_(Sorted<T>::stride(p)) {}

    void forward(const Block& block, int64_t level) {
        interpolate(block, locate(block, level));
        const T* gates = sorted_.gates + block.first;
        M* output = static_cast<M*>(p_.output.data) + level * F * p_.points;
        for (int f = 0; f < F; f++, output += p_.points) {
            if (sorted_.order) {
                const int64_t* order = sorted_.order + block.first;
                for (int64_t i = 0; i < block.count; i++) output[order[i]] = narrow<M>(values_[f][i] * gates[i]);
            } else {
                over_vectors<T>([&](int64_t i) {
                    if (i >= block.count) return;
                    const Vector<T> value = load(values_[f] + i) * load(gates + i);
                    store_part(output + block.first + i, value, int(std::min<int64_t>(LANES<T>, block.count - i)));
                });
            }
        }
    }

    void table_gradient(const Block& block, int64_t level) {
        const Level& row = locate(block, level);
        T* table = static_cast<T*>(p_.grad_table.data) + row.offset * F;
        read_gradients(block, level, sorted_.gates + block.first, values_);
        for (int64_t i = 0; i < block.count; i++) {
            const Pair both = gradient_pair(i);
#pragma GCC unroll 8
            for (int j = 0; j < PAIRS; j++) {
                T* low = table + int64_t(rows_[2 * j][i]) * F;
                T* high = table + int64_t(rows_[2 * j + 1][i]) * F;
                store_pair<F>(low, high, load_pair<F, T>(low, high) + others_[j][i] * both);  // never one row
            }
        }
    }

    // Of gates, where points want none: the product of a point's features, not gated, and their gradients.
    void gate_gradient(const Block& block, int64_t level) {
        interpolate(block, locate(block, level));
        read_gradients(block, level, nullptr, products_);
        T* sums = sorted_.gradients + D * stride_ + block.first;
        over_vectors<T>([&](int64_t i) {
            if (i >= block.count) return;
            const int n = int(std::min<int64_t>(LANES<T>, block.count - i));
            Vector<T> sum = level ? load_part<T>(sums + i, n) : Vector<T>{};
            for (int f = 0; f < F; f++) sum += load(values_[f] + i) * load(products_[f] + i);
            store_part(sums + i, sum, n);
        });
    }

    // Of points and gates. With s_c = <row of corner c, gradient>, both are sums of s over corners.
    void point_gradient(const Block& block, int64_t level) {
        const Level& row = locate<true>(block, level);
        const M* table = static_cast<const M*>(p_.table.data) + row.offset * F;
        read_gradients(block, level, nullptr, values_);
        for (int64_t i = 0; i < block.count; i++) {
#pragma GCC unroll 8
            for (int j = 0; j < PAIRS; j++) {
                const auto pair = pair_at(table, j, i);
                T low = 0, high = 0;
#pragma GCC unroll 8
                for (int f = 0; f < F; f++) low += pair[f] * values_[f][i], high += pair[F + f] * values_[f][i];
                products_[2 * j][i] = low, products_[2 * j + 1][i] = high;
            }
        }
        T* sums = sorted_.gradients + block.first;
        over_vectors<T>([&](int64_t i) {
            if (i >= block.count) return;
            const int n = int(std::min<int64_t>(LANES<T>, block.count - i));
            const Vector<T> gate = load(sorted_.gates + block.first + i);
            Vector<T> factor[D][2], of_gate{}, of_point[D] = {};
            for (int d = 0; d < D; d++) factor[d][1] = load(weights_[d] + i), factor[d][0] = 1 - factor[d][1];
            for (int c = 0; c < 2 * PAIRS; c++) {
                const Vector<T> s = load(products_[c] + i);
                Vector<T> all = s;
                for (int d = 0; d < D; d++) all *= factor[d][c >> d & 1];
                of_gate += all;
                for (int d = 0; d < D; d++) {
                    Vector<T> others = c >> d & 1 ? s : -s;
                    for (int e = 0; e < D; e++)
                        if (e != d) others *= factor[e][c >> e & 1];
                    of_point[d] += others;
                }
            }
            const auto add = [&](int64_t k, Vector<T> x) {
                T* sum = sums + k * stride_ + i;
                store_part(sum, level ? load_part<T>(sum, n) + x : x, n);
            };
            for (int d = 0; d < D; d++) add(d, of_point[d] * gate * load(slopes_[d] + i) * T(row.scale));
            add(D, of_gate);
        });
    }

    void write_point_gradient(const Block& block) const {
        for (int64_t i = block.first; i < block.first + block.count; i++) {
            const int64_t place = sorted_.place(i);
            const auto sum = [&](int64_t k) { return p_.active ? sorted_.gradients[k * stride_ + i] : T(0); };
            for (int d = 0; d < D && p_.grad_points.data; d++)
                static_cast<T*>(p_.grad_points.data)[place * D + d] = sum(d);
            if (p_.grad_gate.data) static_cast<T*>(p_.grad_gate.data)[place] = sum(D);
        }
    }

    void clear_table_gradient(const Level& row) const {
        T* first = static_cast<T*>(p_.grad_table.data) + row.offset * F;
        std::fill(first, first + int64_t(row.size) * F, T(0));
    }

  private:
    static constexpr int PAIRS = 1 << (D - 1);
    using Pair = typename Row<T, 2 * F>::type;
    using Words = typename Row<uint32_t, LANES<T>>::type;
    using Integers = typename Row<int32_t, LANES<T>>::type;

    // Fills the values of a block that was located.
    INLINE void interpolate(const Block& block, const Level& row) {
        const M* table = static_cast<const M*>(p_.table.data) + row.offset * F;
        for (int64_t i = 0; i < block.count; i++) {
            Pair sum{};
#pragma GCC unroll 8
            for (int j = 0; j < PAIRS; j++)
                sum += others_[j][i] * pair_at(table, j, i);
            const T w = weights_[0][i];
            if constexpr (F == 1) {
                values_[0][i] = sum[0] + (sum[1] - sum[0]) * w;
            } else {
                const auto low = low_half<F>(sum), high = high_half<F>(sum);
                const auto value = low + (high - low) * w;
#pragma GCC unroll 8
                for (int f = 0; f < F; f++) values_[f][i] = value[f];
            }
        }
    }

    // Fills rows, weights and the products of all but the first, of a block's points at a level; with SLOPES also the
    // weights' derivatives by positions.
    template <bool SLOPES = false> const Level& locate(const Block& block, int64_t level) {
        const Level& row = p_.rows[block.expert * p_.levels + level];
        if (row.hashed) fill<SLOPES, true>(block, row);
        else fill<SLOPES, false>(block, row);
        return row;
    }

    template <bool SLOPES, bool HASHED> void fill(const Block& block, const Level row) {
        const Vector<T> scale = broadcast(T(row.scale)), offset = broadcast(T(p_.staggered ? 0.5 : 0));
        const int32_t interpolation = p_.interpolation, staggered = p_.staggered;
        const T* points = sorted_.points + block.first;
        const int64_t stride = stride_;
        Words left{};
        over_vectors<T>([&](int64_t i) {
            Words lower[D], upper[D];
            Vector<T> weight[D];
#pragma GCC unroll 4
            for (int d = 0; d < D; d++) {
                const Vector<T> given = scale * load(points + d * stride + i) + offset;
                Vector<T> position = given < T(-2147483648.0) ? Vector<T>{} - T(2147483648.0) : given;
                position = position > T(2147483520.0) ? Vector<T>{} + T(2147483520.0) : position;
                const Integers towards_zero = __builtin_convertvector(position, Integers);
                const Vector<T> whole = __builtin_convertvector(towards_zero, Vector<T>);
                const Mask<T> below = position < whole;
                const Words cell = (Words)(towards_zero + __builtin_convertvector(below, Integers));
                Vector<T> w = position - (below ? whole - 1 : whole);
                if constexpr (SLOPES) {
                    Vector<T> slope = position == given ? Vector<T>{} + 1 : Vector<T>{};
                    if (!staggered) slope = w > 0 ? slope : Vector<T>{};  // both corners are one
                    if (interpolation == SMOOTHSTEP) slope *= 6 * w * (1 - w);
                    if (interpolation == NEAREST) slope = Vector<T>{};
                    store(slopes_[d] + i, slope);
                }
                if (interpolation == SMOOTHSTEP) w = w * w * (3 - 2 * w);
                if (interpolation == NEAREST) w = Vector<T>{};
                weight[d] = w;
                store(weights_[d] + i, w);
                lower[d] = cell * row.multipliers[d], upper[d] = lower[d] + row.multipliers[d];
            }
#pragma GCC unroll 8
            for (int j = 0; j < PAIRS; j++) {
                Vector<T> factor = j & 1 ? weight[1] : 1 - weight[1];
#pragma GCC unroll 4
                for (int d = 2; d < D; d++) factor *= j >> (d - 1) & 1 ? weight[d] : 1 - weight[d];
                store(others_[j] + i, factor);
            }
#pragma GCC unroll 16
            for (int c = 0; c < 2 * PAIRS; c++) {
                Words index = c & 1 ? upper[0] : lower[0];
#pragma GCC unroll 4
                for (int d = 1; d < D; d++) {
                    const Words term = c >> d & 1 ? upper[d] : lower[d];
                    index = HASHED ? index ^ term : index + term;
                }
                if constexpr (HASHED) {
                    index &= row.size - 1;
                } else {  // inside of the grid, one subtraction is the remainder
                    index = index >= row.size ? index - row.size : index;
                    left |= (Words)(index >= row.size);
                }
                *reinterpret_cast<typename Row<uint32_t, LANES<T>>::unaligned*>(rows_[c] + i) = index;
            }
        });
        bool beyond = false;
        for (int lane = 0; !HASHED && lane < LANES<T>; lane++) beyond |= left[lane] != 0;
        for (int c = 0; beyond && c < 2 * PAIRS; c++)
            for (int64_t i = 0; i < BLOCK; i++) rows_[c][i] %= row.size;
    }

    // The block's gradients at a level, times `factors` if there are any.
    void read_gradients(const Block& block, int64_t level, const T* factors, T (*into)[BLOCK]) {
        const T* from = static_cast<const T*>(p_.grad_output.data) + level * F * p_.points;
        for (int f = 0; f < F; f++, from += p_.points) {
            for (int64_t i = 0; sorted_.order && i < block.count; i++)
                into[f][i] = from[sorted_.order[block.first + i]];
            if (!sorted_.order) std::copy(from + block.first, from + block.first + block.count, into[f]);
            over_vectors<T>([&](int64_t i) {
                if (factors) store(into[f] + i, load(into[f] + i) * load(factors + i));
            });
        }
    }

    INLINE auto pair_at(const M* table, int j, int64_t i) const {
        return load_pair<F, T>(table + int64_t(rows_[2 * j][i]) * F, table + int64_t(rows_[2 * j + 1][i]) * F);
    }

    // A point's gradient, times the factors of the lower and the upper neighbour along the first dimension.
    INLINE Pair gradient_pair(int64_t i) const {
        const T upper = weights_[0][i], lower = 1 - upper;
        Pair out;
#pragma GCC unroll 8
        for (int f = 0; f < F; f++) out[f] = lower * values_[f][i], out[F + f] = upper * values_[f][i];
        return out;
    }

    const Problem& p_;
    const Sorted<T>& sorted_;
    const int64_t stride_;
    alignas(64) uint32_t rows_[2 * PAIRS][BLOCK];  // of corner c, whose bit d is its step along dimension d
    alignas(64) T weights_[D][BLOCK], slopes_[D][BLOCK], others_[PAIRS][BLOCK];
    alignas(64) T values_[F][BLOCK], products_[std::max(2 * PAIRS, F)][BLOCK];
};

template <typename T, typename M, int D, int F> void encode(const Problem& p, const Sorted<T>& sorted) {
    Encoder<T, M, D, F> encoder(p, sorted);
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = sorted.count * thread / threads, end = sorted.count * (thread + 1) / threads;
    for (int64_t level = 0; p.output.data && level < p.active; level++)
        for (int64_t b = begin; b < end; b++) encoder.forward(sorted.blocks[b], level);
    if (p.grad_table.data) {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < p.levels * p.experts; task++) {
            const int64_t level = p.levels - 1 - task / p.experts, expert = task % p.experts;
            encoder.clear_table_gradient(p.rows[expert * p.levels + level]);
            if (level >= p.active) continue;
            for (int64_t b = sorted.first_block[expert]; b < sorted.first_block[expert + 1]; b++)
                encoder.table_gradient(sorted.blocks[b], level);
        }
    }
    if (!p.grad_points.data && !p.grad_gate.data) return;
    for (int64_t level = 0; level < p.active; level++)
        for (int64_t b = begin; b < end; b++) {
            if (p.grad_points.data) encoder.point_gradient(sorted.blocks[b], level);
            else encoder.gate_gradient(sorted.blocks[b], level);
        }
    for (int64_t b = begin; b < end; b++) encoder.write_point_gradient(sorted.blocks[b]);
}

template <typename T, typename M, int D> void with_features(const Problem& p, const Sorted<T>& sorted) {
    if (p.features == 1) encode<T, M, D, 1>(p, sorted);
    if (p.features == 2) encode<T, M, D, 2>(p, sorted);
    if (p.features == 4) encode<T, M, D, 4>(p, sorted);
    if (p.features == 8) encode<T, M, D, 8>(p, sorted);
}

template <typename M> int run(Problem& p, int threads) {
    using T = std::conditional_t<std::is_same_v<M, double>, double, float>;
    static thread_local Workspace workspace;
    char* memory = workspace.get<char>(Sorted<T>::bytes(p));
    if (!memory) return NO_MEMORY;
    Sorted<T> sorted(p, reinterpret_cast<T*>(memory));
    if (const Outcome outcome = sorted.sort(p)) return outcome;
    threads = p.points * p.levels < WORTH_THREADS ? 1 : threads;
    int64_t bad = p.points;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) reduction(min : bad)
        for (int64_t b = 0; b < sorted.count; b++) {
            const int64_t found = sorted.gather(p, sorted.blocks[b]);
            bad = std::min(bad, found < 0 ? p.points : found);
        }
        if (bad == p.points) {
            if (p.dims == 2) with_features<T, M, 2>(p, sorted);
            if (p.dims == 3) with_features<T, M, 3>(p, sorted);
            if (p.dims == 4) with_features<T, M, 4>(p, sorted);
        }
    }
    p.culprit = bad;
    return bad == p.points ? DONE : NOT_FINITE;
}

}  // namespace

// Writes the output where there is one and the gradients that are wanted; returns an Outcome.
extern "C" int hash_encoding(Problem* problem, int threads) {
    int outcome = DONE;
    with_type(problem->table.dtype, [&](auto* type) {
        outcome = run<std::remove_pointer_t<decltype(type)>>(*problem, threads);
    });
    return outcome;
}
