// Products of rows with matrices that are unpacked in registers: memory is read once, in the format it is held in.
//
// A matrix [n, depth] lies in panels of 16 of its rows. Rows are float32, or bfloat16 where the processor multiplies
// that; what is added up is float32. Each number of a result is one chain over the depth, however many rows there are
// and however wide vectors are: what stands beside a row does not change its numbers, nor does the kind of processor.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#ifdef __AVX512F__
constexpr int WIDE = 4;             // panels of a tile
constexpr int FEW = 3;              // rows up to which unpacking a line in registers alone is best
constexpr int64_t ALONE = 4 << 20;  // bytes of a matrix times rows up to which a second thread costs more than it brings
#define MSI_TILE_FUNCTION inline
#else
constexpr int WIDE = 1;
constexpr int FEW = 8;
constexpr int64_t ALONE = 1 << 20;
#define MSI_TILE_FUNCTION __attribute__((noinline))  // inlined, sums often leave the 16 registers
#endif
constexpr int MOST = 6;               // rows of a tile
constexpr int WIDTH = 16;             // rows of a matrix in a panel
constexpr int HALVES = WIDTH / LANES;
constexpr int LINE = WIDTH * 4;       // bytes: two neighbours of each row of a panel in bfloat16, or one float of each
constexpr int64_t GROUP = 128;        // values of a row that share a scale
constexpr int AHEAD = 1024;           // bytes that are fetched ahead
constexpr int64_t PASS = 96;          // rows that meet all panels of a task before the next: they stay in the cache

inline V even(U line) { return (V)(line << 16); }
inline V odd(U line) { return (V)(line & 0xffff0000u); }
inline U line_of(V first, V second) { return ((U)first >> 16) | ((U)second & 0xffff0000u); }

// -- formats: what a pair of neighbours along the depth is, of LANES rows of a panel ----------------------------------

// [depth / 2, 16, 2]
struct Bfloat16 {
  static constexpr bool GROUPED = false, BY_TWO_LINES = false;
  static constexpr int PAIR_BYTES = LINE;
  static int64_t panel_bytes(int64_t depth) { return depth / 2 * LINE; }
  static U line(const uint8_t* at, int half) { return *(const U*)(at + half * LANES * 4); }
  static V first(const uint8_t* at, int half) { return even(line(at, half)); }
  static V second(const uint8_t* at, int half) { return odd(line(at, half)); }
};

// Of each group its scales, float [16], and then values.
template <int BYTES>
struct Grouped {
  static constexpr bool GROUPED = true;
  static constexpr int PAIR_BYTES = BYTES;
  static constexpr int64_t GROUP_BYTES = LINE + GROUP / 2 * BYTES;
  static int64_t panel_bytes(int64_t depth) { return (depth + GROUP - 1) / GROUP * GROUP_BYTES; }
};

#ifndef __AVX512F__
// Each of 8 bytes, of one half of 16, as the highest of a number: 2^24 times what it is. Laying bytes anew within 16 takes
// half as long as widening them, which moves them across.
inline __m256i on_top(const uint8_t* at, int half) {
  const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)at));
  const int first = half * 8;
  const auto places = [](int byte) {
    return _mm_add_epi32(_mm_set1_epi32(byte << 24 | 0x808080), _mm_setr_epi32(0, 1 << 24, 2 << 24, 3 << 24));
  };
  return _mm256_shuffle_epi8(all, _mm256_set_m128i(places(first + 4), places(first)));
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// The two bytes of whole numbers up to 127 as bfloat16.
struct Wholes {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr Wholes() {
    for (int number = 1; number < 128; ++number) {
      int exponent = 0;
      while (number >> exponent > 1) ++exponent;
      const int bits = (127 + exponent) << 7 | ((number << (7 - exponent)) & 127);
      low[number] = bits & 255;
      high[number] = bits >> 8;
    }
  }
};
constexpr Wholes WHOLES;

// [depth / 4, 4, 2, 4, 2]: of four neighbours in a row of a panel two lie together, and those of four rows, so that looking
// up both bytes of 64 values and laying them beside one another makes two lines. No value is -128.
struct Int8 : Grouped<2 * WIDTH> {
  static constexpr bool BY_TWO_LINES = true;
  static constexpr float SCALE = 1.0f;
  static int64_t place(int64_t i, int64_t row) {
    return i / 4 * 4 * WIDTH + row / 4 * 16 + i / 2 % 2 * 8 + row % 4 * 2 + i % 2;
  }
  static void lines(const uint8_t* at, U* to) {
    const auto table = [](const uint8_t* from) { return _mm512_load_si512(from); };
    const __m512i given = _mm512_loadu_si512(at), size = _mm512_abs_epi8(given);
    const __m512i low = _mm512_permutex2var_epi8(table(WHOLES.low), size, table(WHOLES.low + 64));
    const __m512i unsigned_high = _mm512_permutex2var_epi8(table(WHOLES.high), size, table(WHOLES.high + 64));
    const __m512i high = _mm512_or_si512(unsigned_high, _mm512_and_si512(given, _mm512_set1_epi8((char)0x80)));
    to[0] = (U)_mm512_unpacklo_epi8(low, high);
    to[1] = (U)_mm512_unpackhi_epi8(low, high);
  }
};
#else
// [depth, 16]
struct Int8 : Grouped<2 * WIDTH> {
  static constexpr bool BY_TWO_LINES = false;
  static int64_t place(int64_t i, int64_t row) { return i * WIDTH + row; }
#ifdef __AVX512F__
  static constexpr float SCALE = 1.0f;
  static V floats(const uint8_t* at, int) {
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
  }
#else
  static constexpr float SCALE = 0x1p-24f;
  static V floats(const uint8_t* at, int half) { return (V)_mm256_cvtepi32_ps(on_top(at, half)); }
#endif
  static V first(const uint8_t* at, int half) { return floats(at, half); }
  static V second(const uint8_t* at, int half) { return floats(at + WIDTH, half); }
  static U line(const uint8_t* at, int half) { return line_of(first(at, half), second(at, half)); }
};
#endif

// [depth, 16] of float8 e4m3. Its bits are those of a float16 that is 256 times smaller: scales make up for it.
struct Float8 : Grouped<2 * WIDTH> {
  static constexpr bool BY_TWO_LINES = false;
  static constexpr float SCALE = 256.0f;
  static V floats(const uint8_t* at, int half) {
#ifdef __AVX512F__
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)), 7);
    return (V)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff)));
#else  // both halves are widened at once
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)), 7);
    const __m256i both = _mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff));
    return (V)_mm256_cvtph_ps(half ? _mm256_extracti128_si256(both, 1) : _mm256_castsi256_si128(both));
#endif
  }
  static V first(const uint8_t* at, int half) { return floats(at, half); }
  static V second(const uint8_t* at, int half) { return floats(at + WIDTH, half); }
  static U line(const uint8_t* at, int half) { return line_of(first(at, half), second(at, half)); }
};

// [depth / 2, 16]: the first of a pair in the low half of a byte
struct Int4 : Grouped<WIDTH> {
  static constexpr bool BY_TWO_LINES = false;
#ifdef __AVX512F__
  static constexpr float SCALE = 1.0f;
  static __m512i bytes(const uint8_t* at) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)); }
  static __m512 looked_up(__m512i index) {  // by their lowest four bits
    return _mm512_permutexvar_ps(index, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  }
  static V first(const uint8_t* at, int) { return (V)looked_up(bytes(at)); }
  static V second(const uint8_t* at, int) { return (V)looked_up(_mm512_srli_epi32(bytes(at), 4)); }
#else
  static constexpr float SCALE = 0x1p-28f;
  static V first(const uint8_t* at, int half) { return (V)_mm256_cvtepi32_ps(_mm256_slli_epi32(on_top(at, half), 4)); }
  static V second(const uint8_t* at, int half) {
    return (V)_mm256_cvtepi32_ps(_mm256_and_si256(on_top(at, half), _mm256_set1_epi32(0xf0000000)));
  }
#endif
  static U line(const uint8_t* at, int half) { return line_of(first(at, half), second(at, half)); }
};

// -- arithmetic: rows, and how a pair of their values meets one of a matrix --------------------------------------------

struct Fused {  // float32, each product in one fused multiply-add
  typedef float Row;
  struct Pair {
    V first, second;
  };
  static Pair broadcast(const Row* x) { return {everywhere(x[0]), everywhere(x[1])}; }
  template <class F>
  static Pair load(const uint8_t* at, int half) {
    return {F::first(at, half), F::second(at, half)};
  }
  static Pair of_line(U line) { return {even(line), odd(line)}; }
  static void store(Row* to, V values) { *(V*)to = values; }
  static V add(V sum, Pair w, Pair x) { return fused(w.second, x.second, fused(w.first, x.first, sum)); }
};

#ifdef __AVX512BF16__
struct Dot {  // bfloat16
  typedef uint16_t Row;
  typedef __m512bh Pair;
  static Pair broadcast(const Row* x) {
    int32_t both;
    std::memcpy(&both, x, 4);
    return (Pair)_mm512_set1_epi32(both);
  }
  template <class F>
  static Pair load(const uint8_t* at, int half) {
    return (Pair)F::line(at, half);
  }
  static Pair of_line(U line) { return (Pair)line; }
  static void store(Row* to, V values) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)values)); }
  static V add(V sum, Pair w, Pair x) { return (V)_mm512_dpbf16_ps((__m512)sum, w, x); }
};
#endif

// -- tiles -------------------------------------------------------------------------------------------------------------

// M rows with P panels over so many pairs: y [M, P * 16], or with scales (of a panel LINE bytes, then the next after
// scale_stride) y plus as much of them.
template <class A, class F, int M, int P>
MSI_TILE_FUNCTION void tile(const typename A::Row* x, int64_t x_stride, const uint8_t* w, int64_t panel_bytes,
                            int64_t pairs, float* y, int64_t y_stride, const uint8_t* scales, int64_t scale_stride,
                            bool is_first) {
  V sums[M][P][HALVES];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int h = 0; h < HALVES; ++h) sums[m][p][h] = V{};
#ifndef __AVX512F__
  const auto meet = [&](int64_t k) __attribute__((always_inline)) {  // of 16 registers sums take at most twelve
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const uint8_t* at = w + p * panel_bytes + k * F::PAIR_BYTES;
      const V low = F::first(at, 0), high = F::first(at, 1);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V value = everywhere(x[m * x_stride + 2 * k]);
        sums[m][p][0] = fused(low, value, sums[m][p][0]);
        sums[m][p][1] = fused(high, value, sums[m][p][1]);
      }
      const V next_low = F::second(at, 0), next_high = F::second(at, 1);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V value = everywhere(x[m * x_stride + 2 * k + 1]);
        sums[m][p][0] = fused(next_low, value, sums[m][p][0]);
        sums[m][p][1] = fused(next_high, value, sums[m][p][1]);
      }
    }
  };
  constexpr int TOGETHER = LINE / F::PAIR_BYTES;
  int64_t k = 0;
  for (; k + TOGETHER <= pairs; k += TOGETHER) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) __builtin_prefetch(w + p * panel_bytes + k * F::PAIR_BYTES + AHEAD);
#pragma GCC unroll 4
    for (int i = 0; i < TOGETHER; ++i) meet(k + i);
  }
  for (; k < pairs; ++k) meet(k);
#else
  if constexpr (F::BY_TWO_LINES) {
    int64_t done = 0;
    const auto meet = [&](int64_t k, auto num_lines) __attribute__((always_inline)) {
      typename A::Pair value[2][M];
#pragma GCC unroll 2
      for (int i = 0; i < num_lines; ++i)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) value[i][m] = A::broadcast(x + m * x_stride + 2 * (k + i));
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = w + p * panel_bytes + k * F::PAIR_BYTES;
        __builtin_prefetch(at + AHEAD);
        U lines[2];
        F::lines(at, lines);
#pragma GCC unroll 2
        for (int i = 0; i < num_lines; ++i)
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) sums[m][p][0] = A::add(sums[m][p][0], A::of_line(lines[i]), value[i][m]);
      }
    };
    for (; done + 2 <= pairs; done += 2) meet(done, std::integral_constant<int, 2>{});
    if (done < pairs) meet(done, std::integral_constant<int, 1>{});
  } else {
    for (int64_t k = 0; k < pairs; ++k) {
      typename A::Pair value[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) value[m] = A::broadcast(x + m * x_stride + 2 * k);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = w + p * panel_bytes + k * F::PAIR_BYTES;
        __builtin_prefetch(at + AHEAD);
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; ++h) {
          const typename A::Pair line = A::template load<F>(at, h);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) sums[m][p][h] = A::add(sums[m][p][h], line, value[m]);
        }
      }
    }
  }
#endif
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int h = 0; h < HALVES; ++h) {
        V* to = (V*)(y + m * y_stride + p * WIDTH + h * LANES);
        if (!scales) {
          *to = sums[m][p][h];
        } else {
          const V scale = *(const V*)(scales + p * scale_stride + h * LANES * 4);
          *to = fused(sums[m][p][h], scale, is_first ? V{} : *to);
        }
      }
}

struct Tile {  // arguments of one but its rows
  const uint8_t* w;
  int64_t panel_bytes, pairs;
  const uint8_t* scales;
  int64_t scale_stride;
  bool is_first;
};

template <class A, class F, int P>
inline void tile_of(int rows, const typename A::Row* x, int64_t x_stride, const Tile& t, float* y, int64_t y_stride) {
  // those that there are: with AVX2 several panels have one or two rows
  constexpr int HIGHEST = WIDE == 1 && P > 1 ? 4 / P : F::GROUPED ? std::min(FEW, MOST) : MOST;
#define MSI_TILE(M)                                                                                                \
  case M:                                                                                                          \
    if constexpr (M <= HIGHEST)                                                                                    \
      tile<A, F, M, P>(x, x_stride, t.w, t.panel_bytes, t.pairs, y, y_stride, t.scales, t.scale_stride, t.is_first); \
    break;
  switch (rows) { MSI_TILE(1) MSI_TILE(2) MSI_TILE(3) MSI_TILE(4) MSI_TILE(5) MSI_TILE(6) }
#undef MSI_TILE
}

// Any number of rows, in tiles of nearly equal height: 8 rows are 4 and 4, not 6 and 2.
template <class A, class F, int P>
inline void tiles(int64_t rows, const typename A::Row* x, int64_t x_stride, const Tile& t, float* y, int64_t y_stride) {
  for (int64_t left = (rows + MOST - 1) / MOST; rows > 0; --left) {
    const int now = (rows + left - 1) / left;
    tile_of<A, F, P>(now, x, x_stride, t, y, y_stride);
    rows -= now;
    x += now * x_stride;
    y += now * y_stride;
  }
}

template <class A, class F, int P>
inline void panels_of(int64_t rows, const typename A::Row* x, int64_t x_stride, const uint8_t* w, int64_t depth,
                      float* y, int64_t y_stride) {
  const int64_t panel_bytes = F::panel_bytes(depth);
  if constexpr (!F::GROUPED) {
    tiles<A, F, P>(rows, x, x_stride, {w, panel_bytes, depth / 2, nullptr, 0, true}, y, y_stride);
  } else {
    alignas(64) uint8_t unpacked[P * GROUP / 2 * LINE];
    for (int64_t from = 0; from < depth; from += GROUP, w += F::GROUP_BYTES) {
      const int64_t pairs = std::min(GROUP, depth - from) / 2;
      Tile t{w + LINE, panel_bytes, pairs, w, panel_bytes, from == 0};
      if (rows <= FEW) {
        tiles<A, F, P>(rows, x + from, x_stride, t, y, y_stride);
        continue;
      }
      for (int p = 0; p < P; ++p)
        for (int64_t k = 0; k < pairs; k += 1 + F::BY_TWO_LINES) {
          const uint8_t* at = t.w + p * panel_bytes + k * F::PAIR_BYTES;
          U* to = (U*)(unpacked + p * (GROUP / 2 * LINE) + k * LINE);
          __builtin_prefetch(at + AHEAD);
          if constexpr (F::BY_TWO_LINES)
            F::lines(at, to);
          else
            for (int h = 0; h < HALVES; ++h) to[h] = F::line(at, h);
        }
      t.w = unpacked;
      t.panel_bytes = GROUP / 2 * LINE;
      tiles<A, Bfloat16, P>(rows, x + from, x_stride, t, y, y_stride);
    }
  }
}

// y [rows, panels * 16] = x [rows, depth] times so many panels, on this thread.
template <class A, class F>
void product(int64_t rows, const typename A::Row* x, int64_t x_stride, const uint8_t* w, int64_t depth, float* y,
             int64_t y_stride, int64_t panels) {
  const int64_t panel_bytes = F::panel_bytes(depth);
  for (; rows > 0; rows -= PASS, x += PASS * x_stride, y += PASS * y_stride) {
    const int64_t now = std::min(PASS, rows);
    int64_t p = 0;
    const auto go = [&](auto wide) {
      for (; panels - p >= wide; p += wide)
        panels_of<A, F, wide>(now, x, x_stride, w + p * panel_bytes, depth, y + p * WIDTH, y_stride);
    };
    if (WIDE >= 4 || now == 1) go(std::integral_constant<int, 4>{});
    if (WIDE < 4 && now == 2) go(std::integral_constant<int, 2>{});  // one panel's sums would wait for one another
    go(std::integral_constant<int, 1>{});
  }
}

}  // namespace
