// The plain C interface between Python (kernels/native/__init__.py) and the kernels.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

struct Tensor {
    void* data;
    int64_t strides[4];  // in elements, of up to four dimensions before the last, which is contiguous
    int32_t dtype;       // 0 float, 1 double, 2 bfloat16
};

// Calls f with a null pointer of the memory type of `dtype`.
template <typename F> inline void with_type(int32_t dtype, F&& f) {
    if (dtype == 0) f(static_cast<float*>(nullptr));
    if (dtype == 1) f(static_cast<double*>(nullptr));
    if (dtype == 2) f(static_cast<simd::BFloat16*>(nullptr));
}

// Memory that a calling thread keeps between calls: fresh pages cost more than the arithmetic done on them.
class Workspace {
  public:
    ~Workspace() { std::free(memory_); }
    template <typename T> T* get(size_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            std::free(memory_);
            memory_ = std::aligned_alloc(64, bytes);
            size_ = memory_ ? bytes : 0;
        }
        return static_cast<T*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};
