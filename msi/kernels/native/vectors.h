// Vectors of float32, as wide as the processor's, and how they come from float32, bfloat16 or e4m3 (as bytes) and go there.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#ifdef __AVX512F__
inline V fused(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#else
inline V fused(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#endif

#ifdef __AVX512F__
inline V everywhere(float value) { return (V)_mm512_set1_ps(value); }
#else
inline V everywhere(float value) { return (V)_mm256_set1_ps(value); }
#endif
inline V load(const float* at) { return *(const V*)at; }
inline void store(float* to, V values) { *(V*)to = values; }

inline V load(const uint16_t* at) {
#ifdef __AVX512F__
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16);
#else
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at)), 16);
#endif
}

// Rounded to the nearest, ties to even; a NaN stays one.
inline void store(uint16_t* to, V values) {
  const U bits = (U)values;
  U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  rounded = values == values ? rounded : bits >> 16 | 64u;
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  const __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8)));
#endif
}

inline V load(const uint8_t* at) {
#ifdef __AVX512F__
  const U code = (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
#else
  const U code = (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
#endif
  const U size = code & 127u;
  U bits = (size << 20) + (120u << 23);
  bits = size < 8u ? (U)(__builtin_convertvector((I)size, V) * 0x1p-9f) : bits;  // denormal numbers would take long
  bits = size == 127u ? U{} + 0x7fc00000u : bits;
  return (V)(bits | (code & 128u) << 24);
}

// Rounded to the nearest, ties to even; beyond 448 either way 448, and a NaN stays one.
inline void store(uint8_t* to, V values) {
  const U size = (U)values & 0x7fffffffu;
  const U large = (size + (size >> 20 & 1u) + 0x7ffffu - (120u << 23)) >> 20;
  const U small = (U)((V)size + 16384.0f) - (141u << 23);  // the last bit of 2^14 is 2^-9, the least step
  U code = size < (121u << 23) ? small : large;
  code = code > 126u ? U{} + 126u : code;
  code = values == values ? code : U{} + 127u;
  code |= (U)values >> 24 & 128u;
#ifdef __AVX512F__
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)code));
#else
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)code), _mm256_extracti128_si256((__m256i)code, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
#endif
}

// e to the power of x for x <= 0 or not, as a polynomial of degree 5 around multiples of ln 2; 1e-7 of it.
inline V exponential(V x) {
  const V bound = V{} + 87.0f;
  x = x > bound ? bound : x;
  x = x < -bound ? -bound : x;
  const V shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: its low bits are the nearest integer
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V e = V{} + 1.9875691500e-4f;
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * (r * r) + r + 1.0f;
  return (V)((U)e + ((U)shifted << 23));
}

// The sum of 16 numbers, in one order whatever a vector's width.
struct Sum {
  V parts[16 / LANES] = {};
  void add(int half, V a, V b) { parts[half] = fused(a, b, parts[half]); }
  float total() const {
#ifdef __AVX512F__
    const __m512i all = (__m512i)parts[0];
    const __m256 eight = _mm256_add_ps((__m256)_mm512_castsi512_si256(all), (__m256)_mm512_extracti64x4_epi64(all, 1));
#else
    const __m256 eight = _mm256_add_ps((__m256)parts[0], (__m256)parts[1]);
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

}  // namespace
