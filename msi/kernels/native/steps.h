// What `layers.cpp` has a team do, and what it is done with; its leader calls. Addresses without a type are of rows, float32
// or bfloat16.

#pragma once

#include <cstdint>

#include "team.h"

// Packed [outputs, depth], and a bias [outputs] or null.
struct Matrix {
  const uint8_t* panels;
  const float* bias;
  int64_t format, outputs, depth;
};

// Experts' activation: gate * sigmoid(alpha * gate) * (up + up_offset), with gate at most `limit`, and up within both
// signs of it.
struct Activation {
  float alpha, limit, up_offset;
};

// Rows, and the experts that they chose, as `msi_experts` says.
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

// A token of each sequence: its heads [rows, num_q + 2 num_kv, head_dim] are normed, where there are weights for that, and
// rotated, its keys and values written, and what it attends to goes out. As `msi_rope_and_write` and `msi_decode` say.
struct Attention {
  bool is_bfloat16, is_e4m3;
  int64_t rows, num_q, num_kv, head_dim, rotated;
  void* heads;
  const void *cos, *sin, *norm;
  float eps;
  void* cache;
  const int64_t* kv_rows;
  const int32_t* tables;
  int64_t tables_stride;
  const int32_t* contexts;
  int64_t window;
  const float* sinks;
  void* out;
  int64_t out_stride;
};

// So that rows below one another do not share a line of the cache.
inline int64_t spread(int64_t depth) { return depth + 32; }

// y [rows, outputs] = x [rows, x_stride] times it.
void linear_in(Team& team, const Matrix& matrix, bool is_bfloat16, int64_t rows, const void* x, int64_t x_stride, void* y);

// As `msi_experts` says.
int64_t experts_in(Team& team, int64_t format, bool is_bfloat16, const Chosen& of);

void attend_in(Team& team, const Attention& of);

// `msi_norm` of rows y_stride apart, on this thread alone.
void norm_rows(bool is_bfloat16, int64_t rows, int64_t n, void* x, const void* added, const void* weight, float eps, void* y,
               int64_t y_stride);
