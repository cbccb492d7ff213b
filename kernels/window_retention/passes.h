// One window's passes along its rows and columns, and their gradients, on tiles (tiles.h).
//
// The queries of a tile lie in the lanes. In a pass along rows they share their keys: those of the row, each broadcast
// to all lanes. In a pass along columns a lane is a column of its own: the keys are the tiles above and below. So
// weights have the queries in their lanes, too, and no sum crosses lanes. Keys are taken eight at a time, for all tiles
// of a line: they stay in the first-level cache where lines are long.
#pragma once

#include "ahead.h"
#include "tiles.h"

enum Form { SOFTMAX, SIGMOID_CLAMP, SIGMOID_SUM, SIGMOID_NONE };

// A head's constants by the steps from key to query; each pointer is to that of no step.
template <typename T> struct Head {
    const T *log_decay, *slope, *decay;  // |steps| log gamma, slope * steps (or |steps|), gamma^|steps|
};

// The tiles of a line: of a row, side by side, or of eight columns, one below the other.
template <typename T, bool ROW> struct Line {
    T* first;
    int64_t stride;

    T* tile(int64_t i) const { return first + i * stride; }
    // Where the keys from `j` (a multiple of eight) on lie.
    const T* keys(int64_t j) const { return tile(ROW ? j / LANE_TOKENS : j); }
    // Channel c of the i-th of these keys, for each lane.
    INLINE Octet<T> key(const T* keys, int64_t c, int i) const {
        if constexpr (ROW)
            return broadcast_octet(keys[c * LANE_TOKENS + i]);
        else
            return load_octet(keys + i * stride + c * LANE_TOKENS);
    }
};

// One octet for each tile and key of a line.
template <typename T> struct Pairs {
    T* data;
    int64_t between_tiles, between_keys;

    T* at(int64_t tile, int64_t key) const { return data + tile * between_tiles + key * between_keys; }
    Pairs turned() const { return {data, between_keys, between_tiles}; }
};

// The most elements of Pairs of a line in a window.
inline int64_t pairs_of_line(int64_t rows, int64_t columns) {
    return std::max(rows * rows * LANE_TOKENS, whole_octets(columns) * whole_octets(columns));
}

// f(number of keys, a constant from 1 to 8; first of them) over all keys
template <typename F> INLINE void by_eights(int64_t keys, F&& f) {
    int64_t j = 0;
    for (; j + 8 <= keys; j += 8) f(std::integral_constant<int, 8>{}, j);
    switch (keys - j) {
        case 1: return f(std::integral_constant<int, 1>{}, j);
        case 2: return f(std::integral_constant<int, 2>{}, j);
        case 3: return f(std::integral_constant<int, 3>{}, j);
        case 4: return f(std::integral_constant<int, 4>{}, j);
        case 5: return f(std::integral_constant<int, 5>{}, j);
        case 6: return f(std::integral_constant<int, 6>{}, j);
        case 7: return f(std::integral_constant<int, 7>{}, j);
    }
}

// to(t, j) = sum_c tile_t[c] * key_j[c]
template <typename T, bool ROW>
void products(
    Line<T, ROW> tiles, int64_t count, Line<T, ROW> line, int64_t channels, int64_t keys, Pairs<T> to, Ahead& ahead
) {
    by_eights(keys, [&](auto some, int64_t j) {
        constexpr int N = some;
        const T* from = line.keys(j);
        for (int64_t t = 0; t < count; t++) {
            const T* tile = tiles.tile(t);
            Octet<T> sum[N] = {};
            for (int64_t c = 0; c < channels; c++) {
                const Octet<T> x = load_octet(tile + c * LANE_TOKENS);
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) sum[i] += x * line.key(from, c, i);
            }
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) store_octet(to.at(t, j + i), sum[i]);
            ahead.fetch();
        }
    });
}

// tile_t[c] = sum_j weight(t, j) * key_j[c], or added to what is there
template <typename T, bool ROW>
void combine(
    Pairs<T> weights, Line<T, ROW> line, int64_t channels, int64_t keys, Line<T, ROW> tiles, int64_t count, bool add,
    Ahead& ahead
) {
    by_eights(keys, [&](auto some, int64_t j) {
        constexpr int N = some;
        const T* from = line.keys(j);
        const bool fresh = j == 0 && !add;
        for (int64_t t = 0; t < count; t++) {
            T* to = tiles.tile(t);
            Octet<T> weight[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) weight[i] = load_octet(weights.at(t, j + i));
#pragma GCC unroll 2
            for (int64_t c = 0; c < channels; c++) {
                Octet<T> sum = fresh ? Octet<T>{} : load_octet(to + c * LANE_TOKENS);
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) sum += weight[i] * line.key(from, c, i);
                store_octet(to + c * LANE_TOKENS, sum);
            }
            ahead.fetch();
        }
    });
}

template <typename T> INLINE void scale(T* numbers, int64_t keys, Octet<T> factor) {
    const int64_t end = keys * LANE_TOKENS;
    for (int64_t j = 0; j < end; j += LANE_TOKENS) store_octet(numbers + j, load_octet(numbers + j) * factor);
}

template <typename T> void softmax(T* logits, int64_t keys) {
    Octet<T> highest = load_octet(logits), sum{};
    for (int64_t j = LANE_TOKENS; j < keys * LANE_TOKENS; j += LANE_TOKENS) {
        const Octet<T> x = load_octet(logits + j);
        highest = x > highest ? x : highest;
    }
    for (int64_t j = 0; j < keys * LANE_TOKENS; j += LANE_TOKENS) {
        const Octet<T> e = exponential(load_octet(logits + j) - highest);
        store_octet(logits + j, e);
        sum += e;
    }
    scale<T>(logits, keys, 1 / sum);
}

// A tile's scores [keys][8] become weights. The first query's place in the line is `place`.
//
// The gradient of a score is weight * (d - held * sum_j weight_j d_j) * slope, d being the gradient of its weight: the
// result is `held`, 1 where the weights' sum is held to one; `slopes` (written unless null, and for sigmoids only) are
// 1 - sigmoid.
template <typename T, bool ROW>
Octet<T> weigh(Form form, const Head<T>& head, int64_t place, int64_t keys, T* scores, T* slopes) {
    const auto constant = [&](const T* table, int64_t j) {
        return ROW ? load_octet(table + place - j) : broadcast_octet(table[place - j]);
    };
    if (form == SOFTMAX) {
        for (int64_t j = 0; j < keys; j++) {
            T* score = scores + j * LANE_TOKENS;
            store_octet(score, load_octet(score) + constant(head.log_decay, j));
        }
        softmax(scores, keys);
        return broadcast_octet(T(1));
    }
    Octet<T> sum{};
    for (int64_t j = 0; j < keys; j++) {
        T* score = scores + j * LANE_TOKENS;
        const Octet<T> z = load_octet(score) + constant(head.slope, j);
        const Octet<T> e = exponential(z < 0 ? z : -z), larger = 1 / (1 + e), smaller = e * larger;
        if (slopes) store_octet(slopes + j * LANE_TOKENS, z < 0 ? larger : smaller);
        Octet<T> weight;
        if (form == SIGMOID_SUM)  // a softmax of logarithms never divides by zero
            weight = (z < 0 ? z : Octet<T>{}) - log_one_plus(e) + constant(head.log_decay, j);
        else
            weight = (z < 0 ? smaller : larger) * constant(head.decay, j);
        store_octet(score, weight);
        sum += weight;
    }
    if (form == SIGMOID_NONE) return Octet<T>{};
    const Octet<T> one = broadcast_octet(T(1));
    if (form == SIGMOID_SUM) {
        softmax(scores, keys);
        return one;
    }
    scale<T>(scores, keys, 1 / (sum < 1 ? one : sum));
    return sum >= 1 ? one : Octet<T>{};
}

// Tiles of a whole window, row by row.
template <typename T> struct Tiles {
    T* data;
    int64_t size;  // of one tile

    T* tile(int64_t i) const { return data + i * size; }
};

// One window of one head: `rows` x `columns` tokens, eight columns a tile. If it lies on its side, `columns_first`: the
// first pass is the one along its columns.
template <typename T> class Window {
  public:
    int64_t rows, columns, key_dim, value_dim;
    bool columns_first;
    Form form;
    Head<T> head;
    // `middle` is between the passes. The output takes the place of `value`, its gradient that of `grad_output`.
    Tiles<T> query, key, value, middle;
    Tiles<T> grad_query, grad_key, grad_middle, grad_output;  // backward
    // Scratch: pairs_of_line each, `held` an octet for each tile of a line; `weights` alone in forward.
    T *weights, *grad_scores, *slopes, *turned_weights, *turned_scores, *held;

    int64_t across() const { return whole_octets(columns) / LANE_TOKENS; }  // tiles in a row

    void forward(Ahead& ahead) { columns_first ? forward<false>(ahead) : forward<true>(ahead); }
    void backward(Ahead& ahead) { columns_first ? backward<false>(ahead) : backward<true>(ahead); }

  private:
    template <bool FIRST> void forward(Ahead& ahead) {
        for (int64_t i = 0; i < lines<FIRST>(); i++) pass<FIRST>(i, value, middle, ahead);
        for (int64_t i = 0; i < lines<!FIRST>(); i++) pass<!FIRST>(i, middle, value, ahead);
    }
    template <bool FIRST> void backward(Ahead& ahead) {
        for (int64_t i = 0; i < lines<FIRST>(); i++) pass<FIRST>(i, value, middle, ahead);
        for (int64_t i = 0; i < lines<!FIRST>(); i++)
            pass_backward<!FIRST>(i, middle, grad_output, grad_middle, false, ahead);
        for (int64_t i = 0; i < lines<FIRST>(); i++)
            pass_backward<FIRST>(i, value, grad_middle, grad_output, true, ahead);
    }

    template <bool ROW> int64_t lines() const { return ROW ? rows : across(); }
    template <bool ROW> Line<T, ROW> line(const Tiles<T>& tiles, int64_t i) const {
        return {tiles.tile(ROW ? i * across() : i), (ROW ? 1 : across()) * tiles.size};
    }
    template <bool ROW> int64_t tiles_in_line() const { return ROW ? across() : rows; }
    template <bool ROW> int64_t keys_in_line() const { return ROW ? columns : rows; }
    template <bool ROW> static int64_t place(int64_t tile) { return ROW ? tile * LANE_TOKENS : tile; }
    // [tiles][keys][8], the keys of a row in whole tiles
    template <bool ROW> Pairs<T> by_tile(T* scratch) const {
        return {scratch, (ROW ? whole_octets(columns) : rows) * LANE_TOKENS, LANE_TOKENS};
    }

    // Line i of a pass.
    template <bool ROW> void pass(int64_t i, const Tiles<T>& from, const Tiles<T>& to, Ahead& ahead) {
        const int64_t keys = keys_in_line<ROW>(), tiles = tiles_in_line<ROW>();
        const Pairs<T> weight = by_tile<ROW>(weights);
        products(line<ROW>(query, i), tiles, line<ROW>(key, i), key_dim, keys, weight, ahead);
        for (int64_t t = 0; t < tiles; t++) {
            weigh<T, ROW>(form, head, place<ROW>(t), keys, weight.at(t, 0), nullptr);
            ahead.fetch();
        }
        combine(weight, line<ROW>(from, i), value_dim, keys, line<ROW>(to, i), tiles, false, ahead);
    }

    // Line i of a pass from x to y: dx from dy, and what queries and keys get, on top of the other pass's if `add`.
    template <bool ROW>
    void pass_backward(
        int64_t i, const Tiles<T>& from, const Tiles<T>& grad_to, const Tiles<T>& grad_from, bool add, Ahead& ahead
    ) {
        const Line<T, ROW> q = line<ROW>(query, i), k = line<ROW>(key, i), x = line<ROW>(from, i);
        const Line<T, ROW> dq = line<ROW>(grad_query, i), dk = line<ROW>(grad_key, i), dx = line<ROW>(grad_from, i);
        const Line<T, ROW> dy = line<ROW>(grad_to, i);
        const int64_t keys = keys_in_line<ROW>(), tiles = tiles_in_line<ROW>();
        const Pairs<T> weight = by_tile<ROW>(weights), grad = by_tile<ROW>(grad_scores), slope = by_tile<ROW>(slopes);
        products(q, tiles, k, key_dim, keys, weight, ahead);
        for (int64_t t = 0; t < tiles; t++) {
            const Octet<T> result = weigh<T, ROW>(form, head, place<ROW>(t), keys, weight.at(t, 0), slope.at(t, 0));
            store_octet(held + t * LANE_TOKENS, result);
        }
        products(dy, tiles, x, value_dim, keys, grad, ahead);
        for (int64_t t = 0; t < tiles; t++)
            grade(weight.at(t, 0), load_octet(held + t * LANE_TOKENS), slope.at(t, 0), keys, grad.at(t, 0));
        combine(grad, k, key_dim, keys, dq, tiles, add, ahead);
        // The same sums over queries instead of keys.
        if constexpr (ROW) {
            turn(weights, tiles, turned_weights);
            turn(grad_scores, tiles, turned_scores);
            combine(by_tile<ROW>(turned_weights), dy, value_dim, keys, dx, tiles, false, ahead);
            combine(by_tile<ROW>(turned_scores), q, key_dim, keys, dk, tiles, add, ahead);
        } else {
            combine(weight.turned(), dy, value_dim, keys, dx, tiles, false, ahead);
            combine(grad.turned(), q, key_dim, keys, dk, tiles, add, ahead);
        }
    }

    // Gradients of a tile's weights become those of its scores (see `weigh`).
    void grade(const T* weight, Octet<T> held, const T* slope, int64_t keys, T* grad) const {
        Octet<T> sum{};
        const int64_t end = keys * LANE_TOKENS;
        for (int64_t j = 0; j < end; j += LANE_TOKENS) sum += load_octet(weight + j) * load_octet(grad + j);
        sum *= held;
        for (int64_t j = 0; j < end; j += LANE_TOKENS) {
            const Octet<T> score = load_octet(weight + j) * (load_octet(grad + j) - sum);
            store_octet(grad + j, form == SOFTMAX ? score : score * load_octet(slope + j));
        }
    }

    // [tiles of queries][keys][8 queries] -> [tiles of keys][queries][8 keys]
    static void turn(const T* by_query, int64_t tiles, T* by_key) {
        for (int64_t t = 0; t < tiles; t++)
            for (int64_t s = 0; s < tiles; s++) {
                Octet<T> block[LANE_TOKENS];
                const T* from = by_query + (t * tiles + s) * LANE_TOKENS * LANE_TOKENS;
                T* to = by_key + (s * tiles + t) * LANE_TOKENS * LANE_TOKENS;
#pragma GCC unroll 8
                for (int j = 0; j < LANE_TOKENS; j++) block[j] = load_octet(from + j * LANE_TOKENS);
                transpose(block);
#pragma GCC unroll 8
                for (int j = 0; j < LANE_TOKENS; j++) store_octet(to + j * LANE_TOKENS, block[j]);
            }
    }
};
