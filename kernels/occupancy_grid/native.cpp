// Marching rays through an occupancy grid on CPU.
//
// A ray goes from one interval of its lattice to the next. Where a block of cells is empty it goes on behind the block:
// every interval whose mid point lies before that is left out, unseen. It is called twice: to find and count samples,
// and, when there is memory of their number, to write them there.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

namespace {

constexpr int64_t BLOCK = 4;        // cells a side
constexpr int MOST_LEVELS = 32;
constexpr double SLACK = 1e-6;      // of an interval, by which rays skip less than they may: more than any rounding
constexpr int64_t WORTH_THREADS = 64;  // rays; fewer take less time than waking a thread
constexpr double INFINITE = std::numeric_limits<double>::infinity();

struct Problem {
    int64_t rays, levels, sizes[3], blocks[3];  // of cells and of blocks of one level
    double step, cone_angle;
    const double *origins, *directions;   // (rays, 3)
    const double *near, *far, *jitter;    // (rays)
    const double* box;                    // (2, 3)
    const bool* occupied;                 // (levels, sizes)
    bool* occupied_blocks;                // (levels, blocks), zeros; written by the first call, as are offsets
    int64_t* offsets;                     // (rays + 1)
    double *start, *end;                  // null in the first call
};

enum Outcome { DONE = 0, NO_MEMORY = 1 };

class Ray {
  public:
    Ray(const Problem& p, int64_t ray)
        : p_(p), near_(p.near[ray]), far_(p.far[ray]), jitter_(p.jitter[ray]) {
        bool still = true;
        for (int d = 0; d < 3; d++) {
            const double lower = p.box[d], upper = p.box[3 + d], half = (upper - lower) / 2;
            origin_[d] = (p.origins[3 * ray + d] - (lower + upper) / 2) / half;
            direction_[d] = p.directions[3 * ray + d] / half;
            still &= direction_[d] == 0;
        }
        for (int64_t l = 0; l < p.levels; l++) cross(l);
        if (still) leave_[p.levels - 1] = -INFINITE;
    }

    // f(start, end) of every sample.
    template <typename F> void march(F&& f) const {
        const double enter = enter_[p_.levels - 1], leave = leave_[p_.levels - 1];
        if (!(enter <= leave)) return;
        if (p_.cone_angle > 0) march_growing(enter, leave, f);
        else march_even(enter, leave, f);
    }

  private:
    void cross(int64_t level) {
        const double half = std::ldexp(1.0, int(level));
        double enter = -INFINITE, leave = INFINITE;
        for (int d = 0; d < 3; d++) {
            if (direction_[d] == 0) {
                if (std::abs(origin_[d]) > half) enter = INFINITE, leave = -INFINITE;
                continue;
            }
            const double a = (-half - origin_[d]) / direction_[d], b = (half - origin_[d]) / direction_[d];
            enter = std::max(enter, std::min(a, b));
            leave = std::min(leave, std::max(a, b));
        }
        enter_[level] = enter, leave_[level] = leave;
    }

    template <typename F> void march_even(double enter, double leave, F&& f) const {
        const double step = p_.step;
        double k = std::max(0.0, before(enter));
        while (true) {
            const double start = near_ + (k + jitter_) * step, end = near_ + (k + 1 + jitter_) * step;
            const double middle = (start + end) / 2;
            if (!(middle < far_ && middle <= leave + step)) return;
            double skip = 0;
            if (is_occupied(middle, skip)) f(start, end);
            k = skip > middle ? std::max(k + 1, before(skip)) : k + 1;
        }
    }
    // The first interval that may have its mid point at `distance` or later.
    double before(double distance) const { return std::ceil((distance - near_) / p_.step - jitter_ - 0.5 - SLACK); }

    template <typename F> void march_growing(double enter, double leave, F&& f) const {
        double start = near_ + jitter_ * interval(near_), skip = enter;
        while (true) {
            const double length = interval(start), end = start + length, middle = (start + end) / 2;
            if (!(middle < far_ && middle <= leave + length)) return;
            if (middle >= skip - SLACK * length && is_occupied(middle, skip)) f(start, end);
            start = end;
        }
    }
    double interval(double distance) const { return std::max(p_.step, p_.cone_angle * distance); }

    // Of the cell at a distance. Of an empty block, also the distance up to which everything is empty.
    bool is_occupied(double distance, double& skip) const {
        double at[3], farthest = 0;
        for (int d = 0; d < 3; d++) {
            at[d] = origin_[d] + distance * direction_[d];
            farthest = std::max(farthest, std::abs(at[d]));
        }
        int64_t level = 0;
        double half = 1, inverse = 1;
        while (farthest > half) {
            if (++level == p_.levels) return false;
            half *= 2, inverse /= 2;
        }
        int64_t cell[3], place = level, block = level;
        for (int d = 0; d < 3; d++) {
            cell[d] = std::min(int64_t((at[d] * inverse + 1) * 0.5 * double(p_.sizes[d])), p_.sizes[d] - 1);
            place = place * p_.sizes[d] + cell[d];
            block = block * p_.blocks[d] + cell[d] / BLOCK;
        }
        if (p_.occupied_blocks[block]) return p_.occupied[place];
        // The finer box may reach into the block.
        skip = level > 0 && enter_[level - 1] > distance ? enter_[level - 1] : INFINITE;
        for (int d = 0; d < 3; d++) {
            if (direction_[d] == 0) continue;
            const int64_t side = (cell[d] / BLOCK + (direction_[d] > 0)) * BLOCK;
            const double border = (2 * double(std::min(side, p_.sizes[d])) / double(p_.sizes[d]) - 1) * half;
            skip = std::min(skip, (border - origin_[d]) / direction_[d]);
        }
        return false;
    }

    const Problem& p_;
    const double near_, far_, jitter_;
    double origin_[3], direction_[3];  // in the box's coordinates: -1 to 1 in the smallest one
    double enter_[MOST_LEVELS], leave_[MOST_LEVELS];
};

void find_blocks(const Problem& p) {
    const bool* cells = p.occupied;
    for (int64_t l = 0; l < p.levels; l++)
        for (int64_t x = 0; x < p.sizes[0]; x++)
            for (int64_t y = 0; y < p.sizes[1]; y++, cells += p.sizes[2]) {
                const int64_t row = (l * p.blocks[0] + x / BLOCK) * p.blocks[1] + y / BLOCK;
                bool* blocks = p.occupied_blocks + row * p.blocks[2];
                for (int64_t z = 0; z < p.sizes[2]; z++) blocks[z / BLOCK] |= cells[z];
            }
}

// What a calling thread keeps from the first call to the second, and its memory for the calls after that.
struct Kept {
    std::vector<std::vector<double>> samples;  // of each thread, starts and ends
    std::vector<int32_t> thread;               // of each ray
    std::vector<int64_t> place;                // of each ray's samples among those of its thread
};

int find(const Problem& p, int threads, Kept& kept) {
    find_blocks(p);
    kept.samples.resize(std::max<size_t>(kept.samples.size(), threads));
    for (auto& samples : kept.samples) samples.clear();
    kept.thread.resize(p.rays);
    kept.place.resize(p.rays);
    bool complete = true;
#pragma omp parallel num_threads(threads)
    {
        std::vector<double>& samples = kept.samples[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 16)
        for (int64_t r = 0; r < p.rays; r++) {
            const size_t place = samples.size();
            try {
                Ray(p, r).march([&](double start, double end) {
                    samples.push_back(start);
                    samples.push_back(end);
                });
            } catch (const std::bad_alloc&) {  // no exception may leave a parallel region
#pragma omp atomic write
                complete = false;
            }
            kept.thread[r] = omp_get_thread_num(), kept.place[r] = int64_t(place);
            p.offsets[r + 1] = int64_t(samples.size() - place) / 2;
        }
    }
    p.offsets[0] = 0;
    for (int64_t r = 0; r < p.rays; r++) p.offsets[r + 1] += p.offsets[r];
    return complete ? DONE : NO_MEMORY;
}

void write(const Problem& p, const Kept& kept) {
    for (int64_t r = 0; r < p.rays; r++) {
        const double* samples = kept.samples[kept.thread[r]].data() + kept.place[r];
        for (int64_t i = p.offsets[r]; i < p.offsets[r + 1]; i++) p.start[i] = *samples++, p.end[i] = *samples++;
    }
}

}  // namespace

// Returns an Outcome.
extern "C" int occupancy_march(const Problem* problem, int threads) {
    static thread_local Kept kept;
    if (problem->start) return write(*problem, kept), DONE;
    try {
        return find(*problem, problem->rays < WORTH_THREADS ? 1 : threads, kept);
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
}
