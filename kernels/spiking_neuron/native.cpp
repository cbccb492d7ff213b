// Spiking neurons on CPU.
//
// Neurons are divided into blocks of a few vectors. Each goes through all time steps before the next: its membranes stay
// in the nearest cache, currents are read once and spikes written once. Backward computes the charged membranes of a
// block again and keeps those of all its steps. Steps lie far apart, often by a power of two, so a larger block would
// throw its own lines out of the caches; what the processor cannot foresee of so short ones is fetched ahead.
//
// T is the type of the arithmetic (float or double), M that of currents, spikes and their gradients in memory; states
// are T. Charging and resetting multiply nothing, so that no contraction to fused operations moves a membrane: spikes are
// those of the definition to the bit.

#include <omp.h>

#include <algorithm>

#include "tensor.h"

namespace {

using namespace simd;

constexpr int64_t WORTH_THREADS = 1 << 15;  // steps of a neuron; fewer take less time than waking a thread

struct Problem {
    int64_t steps, neurons;
    double threshold, tau, rest, alpha;
    double current_slope, membrane_slope;  // dh/dx and dh/dv
    double reset_slopes[2];                // dv/ds = first + second h; zeros if the reset is detached
    int32_t leak, hard, surrogate;
    Tensor current;        // M (steps, neurons), as are spikes and their gradients
    Tensor initial_state;  // T (neurons), as are all states; null: at rest
    Tensor spikes, last_state;  // forward; the state may be null
    Tensor grad_spikes, grad_last_state;  // null: zeros
    Tensor grad_current, grad_initial_state;  // backward; the state may be null
};

enum Outcome { DONE = 0, NO_MEMORY = 1 };
enum Leak { NO_LEAK = 0, INPUT_DECAYS = 1, INPUT_STAYS = 2 };
enum Surrogate { ATAN = 0, SIGMOID = 1, RECTANGULAR = 2 };

// f(first neuron of a vector, number of valid lanes)
template <typename T, typename F> INLINE void over_vectors(int64_t count, F&& f) {
    int64_t i = 0;
    for (; i + LANES<T> <= count; i += LANES<T>) f(i, LANES<T>);
    if (i < count) f(i, int(count - i));
}

template <typename T, typename M> class Worker {
  public:
    static constexpr int64_t BLOCK = 4 * LANES<T>;  // neurons

    // Of membranes, and in backward of the charged membranes of all steps.
    static int64_t scratch(const Problem& p, bool backward) { return BLOCK * (backward ? p.steps + 1 : 1); }

    Worker(const Problem& p, T* memory)
        : p_(p), membranes_(memory), charged_(memory + BLOCK), threshold_(broadcast(T(p.threshold))),
          tau_(broadcast(T(p.tau))), rest_(broadcast(T(p.rest))), hard_(Mask<T>{} - (p.hard != 0)) {}

    template <Leak LEAK> void forward(int64_t first, int64_t count) {
        read_state(p_.initial_state, first, count, T(p_.rest));
        for (int64_t t = 0; t < p_.steps; t++) {
            const M* current = at(p_.current, t, first);
            M* spikes = at(p_.spikes, t, first);
            over_vectors<T>(count, [&](int64_t i, int n) {
                fetch(current + BLOCK + i);
                const Vector<T> h = charge<LEAK>(load(membranes_ + i), load_part<T>(current + i, n));
                const Mask<T> fired = h >= threshold_;
                store_part(spikes + i, fired ? Vector<T>{} + 1 : Vector<T>{}, n);
                store(membranes_ + i, reset(h, fired));
            });
        }
        write_state(p_.last_state, first, count);
    }

    template <Leak LEAK> void charge_again(int64_t first, int64_t count) {
        read_state(p_.initial_state, first, count, T(p_.rest));
        for (int64_t t = 0; t < p_.steps; t++) {
            const M* current = at(p_.current, t, first);
            const M* of_spikes = p_.grad_spikes.data ? at(p_.grad_spikes, t, first) : current;
            const M* of_current = at(p_.grad_current, t, first);
            T* charged = charged_ + t * BLOCK;
            over_vectors<T>(count, [&](int64_t i, int n) {
                fetch(current + BLOCK + i), fetch(of_spikes + i), __builtin_prefetch(of_current + i, 1);
                const Vector<T> h = charge<LEAK>(load(membranes_ + i), load_part<T>(current + i, n));
                store(charged + i, h);
                store(membranes_ + i, reset(h, h >= threshold_));
            });
        }
    }

    // After `charge_again`: from the last step to the first. The membranes' room now holds their gradients.
    template <Surrogate SURROGATE> void backward(int64_t first, int64_t count) {
        const T current_slope = T(p_.current_slope), membrane_slope = T(p_.membrane_slope);
        const T constant = T(p_.reset_slopes[0]), factor = T(p_.reset_slopes[1]);
        read_state(p_.grad_last_state, first, count, T(0));
        for (int64_t t = p_.steps - 1; t >= 0; t--) {
            const M* of_spikes = p_.grad_spikes.data ? at(p_.grad_spikes, t, first) : nullptr;
            M* of_current = at(p_.grad_current, t, first);
            const T* charged = charged_ + t * BLOCK;
            over_vectors<T>(count, [&](int64_t i, int n) {
                const Vector<T> h = load(charged + i), of_membrane = load(membranes_ + i);
                const Vector<T> of_spike = of_spikes ? load_part<T>(of_spikes + i, n) : Vector<T>{};
                const Vector<T> passed = (h >= threshold_) & hard_ ? Vector<T>{} : of_membrane;
                const Vector<T> through_spike = of_spike + of_membrane * (constant + factor * h);
                const Vector<T> of_charged = through_spike * slope<SURROGATE>(h - threshold_) + passed;
                store_part(of_current + i, of_charged * current_slope, n);
                store(membranes_ + i, of_charged * membrane_slope);
            });
        }
        write_state(p_.grad_initial_state, first, count);
    }

  private:
    static void fetch(const M* place) { __builtin_prefetch(place); }
    static M* at(const Tensor& tensor, int64_t step, int64_t neuron) {
        return static_cast<M*>(tensor.data) + step * tensor.strides[0] + neuron;
    }
    void read_state(const Tensor& state, int64_t first, int64_t count, T otherwise) {
        const T* from = static_cast<const T*>(state.data) + first;
        over_vectors<T>(count, [&](int64_t i, int n) {
            store(membranes_ + i, state.data ? load_part<T>(from + i, n) : broadcast(otherwise));
        });
    }
    void write_state(const Tensor& state, int64_t first, int64_t count) const {
        if (state.data) std::copy(membranes_, membranes_ + count, static_cast<T*>(state.data) + first);
    }

    template <Leak LEAK> INLINE Vector<T> charge(Vector<T> v, Vector<T> x) const {
        if constexpr (LEAK == NO_LEAK) return v + x;
        if constexpr (LEAK == INPUT_DECAYS) return v + (x - (v - rest_)) / tau_;
        if constexpr (LEAK == INPUT_STAYS) return v - (v - rest_) / tau_ + x;
    }
    INLINE Vector<T> reset(Vector<T> h, Mask<T> fired) const {
        return fired ? (hard_ ? rest_ : h - threshold_) : h;
    }
    template <Surrogate SURROGATE> INLINE Vector<T> slope(Vector<T> u) const {
        const T alpha = T(p_.alpha);
        if constexpr (SURROGATE == ATAN) {
            const Vector<T> turned = T(1.57079632679489661923 * p_.alpha) * u;
            return T(p_.alpha / 2) / (1 + turned * turned);
        } else if constexpr (SURROGATE == SIGMOID) {
            const Vector<T> e = exponential(-absolute<T>(alpha * u));
            return alpha * e / ((1 + e) * (1 + e));
        } else {
            return absolute<T>(u) < alpha / 2 ? Vector<T>{} + 1 / alpha : Vector<T>{};
        }
    }

    const Problem& p_;
    T *membranes_, *charged_;
    const Vector<T> threshold_, tau_, rest_;
    const Mask<T> hard_;
};

// Calls f(a constant of the template's argument) for the value at run time.
template <typename F> void with_leak(int32_t leak, F&& f) {
    if (leak == NO_LEAK) f(std::integral_constant<Leak, NO_LEAK>{});
    if (leak == INPUT_DECAYS) f(std::integral_constant<Leak, INPUT_DECAYS>{});
    if (leak == INPUT_STAYS) f(std::integral_constant<Leak, INPUT_STAYS>{});
}
template <typename F> void with_surrogate(int32_t surrogate, F&& f) {
    if (surrogate == ATAN) f(std::integral_constant<Surrogate, ATAN>{});
    if (surrogate == SIGMOID) f(std::integral_constant<Surrogate, SIGMOID>{});
    if (surrogate == RECTANGULAR) f(std::integral_constant<Surrogate, RECTANGULAR>{});
}

template <typename M> int run(const Problem& p, bool backward, int threads) {
    using T = std::conditional_t<std::is_same_v<M, double>, double, float>;
    constexpr int64_t BLOCK = Worker<T, M>::BLOCK;
    const int64_t blocks = (p.neurons + BLOCK - 1) / BLOCK, size = Worker<T, M>::scratch(p, backward);
    threads = p.steps * p.neurons < WORTH_THREADS ? 1 : int(std::min<int64_t>(threads, blocks));
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(threads * size);
    if (!memory) return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        Worker<T, M> worker(p, memory + omp_get_thread_num() * size);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t first = i * BLOCK, count = std::min(BLOCK, p.neurons - first);
            with_leak(p.leak, [&](auto leak) {
                if (backward) worker.template charge_again<leak>(first, count);
                else worker.template forward<leak>(first, count);
            });
            if (backward)
                with_surrogate(p.surrogate, [&](auto surrogate) { worker.template backward<surrogate>(first, count); });
        }
    }
    return DONE;
}

int dispatch(const Problem& p, bool backward, int threads) {
    int outcome = DONE;
    with_type(p.current.dtype, [&](auto* type) {
        outcome = run<std::remove_pointer_t<decltype(type)>>(p, backward, threads);
    });
    return outcome;
}

}  // namespace

// Both return an Outcome.
extern "C" int spiking_neuron_forward(const Problem* problem, int threads) { return dispatch(*problem, false, threads); }
extern "C" int spiking_neuron_backward(const Problem* problem, int threads) { return dispatch(*problem, true, threads); }
