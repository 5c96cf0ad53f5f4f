"""The paper's Algorithm 1, plainly: loops and single numbers, with its equations as written or as corrected here.

It keeps what the paper fixes and `msi.planner.search` does not: one expert per node, m in {3, 4}, stage times on
straight lines in the micro-batch, and the number of attention nodes of Eq 1. What is off in the equations as written,
by the numbers of `equations.DEFECTS`, with figures for the catalogue's A800 and the default assumptions:

1. T_c counts elements, half of the bytes in bf16, takes Util of the whole and knows no latency: for 256 rows of
   Mixtral-8x22B it is 0.36 to 0.39 of the corrected one.
2. T_e counts two of an expert's three matrices, so k3 is a third too low and n_a half as high again.
3. A row of the KV cache is 4 h L / g bytes: exact for Mixtral, DBRX and Scaled-MoE, half of the true one for Qwen3
   (heads x head_dim = 2 h for 30B-A3B), 25 times the latent row of DeepSeek-V3. No buffers; all of a GPU is planned.
4. One expert per node, in both versions: 128 or 256 experts take that many nodes, where `search` takes a few.
5. Shared experts cost nothing and hold nothing; dense layers count as layers with experts and hold nothing. The LM
   head takes no time.
6. n_a = k1 E / (k3 K) forgets k2 and k4. k4, the reading of an expert's weights, is what 120 rows of
   Mixtral-8x22B cost, and T_e comes out k4 - k2 above T_a.
7. T_c is a mean.
8. n_a is rounded to the nearest; corrected, it is the largest with T_e <= T_a.

Besides, nothing here checks Eq 2 and 3, and Eq 5 as written holds for a full pipeline only: for Qwen3-30B-A3B it
promises less than half of the pass that its own T_a, T_e and T_c make. The corrected version has the max form.
T_total (Eq 5) is both what Eq 7 limits and what throughput divides by, so `step_s` and `tpot_s` of these plans are one
number; `search` divides by the steady pass, which is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from msi.errors import ConfigError
from msi.planner import equations as eq
from msi.planner.model_shape import ModelShape
from msi.planner.node_pair import Side, attention_gpus_beside, instances_that_fit, sides
from msi.planner.performance import (
    Roofline,
    attention_node_bytes,
    collective_s,
    context_len,
    expert_node_bytes,
    gemm_s,
    kv_shards,
)
from msi.planner.pipeline import Stages
from msi.planner.plan import Limit, Plan
from msi.planner.task import Task

Equations = Literal["paper", "corrected"]
MICRO_BATCHES = (3, 4)  # 3..N_m
FITTED_AT = (16, 32, 64, 128, 256, 512)  # rows at which stages are asked for


@dataclass(frozen=True, slots=True)
class Fits:
    """T_a = k1 b_a + k2, T_e = k3 b_e + k4, in seconds; k1 and k3 above 0."""

    k1: float
    k2: float
    k3: float
    k4: float


def algorithm1(
    task: Task, *, equations: Equations = "paper", fits: Fits | None = None, num_plans: int = 5
) -> list[Plan]:
    """Plans by throughput per unit cost, best first; at most one per pair of GPU types, tp_a, tp_e and m.

    Args:
        fits: from a profile, for every pair; without, least squares through the roofline of each pair.

    Raises:
        ConfigError: no plan keeps the limits.
    """
    model = _as_the_paper_sees(task.model) if equations == "paper" else task.model
    plans: list[Plan] = []
    for expert in sides(task.expert, task.limits):
        for attention in sides(task.attention, task.limits):
            pair = _Pair(replace(task, model=model), attention, expert, equations, fits)
            if pair.fits_weights():
                plans += (plan for m in MICRO_BATCHES if (plan := pair.best(m)) is not None)
    if not plans:
        gpus = ", ".join(f"{pool.count} {pool.gpu.name}" for pool in dict.fromkeys((*task.attention, *task.expert)))
        raise ConfigError(
            f"{model.name}: Algorithm 1 finds no plan on {gpus} with a TPOT of {task.workload.tpot_s * 1e3:g} ms: it "
            f"has one expert per node, so {model.num_experts} nodes for experts, and 3 or 4 micro-batches; give more "
            "GPUs or a higher `tpot_s`, or leave out `algorithm`"
        )
    return sorted(plans, key=lambda plan: -plan.tokens_per_s_per_cost)[:num_plans]


def _as_the_paper_sees(model: ModelShape) -> ModelShape:
    """Defect 5: no shared experts, no dense layers (nor a sliding window)."""
    return replace(
        model,
        num_dense_layers=0,
        dense_intermediate_size=0,
        shared_intermediate_size=0,
        sliding_window=0,
        num_full_layers=0,
    )


@dataclass(frozen=True, slots=True)
class _At:
    """One deployment of a pair at one micro-batch."""

    m: int
    n_a: int
    b_a: int


@dataclass(frozen=True, slots=True)
class _Pair:
    task: Task
    attention: Side
    expert: Side
    equations: Equations
    given_fits: Fits | None

    def fits_weights(self) -> bool:
        """tp_a C_a > 2 P_a, tp_e C_e > 2 P_e, and a GPU for every expert and at least one attention node."""
        model = self.task.model
        weights = model.attention_bytes < self.attention_limit_bytes and model.expert_bytes < self.expert_limit_bytes
        return weights and self.most_attention_nodes() >= 1

    def most_attention_nodes(self) -> int:
        expert_gpus = self.task.model.num_experts * self.expert.tp
        if expert_gpus > self.expert.count:
            return 0
        return attention_gpus_beside(self.attention, self.expert, expert_gpus) // self.attention.tp

    def best(self, m: int) -> Plan | None:
        """n_a by Eq 1, and the largest B that Eq 7 and Eq 8 leave; None where that is nothing."""
        fits, model, most = self.fits(), self.task.model, self.most_attention_nodes()
        as_written = eq.balance_as_written(fits.k1, fits.k3, model.num_experts, model.top_k)
        if self.equations == "paper":
            n_a = min(most, max(1, round(as_written)))
            b_a = self.largest_micro_batch(m, n_a, fits)
            return self.plan(_At(m, n_a, b_a), fits) if b_a else None
        # The balance moves with b_a, and b_a with n_a: the largest n_a that its own b_a balances. As b_a grows the
        # balance goes from that of one row to the one as written.
        most = min(most, eq.largest_balanced(max(as_written, self.balance(fits, 1))))
        for n_a in range(most, 0, -1):
            b_a = self.largest_micro_batch(m, n_a, fits)
            if b_a and n_a <= eq.largest_balanced(self.balance(fits, b_a)):
                return self.plan(_At(m, n_a, b_a), fits)
        return None

    def balance(self, fits: Fits, b_a: int) -> float:
        model = self.task.model
        return eq.balance_corrected(fits.k1, fits.k2, fits.k3, fits.k4, E=model.num_experts, K=model.top_k, b_a=b_a)

    def largest_micro_batch(self, m: int, n_a: int, fits: Fits) -> int:
        limits = self.task.limits
        low, high = 0, limits.max_micro_batch + 1
        if limits.max_batch:
            high = min(high, limits.max_batch // (m * n_a) + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.broken(_At(m, n_a, middle), fits) else (middle, high)
        return low

    def broken(self, at: _At, fits: Fits) -> Limit | None:
        """The limit that is not kept: Eq 7, then Eq 8 (strictly below), then, corrected, the experts' memory."""
        if not eq.eq7(self.total_s(self.stages(at, fits), at.m), self.task.workload.tpot_s):
            return "tpot"
        if self.attention_bytes(at) >= self.attention_limit_bytes:
            return "attention memory"
        return "expert memory" if self.expert_bytes(at) >= self.expert_limit_bytes else None

    def fits(self) -> Fits:
        """Least squares through T_a(b) and T_e(b) of the roofline."""
        if self.given_fits is not None:
            return self.given_fits
        rows = np.array(FITTED_AT, dtype=np.float64)
        k1, k2 = np.polyfit(rows, [self.attention_point_s(b) for b in FITTED_AT], 1)
        k3, k4 = np.polyfit(rows, [self.expert_point_s(b) for b in FITTED_AT], 1)
        return Fits(float(k1), float(k2), float(k3), float(k4))

    def attention_point_s(self, b_a: int) -> float:
        task = self.task
        pair = Roofline(task.model, self.attention.gpu, self.attention.tp, self.expert.gpu, self.expert.tp, task.given)
        layer_s = float(pair.attention_s(float(b_a), b_a * self.mean_len))
        if self.equations == "paper":
            return layer_s
        return layer_s + float(pair.pass_s(float(b_a))) / task.model.num_sparse_layers

    def expert_point_s(self, b_e: int) -> float:
        """One expert: `performance.expert_layer_s` where all three matrices count."""
        model, gpu, tp, given = self.task.model, self.expert.gpu, self.expert.tp, self.task.given
        ffn_flops = eq.ffn_flops_as_written if self.equations == "paper" else eq.ffn_flops_corrected
        values = ffn_flops(model.hidden_size, model.intermediate_size, 1.0) / 2  # 2 FLOPs per weight and row
        streamed = b_e * (2 * model.hidden_size + 3 * model.intermediate_size / tp) * model.precision.compute_bytes
        gemm = gemm_s(float(b_e), values / tp, model.precision.matrix_bytes, streamed, gpu, given)
        sync_s = 2 * collective_s(float(b_e * model.row_bytes), tp, gpu, given)
        return float(gemm + sync_s + given.expert_launch_s)

    def stages(self, at: _At, fits: Fits) -> Stages:
        b_e = self.b_e(at)
        return Stages(fits.k1 * at.b_a + fits.k2, fits.k3 * b_e + fits.k4, self.comm_s(at.b_a, b_e))

    def b_e(self, at: _At) -> float:
        """From b_a m n_a = b_e m E / K."""
        return at.b_a * at.n_a * self.task.model.top_k / self.task.model.num_experts

    def comm_s(self, b_a: float, b_e: float) -> float:
        model, given, attention, expert = self.task.model, self.task.given, self.attention, self.expert
        h, K, W_a, W_e = (
            model.hidden_size,
            model.top_k,
            attention.gpu.network_bytes_per_s,
            expert.gpu.network_bytes_per_s,
        )

        def util(size: float) -> float:
            return float(given.network_at(size))

        if self.equations == "paper":
            return eq.eq6_as_written_s(
                b_a=b_a, b_e=b_e, h=h, K=K, tp_a=attention.tp, tp_e=expert.tp, W_a=W_a, W_e=W_e, util=util
            )
        mean_s = eq.eq6_corrected_s(
            b_a=b_a,
            b_e=b_e,
            h=h,
            K=K,
            E=model.num_experts,
            tp_a=attention.tp,
            tp_e=expert.tp,
            W_a=W_a,
            W_e=W_e,
            util=util,
            value_bytes=model.row_bytes / model.hidden_size,
        )
        return (mean_s + given.network_latency_s) * given.tail  # defect 7

    def total_s(self, stages: Stages, m: int) -> float:
        eq5 = eq.eq5_as_written_s if self.equations == "paper" else eq.eq5_corrected_s
        return eq5(stages, m, self.task.model.num_sparse_layers)

    def attention_bytes(self, at: _At) -> float:
        model, tp = self.task.model, self.attention.tp
        if self.equations == "paper":
            return eq.eq8_as_written_bytes(
                m=at.m,
                b_a=at.b_a,
                s=self.task.workload.mean_len,
                h=model.hidden_size,
                L=model.num_layers,
                g=model.queries_per_kv_head,
                attention_values=model.attention_values,
            )
        empty = attention_node_bytes(
            model,
            tp,
            self.task.given,
            micro_batch=at.b_a,
            num_micro_batches=at.m,
            mean_len=0.0,
            num_expert_nodes=model.num_experts,
        )
        return eq.eq8_corrected_bytes(
            m=at.m,
            b_a=at.b_a,
            s=self.mean_len,
            attention_bytes=model.attention_bytes,
            kv_bytes_per_token=model.kv_bytes_per_token * tp / kv_shards(model, tp),
            buffer_bytes=float(empty) - model.attention_bytes,
        )

    def expert_bytes(self, at: _At) -> float:
        model = self.task.model
        if self.equations == "paper":
            return model.expert_bytes
        return float(
            expert_node_bytes(
                model,
                self.expert.tp,
                self.task.given,
                micro_batch=at.b_a,
                num_micro_batches=at.m,
                num_attention_nodes=at.n_a,
                experts_per_node=1,
            )
        )

    @property
    def mean_len(self) -> float:
        return float(context_len(self.task.model, self.task.workload.mean_len))

    @property
    def attention_limit_bytes(self) -> float:
        return self._limit_bytes(self.attention)

    @property
    def expert_limit_bytes(self) -> float:
        return self._limit_bytes(self.expert)

    def _limit_bytes(self, side: Side) -> float:
        """The paper plans with all of a GPU."""
        return (
            side.tp * side.gpu.memory_bytes if self.equations == "paper" else side.memory_limit_bytes(self.task.given)
        )

    def plan(self, at: _At, fits: Fits) -> Plan:
        task, attention, expert = self.task, self.attention, self.expert
        stages, num_experts = self.stages(at, fits), task.model.num_experts
        total_s = self.total_s(stages, at.m)
        batch_size = at.b_a * at.m * at.n_a

        def per(a_gpu: float, e_gpu: float) -> float:
            return eq.throughput_per_cost(
                batch_size,
                total_s,
                tp_a=attention.tp,
                n_a=at.n_a,
                cost_a=a_gpu,
                tp_e=expert.tp,
                n_e=num_experts,
                cost_e=e_gpu,
            )

        return Plan(
            kind="disaggregated",
            attention_gpu=attention.gpu.name,
            expert_gpu=expert.gpu.name,
            tp_attention=attention.tp,
            tp_expert=expert.tp,
            num_attention_nodes=at.n_a,
            num_expert_nodes=num_experts,
            experts_per_node=1,
            num_micro_batches=at.m,
            num_layers=task.model.num_sparse_layers,
            batch_size=batch_size,
            t_attention_s=stages.attention_s,
            t_expert_s=stages.expert_s,
            t_comm_s=stages.comm_s,
            step_s=total_s,
            tpot_s=total_s,
            tokens_per_s=batch_size / total_s,
            tokens_per_s_per_gpu=per(1.0, 1.0),
            tokens_per_s_per_cost=per(attention.gpu.price, expert.gpu.price),
            tokens_per_s_per_watt=per(attention.gpu.power_w, expert.gpu.power_w),
            attention_memory_bytes=self.attention_bytes(at),
            expert_memory_bytes=self.expert_bytes(at),
            attention_memory_limit_bytes=self.attention_limit_bytes,
            expert_memory_limit_bytes=self.expert_limit_bytes,
            limited_by=self.broken(replace(at, b_a=at.b_a + 1), fits) or "batch limit",
            num_instances=int(instances_that_fit(attention, at.n_a * attention.tp, expert, num_experts * expert.tp)),
        )
