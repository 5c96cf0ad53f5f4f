"""The same model on the same GPUs with attention and experts together: what disaggregation is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msi.planner.assumptions import Baseline
from msi.planner.hardware import Gpu
from msi.planner.performance import (
    active_experts,
    attention_layer_s,
    attention_node_bytes,
    collective_s,
    context_len,
    expert_gemm_s,
)
from msi.planner.pipeline import Stages, isolated_pass_s, steady_pass_s
from msi.planner.plan import Limit, Plan
from msi.planner.task import MAX_MICRO_BATCH, Pool, Task, score_of

MAX_GROUP = 64


@dataclass(frozen=True, slots=True)
class Group:
    """One tensor-parallel group that serves the whole model as a baseline does; its stages never overlap."""

    task: Task
    gpu: Gpu
    size: int
    baseline: Baseline

    def stages(self, batch: int) -> Stages:
        """T_a and T_e with nothing hidden; 2 T_c is the all-reduce behind the experts."""
        task, model, gpu, size, given = self.task, self.task.model, self.gpu, self.size, self.task.given
        context = float(context_len(model, task.workload.mean_len))
        attention_s = attention_layer_s(model, gpu, size, float(batch), batch * context, given)
        head_bytes = model.head_values / size * model.precision.head_bytes + 8 * batch * model.vocab_size / size
        head_s = max(
            2 * batch * model.head_values / size / (gpu.flops_per_s * float(given.compute_at(float(batch)))),
            head_bytes / (gpu.memory_bytes_per_s * given.memory),
        )
        head_s += given.attention_launch_s
        pairs, active = batch * model.top_k, float(active_experts(model, float(model.num_experts), float(batch)))
        slices = size if self.baseline.experts == "sharded" else max(1, size // model.num_experts)
        holders = size // slices  # GPUs, or groups of them, that have different experts
        expert_s = expert_gemm_s(model, gpu, pairs / holders, active / holders, given, slices=slices)
        reduce_s = collective_s(float(batch * model.hidden_size * model.precision.compute_bytes), size, gpu, given)
        return Stages(float(attention_s) + head_s / model.num_sparse_layers, float(expert_s), float(reduce_s))

    def memory_bytes(self, batch: int) -> tuple[float, float]:
        """Without the experts and of them, activations included."""
        model = self.task.model
        rest = attention_node_bytes(
            model,
            self.size,
            self.task.given,
            micro_batch=float(batch),
            num_micro_batches=1.0,
            mean_len=self.task.workload.mean_len,
            num_expert_nodes=0.0,
        )
        activations = (
            batch * model.top_k * (2 * model.hidden_size + 3 * model.intermediate_size) * model.precision.compute_bytes
        )
        return float(rest), float(model.num_experts * model.expert_bytes + activations)

    @property
    def memory_limit_bytes(self) -> float:
        return self.size * self.gpu.memory_bytes * self.task.given.memory_utilization

    def broken(self, batch: int) -> Limit | None:
        """The limit that so many sequences break."""
        layers, most = self.task.model.num_sparse_layers, self.task.limits.max_batch
        if (self.baseline.max_num_seqs and batch > self.baseline.max_num_seqs) or (most and batch > most):
            return "batch limit"
        if sum(self.memory_bytes(batch)) > self.memory_limit_bytes:
            return "attention memory"
        if steady_pass_s(self.stages(batch), 1, layers) > self.task.workload.tpot_s:
            return "tpot"
        return None

    def plan(self, count: int) -> Plan | None:
        """With the largest batch within the limits; None where there is none."""
        low, high = 0, MAX_MICRO_BATCH
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.broken(middle) else (middle, high)
        if not low:
            return None
        stages, layers, gpu = self.stages(low), self.task.model.num_sparse_layers, self.gpu
        tpot_s = steady_pass_s(stages, 1, layers)
        tokens_per_s = low / tpot_s
        attention_bytes, expert_bytes = self.memory_bytes(low)
        return Plan(
            kind="colocated",
            baseline=self.baseline.name,
            attention_gpu=gpu.name,
            expert_gpu=gpu.name,
            tp_attention=self.size,
            tp_expert=self.size,
            num_attention_nodes=1,
            num_expert_nodes=1,
            experts_per_node=self.task.model.num_experts,
            num_micro_batches=1,
            num_layers=layers,
            batch_size=low,
            t_attention_s=stages.attention_s,
            t_expert_s=stages.expert_s,
            t_comm_s=stages.comm_s,
            step_s=isolated_pass_s(stages, 1, layers),
            tpot_s=tpot_s,
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_gpu=tokens_per_s / self.size,
            tokens_per_s_per_cost=tokens_per_s / (self.size * gpu.price),
            tokens_per_s_per_watt=tokens_per_s / (self.size * gpu.power_w),
            attention_memory_bytes=attention_bytes,
            expert_memory_bytes=expert_bytes,
            attention_memory_limit_bytes=self.memory_limit_bytes - expert_bytes,
            expert_memory_limit_bytes=self.memory_limit_bytes - attention_bytes,
            limited_by=self.broken(low + 1) or "batch limit",
            num_instances=count // self.size,
        )


def best_colocated(task: Task, baseline: Baseline) -> Plan | None:
    """The best group of any type and size by the task's objective; None where none keeps the limits."""
    plans = [plan for group, count in _groups(task, baseline) if (plan := group.plan(count)) is not None]
    return max(plans, key=lambda plan: score_of(plan, task.objective), default=None)


def _groups(task: Task, baseline: Baseline) -> Iterator[tuple[Group, int]]:
    pools: dict[Gpu, Pool] = {}
    for pool in (*task.attention, *task.expert):
        known = pools.get(pool.gpu)
        pools[pool.gpu] = pool if known is None or known.count < pool.count else known
    for pool in pools.values():
        size = 1
        while size <= min(MAX_GROUP, pool.count):
            experts = task.model.num_experts
            if baseline.experts == "sharded" or experts % size == 0 or size % experts == 0:
                yield Group(task, pool.gpu, size, baseline), pool.count
            size *= 2
