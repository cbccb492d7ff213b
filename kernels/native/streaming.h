// Stores past the caches, for results so large that they would be thrown out before anybody reads them. An ordinary
// store first fetches the line that it overwrites: a third of a copy's traffic.
#pragma once

#include <cstdint>

#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace streaming {

constexpr int64_t WORTH_BYTES = 4 << 20;  // of a result; smaller ones are read again from a cache

// A vector to memory aligned to it, visible to other threads after `finish`.
template <typename T> INLINE void store(T* place, simd::Vector<T> v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(place), reinterpret_cast<__m512i>(v));
#elif defined(__AVX__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(place), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(place), reinterpret_cast<__m128i>(v));
#else
    simd::store(place, v);
#endif
}

INLINE void finish() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

INLINE bool aligned(const void* place) { return reinterpret_cast<uintptr_t>(place) % simd::REGISTER_BYTES == 0; }

}  // namespace streaming
