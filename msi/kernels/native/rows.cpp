// What lies between products in a layer, a call for each: norms, rotary embedding, attention of single tokens, routing.
//
// Rows are float32 or bfloat16, a cache is too or e4m3, and what is computed is float32. What stands beside a row does not change its numbers.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "steps.h"
#include "vectors.h"

namespace {

constexpr int64_t BLOCK_TOKENS = 16;
constexpr int64_t SHARED_WORK = 8000;  // dot products from which on a second thread pays

template <class Row>
inline void norm_row(int64_t n, Row* x, const Row* added, const Row* weight, float eps, Row* y) {
  Sum squares;
  for (int64_t i = 0; i < n; i += LANES) {
    if (added) store(x + i, load(x + i) + load(added + i));
    const V values = load(x + i);
    squares.add(i / LANES % (16 / LANES), values, values);
  }
  const float scale = 1.0f / std::sqrt(squares.total() / n + eps);
  for (int64_t i = 0; i < n; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
}

template <class Row>
void norm(int64_t rows, int64_t n, Row* x, const Row* added, int64_t added_stride, const Row* weight, float eps,
          Row* y) {
#pragma omp parallel for schedule(static) if (rows > 32)
  for (int64_t r = 0; r < rows; ++r)
    norm_row(n, x + r * n, added ? added + r * added_stride : nullptr, weight, eps, y + r * n);
}

// By its inverse root mean square and the weight, n numbers.
template <class Row>
void norm_head(Row* head, const Row* weight, int64_t n, float eps) {
  Sum squares;
  for (int64_t i = 0; i < n; i += LANES) {
    const V values = load(head + i);
    squares.add(i / LANES % (16 / LANES), values, values);
  }
  const float scale = 1.0f / std::sqrt(squares.total() / n + eps);
  for (int64_t i = 0; i < n; i += LANES) store(head + i, load(head + i) * scale * load(weight + i));
}

// By tables of 2 half numbers.
template <class Row>
inline void rotate_head(Row* head, const Row* cos, const Row* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += LANES) {
    const V a = load(head + i), b = load(head + half + i);
    store(head + i, a * load(cos + i) + b * load(sin + i));
    store(head + half + i, b * load(cos + half + i) + a * load(sin + half + i));
  }
}

// n numbers, as a cache has them.
template <class Row, class Cached>
inline void keep(const Row* from, Cached* to, int64_t n) {
  if constexpr (std::is_same_v<Row, Cached>)
    std::memcpy(to, from, n * sizeof(Row));
  else
    for (int64_t i = 0; i < n; i += LANES) store(to + i, load(from + i));
}

template <class Row, class Cached>
void rope_and_write(int64_t rows, int64_t num_q, int64_t num_kv, int64_t head_dim, int64_t rotated, Row* heads,
                    const Row* cos, const Row* sin, Cached* cache, const int64_t* kv_rows, const Row* weights, float eps) {
  const int64_t width = (num_q + 2 * num_kv) * head_dim, kv = num_kv * head_dim;
#pragma omp parallel for schedule(static) if (rows > 32)
  for (int64_t r = 0; r < rows; ++r) {
    Row* row = heads + r * width;
    for (int64_t h = 0; h < num_q + num_kv; ++h) {
      if (weights) norm_head(row + h * head_dim, weights + h * head_dim, head_dim, eps);
      rotate_head(row + h * head_dim, cos + r * rotated, sin + r * rotated, rotated / 2);
    }
    const Row* keys = row + num_q * head_dim;
    for (int64_t half = 0; half < 2; ++half) keep(keys + half * kv, cache + kv_rows[2 * r + half] * kv, kv);
  }
}

// One query of a sequence, of S heads of those that share a KV head: a key or a value is read once for all of them.
template <class Row, class Cached, int S>
void attend(const Row* query, const Cached* cache, const int32_t* table, int64_t first, int64_t context, int64_t num_kv,
            int64_t kv_head, int64_t head_dim, const float* sinks, Row* out, std::vector<float>& room) {
  const int64_t length = context - first, apart = (length + 15) / 16 * 16;
  room.assign(S * (head_dim + apart), 0.0f);
  float *q = room.data(), *scores = q + S * head_dim;
  const float scale = 1.0f / std::sqrt((float)head_dim);
  for (int64_t i = 0; i < S * head_dim; i += LANES) store(q + i, load(query + i) * scale);
  const auto row_of = [&](int64_t t, int64_t half) {
    return cache + ((table[t / BLOCK_TOKENS] * 2 + half) * BLOCK_TOKENS + t % BLOCK_TOKENS) * num_kv * head_dim +
           kv_head * head_dim;
  };
  for (int64_t t = 0; t < length; ++t) {
    const Cached* key = row_of(first + t, 0);
    Sum dots[S];
    for (int64_t i = 0; i < head_dim; i += 16)
#pragma GCC unroll 2
      for (int64_t h = 0; h < 16 / LANES; ++h) {
        const V values = load(key + i + h * LANES);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) dots[s].add(h, values, load(q + s * head_dim + i + h * LANES));
      }
    for (int s = 0; s < S; ++s) scores[s * apart + t] = dots[s].total();
  }
  for (int s = 0; s < S; ++s) {
    float *of = scores + s * apart, most = of[0], total = 0.0f;
    for (int64_t t = 1; t < length; ++t) most = std::max(most, of[t]);
    if (sinks) most = std::max(most, sinks[s]);
    for (int64_t t = 0; t < length; t += LANES) store(of + t, exponential(load(of + t) - most));
    for (int64_t t = 0; t < length; ++t) total += of[t];
    if (sinks) total += std::exp(sinks[s] - most);
    for (int64_t t = 0; t < length; ++t) of[t] /= total;
  }
  for (int64_t i = 0; i < head_dim; i += LANES) {
    V sums[S] = {};
    for (int64_t t = 0; t < length; ++t) {
      const V values = load(row_of(first + t, 1) + i);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sums[s] = fused(everywhere(scores[s * apart + t]), values, sums[s]);
    }
    for (int s = 0; s < S; ++s) store(out + s * head_dim + i, sums[s]);
  }
}

// One query of a sequence, of all heads that share a KV head.
template <class Row, class Cached>
inline void attend_shared(int64_t shared, const Row* query, const Cached* cache, const int32_t* table, int64_t context,
                          int64_t window, int64_t num_kv, int64_t kv_head, int64_t head_dim, const float* sinks, Row* out,
                          std::vector<float>& room) {
  const int64_t first = window ? std::max<int64_t>(0, context - window) : 0;
  for (int64_t s = 0; s < shared;) {
    const int64_t left = shared - s;
    const auto of = left >= 8   ? attend<Row, Cached, 8>
                    : left >= 4 ? attend<Row, Cached, 4>
                    : left >= 2 ? attend<Row, Cached, 2>
                                : attend<Row, Cached, 1>;
    of(query + s * head_dim, cache, table, first, context, num_kv, kv_head, head_dim, sinks ? sinks + s : nullptr,
       out + s * head_dim, room);
    s += left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }
}

template <class Row, class Cached>
void decode(int64_t num_seqs, int64_t num_heads, int64_t num_kv, int64_t head_dim, const Row* query, int64_t stride,
            const Cached* cache, const int32_t* tables, int64_t tables_stride, const int32_t* contexts, int64_t window,
            const float* sinks, Row* out) {
  const int64_t shared = num_heads / num_kv;
  int64_t work = 0;
  for (int64_t i = 0; i < num_seqs; ++i) work += contexts[i] * num_heads;
#pragma omp parallel if (work > SHARED_WORK)
  {
    std::vector<float> room;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_seqs * num_kv; ++task) {
      const int64_t i = task / num_kv, head = task % num_kv, at = head * shared;
      attend_shared(shared, query + i * stride + at * head_dim, cache, tables + i * tables_stride, contexts[i], window,
                    num_kv, head, head_dim, sinks ? sinks + at : nullptr, out + (i * num_heads + at) * head_dim, room);
    }
  }
}

// A task for each sequence and KV head: what shares that is normed, rotated, written and attended to by one thread.
template <class Row, class Cached>
void attend_by(Team& team, const Attention& of) {
  const int64_t shared = of.num_q / of.num_kv, head_dim = of.head_dim, kv = of.num_kv * head_dim;
  team.share(of.rows * of.num_kv, [&](int64_t task, Room& room) {
    const int64_t r = task / of.num_kv, head = task % of.num_kv, at = head * shared, key_at = of.num_q + head;
    Row* row = (Row*)of.heads + r * (of.num_q + 2 * of.num_kv) * head_dim;
    const auto turn = [&](int64_t h) {
      if (of.norm) norm_head(row + h * head_dim, (const Row*)of.norm + h * head_dim, head_dim, of.eps);
      rotate_head(row + h * head_dim, (const Row*)of.cos + r * of.rotated, (const Row*)of.sin + r * of.rotated,
                  of.rotated / 2);
    };
    for (int64_t h = at; h < at + shared; ++h) turn(h);
    turn(key_at);
    Cached* cache = (Cached*)of.cache;
    for (int64_t half = 0; half < 2; ++half)
      keep(row + (key_at + half * of.num_kv) * head_dim, cache + of.kv_rows[2 * r + half] * kv + head * head_dim,
           head_dim);
    attend_shared(shared, row + at * head_dim, (const Cached*)cache, of.tables + r * of.tables_stride, of.contexts[r],
                  of.window, of.num_kv, head, head_dim, of.sinks ? of.sinks + at : nullptr,
                  (Row*)of.out + r * of.out_stride + at * head_dim, room.first);
  });
}

inline float number(float value) { return value; }
inline float number(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// A NaN is larger than any number, as it is for torch.
inline bool is_larger(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

template <class Row>
void topk_softmax(int64_t rows, int64_t n, int64_t stride, int64_t k, bool is_renormalised, const Row* logits,
                  float* weights, int64_t* ids) {
  std::vector<float> values(n);
  for (int64_t r = 0; r < rows; ++r, weights += k, ids += k) {
    for (int64_t i = 0; i < n; ++i) values[i] = number(logits[r * stride + i]);
    float most = values[0], total = 0.0f;
    for (int64_t i = 1; i < n; ++i) most = is_larger(values[i], most) ? values[i] : most;
    if (!is_renormalised)
      for (int64_t i = 0; i < n; ++i) total += std::exp(values[i] - most);
    for (int64_t c = 0; c < k; ++c) {
      int64_t best = -1;
      for (int64_t i = 0; i < n; ++i) {
        bool is_left = best < 0 || is_larger(values[i], values[best]);
        for (int64_t before = 0; before < c && is_left; ++before) is_left = ids[before] != i;
        if (is_left) best = i;
      }
      ids[c] = best;
      weights[c] = std::exp(values[best] - most);
      if (is_renormalised) total += weights[c];
    }
    for (int64_t c = 0; c < k; ++c) weights[c] /= total;
  }
}

// Calls it with a number of the rows' type and one of the cache's, which is e4m3 or the same.
template <class With>
void by_dtypes(int64_t is_bfloat16, int64_t is_e4m3, const With& with) {
  if (is_bfloat16 && is_e4m3)
    with(uint16_t{}, uint8_t{});
  else if (is_bfloat16)
    with(uint16_t{}, uint16_t{});
  else if (is_e4m3)
    with(float{}, uint8_t{});
  else
    with(float{}, float{});
}

}  // namespace

void attend_in(Team& team, const Attention& of) {
  by_dtypes(of.is_bfloat16, of.is_e4m3,
            [&](auto row, auto cached) { attend_by<decltype(row), decltype(cached)>(team, of); });
}

void norm_rows(bool is_bfloat16, int64_t rows, int64_t n, void* x, const void* added, const void* weight, float eps, void* y,
               int64_t y_stride) {
  const auto each = [&](auto row) {
    typedef decltype(row) Row;
    for (int64_t r = 0; r < rows; ++r)
      norm_row(n, (Row*)x + r * n, added ? (const Row*)added + r * n : nullptr, (const Row*)weight, eps,
               (Row*)y + r * y_stride);
  };
  if (is_bfloat16)
    each(uint16_t{});
  else
    each(float{});
}

extern "C" {

// y [rows, n] = x times its inverse root mean square times the weight; x is contiguous, and has `added` added before
// where that is given. n is a multiple of 16.
void msi_norm(int64_t is_bfloat16, int64_t rows, int64_t n, void* x, const void* added, int64_t added_stride,
              const void* weight, float eps, void* y) {
  if (is_bfloat16)
    norm(rows, n, (uint16_t*)x, (const uint16_t*)added, added_stride, (const uint16_t*)weight, eps, (uint16_t*)y);
  else
    norm(rows, n, (float*)x, (const float*)added, added_stride, (const float*)weight, eps, (float*)y);
}

// Rotates the first num_q + num_kv heads of heads [rows, num_q + 2 num_kv, head_dim] by tables [rows, rotated], and
// writes keys and values to the rows of the cache that kv_rows [rows, 2] says. `rotated` is a multiple of 32. With
// weights [num_q + num_kv, head_dim] these heads are normed before; then, and with a cache in e4m3, head_dim is a multiple
// of 16.
void msi_rope_and_write(int64_t is_bfloat16, int64_t is_e4m3, int64_t rows, int64_t num_q, int64_t num_kv,
                        int64_t head_dim, int64_t rotated, void* heads, const void* cos, const void* sin, void* cache,
                        const int64_t* kv_rows, const void* weights, float eps) {
  const auto with = [&](auto row, auto cached) {
    using Row = decltype(row);
    rope_and_write(rows, num_q, num_kv, head_dim, rotated, (Row*)heads, (const Row*)cos, (const Row*)sin,
                   (decltype(cached)*)cache, kv_rows, (const Row*)weights, eps);
  };
  by_dtypes(is_bfloat16, is_e4m3, with);
}

// Attention of one token of each sequence: query [num_seqs, num_heads, head_dim], rows `stride` apart; out contiguous.
// head_dim is a multiple of 16; window 0 sees all; sinks [num_heads], of each head the score of a key without a value.
void msi_decode(int64_t is_bfloat16, int64_t is_e4m3, int64_t num_seqs, int64_t num_heads, int64_t num_kv,
                int64_t head_dim, const void* query, int64_t stride, const void* cache, const int32_t* tables,
                int64_t tables_stride, const int32_t* contexts, int64_t window, const float* sinks,
                void* out) {
  const auto with = [&](auto row, auto cached) {
    using Row = decltype(row);
    decode(num_seqs, num_heads, num_kv, head_dim, (const Row*)query, stride, (const decltype(cached)*)cache, tables,
           tables_stride, contexts, window, sinks, (Row*)out);
  };
  by_dtypes(is_bfloat16, is_e4m3, with);
}

// The k largest of each row of logits [rows, n], rows `stride` apart, and their softmax: weights and ids [rows, k], the
// largest first and, of equal ones, that of the lower id. Renormalised, the weights of a row add up to 1. k <= n.
void msi_topk_softmax(int64_t is_bfloat16, int64_t rows, int64_t n, int64_t stride, int64_t k, int64_t is_renormalised,
                      const void* logits, float* weights, int64_t* ids) {
  if (is_bfloat16)
    topk_softmax(rows, n, stride, k, is_renormalised, (const uint16_t*)logits, weights, ids);
  else
    topk_softmax(rows, n, stride, k, is_renormalised, (const float*)logits, weights, ids);
}

// Writes rows of `row_bytes`, with weights [rows, k] and the local ids of ids [rows, k], to where those of an expert node
// lie, `apart` bytes from one to the next.
void msi_pack_rows(int64_t rows, int64_t row_bytes, int64_t k, const char* hidden, int64_t hidden_apart,
                   const float* weights, const int64_t* ids, const int32_t* local_ids, char* to_hidden, char* to_weights,
                   char* to_ids, int64_t apart) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(to_hidden + r * apart, hidden + r * hidden_apart, row_bytes);
    std::memcpy(to_weights + r * apart, weights + r * k, k * sizeof(float));
    for (int64_t c = 0; c < k; ++c) ((int32_t*)(to_ids + r * apart))[c] = local_ids[ids[r * k + c]];
  }
}

// Rounds values [rows, n] to rows `apart` from one another; n is a multiple of 16.
void msi_round(int64_t is_bfloat16, int64_t rows, int64_t n, const float* values, void* to, int64_t apart) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; i += LANES) {
      const V given = load(values + r * n + i);
      if (is_bfloat16)
        store((uint16_t*)to + r * apart + i, given);
      else
        store((float*)to + r * apart + i, given);
    }
}
}
