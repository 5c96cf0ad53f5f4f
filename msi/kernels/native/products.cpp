// Products of rows with matrices that are unpacked in registers: memory is read once, in the format it is held in.
//
// A matrix [n, depth] lies in panels of 16 of its rows. Rows are float32, or bfloat16 where the processor multiplies
// that; what is added up is float32. Each number of a result is one chain over the depth, however many rows there are
// and however wide vectors are: what stands beside a row does not change its numbers, nor does the kind of processor.

#include "vectors.h"

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int MOST = 6;  // rows of a tile
constexpr int WIDE = 4;  // panels of one
constexpr int64_t ALONE = 4 << 20;  // bytes of a matrix times rows up to which a second thread costs more than it brings
#else
constexpr int MOST = 6;
constexpr int WIDE = 1;
constexpr int64_t ALONE = 1 << 20;
#endif
constexpr int WIDTH = 16;             // rows of a matrix in a panel
constexpr int HALVES = WIDTH / LANES;
constexpr int LINE = WIDTH * 4;       // bytes: two neighbours of each row of a panel in bfloat16, or one float of each
constexpr int64_t GROUP = 128;        // values of a row that share a scale
constexpr int AHEAD = 1024;           // bytes that are fetched ahead
constexpr int64_t PASS = 96;          // rows that meet all panels of a task before the next: they stay in the cache
constexpr int FEW = 3;                // rows up to which unpacking a line in registers alone is best

inline V even(U line) { return (V)(line << 16); }
inline V odd(U line) { return (V)(line & 0xffff0000u); }
inline U line_of(V first, V second) { return ((U)first >> 16) | ((U)second & 0xffff0000u); }

// -- formats: what a pair of neighbours along the depth is, of LANES rows of a panel ----------------------------------

// [depth / 2, 16, 2]
struct Bfloat16 {
  static constexpr bool GROUPED = false;
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

// [depth, 16]
struct Int8 : Grouped<2 * WIDTH> {
  static V floats(const uint8_t* at) {
#ifdef __AVX512F__
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
#else
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)));
#endif
  }
  static V first(const uint8_t* at, int half) { return floats(at + half * LANES); }
  static V second(const uint8_t* at, int half) { return floats(at + WIDTH + half * LANES); }
  static U line(const uint8_t* at, int half) { return line_of(first(at, half), second(at, half)); }
};

// [depth, 16] of float8 e4m3. Its bits are those of a float16 that is 256 times smaller: scales make up for it.
struct Float8 : Grouped<2 * WIDTH> {
  static constexpr float SCALE = 256.0f;
  static V floats(const uint8_t* at) {
#ifdef __AVX512F__
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)), 7);
    return (V)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbfff)));
#else
    const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)at)), 7);
    return (V)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbfff)));
#endif
  }
  static V first(const uint8_t* at, int half) { return floats(at + half * LANES); }
  static V second(const uint8_t* at, int half) { return floats(at + WIDTH + half * LANES); }
  static U line(const uint8_t* at, int half) { return line_of(first(at, half), second(at, half)); }
};

// [depth / 2, 16]: the first of a pair in the low half of a byte, 8 more than it is
struct Int4 : Grouped<WIDTH> {
#ifdef __AVX512F__
  static __m512i bytes(const uint8_t* at) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)); }
  static __m512 looked_up(__m512i index) {  // by their lowest four bits
    return _mm512_permutexvar_ps(index, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
  }
  static V first(const uint8_t* at, int) { return (V)looked_up(bytes(at)); }
  static V second(const uint8_t* at, int) { return (V)looked_up(_mm512_srli_epi32(bytes(at), 4)); }
#else
  static __m256i bytes(const uint8_t* at) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at)); }
  static V value(__m256i of) { return (V)_mm256_cvtepi32_ps(_mm256_sub_epi32(of, _mm256_set1_epi32(8))); }
  static V first(const uint8_t* at, int half) {
    return value(_mm256_and_si256(bytes(at + half * LANES), _mm256_set1_epi32(15)));
  }
  static V second(const uint8_t* at, int half) { return value(_mm256_srli_epi32(bytes(at + half * LANES), 4)); }
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
  static void store(Row* to, V values) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)values)); }
  static V add(V sum, Pair w, Pair x) { return (V)_mm512_dpbf16_ps((__m512)sum, w, x); }
};
#endif

// -- tiles -------------------------------------------------------------------------------------------------------------

// M rows with P panels over so many pairs: y [M, P * 16], or with scales (of a panel LINE bytes, then the next after
// scale_stride) y plus as much of them.
template <class A, class F, int M, int P>
inline void tile(const typename A::Row* x, int64_t x_stride, const uint8_t* w, int64_t panel_bytes, int64_t pairs,
                 float* y, int64_t y_stride, const uint8_t* scales, int64_t scale_stride, bool is_first) {
  V sums[M][P][HALVES];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int h = 0; h < HALVES; ++h) sums[m][p][h] = V{};
#ifndef __AVX512F__
  for (int64_t k = 0; k < pairs; ++k) {  // of 16 registers sums take twelve: one value of a row at a time
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const uint8_t* at = w + p * panel_bytes + k * F::PAIR_BYTES;
      __builtin_prefetch(at + AHEAD);
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
  }
#else
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
#define MSI_TILE(M)                                                                                             \
  case M:                                                                                                       \
    tile<A, F, M, P>(x, x_stride, t.w, t.panel_bytes, t.pairs, y, y_stride, t.scales, t.scale_stride, t.is_first); \
    break;
  if constexpr (F::GROUPED) {
    switch (rows) { MSI_TILE(1) MSI_TILE(2) MSI_TILE(3) }
  } else {
    switch (rows) { MSI_TILE(1) MSI_TILE(2) MSI_TILE(3) MSI_TILE(4) MSI_TILE(5) MSI_TILE(6) }
  }
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
        tile_of<A, F, P>(rows, x + from, x_stride, t, y, y_stride);
        continue;
      }
      for (int p = 0; p < P; ++p)
        for (int64_t k = 0; k < pairs; ++k)
          for (int h = 0; h < HALVES; ++h) {
            const uint8_t* at = t.w + p * panel_bytes + k * F::PAIR_BYTES;
            __builtin_prefetch(at + AHEAD);
            *(U*)(unpacked + p * (GROUP / 2 * LINE) + k * LINE + h * LANES * 4) = F::line(at, h);
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
  constexpr int P = 4;
  const int64_t panel_bytes = F::panel_bytes(depth);
  for (; rows > 0; rows -= PASS, x += PASS * x_stride, y += PASS * y_stride) {
    const int64_t now = std::min(PASS, rows);
    int64_t p = 0;
    for (; panels - p >= P && (WIDE >= P || now == 1); p += P)
      panels_of<A, F, P>(now, x, x_stride, w + p * panel_bytes, depth, y + p * WIDTH, y_stride);
    for (; p < panels; ++p)
      panels_of<A, F, 1>(now, x, x_stride, w + p * panel_bytes, depth, y + p * WIDTH, y_stride);
  }
}

// silu(gate) * up of n numbers; n is a multiple of 16.
template <class A>
inline void silu_and_mul(const float* gate, const float* up, typename A::Row* to, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const V g = *(const V*)(gate + i);
    A::store(to + i, g / (1.0f + exponential(-g)) * *(const V*)(up + i));
  }
}

// Another activation: gate * sigmoid(alpha * gate) * (up + up_offset), with gate at most `limit`, and up within both
// signs of it.
struct Activation {
  float alpha, limit, up_offset;
};

inline V at_most(V value, float limit) { return value > limit ? everywhere(limit) : value; }

// Of n numbers, to which biases are added before where there are any; n is a multiple of 16.
template <class A>
inline void activate(const Activation& of, const float* gate, const float* up, const float* gate_bias,
                     const float* up_bias, typename A::Row* to, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    V g = *(const V*)(gate + i), u = *(const V*)(up + i);
    if (gate_bias) g += *(const V*)(gate_bias + i), u += *(const V*)(up_bias + i);
    if (of.limit > 0) g = at_most(g, of.limit), u = -at_most(-at_most(u, of.limit), of.limit);
    A::store(to + i, g / (1.0f + exponential(-of.alpha * g)) * (u + of.up_offset));
  }
}

// Panels of one task: about four tasks for a thread, so that none waits long for another.
int64_t panels_of_task(int64_t panels, int64_t tasks_beside) {
  const int64_t wanted = panels * tasks_beside / (4 * omp_get_max_threads());
  return std::clamp<int64_t>(wanted / 4 * 4, 4, 16);
}

// So that rows below one another do not share a line of the cache.
inline int64_t spread(int64_t depth) { return depth + 32; }

template <class A, class F>
void linear(int64_t rows, const typename A::Row* x, int64_t x_stride, int64_t depth, const uint8_t* w, int64_t n,
            const float* bias, typename A::Row* y) {
  const int64_t panels = n / WIDTH, chunk = panels_of_task(panels, 1), panel_bytes = F::panel_bytes(depth);
  std::vector<typename A::Row> apart;
  if (rows > 2) {
    apart.resize(rows * spread(depth));
    for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * x_stride, depth, apart.data() + r * spread(depth));
    x = apart.data();
    x_stride = spread(depth);
  }
#pragma omp parallel if (rows * panels * panel_bytes > ALONE)
  {
    std::vector<float> scratch(rows * chunk * WIDTH);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < panels; p += chunk) {
      const int64_t now = std::min(chunk, panels - p), wide = now * WIDTH;
      product<A, F>(rows, x, x_stride, w + p * panel_bytes, depth, scratch.data(), wide, now);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < wide; c += LANES) {
          const V values = *(const V*)(scratch.data() + r * wide + c);
          A::store(y + r * n + p * WIDTH + c, bias ? values + *(const V*)(bias + p * WIDTH + c) : values);
        }
    }
  }
}

struct Chosen {
  int64_t rows, k, num_experts, hidden, inner;
  const void* x;
  int64_t x_stride;
  const int32_t* ids;
  int64_t ids_stride;
  const float* weights;
  int64_t weights_stride;
  const uint8_t *const *gate_up, *const *down;
  const float *const *gate_up_bias, *const *down_bias;
  const Activation* activation;
  void* work;
  float* combined;
  int64_t* num_rows;
};

struct Expert {
  const uint8_t *gate_up, *down;
  const float *gate_up_bias, *down_bias;
  int64_t first, count;
};

template <class A, class F>
int64_t experts_of(const Chosen& of) {
  typedef typename A::Row Row;
  const int64_t rows = of.rows, k = of.k, hidden = of.hidden, inner = of.inner;
  std::vector<std::vector<int64_t>> chosen(of.num_experts);
  for (int64_t i = 0; i < rows * k; ++i) {
    const int32_t expert = of.ids[i / k * of.ids_stride + i % k];
    if (expert == -1) continue;
    if (expert < -1 || expert >= of.num_experts || !of.gate_up[expert] || !of.down[expert]) return -1;
    chosen[expert].push_back(i);
  }
  std::vector<Expert> experts;
  std::vector<int64_t> order;
  for (int64_t e = 0; e < of.num_experts; ++e) {
    const int64_t count = chosen[e].size();
    if (!count) continue;
    experts.push_back({of.gate_up[e], of.down[e], of.gate_up_bias ? of.gate_up_bias[e] : nullptr,
                       of.down_bias ? of.down_bias[e] : nullptr, (int64_t)order.size(), count});
    order.insert(order.end(), chosen[e].begin(), chosen[e].end());
    of.num_rows[e] += count;
  }
  const int64_t x_apart = spread(hidden), inside_apart = spread(inner);
  Row *gathered = (Row*)of.work, *inside = gathered + rows * k * x_apart;
  for (int64_t i = 0; i < (int64_t)order.size(); ++i)
    std::copy_n((const Row*)of.x + order[i] / k * of.x_stride, hidden, gathered + i * x_apart);
  const int64_t num = experts.size(), in_panels = inner / WIDTH, out_panels = hidden / WIDTH;
  const int64_t in_bytes = F::panel_bytes(hidden), out_bytes = F::panel_bytes(inner);
  const int64_t in_chunk = panels_of_task(in_panels, num), in_tasks = (in_panels + in_chunk - 1) / in_chunk;
  const int64_t out_chunk = panels_of_task(out_panels, 1);
#pragma omp parallel
  {
    std::vector<float> gate, up;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num * in_tasks; ++task) {
      const Expert& expert = experts[task / in_tasks];
      const int64_t p = task % in_tasks * in_chunk, panels = std::min(in_chunk, in_panels - p), wide = panels * WIDTH;
      const Row* in = gathered + expert.first * x_apart;
      gate.resize(expert.count * wide);
      up.resize(expert.count * wide);
      product<A, F>(expert.count, in, x_apart, expert.gate_up + p * in_bytes, hidden, gate.data(), wide, panels);
      product<A, F>(expert.count, in, x_apart, expert.gate_up + (in_panels + p) * in_bytes, hidden, up.data(), wide,
                    panels);
      const float* bias = expert.gate_up_bias ? expert.gate_up_bias + p * WIDTH : nullptr;
      for (int64_t r = 0; r < expert.count; ++r) {
        Row* to = inside + (expert.first + r) * inside_apart + p * WIDTH;
        if (of.activation)
          activate<A>(*of.activation, gate.data() + r * wide, up.data() + r * wide, bias, bias ? bias + inner : nullptr,
                      to, wide);
        else
          silu_and_mul<A>(gate.data() + r * wide, up.data() + r * wide, to, wide);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < out_panels; p += out_chunk) {
      const int64_t panels = std::min(out_chunk, out_panels - p), wide = panels * WIDTH;
      for (int64_t r = 0; r < rows; ++r) std::fill_n(of.combined + r * hidden + p * WIDTH, wide, 0.0f);
      for (const Expert& expert : experts) {
        gate.resize(expert.count * wide);
        product<A, F>(expert.count, inside + expert.first * inside_apart, inside_apart, expert.down + p * out_bytes,
                      inner, gate.data(), wide, panels);
        for (int64_t r = 0; r < expert.count; ++r) {
          const int64_t i = order[expert.first + r];
          const float weight = of.weights[i / k * of.weights_stride + i % k];
          float* to = of.combined + i / k * hidden + p * WIDTH;
          for (int64_t c = 0; c < wide; ++c) to[c] += weight * gate[r * wide + c];
          if (const float* bias = expert.down_bias)
            for (int64_t c = 0; c < wide; ++c) to[c] += weight * bias[p * WIDTH + c];
        }
      }
    }
  }
  return num;
}

enum Format { BFLOAT16, INT8, INT4, FLOAT8 };

#ifdef __AVX512BF16__
#define MSI_WITH_ROWS(is_bfloat16, call) \
  if (is_bfloat16) {                     \
    typedef Dot A;                       \
    call;                                \
  } else {                               \
    typedef Fused A;                     \
    call;                                \
  }
#else
#define MSI_WITH_ROWS(is_bfloat16, call) \
  {                                      \
    typedef Fused A;                     \
    call;                                \
  }
#endif

#define MSI_WITH(format, is_bfloat16, call)                       \
  switch (format) {                                               \
    case INT8: {                                                  \
      typedef Int8 F;                                             \
      MSI_WITH_ROWS(is_bfloat16, call);                           \
      break;                                                      \
    }                                                             \
    case INT4: {                                                  \
      typedef Int4 F;                                             \
      MSI_WITH_ROWS(is_bfloat16, call);                           \
      break;                                                      \
    }                                                             \
    case FLOAT8: {                                                \
      typedef Float8 F;                                           \
      MSI_WITH_ROWS(is_bfloat16, call);                           \
      break;                                                      \
    }                                                             \
    default: {                                                    \
      typedef Bfloat16 F;                                         \
      MSI_WITH_ROWS(is_bfloat16, call);                           \
    }                                                             \
  }

}  // namespace

extern "C" {

// Whether rows can be bfloat16.
int64_t msi_has_bfloat16_rows() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// Bytes of a matrix [n, depth] in panels; n is a multiple of 16, and depth of 2.
int64_t msi_packed_bytes(int64_t format, int64_t n, int64_t depth) {
  const int64_t panel = format == INT8     ? Int8::panel_bytes(depth)
                        : format == INT4   ? Int4::panel_bytes(depth)
                        : format == FLOAT8 ? Float8::panel_bytes(depth)
                                           : Bfloat16::panel_bytes(depth);
  return n / WIDTH * panel;
}

// w [n, depth] as panels: bfloat16; or int8 or float8 with scales float [n, groups].
void msi_pack(int64_t format, const void* w, const float* scales, int64_t n, int64_t depth, uint8_t* packed) {
  const int64_t panel_bytes = msi_packed_bytes(format, WIDTH, depth), groups = (depth + GROUP - 1) / GROUP;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < n / WIDTH; ++p) {
    uint8_t* panel = packed + p * panel_bytes;
    for (int64_t l = 0; l < WIDTH; ++l) {
      const int64_t row = p * WIDTH + l;
      if (format == BFLOAT16) {
        const uint16_t* from = (const uint16_t*)w + row * depth;
        for (int64_t k = 0; k < depth; ++k) ((uint16_t*)panel)[k / 2 * 2 * WIDTH + 2 * l + k % 2] = from[k];
        continue;
      }
      const int8_t* from = (const int8_t*)w + row * depth;
      const int64_t group_bytes = format == INT4 ? Int4::GROUP_BYTES : Int8::GROUP_BYTES;
      const float factor = format == FLOAT8 ? Float8::SCALE : 1.0f;
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* at = panel + g * group_bytes;
        ((float*)at)[l] = scales[row * groups + g] * factor;
        at += LINE;
        for (int64_t i = 0; i < std::min(GROUP, depth - g * GROUP); ++i) {
          const int8_t value = from[g * GROUP + i];
          if (format != INT4)
            at[i * WIDTH + l] = value;
          else if (i % 2 == 0)
            at[i / 2 * WIDTH + l] = value + 8;
          else
            at[i / 2 * WIDTH + l] |= (value + 8) << 4;
        }
      }
    }
  }
}

// y [rows, n] = x [rows, depth] times the packed w, plus a bias where there is one; y is contiguous, and of x's dtype.
void msi_linear(int64_t format, int64_t is_bfloat16, int64_t rows, const void* x, int64_t x_stride, int64_t depth,
                const uint8_t* w, int64_t n, const float* bias, void* y) {
  MSI_WITH(format, is_bfloat16,
           (linear<A, F>(rows, (const A::Row*)x, x_stride, depth, w, n, bias, (A::Row*)y)))
}

// Values of work for so many rows, each of a row's dtype.
int64_t msi_work_values(int64_t rows, int64_t k, int64_t hidden, int64_t inner) {
  return rows * k * (spread(hidden) + spread(inner));
}

// Adds up each row's experts by their weights: combined [rows, hidden], which need not be zero.
//   x [rows, x_stride]; topk_ids [rows, ids_stride], -1 for an expert elsewhere; topk_weights [rows, weights_stride]
//   gate_up, down: of each expert, packed [2 * inner, hidden] and [hidden, inner]
//   gate_up_bias, down_bias: of each expert, [2 * inner] and [hidden]; null where there are none
//   activation: three floats as `Activation` has them; null for silu(gate) * up, of experts without biases
//   work: of x's dtype, `msi_work_values` of them
//   num_rows: of each expert, to which this is added
// Returns how many experts had rows; -1, and does nothing, when there is no such expert, or it has no weights.
int64_t msi_experts(int64_t format, int64_t is_bfloat16, int64_t rows, int64_t k, int64_t num_experts, int64_t hidden,
                    int64_t inner, const void* x, int64_t x_stride, const int32_t* topk_ids, int64_t ids_stride,
                    const float* topk_weights, int64_t weights_stride, const uint8_t* const* gate_up,
                    const uint8_t* const* down, const float* const* gate_up_bias, const float* const* down_bias,
                    const float* activation, void* work, float* combined, int64_t* num_rows) {
  const Chosen chosen{rows,      k,          num_experts,  hidden,         inner,   x,
                      x_stride,  topk_ids,   ids_stride,   topk_weights,   weights_stride, gate_up,
                      down,      gate_up_bias, down_bias,  (const Activation*)activation, work, combined,
                      num_rows};
  int64_t num = -1;
  MSI_WITH(format, is_bfloat16, (num = experts_of<A, F>(chosen)))
  return num;
}
}
