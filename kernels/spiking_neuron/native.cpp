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

#include "streaming.h"
#include "tensor.h"

namespace {

using namespace simd;

constexpr int64_t WORTH_THREADS = 1 << 15;  // steps of a neuron; fewer take less time than waking a thread

struct Problem {
    int64_t steps, neurons;
    double threshold, tau, rest, alpha;
    double current_slope, membrane_slope;  // dh/dx and dh/dv
    double reset_constant, reset_factor;   // dv/ds = constant + factor h; zeros if the reset is detached
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

// How membranes charge and are reset. Loops work on a copy, which stays in registers: the compiler must take it that what
// they store may be a member of anything else.
template <typename T> struct Dynamics {
    Vector<T> threshold, tau, rest;
    Mask<T> hard;

    explicit Dynamics(const Problem& p)
        : threshold(broadcast(T(p.threshold))), tau(broadcast(T(p.tau))), rest(broadcast(T(p.rest))),
          hard(Mask<T>{} - (p.hard != 0)) {}

    template <Leak LEAK> INLINE Vector<T> charge(Vector<T> v, Vector<T> x) const {
        if constexpr (LEAK == NO_LEAK) return v + x;
        if constexpr (LEAK == INPUT_DECAYS) return v + (x - (v - rest)) / tau;
        if constexpr (LEAK == INPUT_STAYS) return v - (v - rest) / tau + x;
    }
    INLINE Mask<T> fires(Vector<T> h) const { return h >= threshold; }
    INLINE Vector<T> reset(Vector<T> h, Mask<T> fired) const { return fired ? (hard ? rest : h - threshold) : h; }
};

// The surrogate of a spike's derivative.
template <typename T, Surrogate SURROGATE> struct Slope {
    T height, scale;

    explicit Slope(T alpha) : height(alpha), scale(alpha) {
        if constexpr (SURROGATE == ATAN) height = alpha / 2, scale = T(1.57079632679489661923 * alpha);
        if constexpr (SURROGATE == RECTANGULAR) height = 1 / alpha, scale = alpha / 2;
    }
    INLINE Vector<T> operator()(Vector<T> u) const {
        if constexpr (SURROGATE == ATAN) {
            const Vector<T> turned = scale * u;
            return height / (1 + turned * turned);
        } else if constexpr (SURROGATE == SIGMOID) {
            const Vector<T> e = exponential(-absolute<T>(scale * u));
            return height * e / ((1 + e) * (1 + e));
        } else {
            return absolute<T>(u) < scale ? Vector<T>{} + height : Vector<T>{};
        }
    }
};

// Takes a block of VECTORS vectors of neurons through time. WHOLE: all of them exist.
template <typename T, typename M> class Worker {
  public:
    static constexpr int VECTORS = 4;
    static constexpr int64_t BLOCK = VECTORS * LANES<T>;  // neurons

    // Of backward: the charged membranes of all steps.
    static int64_t scratch(const Problem& p, bool backward) { return backward ? BLOCK * p.steps : 0; }

    Worker(const Problem& p, T* memory, bool backward)
        : p_(p), charged_(memory), dynamics_(p), past_caches_(streams(p, backward ? p.grad_current : p.spikes)) {}

    template <Leak LEAK, bool WHOLE> void forward(int64_t first, int64_t count) const {
        const Dynamics<T> neuron = dynamics_;
        const bool past_caches = past_caches_;
        Vector<T> membranes[VECTORS];
        read_state<WHOLE>(membranes, p_.initial_state, first, count, T(p_.rest));
        for (int64_t t = 0; t < p_.steps; t++) {
            const M* current = at(p_.current, t, first);
            M* spikes = at(p_.spikes, t, first);
            over_vectors<WHOLE>(count, [&](int k, int64_t i, int n) {
                fetch(current + BLOCK + i);
                const Vector<T> h = neuron.template charge<LEAK>(membranes[k], load_part<T>(current + i, n));
                const Mask<T> fired = neuron.fires(h);
                write(spikes + i, fired ? Vector<T>{} + 1 : Vector<T>{}, n, past_caches);
                membranes[k] = neuron.reset(h, fired);
            });
        }
        write_state<WHOLE>(membranes, p_.last_state, first, count);
    }

    template <Leak LEAK, bool WHOLE> void charge_again(int64_t first, int64_t count) const {
        const Dynamics<T> neuron = dynamics_;
        const bool past_caches = past_caches_;
        Vector<T> membranes[VECTORS];
        read_state<WHOLE>(membranes, p_.initial_state, first, count, T(p_.rest));
        for (int64_t t = 0; t < p_.steps; t++) {
            const M* current = at(p_.current, t, first);
            const M* of_spikes = p_.grad_spikes.data ? at(p_.grad_spikes, t, first) : current;
            const M* of_current = at(p_.grad_current, t, first);
            T* charged = charged_ + t * BLOCK;
            over_vectors<WHOLE>(count, [&](int k, int64_t i, int n) {
                fetch(current + BLOCK + i), fetch(of_spikes + i);
                if (!past_caches) __builtin_prefetch(of_current + i, 1);
                const Vector<T> h = neuron.template charge<LEAK>(membranes[k], load_part<T>(current + i, n));
                store(charged + i, h);
                membranes[k] = neuron.reset(h, neuron.fires(h));
            });
        }
    }

    // After `charge_again`: from the last step to the first.
    template <Surrogate SURROGATE, bool WHOLE> void backward(int64_t first, int64_t count) const {
        const Dynamics<T> neuron = dynamics_;
        const Slope<T, SURROGATE> slope(T(p_.alpha));
        const bool past_caches = past_caches_;
        const T current_slope = T(p_.current_slope), membrane_slope = T(p_.membrane_slope);
        const T constant = T(p_.reset_constant), factor = T(p_.reset_factor);
        Vector<T> of_membranes[VECTORS];
        read_state<WHOLE>(of_membranes, p_.grad_last_state, first, count, T(0));
        for (int64_t t = p_.steps - 1; t >= 0; t--) {
            const M* of_spikes = p_.grad_spikes.data ? at(p_.grad_spikes, t, first) : nullptr;
            M* of_current = at(p_.grad_current, t, first);
            const T* charged = charged_ + t * BLOCK;
            over_vectors<WHOLE>(count, [&](int k, int64_t i, int n) {
                const Vector<T> h = load(charged + i), of_membrane = of_membranes[k];
                const Vector<T> of_spike = of_spikes ? load_part<T>(of_spikes + i, n) : Vector<T>{};
                const Vector<T> passed = neuron.fires(h) & neuron.hard ? Vector<T>{} : of_membrane;
                const Vector<T> through_spike = of_spike + of_membrane * (constant + factor * h);
                const Vector<T> of_charged = through_spike * slope(h - neuron.threshold) + passed;
                write(of_current + i, of_charged * current_slope, n, past_caches);
                of_membranes[k] = of_charged * membrane_slope;
            });
        }
        write_state<WHOLE>(of_membranes, p_.grad_initial_state, first, count);
    }

  private:
    static bool streams(const Problem& p, const Tensor& result) {
        return std::is_same_v<T, M> && p.steps * p.neurons * int64_t(sizeof(M)) >= streaming::WORTH_BYTES &&
               streaming::aligned(result.data) && result.strides[0] % LANES<T> == 0;
    }
    static INLINE void write(M* place, Vector<T> v, int count, bool past_caches) {
        if constexpr (std::is_same_v<T, M>)
            if (past_caches && count == LANES<T>) return streaming::store(place, v);
        store_part(place, v, count);
    }
    static void fetch(const M* place) { __builtin_prefetch(place); }
    static M* at(const Tensor& tensor, int64_t step, int64_t neuron) {
        return static_cast<M*>(tensor.data) + step * tensor.strides[0] + neuron;
    }
    // f(number of a vector, its first neuron, number of its neurons that exist)
    template <bool WHOLE, typename F> static INLINE void over_vectors(int64_t count, F&& f) {
#pragma GCC unroll 4
        for (int k = 0; k < VECTORS; k++) {
            const int64_t i = k * LANES<T>;
            f(k, i, WHOLE ? LANES<T> : int(std::clamp<int64_t>(count - i, 0, LANES<T>)));
        }
    }
    template <bool WHOLE>
    static void read_state(Vector<T>* into, const Tensor& state, int64_t first, int64_t count, T otherwise) {
        const T* from = static_cast<const T*>(state.data) + first;
        over_vectors<WHOLE>(count, [&](int k, int64_t i, int n) {
            into[k] = state.data ? load_part<T>(from + i, n) : broadcast(otherwise);
        });
    }
    template <bool WHOLE>
    static void write_state(const Vector<T>* values, const Tensor& state, int64_t first, int64_t count) {
        if (!state.data) return;
        T* to = static_cast<T*>(state.data) + first;
        over_vectors<WHOLE>(count, [&](int k, int64_t i, int n) { store_part(to + i, values[k], n); });
    }

    const Problem& p_;
    T* charged_;
    const Dynamics<T> dynamics_;
    const bool past_caches_;
};

// Calls f(a constant of the template's argument) for the value at run time.
template <typename F> void with_flag(bool flag, F&& f) {
    if (flag) f(std::true_type{});
    else f(std::false_type{});
}
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
    if (size && !memory) return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        Worker<T, M> worker(p, memory + omp_get_thread_num() * size, backward);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t first = i * BLOCK, count = std::min(BLOCK, p.neurons - first);
            with_flag(count == BLOCK, [&](auto whole) {
                with_leak(p.leak, [&](auto leak) {
                    if (backward) worker.template charge_again<leak, whole>(first, count);
                    else worker.template forward<leak, whole>(first, count);
                });
                if (!backward) return;
                with_surrogate(p.surrogate, [&](auto surrogate) {
                    worker.template backward<surrogate, whole>(first, count);
                });
            });
        }
        streaming::finish();
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
