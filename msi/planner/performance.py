"""The performance model: what a stage takes and what a node holds, from sizes alone (a roofline).

Seconds and bytes; every function takes single numbers or arrays of candidates. Stages are one layer of one
micro-batch. The paper's equations, as written and corrected, are in `msi.planner.equations`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from msi.planner.assumptions import Assumptions, Quantity
from msi.planner.hardware import Gpu
from msi.planner.model_shape import ModelShape


class PairCosts(Protocol):
    """Stage times of one pair of node types, whatever the number of nodes: a roofline or a profile."""

    def attention_s(self, num_tokens: Quantity, num_context_tokens: Quantity) -> Quantity: ...

    def pass_s(self, num_logit_rows: Quantity) -> Quantity: ...

    def expert_s(
        self, num_expert_rows: Quantity, num_active_experts: Quantity, experts_per_node: Quantity
    ) -> Quantity: ...

    def comm_s(
        self, message_bytes: Quantity, num_attention_nodes: Quantity, num_expert_nodes: Quantity
    ) -> Quantity: ...


def gemm_s(
    rows: Quantity,
    weight_values: Quantity,
    weight_bytes: float,
    activation_bytes: Quantity,
    gpu: Gpu,
    given: Assumptions,
) -> Quantity:
    """(rows, k) x (k, n) with k n = weight_values: the longer of computing and of reading it all once."""
    compute_s = 2 * rows * weight_values / (gpu.flops_per_s * given.compute_at(rows))
    memory_s = (weight_values * weight_bytes + activation_bytes) / (gpu.memory_bytes_per_s * given.memory)
    return np.maximum(compute_s, memory_s)


def collective_s(gathered_bytes: Quantity, group: int, gpu: Gpu, given: Assumptions) -> Quantity:
    """One all-gather or reduce-scatter of a tensor-parallel group whose whole is `gathered_bytes`.

    Each GPU moves (group - 1) / group of it (the paper's TP synchronisation). A group that spans nodes is as fast as
    the NICs of a node together.
    """
    if group == 1:
        return 0.0 * gathered_bytes
    if group <= gpu.gpus_per_node:
        bytes_per_s, latency_s = gpu.intra_node_bytes_per_s * given.intra_node, given.collective_latency_s
    else:
        node_bytes_per_s = gpu.network_bytes_per_s * gpu.gpus_per_node * given.network
        bytes_per_s = min(gpu.intra_node_bytes_per_s * given.intra_node, node_bytes_per_s)
        latency_s = given.cross_node_latency_s
    return latency_s + gathered_bytes * (group - 1) / group / bytes_per_s


def kv_shards(model: ModelShape, tp: int) -> int:
    """Parts into which a tensor-parallel group divides the KV cache; further ranks hold copies."""
    return 1 if model.latent is not None else min(tp, model.num_kv_heads)


def context_len(model: ModelShape, mean_len: Quantity) -> Quantity:
    """Tokens that attention reads per sequence, in the mean over layers. The cache keeps all, window or not."""
    if not model.sliding_window:
        return mean_len
    windowed = (model.num_layers - model.num_full_layers) / model.num_layers
    return (1 - windowed) * mean_len + windowed * np.minimum(mean_len, model.sliding_window)


def attention_layer_s(
    model: ModelShape, gpu: Gpu, tp: int, tokens: Quantity, context_tokens: Quantity, given: Assumptions
) -> Quantity:
    """T_a: projections, attention over the cache, router, shared expert; a share of the dense layers.

    The shared expert runs while the routed ones are away: it is time of the device, hidden behind 2 T_c + T_e
    (defect 5). Dense layers are spread over the sparse ones, whose turns the pipeline counts.
    """
    precision = model.precision
    width, activation_bytes = precision.matrix_bytes, precision.compute_bytes
    streamed = 4 * tokens * model.hidden_size * activation_bytes
    projections_s = gemm_s(tokens, model.projection_values / tp, width, streamed, gpu, given)
    core_bytes = context_tokens * model.kv_values * precision.kv_cache_bytes / kv_shards(model, tp)
    core_flops = context_tokens * model.attention_flops / tp
    core_s = np.maximum(
        core_bytes / (gpu.memory_bytes_per_s * given.memory), core_flops / (gpu.flops_per_s * given.compute_at(tokens))
    )
    sync_s = 2 * collective_s(tokens * model.hidden_size * activation_bytes, tp, gpu, given)
    every_layer_s = projections_s + core_s + sync_s + given.attention_launch_s
    sparse_s = gemm_s(tokens, model.shared_values / tp, width, streamed / 2, gpu, given)
    if not model.num_dense_layers:
        return every_layer_s + sparse_s
    dense_s = gemm_s(tokens, model.dense_values / tp, width, streamed, gpu, given) + sync_s
    per_sparse = model.num_layers / model.num_sparse_layers
    return every_layer_s * per_sparse + sparse_s + dense_s * (per_sparse - 1)


def expert_gemm_s(
    model: ModelShape,
    gpu: Gpu,
    expert_rows: Quantity,
    active_experts: Quantity,
    given: Assumptions,
    *,
    slices: int = 1,
) -> Quantity:
    """One grouped GEMM over (token, expert) pairs; an expert with any row costs the reading of its weights.

    `slices`: GPUs that share each expert; this is one of them.
    """
    precision = model.precision
    rows_each = expert_rows / np.maximum(active_experts, 1e-9)
    compute_s = 2 * expert_rows * model.expert_values / slices / (gpu.flops_per_s * given.compute_at(rows_each))
    streamed = expert_rows * (2 * model.hidden_size + 3 * model.intermediate_size / slices) * precision.compute_bytes
    read = active_experts * model.expert_values * precision.matrix_bytes / slices
    memory_s = (read + streamed) / (gpu.memory_bytes_per_s * given.memory)
    return np.maximum(compute_s, memory_s) + given.expert_launch_s


def expert_layer_s(
    model: ModelShape,
    gpu: Gpu,
    tp: int,
    expert_rows: Quantity,
    active_experts: Quantity,
    given: Assumptions,
    *,
    rows_per_pair: Quantity = 1.0,
) -> Quantity:
    """T_e of an expert node of tp GPUs: the grouped GEMM, rows gathered before it and scattered after.

    `rows_per_pair`: rows that travel per (token, expert) pair; a token with two experts on a node comes once.
    """
    gemm = expert_gemm_s(model, gpu, expert_rows, active_experts, given, slices=tp)
    return gemm + 2 * collective_s(expert_rows * rows_per_pair * model.row_bytes, tp, gpu, given)


def active_experts(model: ModelShape, experts: Quantity, tokens: Quantity) -> Quantity:
    """Of so many experts, how many at least one of `tokens` tokens chooses, in the mean and with even routing."""
    return experts * (1 - (1 - model.top_k / model.num_experts) ** tokens)


def nodes_per_token(model: ModelShape, experts_per_node: Quantity) -> Quantity:
    """Expert nodes that one token's rows go to, in the mean: K different experts, drawn evenly from E."""
    passed_over: Quantity = 1.0
    for drawn in range(model.top_k):
        left = model.num_experts - drawn
        passed_over = passed_over * np.maximum((left - experts_per_node) / left, 0.0)
    return model.num_experts / experts_per_node * (1 - passed_over)


@functools.lru_cache(maxsize=64)
def _travelling_rows(model: ModelShape) -> NDArray[np.float64]:
    """Rows that travel per (token, expert) pair, by experts per node; index 0 is unused."""
    per_node = np.maximum(np.arange(model.num_experts + 1), 1)
    return np.asarray(nodes_per_token(model, per_node.astype(np.float64)) / model.top_k)


@dataclass(frozen=True, slots=True)
class Roofline:
    """`PairCosts` of attention nodes of `attention_tp` GPUs and expert nodes of `expert_tp`."""

    model: ModelShape
    attention_gpu: Gpu
    attention_tp: int
    expert_gpu: Gpu
    expert_tp: int
    given: Assumptions

    def attention_s(self, num_tokens: Quantity, num_context_tokens: Quantity) -> Quantity:
        return attention_layer_s(
            self.model, self.attention_gpu, self.attention_tp, num_tokens, num_context_tokens, self.given
        )

    def pass_s(self, num_logit_rows: Quantity) -> Quantity:
        model, tp = self.model, self.attention_tp
        logits_bytes = num_logit_rows * model.vocab_size / tp * 4
        head_s = gemm_s(
            num_logit_rows, model.head_values / tp, model.precision.head_bytes, 2 * logits_bytes,
            self.attention_gpu, self.given,
        )  # fmt: skip
        return head_s + self.given.attention_launch_s

    def expert_s(self, num_expert_rows: Quantity, num_active_experts: Quantity, experts_per_node: Quantity) -> Quantity:
        sizes = (num_expert_rows, num_active_experts)
        if self.expert_tp == 1:
            return expert_layer_s(self.model, self.expert_gpu, 1, *sizes, self.given)
        travelling = _travelling_rows(self.model)[np.asarray(experts_per_node, dtype=int)]
        return expert_layer_s(self.model, self.expert_gpu, self.expert_tp, *sizes, self.given, rows_per_pair=travelling)

    def comm_s(self, message_bytes: Quantity, num_attention_nodes: Quantity, num_expert_nodes: Quantity) -> Quantity:
        """Eq 6 in bytes (defect 1): the slower of a sender's messages to all peers and a receiver's from all."""
        pair_a, pair_e = message_bytes / self.attention_tp, message_bytes / self.expert_tp
        given = self.given
        send_s = num_expert_nodes * pair_a / (self.attention_gpu.network_bytes_per_s * given.network_at(pair_a))
        receive_s = num_attention_nodes * pair_e / (self.expert_gpu.network_bytes_per_s * given.network_at(pair_e))
        return (np.maximum(send_s, receive_s) + given.network_latency_s) * given.tail


@dataclass(frozen=True, slots=True)
class DeploymentCosts:
    """`msi.planner.stage_costs.StageCosts` of one deployment, for the simulator."""

    pair: PairCosts
    num_attention_nodes: int
    num_expert_nodes: int
    experts_per_node: int

    def attention_s(self, num_tokens: int, num_context_tokens: int) -> float:
        return float(self.pair.attention_s(float(num_tokens), float(num_context_tokens)))

    def pass_s(self, num_logit_rows: int) -> float:
        return float(self.pair.pass_s(float(num_logit_rows)))

    def expert_s(self, num_expert_rows: float, num_active_experts: int) -> float:
        experts = float(self.experts_per_node)
        return float(self.pair.expert_s(float(num_expert_rows), float(num_active_experts), experts))

    def comm_s(self, num_bytes: int) -> float:
        nodes = float(self.num_attention_nodes), float(self.num_expert_nodes)
        return float(self.pair.comm_s(float(max(num_bytes, 1)), *nodes))


def attention_node_bytes(
    model: ModelShape,
    tp: int,
    given: Assumptions,
    *,
    micro_batch: Quantity,
    num_micro_batches: Quantity,
    mean_len: Quantity,
    num_expert_nodes: Quantity,
) -> Quantity:
    """What an attention node of tp GPUs holds: weights, KV cache, slots for answers and rows to send, activations.

    Corrects Eq 8 (defect 3): KV bytes per token from heads and head_dim, buffers counted.
    """
    kv_bytes = num_micro_batches * micro_batch * mean_len * model.kv_bytes_per_token * (tp / kv_shards(model, tp))
    slots = 2 * num_expert_nodes * num_micro_batches * micro_batch * model.row_bytes
    widest = 6 * model.hidden_size + 3 * (model.shared_intermediate_size + model.dense_intermediate_size)
    activations = micro_batch * (widest * model.precision.compute_bytes + 4 * model.vocab_size)
    return model.attention_bytes + kv_bytes + slots + activations + tp * given.reserved_bytes


def expert_node_bytes(
    model: ModelShape,
    tp: int,
    given: Assumptions,
    *,
    micro_batch: Quantity,
    num_micro_batches: Quantity,
    num_attention_nodes: Quantity,
    experts_per_node: Quantity,
) -> Quantity:
    """What an expert node of tp GPUs holds: its experts, slots for each attention node and lane, activations."""
    seats = num_attention_nodes * micro_batch * model.row_bytes
    rows = num_attention_nodes * micro_batch * model.top_k * experts_per_node / model.num_experts
    activations = rows * (2 * model.hidden_size + 3 * model.intermediate_size) * model.precision.compute_bytes
    weights = experts_per_node * model.expert_bytes
    return weights + 2 * num_micro_batches * seats + activations + tp * given.reserved_bytes
