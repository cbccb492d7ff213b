// Routing on CPU: the softmax of each token's scores and its best experts in one pass, and a counting sort of choices.
//
// Rows of scores are short, eight numbers say, and a vector holds more: each lane is a token. The sort counts, so it reads
// the choices twice and compares nothing; it is serial, for it takes less time than waking a thread does.

#include <omp.h>

#include <algorithm>
#include <limits>

#include "tensor.h"

namespace {

using namespace simd;

constexpr int64_t WORTH_THREADS = 1 << 15;  // scores; fewer take less time than waking a thread

struct Choice {
    int64_t tokens, experts, choices;
    Tensor scores;         // T (tokens, experts)
    Tensor probabilities;  // T (tokens, experts), contiguous; null: not wanted
    int64_t* indices;      // (choices, tokens)
};

struct Places {
    int64_t tokens, experts, choices, limit;
    int32_t bounded_by_load;
    const int64_t* indices;  // (choices, tokens)
    const int64_t* turns;    // (tokens), the order in which they are counted; null: their own
    int64_t *locations, *positions, *order, *starts, *loads, *capacity;
};

enum Outcome { DONE = 0, NO_ORDER = 1, NO_MEMORY = 2 };

// A vector of tokens, each in a lane. Their scores lie in `scratch`, those of an expert together.
template <typename T> class Lanes {
  public:
    Lanes(const Choice& p, int64_t first, T* scratch)
        : p_(p), first_(first), count_(int(std::min<int64_t>(LANES<T>, p.tokens - first))), scratch_(scratch) {}

    // Returns whether every token has a largest score that is finite, and no NaN.
    bool choose() {
        for (int i = 0; i < count_; i++) {
            const T* row = static_cast<const T*>(p_.scores.data) + (first_ + i) * p_.scores.strides[0];
            for (int64_t e = 0; e < p_.experts; e++) scratch_[e * LANES<T> + i] = row[e];
        }
        Vector<T> most = of(0);
        Mask<T> unordered = most != most;
        for (int64_t e = 1; e < p_.experts; e++) {
            const Vector<T> x = of(e);
            unordered |= x != x;
            most = x > most ? x : most;
        }
        unordered |= absolute<T>(most) > std::numeric_limits<T>::max();
        for (int i = 0; i < count_; i++)
            if (unordered[i]) return false;
        rank(most);
        if (p_.probabilities.data) softmax(most);
        return true;
    }

  private:
    Vector<T> of(int64_t expert) const { return load(scratch_ + expert * LANES<T>); }

    // The first expert of the largest score, then in each pass the best of those that come after the last one found.
    void rank(Vector<T> last) {
        using Index = std::decay_t<decltype(Mask<T>{}[0])>;
        Mask<T> last_expert = Mask<T>{} - 1;
        for (int64_t j = 0; j < p_.choices; j++) {
            Vector<T> best = Vector<T>{};
            Mask<T> expert = Mask<T>{} - 1;
            for (int64_t e = 0; e < p_.experts; e++) {
                const Vector<T> x = of(e);
                const Mask<T> comes_after = (x < last) | ((x == last) & (last_expert < Index(e)));
                const Mask<T> better = comes_after & ((expert < 0) | (x > best));
                best = better ? x : best;
                expert = better ? Mask<T>{} + Index(e) : expert;
            }
            int64_t* indices = p_.indices + j * p_.tokens + first_;
            for (int i = 0; i < count_; i++) indices[i] = expert[i];
            last = best, last_expert = expert;
        }
    }

    void softmax(Vector<T> most) {
        Vector<T> total = Vector<T>{};
        for (int64_t e = 0; e < p_.experts; e++) {
            const Vector<T> power = exponential(of(e) - most);
            store(scratch_ + e * LANES<T>, power);
            total += power;
        }
        for (int64_t e = 0; e < p_.experts; e++) store(scratch_ + e * LANES<T>, of(e) / total);
        T* row = static_cast<T*>(p_.probabilities.data) + first_ * p_.experts;
        for (int i = 0; i < count_; i++, row += p_.experts)
            for (int64_t e = 0; e < p_.experts; e++) row[e] = scratch_[e * LANES<T> + i];
    }

    const Choice& p_;
    const int64_t first_;
    const int count_;
    T* scratch_;
};

template <typename T> int choose(const Choice& p, int threads) {
    const int64_t blocks = (p.tokens + LANES<T> - 1) / LANES<T>, size = p.experts * LANES<T>;
    threads = p.tokens * p.experts < WORTH_THREADS ? 1 : int(std::min<int64_t>(threads, blocks));
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(threads * size);
    if (!memory) return NO_MEMORY;
    std::fill(memory, memory + threads * size, T(0));  // lanes that hold no token
    bool ordered = true;
#pragma omp parallel num_threads(threads) reduction(&& : ordered)
    {
        T* scratch = memory + omp_get_thread_num() * size;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) ordered = Lanes<T>(p, b * LANES<T>, scratch).choose() && ordered;
    }
    return ordered ? DONE : NO_ORDER;
}

int place(const Places& p) {
    static thread_local Workspace workspace;
    int64_t* tails = workspace.get<int64_t>(p.experts);
    if (!tails) return NO_MEMORY;
    std::fill(p.loads, p.loads + p.experts, 0);
    for (int64_t j = 0; j < p.choices; j++) {
        const int64_t* indices = p.indices + j * p.tokens;
        int64_t* locations = p.locations + j * p.tokens;
        for (int64_t i = 0; i < p.tokens; i++) {
            const int64_t n = p.turns ? p.turns[i] : i;
            locations[n] = p.loads[indices[n]]++;
        }
    }
    const int64_t most = *std::max_element(p.loads, p.loads + p.experts);
    const int64_t capacity = p.bounded_by_load ? std::min(p.limit, most) : p.limit;
    *p.capacity = capacity;
    p.starts[0] = 0;
    for (int64_t e = 0; e < p.experts; e++) p.starts[e + 1] = p.starts[e] + std::min(p.loads[e], capacity);
    int64_t tail = p.starts[p.experts];
    for (int64_t e = 0; e < p.experts; e++) {
        tails[e] = tail - capacity;  // to which a location is added, the capacity at least
        tail += p.loads[e] - std::min(p.loads[e], capacity);
    }
    for (int64_t c = 0; c < p.choices * p.tokens; c++) {
        const int64_t e = p.indices[c], location = p.locations[c];
        const int64_t position = location + (location < capacity ? p.starts[e] : tails[e]);
        p.positions[c] = position;
        p.order[position] = c;
    }
    return DONE;
}

}  // namespace

// Both return an Outcome.
extern "C" int expert_choice(const Choice* problem, int threads) {
    return problem->scores.dtype == 1 ? choose<double>(*problem, threads) : choose<float>(*problem, threads);
}
extern "C" int expert_places(const Places* problem, int) { return place(*problem); }
