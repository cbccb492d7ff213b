// Volume rendering on CPU.
//
// Rays are divided into groups, each the work of one thread. Only the running sums of a ray, and backward those of what
// lies behind a sample, go sample by sample; exponentials are taken of whole vectors, across the borders of rays, for
// many rays have fewer samples than a vector has lanes. Sums of optical depths are double, as are opacities, depths and
// those of what lies behind a sample.

#include <omp.h>

#include <algorithm>

#include "tensor.h"

namespace {

using namespace simd;

constexpr int64_t RAYS = 64;                // of a group
constexpr int64_t WORTH_THREADS = 1 << 12;  // samples; fewer take less time than waking a thread

struct Problem {
    int64_t rays, samples, channels;
    const int64_t* offsets;                            // (rays + 1)
    Tensor density, start, end;                        // T (samples)
    Tensor colour;                                     // T (samples, channels)
    Tensor weights;                                    // T (samples), written forward and read backward
    Tensor ray_colour, opacity, depth;                 // forward: T (rays, channels), (rays), (rays)
    Tensor grad_ray_colour, grad_opacity, grad_depth;  // backward, as those; null: zeros
    Tensor grad_weights;                               // T (samples); null: zeros
    Tensor grad_density, grad_colour;                  // T (samples), (samples, channels)
    bool* visible;                                     // (samples)
    double least_transmittance, least_alpha;
};

enum Outcome { DONE = 0, NO_MEMORY = 1, WRONG_OFFSETS = 2 };
enum Task { FORWARD = 0, BACKWARD = 1, VISIBLE = 2 };

// 1 - exp(-x), of small x by its series: the difference would have none of its digits.
template <typename T> INLINE Vector<T> opacity_of(Vector<T> x) {
    if constexpr (std::is_same_v<T, float>) {
        Vector<T> series = 1 - x * (T(1) / 8);
        for (int n = 7; n > 1; n--) series = 1 - x * (T(1) / T(n)) * series;
        return absolute<T>(x) < T(0.35) ? x * series : 1 - exponential(-x);
    } else {
        for (int i = 0; i < LANES<T>; i++) x[i] = -std::expm1(-x[i]);
        return x;
    }
}

// CHANNELS is their number, or 0 for any.
template <typename T, int CHANNELS> class Worker {
  public:
    // Two numbers a sample of the largest group.
    static int64_t scratch(int64_t largest) { return 2 * padded(largest); }

    Worker(const Problem& p, T* memory, int64_t largest)
        : p_(p), own_(memory), sums_(memory + padded(largest)), channels_(CHANNELS ? CHANNELS : p.channels) {}

    void run(Task task, int64_t ray, int64_t last_ray) {
        first_ = p_.offsets[ray], count_ = p_.offsets[last_ray] - first_;
        add_up(ray, last_ray, task == BACKWARD);
        if (task == VISIBLE) return see();
        if (task == FORWARD) weigh();
        else attenuate();
        for (; ray < last_ray; ray++) task == FORWARD ? composite(ray) : differentiate(ray);
    }

  private:
    static int64_t padded(int64_t count) { return (count + LANES<T> - 1) / LANES<T> * LANES<T>; }
    static T* data(const Tensor& tensor) { return static_cast<T*>(tensor.data); }
    static T* row(const Tensor& tensor, int64_t i) { return data(tensor) + i * tensor.strides[0]; }

    // Of every sample the optical depth, and those before it in its ray added up; with `inclusive` its own, too.
    void add_up(int64_t ray, int64_t last_ray, bool inclusive) {
        const T *density = data(p_.density) + first_, *start = data(p_.start) + first_, *end = data(p_.end) + first_;
        for (int64_t i = 0; i < count_; i += LANES<T>) {
            const int n = int(std::min<int64_t>(LANES<T>, count_ - i));
            const Vector<T> length = load_part<T>(end + i, n) - load_part<T>(start + i, n);
            store(own_ + i, load_part<T>(density + i, n) * length);
            store(sums_ + i, Vector<T>{});  // lanes beyond the last sample, too
        }
        for (; ray < last_ray; ray++) {
            double sum = 0;
            for (int64_t i = p_.offsets[ray] - first_; i < p_.offsets[ray + 1] - first_; i++) {
                const double before = sum;
                sum += own_[i];
                sums_[i] = T(inclusive ? sum : before);
            }
        }
    }
    void weigh() {
        for (int64_t i = 0; i < count_; i += LANES<T>) {
            const Vector<T> w = exponential(-load(sums_ + i)) * opacity_of<T>(load(own_ + i));
            store_part(data(p_.weights) + first_ + i, w, int(std::min<int64_t>(LANES<T>, count_ - i)));
        }
    }
    void attenuate() {
        for (int64_t i = 0; i < count_; i += LANES<T>) store(sums_ + i, exponential(-load(sums_ + i)));
    }
    void see() {
        const T least = T(p_.least_transmittance), least_alpha = T(p_.least_alpha);
        for (int64_t i = 0; i < count_; i += LANES<T>) {
            const Vector<T> transmittance = exponential(-load(sums_ + i)), alpha = opacity_of<T>(load(own_ + i));
            for (int lane = 0; lane < LANES<T> && i + lane < count_; lane++)
                p_.visible[first_ + i + lane] = transmittance[lane] >= least && alpha[lane] >= least_alpha;
        }
    }

    void composite(int64_t ray) {
        T* colour = row(p_.ray_colour, ray);
        const T* weights = data(p_.weights);
        double opacity = 0, depth = 0;
        std::fill(colour, colour + channels_, T(0));
        for (int64_t i = p_.offsets[ray]; i < p_.offsets[ray + 1]; i++) {
            const T w = weights[i];
            const T* c = row(p_.colour, i);
            for (int64_t d = 0; d < channels_; d++) colour[d] += w * c[d];
            opacity += w;
            depth += double(w) * middle(i);
        }
        data(p_.opacity)[ray] = T(opacity), data(p_.depth)[ray] = T(depth);
    }

    // After `attenuate`: the sums' room now holds what light is left behind each sample.
    void differentiate(int64_t ray) {
        const T* of_colour = p_.grad_ray_colour.data ? row(p_.grad_ray_colour, ray) : nullptr;
        const T of_opacity = p_.grad_opacity.data ? data(p_.grad_opacity)[ray] : T(0);
        const T of_depth = p_.grad_depth.data ? data(p_.grad_depth)[ray] : T(0);
        const T *weights = data(p_.weights), *of_weights = data(p_.grad_weights);
        double behind = 0;
        for (int64_t i = p_.offsets[ray + 1] - 1; i >= p_.offsets[ray]; i--) {
            T gradient = of_opacity + of_depth * middle(i) + (of_weights ? of_weights[i] : T(0));
            const T* c = row(p_.colour, i);
            T* of_sample = row(p_.grad_colour, i);
            for (int64_t d = 0; d < channels_; d++) {
                if (of_colour) gradient += of_colour[d] * c[d];
                of_sample[d] = of_colour ? weights[i] * of_colour[d] : T(0);
            }
            const T length = data(p_.end)[i] - data(p_.start)[i];
            data(p_.grad_density)[i] = T(length * (double(sums_[i - first_]) * gradient - behind));
            behind += double(weights[i]) * gradient;
        }
    }
    T middle(int64_t sample) const { return (data(p_.start)[sample] + data(p_.end)[sample]) / 2; }

    const Problem& p_;
    T *own_, *sums_;
    const int64_t channels_;
    int64_t first_ = 0, count_ = 0;
};

template <typename T, int CHANNELS> int run(const Problem& p, Task task, int threads) {
    using Rays = Worker<T, CHANNELS>;
    const int64_t groups = (p.rays + RAYS - 1) / RAYS;
    int64_t largest = 0;
    for (int64_t g = 0; g < groups; g++)
        largest = std::max(largest, p.offsets[std::min(p.rays, (g + 1) * RAYS)] - p.offsets[g * RAYS]);
    threads = p.samples < WORTH_THREADS ? 1 : int(std::min<int64_t>(threads, groups));
    static thread_local Workspace workspace;
    T* memory = workspace.get<T>(threads * Rays::scratch(largest) + 1);
    if (!memory) return NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        Rays rays(p, memory + omp_get_thread_num() * Rays::scratch(largest), largest);
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < groups; g++) rays.run(task, g * RAYS, std::min(p.rays, (g + 1) * RAYS));
    }
    return DONE;
}

template <typename T> int with_channels(const Problem& p, Task task, int threads) {
    return p.channels == 3 ? run<T, 3>(p, task, threads) : run<T, 0>(p, task, threads);
}

int dispatch(const Problem& p, Task task, int threads) {
    bool fits = p.offsets[0] == 0 && p.offsets[p.rays] == p.samples;
    for (int64_t r = 0; r < p.rays; r++) fits &= p.offsets[r] <= p.offsets[r + 1];
    if (!fits) return WRONG_OFFSETS;
    return p.density.dtype == 1 ? with_channels<double>(p, task, threads) : with_channels<float>(p, task, threads);
}

}  // namespace

// Returns an Outcome.
extern "C" int volume_rendering(const Problem* problem, int task, int threads) {
    return dispatch(*problem, Task(task), threads);
}
