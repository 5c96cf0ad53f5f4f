// Products of float32 rows with bfloat16 matrices that are widened in registers: memory is read once, as bfloat16.
//
// A matrix [n, depth] lies in panels of 16 of its rows: [n / 16, depth, 16], where neighbours are rows l and l + 8 of a
// panel, so that one shift and one mask widen a line. Each number of a result is one chain of fused multiply-adds over
// the depth, however many rows there are: what stands beside a row does not change its numbers.

#include <algorithm>
#include <cstdint>
#include <vector>

#include <omp.h>

namespace {

constexpr int LANES = 8;
constexpr int WIDTH = 2 * LANES;  // of a panel
constexpr int FEW = 6;            // rows up to which widening a line again for each product costs less than keeping it
constexpr int64_t DEPTH = 128;    // of a panel's part that is kept widened: 8 KB
constexpr int ROWS = 96;          // that pass over such a part before the next

typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline V low(U line) { return (V)(line << 16); }
inline V high(U line) { return (V)(line & 0xffff0000u); }

// M rows with P panels: y [M, P * 16] = x [M, depth] times the panels.
template <int M, int P>
inline void few(const float* x, int64_t x_stride, const uint16_t* w, int64_t depth, float* y, int64_t y_stride) {
  V sums[M][P][2];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) sums[m][p][0] = sums[m][p][1] = V{};
  for (int64_t k = 0; k < depth; ++k) {
    V value[M];
    for (int m = 0; m < M; ++m) value[m] = V{} + x[m * x_stride + k];
    for (int p = 0; p < P; ++p) {
      const uint16_t* at = w + (p * depth + k) * WIDTH;
      __builtin_prefetch(at + 512);
      const U line = *(const U*)at;
      const V a = low(line), b = high(line);
      for (int m = 0; m < M; ++m) {
        sums[m][p][0] += a * value[m];
        sums[m][p][1] += b * value[m];
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p)
      for (int h = 0; h < 2; ++h) *(V*)(y + m * y_stride + p * WIDTH + h * LANES) = sums[m][p][h];
}

// M rows with a part of one panel that is widened already; adds to y unless it is the first.
template <int M>
inline void part(const float* x, int64_t x_stride, const float* w, int64_t depth, float* y, int64_t y_stride,
                 bool is_first) {
  V sums[M][2];
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) sums[m][h] = is_first ? V{} : *(const V*)(y + m * y_stride + h * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    const V a = *(const V*)(w + k * WIDTH), b = *(const V*)(w + k * WIDTH + LANES);
    for (int m = 0; m < M; ++m) {
      const V value = V{} + x[m * x_stride + k];
      sums[m][0] += a * value;
      sums[m][1] += b * value;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int h = 0; h < 2; ++h) *(V*)(y + m * y_stride + h * LANES) = sums[m][h];
}

void parts(int rows, const float* x, int64_t x_stride, const float* w, int64_t depth, float* y, int64_t y_stride,
           bool is_first) {
  for (int left = (rows + FEW - 1) / FEW; rows > 0; --left) {  // evenly: 8 rows are 4 and 4, not 6 and 2
    const int now = (rows + left - 1) / left;
    switch (now) {
      case 6: part<6>(x, x_stride, w, depth, y, y_stride, is_first); break;
      case 5: part<5>(x, x_stride, w, depth, y, y_stride, is_first); break;
      case 4: part<4>(x, x_stride, w, depth, y, y_stride, is_first); break;
      case 3: part<3>(x, x_stride, w, depth, y, y_stride, is_first); break;
      case 2: part<2>(x, x_stride, w, depth, y, y_stride, is_first); break;
      default: part<1>(x, x_stride, w, depth, y, y_stride, is_first);
    }
    rows -= now;
    x += now * x_stride;
    y += now * y_stride;
  }
}

template <int M, int P>
void few_in_all(const float* x, int64_t x_stride, const uint16_t* w, int64_t depth, float* y, int64_t y_stride,
                int64_t panels) {
  for (; panels >= P; panels -= P, w += P * depth * WIDTH, y += P * WIDTH) few<M, P>(x, x_stride, w, depth, y, y_stride);
  for (; panels > 0; --panels, w += depth * WIDTH, y += WIDTH) few<M, 1>(x, x_stride, w, depth, y, y_stride);
}

// y [rows, panels * 16] = x [rows, depth] times so many panels, on this thread.
void product(int rows, const float* x, int64_t x_stride, const uint16_t* w, int64_t depth, float* y, int64_t y_stride,
             int64_t panels) {
  switch (rows) {
    case 0: return;
    case 1: return few_in_all<1, 4>(x, x_stride, w, depth, y, y_stride, panels);
    case 2: return few_in_all<2, 2>(x, x_stride, w, depth, y, y_stride, panels);
    case 3: return few_in_all<3, 2>(x, x_stride, w, depth, y, y_stride, panels);
    case 4: return few_in_all<4, 1>(x, x_stride, w, depth, y, y_stride, panels);
    case 5: return few_in_all<5, 1>(x, x_stride, w, depth, y, y_stride, panels);
    case 6: return few_in_all<6, 1>(x, x_stride, w, depth, y, y_stride, panels);
  }
  alignas(64) float wide[DEPTH * WIDTH];
  for (int from = 0; from < rows; from += ROWS) {
    const int num = std::min(ROWS, rows - from);
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t deep = std::min(DEPTH, depth - k);
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t i = 0; i < deep; ++i) {
          const uint16_t* at = w + (p * depth + k + i) * WIDTH;
          const U line = *(const U*)at;
          *(V*)(wide + i * WIDTH) = low(line);
          *(V*)(wide + i * WIDTH + LANES) = high(line);
        }
        parts(num, x + from * x_stride + k, x_stride, wide, deep, y + from * y_stride + p * WIDTH, y_stride, k == 0);
      }
    }
  }
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

// gate [n] becomes silu(gate) * up; n is a multiple of 8.
inline void silu_and_mul(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const V g = *(const V*)(gate + i);
    *(V*)(gate + i) = g / (1.0f + exponential(-g)) * *(const V*)(up + i);
  }
}

// Panels of one task: about four tasks for a thread, so that none waits long for another.
int64_t panels_of_task(int64_t panels, int64_t tasks_beside) {
  const int64_t wanted = panels * tasks_beside / (4 * omp_get_max_threads());
  return std::clamp<int64_t>(wanted / 4 * 4, 4, 16);
}

}  // namespace

extern "C" {

// w [n, depth] as panels; n is a multiple of 16.
void msi_pack(const uint16_t* w, int64_t n, int64_t depth, uint16_t* panels) {
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < n / WIDTH; ++p)
    for (int64_t k = 0; k < depth; ++k)
      for (int l = 0; l < LANES; ++l) {
        uint16_t* to = panels + (p * depth + k) * WIDTH + 2 * l;
        to[0] = w[(p * WIDTH + l) * depth + k];
        to[1] = w[(p * WIDTH + LANES + l) * depth + k];
      }
}

// y [rows, n] = x [rows, depth] times the packed w, both contiguous.
void msi_linear(int64_t rows, const float* x, int64_t depth, const uint16_t* w, int64_t n, float* y) {
  const int64_t panels = n / WIDTH, chunk = panels_of_task(panels, 1);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t p = 0; p < panels; p += chunk)
    product(rows, x, depth, w + p * depth * WIDTH, depth, y + p * WIDTH, n, std::min(chunk, panels - p));
}

// Adds up each row's experts by their weights: combined [rows, hidden], which need not be zero.
//   x [rows, x_stride]; topk_ids [rows, ids_stride], -1 for an expert elsewhere; topk_weights [rows, weights_stride]
//   gate_up, down: of each expert, packed [2 * inner, hidden] and [hidden, inner]
//   work: float [rows * k, hidden + inner]
//   num_rows: of each expert, to which this is added
// Returns how many experts had rows; -1, and does nothing, when there is no such expert, or it has no weights.
int64_t msi_experts(int64_t rows, int64_t k, int64_t num_experts, int64_t hidden, int64_t inner, const float* x,
                    int64_t x_stride, const int32_t* topk_ids, int64_t ids_stride, const float* topk_weights,
                    int64_t weights_stride, const uint16_t* const* gate_up, const uint16_t* const* down, float* work,
                    float* combined, int64_t* num_rows) {
  struct Expert {
    const uint16_t *gate_up, *down;
    int64_t first, count;
  };
  std::vector<std::vector<int64_t>> chosen(num_experts);
  for (int64_t i = 0; i < rows * k; ++i) {
    const int32_t expert = topk_ids[i / k * ids_stride + i % k];
    if (expert == -1) continue;
    if (expert < -1 || expert >= num_experts || !gate_up[expert] || !down[expert]) return -1;
    chosen[expert].push_back(i);
  }
  std::vector<Expert> experts;
  std::vector<int64_t> order;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t count = chosen[e].size();
    if (!count) continue;
    experts.push_back({gate_up[e], down[e], (int64_t)order.size(), count});
    order.insert(order.end(), chosen[e].begin(), chosen[e].end());
    num_rows[e] += count;
  }
  float *gathered = work, *inside = work + rows * k * hidden;
  for (int64_t i = 0; i < (int64_t)order.size(); ++i)
    std::copy_n(x + order[i] / k * x_stride, hidden, gathered + i * hidden);
  const int64_t num = experts.size(), in_panels = inner / WIDTH, out_panels = hidden / WIDTH;
  const int64_t in_chunk = panels_of_task(in_panels, num), in_tasks = (in_panels + in_chunk - 1) / in_chunk;
  const int64_t out_chunk = panels_of_task(out_panels, 1);
#pragma omp parallel
  {
    std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num * in_tasks; ++task) {
      const Expert& expert = experts[task / in_tasks];
      const int64_t p = task % in_tasks * in_chunk, panels = std::min(in_chunk, in_panels - p), wide = panels * WIDTH;
      const float* in = gathered + expert.first * hidden;
      float* out = inside + expert.first * inner + p * WIDTH;
      scratch.resize(expert.count * wide);
      product(expert.count, in, hidden, expert.gate_up + p * hidden * WIDTH, hidden, out, inner, panels);
      product(expert.count, in, hidden, expert.gate_up + (in_panels + p) * hidden * WIDTH, hidden, scratch.data(), wide,
              panels);
      for (int64_t r = 0; r < expert.count; ++r) silu_and_mul(out + r * inner, scratch.data() + r * wide, wide);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < out_panels; p += out_chunk) {
      const int64_t panels = std::min(out_chunk, out_panels - p), wide = panels * WIDTH;
      for (int64_t r = 0; r < rows; ++r) std::fill_n(combined + r * hidden + p * WIDTH, wide, 0.0f);
      for (const Expert& expert : experts) {
        scratch.resize(expert.count * wide);
        product(expert.count, inside + expert.first * inner, inner, expert.down + p * inner * WIDTH, inner,
                scratch.data(), wide, panels);
        for (int64_t r = 0; r < expert.count; ++r) {
          const int64_t i = order[expert.first + r];
          const float weight = topk_weights[i / k * weights_stride + i % k];
          float* to = combined + i / k * hidden + p * WIDTH;
          for (int64_t c = 0; c < wide; ++c) to[c] += weight * scratch[r * wide + c];
        }
      }
    }
  }
  return num;
}
}
