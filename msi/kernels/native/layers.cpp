// All layers of a decode pass in one call, by one team of threads. Each number is what calls of its parts give.
//
// Products and attention are steps of the team: six a layer. What is computed row by row between them takes a microsecond or
// two, and its leader does it alone.

#include <omp.h>

#include <chrono>
#include <cstring>
#include <vector>

#include "steps.h"

extern "C" {
void msi_topk_softmax(int64_t is_bfloat16, int64_t rows, int64_t n, int64_t stride, int64_t k, int64_t is_renormalised,
                      const void* logits, float* weights, int64_t* ids);
void msi_round(int64_t is_bfloat16, int64_t rows, int64_t n, const float* values, void* to, int64_t apart);
}

namespace {

// The structures of `layers.py`, field by field.

struct Layer {
  const void *attention_norm, *head_norm, *mlp_norm;  // head_norm: null where there is none
  const float* sinks;                                 // null where there are none
  void* cache;
  int64_t* num_rows;
  Matrix qkv, output, router;
  const uint8_t *const *gate_up, *const *down;
  const float *const *gate_up_bias, *const *down_bias;
  int64_t view;
  double attention_eps, head_eps, mlp_eps;
};

struct Model {
  const Layer* layers;
  const Activation* activation;
  int64_t num_layers, is_bfloat16, is_e4m3, hidden, num_q, num_kv, head_dim, rotated;
  int64_t num_choices, k, is_renormalised;  // of the router
  int64_t format, num_experts, inner;
};

struct View {
  const void *cos, *sin;  // [rows, rotated]
  int64_t window;
};

struct Pass {
  const View* views;
  void* hidden;   // [rows, hidden]; changed, all but for what the last layer's experts add
  void* answers;  // [rows, hidden], which is that
  const int64_t* kv_rows;
  const int32_t *tables, *contexts, *local_ids;
  int64_t rows, tables_stride, answers_stride;
  double attention_s, experts_s;  // in all layers, which are added to them
  int64_t num_active;             // experts that had rows in all layers, which is added to it; -1: one has no weights
};

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The leader's way through all layers.
template <class Row>
void go_through(Team& team, const Model& model, Pass& pass) {
  const bool is_bfloat16 = model.is_bfloat16;
  const int64_t rows = pass.rows, n = model.hidden, k = model.k, apart = spread(n);
  const int64_t attended_apart = spread(model.num_q * model.head_dim);
  Row* hidden = (Row*)pass.hidden;
  std::vector<Row> normed(rows * apart), heads(rows * (model.num_q + 2 * model.num_kv) * model.head_dim);
  std::vector<Row> attended(rows * attended_apart), added(rows * n), logits(rows * model.layers->router.outputs);
  std::vector<Row> work(rows * k * (apart + spread(model.inner)));
  std::vector<float> weights(rows * k), combined(rows * n);
  std::vector<int64_t> ids(rows * k);
  std::vector<int32_t> local(rows * k);
  for (int64_t l = 0; l < model.num_layers; ++l) {
    const Layer& layer = model.layers[l];
    const View& view = pass.views[layer.view];
    const double begun = now_s();
    norm_rows(is_bfloat16, rows, n, hidden, l ? added.data() : nullptr, layer.attention_norm, layer.attention_eps,
              normed.data(), apart);
    linear_in(team, layer.qkv, is_bfloat16, rows, normed.data(), apart, heads.data());
    attend_in(team, {is_bfloat16, (bool)model.is_e4m3, rows, model.num_q, model.num_kv, model.head_dim, model.rotated,
                     heads.data(), view.cos, view.sin, layer.head_norm, (float)layer.head_eps, layer.cache,
                     pass.kv_rows, pass.tables, pass.tables_stride, pass.contexts, view.window, layer.sinks,
                     attended.data(), attended_apart});
    linear_in(team, layer.output, is_bfloat16, rows, attended.data(), attended_apart, added.data());
    norm_rows(is_bfloat16, rows, n, hidden, added.data(), layer.mlp_norm, layer.mlp_eps, normed.data(), apart);
    linear_in(team, layer.router, is_bfloat16, rows, normed.data(), apart, logits.data());
    msi_topk_softmax(is_bfloat16, rows, model.num_choices, layer.router.outputs, k, model.is_renormalised, logits.data(),
                     weights.data(), ids.data());
    for (int64_t i = 0; i < rows * k; ++i) local[i] = pass.local_ids[ids[i]];
    const double routed = now_s();
    const int64_t num = experts_in(
        team, model.format, is_bfloat16,
        {rows, k, model.num_experts, n, model.inner, normed.data(), apart, local.data(), k, weights.data(), k,
         layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias, model.activation, work.data(), combined.data(),
         layer.num_rows});
    pass.num_active = num < 0 ? -1 : pass.num_active + num;
    if (num < 0) return;
    msi_round(is_bfloat16, rows, n, combined.data(), added.data(), n);
    pass.attention_s += routed - begun;
    pass.experts_s += now_s() - routed;
  }
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy((Row*)pass.answers + r * pass.answers_stride, added.data() + r * n, n * sizeof(Row));
}

}  // namespace

extern "C" {

// is_alone: a second thread would cost more than it brings.
void msi_layers(const Model* model, Pass* pass, int64_t is_alone) {
  Team team(is_alone ? 1 : omp_get_max_threads());
#pragma omp parallel num_threads(team.size)
  if (omp_get_thread_num() == 0) {
    (model->is_bfloat16 ? go_through<uint16_t> : go_through<float>)(team, *model, *pass);
    team.end();
  } else {
    team.help();
  }
}
}
