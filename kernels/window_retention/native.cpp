// Window retention on CPU.
//
// Tokens meet inside a cell: a run of rows times a run of columns that no border of a window and no wrap-around
// crosses. Each (batch, cell, head) is a task of its own: its tokens are read once, rotated and laid out as tiles
// (tiles.h), both passes run on them (passes.h), and the output is written once, while the next cell's memory is on its
// way (ahead.h). The gradient recomputes the weights and what lies between the passes. The bits do not depend on the
// number of threads.
//
// T is the type of the arithmetic (float or double), M the type in memory.

#include <omp.h>

#include <cmath>

#include "passes.h"

namespace {

struct Problem {
    int64_t batch, heads, key_dim, value_dim;
    int64_t window[2];                 // rows, columns
    int64_t runs[2];                   // how many, of rows and of columns
    const int64_t* bounds[2];          // where each begins, and where the last ends
    const double *log_decay, *slopes;  // by head; slopes null: none
    int32_t form, signed_slopes;
    double scale;
    const void* rotation[2];  // T [cosine, sine][rows][tiles][pairs, whole fours][8], then turned; null: none
    Tensor query, key, value;
    Tensor output;                                        // forward
    Tensor grad_output, grad_query, grad_key, grad_value;  // gradient
};

enum Outcome { DONE = 0, NO_MEMORY = 1 };

// Tables of all heads (see Head), each of the longest line's steps either way and a tile more.
template <typename T> class Tables {
  public:
    static int64_t size(const Problem& p) { return 3 * p.heads * steps(p); }

    Tables(const Problem& p, T* memory) : memory_(memory), steps_(steps(p)) {
        for (int64_t h = 0; h < p.heads; h++)
            for (int64_t i = 0; i < steps_; i++) {
                const double step = double(i - steps_ / 2), distance = std::abs(step);
                const double slope = p.slopes ? p.slopes[h] : 0;
                T* to = memory + 3 * h * steps_ + i;
                to[0] = T(distance * p.log_decay[h]);
                to[steps_] = T(slope * (p.signed_slopes ? step : distance));
                to[2 * steps_] = T(std::exp(distance * p.log_decay[h]));
            }
    }
    Head<T> head(int64_t h) const {
        const T* middle = memory_ + 3 * h * steps_ + steps_ / 2;
        return {middle, middle + steps_, middle + 2 * steps_};
    }

  private:
    static int64_t steps(const Problem& p) {
        return 2 * whole_octets(std::max(p.window[0], p.window[1])) + LANE_TOKENS;
    }

    T* memory_;
    int64_t steps_;
};

// How a cell lies in tiles: turned on its side where that takes fewer.
struct Layout {
    bool turned;
    int64_t rows, columns;

    Layout(int64_t height, int64_t width) {
        turned = width * whole_octets(height) < height * whole_octets(width);
        rows = turned ? width : height, columns = turned ? height : width;
    }
    int64_t tokens() const { return rows * whole_octets(columns); }
};

// The most that any cell needs: elements of a channel's tiles, of a line's pairs, and an octet for each tile of a line.
struct Needs {
    int64_t tokens = 0, pairs = 0, held = 0;

    explicit Needs(const Problem& p) {
        const auto over_lengths = [&](int axis, auto&& f) {
            for (int64_t i = 0, last = 0; i < p.runs[axis]; i++) {
                const int64_t length = p.bounds[axis][i + 1] - p.bounds[axis][i];
                if (length != last) f(length);
                last = length;
            }
        };
        over_lengths(0, [&](int64_t height) {
            over_lengths(1, [&](int64_t width) {
                const Layout layout(height, width);
                tokens = std::max(tokens, layout.tokens());
                pairs = std::max(pairs, pairs_of_line(layout.rows, layout.columns));
                held = std::max(held, std::max(layout.rows, layout.columns) * LANE_TOKENS);
            });
        });
    }
};

template <typename T> class Worker {
  public:
    static int64_t scratch(const Problem& p, const Needs& needs, bool backward) {
        const int64_t of_tiles = needs.tokens * (whole_octets(p.key_dim) + whole_octets(p.value_dim));
        return backward ? 4 * of_tiles + 5 * needs.pairs + needs.held : 2 * of_tiles + needs.pairs;
    }

    Worker(const Problem& p, const Tables<T>& tables, const Needs& needs, bool backward, T* memory)
        : p_(p), tables_(tables) {
        const auto take = [&](int64_t count) {
            T* taken = memory;
            memory += count;
            return taken;
        };
        const auto tiles_of = [&](int64_t channels) {
            const int64_t width = whole_octets(channels);
            return Tiles<T>{take(needs.tokens * width), width * LANE_TOKENS};
        };
        Window<T>& w = window_;
        w.key_dim = p.key_dim, w.value_dim = p.value_dim, w.form = Form(p.form);
        for (Tiles<T>* tiles : {&w.query, &w.key}) *tiles = tiles_of(p.key_dim);
        for (Tiles<T>* tiles : {&w.value, &w.middle}) *tiles = tiles_of(p.value_dim);
        w.weights = take(needs.pairs);
        if (!backward) return;
        for (Tiles<T>* tiles : {&w.grad_query, &w.grad_key}) *tiles = tiles_of(p.key_dim);
        for (Tiles<T>* tiles : {&w.grad_middle, &w.grad_output}) *tiles = tiles_of(p.value_dim);
        for (T** pairs : {&w.grad_scores, &w.slopes, &w.turned_weights, &w.turned_scores}) *pairs = take(needs.pairs);
        w.held = take(needs.held);
    }

    void forward(int64_t task) {
        start(task);
        ahead(p_.output, VALUED);
        window_.forward(ahead_);
        write(window_.value, p_.output, VALUED, 1);
    }
    void backward(int64_t task) {
        start(task);
        read(p_.grad_output, VALUED, 1, window_.grad_output);
        ahead(p_.grad_output, VALUED);
        ahead(p_.grad_query, KEYED);
        ahead(p_.grad_key, KEYED);
        ahead(p_.grad_value, VALUED);
        window_.backward(ahead_);
        write(window_.grad_query, p_.grad_query, KEYED, T(p_.scale));
        write(window_.grad_key, p_.grad_key, KEYED, 1);
        write(window_.grad_output, p_.grad_value, VALUED, 1);
    }

  private:
    enum Kind { KEYED, VALUED };  // tensors with the channels of queries and keys, which rotate; with those of values

    struct Cell {
        int64_t batch, head, top, left;
        Layout layout;

        // Elements from a token to that below it, and to that on its right, as the cell lies in tiles.
        int64_t down(const Tensor& tensor) const { return tensor.strides[layout.turned ? 2 : 1]; }
        int64_t right(const Tensor& tensor) const { return tensor.strides[layout.turned ? 1 : 2]; }
        int64_t offset(const Tensor& tensor) const {
            const int64_t* strides = tensor.strides;
            return batch * strides[0] + top * strides[1] + left * strides[2] + head * strides[3];
        }
    };

    Cell cell(int64_t task) const {
        const int64_t head = task % p_.heads, place = task / p_.heads;
        const int64_t across = place % p_.runs[1], above = place / p_.runs[1];
        const int64_t down = above % p_.runs[0], batch = above / p_.runs[0];
        if (batch >= p_.batch) return {0, 0, 0, 0, Layout(0, 0)};  // beyond the last
        const int64_t *rows = p_.bounds[0] + down, *columns = p_.bounds[1] + across;
        return {batch, head, rows[0], columns[0], Layout(rows[1] - rows[0], columns[1] - columns[0])};
    }

    void start(int64_t task) {
        cell_ = cell(task);
        next_ = cell(task + 1);
        window_.rows = cell_.layout.rows, window_.columns = cell_.layout.columns;
        window_.columns_first = cell_.layout.turned;
        window_.head = tables_.head(cell_.head);
        read(p_.query, KEYED, T(p_.scale), window_.query);
        read(p_.key, KEYED, 1, window_.key);
        read(p_.value, VALUED, 1, window_.value);
        ahead_.start(next_.layout.rows, next_.layout.columns);
        ahead(p_.query, KEYED);
        ahead(p_.key, KEYED);
        ahead(p_.value, VALUED);
    }

    int64_t channels(Kind kind) const { return kind == KEYED ? p_.key_dim : p_.value_dim; }

    void ahead(const Tensor& tensor, Kind kind) {
        with_type(tensor.dtype, [&](auto* type) {
            const int64_t size = sizeof(*type);
            const auto* first = static_cast<decltype(type)>(tensor.data) + next_.offset(tensor);
            ahead_.add(first, next_.down(tensor) * size, next_.right(tensor) * size, channels(kind) * size);
        });
    }

    // f(elements before the tile's first token, tokens, rotation, tile) for every tile of the cell
    template <typename F> void over_tiles(const Tensor& tensor, Kind kind, F&& f) const {
        const Layout& layout = cell_.layout;
        const int64_t pairs = whole_octets(p_.key_dim) / 2, across = whole_octets(p_.window[!layout.turned]);
        const T* cosine = kind == KEYED ? static_cast<const T*>(p_.rotation[layout.turned]) : nullptr;
        const T* sine = cosine ? cosine + p_.window[layout.turned] * across * pairs : nullptr;
        int64_t tile = 0;
        for (int64_t h = 0; h < layout.rows; h++)
            for (int64_t w = 0; w < layout.columns; w += LANE_TOKENS) {
                const int64_t at = cell_.offset(tensor) + h * cell_.down(tensor) + w * cell_.right(tensor);
                const int64_t turn = (h * across + w) * pairs;
                const Rotation<T> rotation{cosine ? cosine + turn : nullptr, sine ? sine + turn : nullptr};
                f(at, std::min(LANE_TOKENS, layout.columns - w), rotation, tile++);
            }
    }
    void read(const Tensor& tensor, Kind kind, T factor, const Tiles<T>& tiles) const {
        with_type(tensor.dtype, [&](auto* type) {
            over_tiles(tensor, kind, [&](int64_t at, int64_t count, Rotation<T> rotation, int64_t i) {
                const auto* from = static_cast<decltype(type)>(tensor.data) + at;
                read_tile(from, cell_.right(tensor), count, channels(kind), factor, rotation, tiles.tile(i));
            });
        });
    }
    void write(const Tiles<T>& tiles, const Tensor& tensor, Kind kind, T factor) const {
        with_type(tensor.dtype, [&](auto* type) {
            over_tiles(tensor, kind, [&](int64_t at, int64_t count, Rotation<T> rotation, int64_t i) {
                auto* to = static_cast<decltype(type)>(tensor.data) + at;
                write_tile(tiles.tile(i), channels(kind), factor, rotation, to, cell_.right(tensor), count);
            });
        });
    }

    const Problem& p_;
    const Tables<T>& tables_;
    Cell cell_ = cell(0), next_ = cell_;
    Window<T> window_;
    Ahead ahead_;
};

template <typename T> int run(const Problem& p, bool backward, int threads) {
    const Needs needs(p);
    const int64_t size = Worker<T>::scratch(p, needs, backward), tables_size = Tables<T>::size(p);
    const int64_t tasks = p.batch * p.runs[0] * p.runs[1] * p.heads;
    threads = int(std::min<int64_t>(threads, tasks));
    // The heads of a cell lie beside each other: one thread takes them all, unless cells are few.
    const int64_t chunk = tasks >= 8 * p.heads * threads ? p.heads : 1;
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(tables_size + threads * size);
    if (!memory) return NO_MEMORY;
    const Tables<T> tables(p, memory + threads * size);
#pragma omp parallel num_threads(threads)
    {
        Worker<T> worker(p, tables, needs, backward, memory + omp_get_thread_num() * size);
#pragma omp for schedule(dynamic, chunk)
        for (int64_t task = 0; task < tasks; task++) backward ? worker.backward(task) : worker.forward(task);
    }
    return DONE;
}

}  // namespace

// Both return an Outcome. `wide` computes in double.
extern "C" int window_retention_forward(const Problem* problem, int wide, int threads) {
    return wide ? run<double>(*problem, false, threads) : run<float>(*problem, false, threads);
}
extern "C" int window_retention_backward(const Problem* problem, int wide, int threads) {
    return wide ? run<double>(*problem, true, threads) : run<float>(*problem, true, threads);
}
