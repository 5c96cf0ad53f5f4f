// Products for calls from outside, each with threads of its own, and the same as steps of a team; and how matrices are packed.

#include <omp.h>

#include <vector>

#include "panels.h"
#include "steps.h"

namespace {

// silu(gate) * up of n numbers; n is a multiple of 16.
template <class A>
inline void silu_and_mul(const float* gate, const float* up, typename A::Row* to, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const V g = *(const V*)(gate + i);
    A::store(to + i, g / (1.0f + exponential(-g)) * *(const V*)(up + i));
  }
}

inline V at_most(V value, float limit) { return value > limit ? everywhere(limit) : value; }

// Another activation, of n numbers, to which biases are added before where there are any; n is a multiple of 16.
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
int64_t panels_of_task(int64_t panels, int64_t tasks_beside, int num_threads) {
  const int64_t wanted = panels * tasks_beside / (4 * num_threads);
  return std::clamp<int64_t>(wanted / 4 * 4, 4, 16);
}

// A product, by tasks of some panels.
template <class A, class F>
struct Linear {
  typedef typename A::Row Row;
  const Matrix& matrix;
  int64_t rows;
  const Row* x;
  int64_t x_stride;
  Row* y;
  int64_t chunk, num_tasks;

  Linear(const Matrix& matrix, int64_t rows, const Row* x, int64_t x_stride, Row* y, int num_threads)
      : matrix(matrix), rows(rows), x(x), x_stride(x_stride), y(y) {
    const int64_t panels = matrix.outputs / WIDTH;
    chunk = panels_of_task(panels, 1, num_threads);
    num_tasks = (panels + chunk - 1) / chunk;
  }

  void run(int64_t task, Room& rooms) const {
    std::vector<float>& room = rooms.first;
    const int64_t p = task * chunk, panels = std::min(chunk, matrix.outputs / WIDTH - p), wide = panels * WIDTH;
    room.resize(rows * wide);
    product<A, F>(rows, x, x_stride, matrix.panels + p * F::panel_bytes(matrix.depth), matrix.depth, room.data(), wide,
                  panels);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < wide; c += LANES) {
        const V values = load(room.data() + r * wide + c);
        const float* bias = matrix.bias ? matrix.bias + p * WIDTH + c : nullptr;
        A::store(y + r * matrix.outputs + p * WIDTH + c, bias ? values + load(bias) : values);
      }
  }
};

template <class A, class F>
void linear(int64_t rows, const typename A::Row* x, int64_t x_stride, const Matrix& matrix, typename A::Row* y) {
  const int64_t depth = matrix.depth;
  std::vector<typename A::Row> apart;
  if (rows > 2) {
    apart.resize(rows * spread(depth));
    for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * x_stride, depth, apart.data() + r * spread(depth));
    x = apart.data();
    x_stride = spread(depth);
  }
  const Linear<A, F> of(matrix, rows, x, x_stride, y, omp_get_max_threads());
#pragma omp parallel if (rows * (matrix.outputs / WIDTH) * F::panel_bytes(depth) > ALONE)
  {
    Room room;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < of.num_tasks; ++task) of.run(task, room);
  }
}

struct Expert {
  const uint8_t *gate_up, *down;
  const float *gate_up_bias, *down_bias;
  int64_t first, count;
};

// The experts of a layer, by tasks: first some panels of one's gate and up, then some of all their downs.
template <class A, class F>
struct Experts {
  typedef typename A::Row Row;
  const Chosen& of;
  Row *gathered, *inside;  // [rows * k, spread(hidden)] and [rows * k, spread(inner)]
  bool are_here = true;    // all that were chosen
  std::vector<Expert> experts;
  std::vector<int64_t> order;
  int64_t in_chunk = 0, out_chunk = 0, in_tasks = 0, tasks_in = 0, tasks_out = 0;

  Experts(const Chosen& of, Row* gathered, Row* inside, int num_threads) : of(of), gathered(gathered), inside(inside) {
    std::vector<std::vector<int64_t>> chosen(of.num_experts);
    for (int64_t i = 0; i < of.rows * of.k; ++i) {
      const int32_t expert = of.ids[i / of.k * of.ids_stride + i % of.k];
      if (expert == -1) continue;
      are_here = are_here && expert >= 0 && expert < of.num_experts && of.gate_up[expert] && of.down[expert];
      if (!are_here) return;
      chosen[expert].push_back(i);
    }
    for (int64_t e = 0; e < of.num_experts; ++e) {
      const int64_t count = chosen[e].size();
      if (!count) continue;
      experts.push_back({of.gate_up[e], of.down[e], of.gate_up_bias ? of.gate_up_bias[e] : nullptr,
                         of.down_bias ? of.down_bias[e] : nullptr, (int64_t)order.size(), count});
      order.insert(order.end(), chosen[e].begin(), chosen[e].end());
    }
    for (int64_t i = 0; i < (int64_t)order.size(); ++i)
      std::copy_n((const Row*)of.x + order[i] / of.k * of.x_stride, of.hidden, gathered + i * spread(of.hidden));
    const int64_t num = experts.size(), in_panels = of.inner / WIDTH, out_panels = of.hidden / WIDTH;
    in_chunk = panels_of_task(in_panels, num, num_threads);
    out_chunk = panels_of_task(out_panels, 1, num_threads);
    in_tasks = (in_panels + in_chunk - 1) / in_chunk;
    tasks_in = num * in_tasks;
    tasks_out = (out_panels + out_chunk - 1) / out_chunk;
  }

  void count() const {
    for (const int64_t i : order) ++of.num_rows[of.ids[i / of.k * of.ids_stride + i % of.k]];
  }

  void enter(int64_t task, Room& room) const {
    const Expert& expert = experts[task / in_tasks];
    const int64_t in_panels = of.inner / WIDTH, bytes = F::panel_bytes(of.hidden), x_apart = spread(of.hidden);
    const int64_t p = task % in_tasks * in_chunk, panels = std::min(in_chunk, in_panels - p), wide = panels * WIDTH;
    const Row* in = gathered + expert.first * x_apart;
    room.first.resize(expert.count * wide);
    room.second.resize(expert.count * wide);
    float *gate = room.first.data(), *up = room.second.data();
    product<A, F>(expert.count, in, x_apart, expert.gate_up + p * bytes, of.hidden, gate, wide, panels);
    product<A, F>(expert.count, in, x_apart, expert.gate_up + (in_panels + p) * bytes, of.hidden, up, wide, panels);
    const float* bias = expert.gate_up_bias ? expert.gate_up_bias + p * WIDTH : nullptr;
    for (int64_t r = 0; r < expert.count; ++r, gate += wide, up += wide) {
      Row* to = inside + (expert.first + r) * spread(of.inner) + p * WIDTH;
      if (of.activation)
        activate<A>(*of.activation, gate, up, bias, bias ? bias + of.inner : nullptr, to, wide);
      else
        silu_and_mul<A>(gate, up, to, wide);
    }
  }

  void leave(int64_t task, Room& room) const {
    const int64_t p = task * out_chunk, panels = std::min(out_chunk, of.hidden / WIDTH - p), wide = panels * WIDTH;
    for (int64_t r = 0; r < of.rows; ++r) std::fill_n(of.combined + r * of.hidden + p * WIDTH, wide, 0.0f);
    for (const Expert& expert : experts) {
      room.first.resize(expert.count * wide);
      product<A, F>(expert.count, inside + expert.first * spread(of.inner), spread(of.inner),
                    expert.down + p * F::panel_bytes(of.inner), of.inner, room.first.data(), wide, panels);
      for (int64_t r = 0; r < expert.count; ++r) {
        const int64_t i = order[expert.first + r];
        const float weight = of.weights[i / of.k * of.weights_stride + i % of.k];
        const float* values = room.first.data() + r * wide;
        float* to = of.combined + i / of.k * of.hidden + p * WIDTH;
        for (int64_t c = 0; c < wide; ++c) to[c] += weight * values[c];
        if (const float* bias = expert.down_bias)
          for (int64_t c = 0; c < wide; ++c) to[c] += weight * bias[p * WIDTH + c];
      }
    }
  }
};

template <class A, class F>
int64_t experts_of(const Chosen& of) {
  typedef typename A::Row Row;
  Row *gathered = (Row*)of.work, *inside = gathered + of.rows * of.k * spread(of.hidden);
  const Experts<A, F> layer(of, gathered, inside, omp_get_max_threads());
  if (!layer.are_here) return -1;
  layer.count();
#pragma omp parallel
  {
    Room room;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < layer.tasks_in; ++task) layer.enter(task, room);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < layer.tasks_out; ++task) layer.leave(task, room);
  }
  return layer.experts.size();
}

template <class A, class F>
int64_t experts_by(Team& team, const Chosen& of) {
  typedef typename A::Row Row;
  Row *gathered = (Row*)of.work, *inside = gathered + of.rows * of.k * spread(of.hidden);
  const Experts<A, F> layer(of, gathered, inside, team.size);
  if (!layer.are_here) return -1;
  layer.count();
  team.share(layer.tasks_in, [&](int64_t task, Room& room) { layer.enter(task, room); });
  team.share(layer.tasks_out, [&](int64_t task, Room& room) { layer.leave(task, room); });
  return layer.experts.size();
}

template <class A, class F>
void linear_by(Team& team, int64_t rows, const typename A::Row* x, int64_t x_stride, const Matrix& matrix,
               typename A::Row* y) {
  const Linear<A, F> of(matrix, rows, x, x_stride, y, team.size);
  team.share(of.num_tasks, [&](int64_t task, Room& room) { of.run(task, room); });
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

void linear_in(Team& team, const Matrix& matrix, bool is_bfloat16, int64_t rows, const void* x, int64_t x_stride, void* y) {
  MSI_WITH(matrix.format, is_bfloat16, (linear_by<A, F>(team, rows, (const A::Row*)x, x_stride, matrix, (A::Row*)y)))
}

int64_t experts_in(Team& team, int64_t format, bool is_bfloat16, const Chosen& of) {
  int64_t num = -1;
  MSI_WITH(format, is_bfloat16, (num = experts_by<A, F>(team, of)))
  return num;
}

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
      const float factor = format == INT8 ? Int8::SCALE : format == INT4 ? Int4::SCALE : Float8::SCALE;
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* at = panel + g * group_bytes;
        ((float*)at)[l] = scales[row * groups + g] * factor;
        at += LINE;
        for (int64_t i = 0; i < std::min(GROUP, depth - g * GROUP); ++i) {
          const int8_t value = from[g * GROUP + i];
          if (format == INT8)
            at[Int8::place(i, l)] = value;
          else if (format == FLOAT8)
            at[i * WIDTH + l] = value;
          else if (i % 2 == 0)
            at[i / 2 * WIDTH + l] = value & 15;
          else
            at[i / 2 * WIDTH + l] |= value << 4;
        }
      }
    }
  }
}

// y [rows, n] = x [rows, depth] times the packed w, plus a bias where there is one; y is contiguous, and of x's dtype.
void msi_linear(int64_t format, int64_t is_bfloat16, int64_t rows, const void* x, int64_t x_stride, int64_t depth,
                const uint8_t* w, int64_t n, const float* bias, void* y) {
  const Matrix matrix{w, bias, format, n, depth};
  MSI_WITH(format, is_bfloat16, (linear<A, F>(rows, (const A::Row*)x, x_stride, matrix, (A::Row*)y)))
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
