"""Plans for one machine that was profiled: which layout of processes, how many micro-batches, which batch.

Few enough candidates to try them all: attention and expert workers that share the machine's cores, or both roles in
one process. Stage times are the profile's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from msi.errors import ConfigError
from msi.planner.hardware import Gpu
from msi.planner.performance import (
    active_experts,
    attention_node_bytes,
    context_len,
    expert_node_bytes,
    nodes_per_token,
)
from msi.planner.pipeline import Stages, isolated_pass_s, steady_pass_s
from msi.planner.plan import Limit, Plan
from msi.planner.profile import Profile
from msi.planner.profiled_costs import ProfiledCosts, StageConditions
from msi.planner.task import Task, score_of


@dataclass(frozen=True, slots=True)
class Layout:
    """Workers of one machine."""

    num_attention: int
    num_expert: int
    threads: int
    num_micro_batches: int
    is_colocated: bool = False

    def __str__(self) -> str:
        workers = "colocated" if self.is_colocated else f"{self.num_attention}+{self.num_expert}"
        return f"{workers}/m{self.num_micro_batches}/t{self.threads}"


def layouts(profile: Profile, micro_batches: tuple[int, ...], num_experts: int) -> Iterator[Layout]:
    """Every layout whose workers of one side have a core for each of their threads."""
    measured = sorted({point.threads for point in profile.attention} & {point.threads for point in profile.expert})
    for threads in measured:
        if threads <= profile.num_cores:
            yield Layout(1, 1, threads, 1, True)
        most = profile.num_cores // threads
        for num_attention in range(1, most + 1):
            for num_expert in range(1, min(most, num_experts) + 1):
                for m in micro_batches:
                    # more at a time than there are cores would only get in each other's way
                    if m == 1 or (num_attention + num_expert) * threads <= profile.num_cores:
                        yield Layout(num_attention, num_expert, threads, m, False)


@dataclass(frozen=True, slots=True)
class Machine:
    """One layout for a task. Raises ConfigError: the profile has nothing for it."""

    task: Task
    profile: Profile
    layout: Layout
    costs: ProfiledCosts

    @property
    def gpu(self) -> Gpu:
        """The catalogue's entry for one core."""
        return self.task.attention[0].gpu

    @property
    def experts_per_node(self) -> int:
        return -(-self.task.model.num_experts // self.layout.num_expert)

    def stage_costs(self, micro_batch: float) -> ProfiledCosts:
        """What stages take when every micro-batch has so many sequences."""
        rows, active = self._expert_rows(micro_batch)
        context = micro_batch * float(context_len(self.task.model, self.task.workload.mean_len))
        return self.costs.settled(micro_batch, context, rows, active)

    def _expert_rows(self, micro_batch: float) -> tuple[float, float]:
        """(token, expert) pairs of one expert node's batch, and its active experts as the router was seen to choose."""
        model, tokens = self.task.model, micro_batch * self.layout.num_attention
        experts = model.num_experts / self.layout.num_expert
        if self.profile.routing:
            active = float(self.profile.active_experts(experts, tokens))
        else:
            active = float(active_experts(model, experts, tokens))
        return tokens * model.top_k * experts / model.num_experts, active

    def layer_stages(self, micro_batch: float) -> Stages:
        """T_a, T_e, T_c of one layer; micro-batches of so many sequences in the mean."""
        model, costs = self.task.model, self.stage_costs(micro_batch)
        context = micro_batch * float(context_len(model, self.task.workload.mean_len))
        rows, active = self._expert_rows(micro_batch)
        sent = micro_batch * float(nodes_per_token(model, float(self.experts_per_node))) / self.layout.num_expert
        by = self.task.factors
        return Stages(
            float(costs.attention_s(micro_batch, context)) * by.attention,
            float(costs.expert_s(rows, active)) * by.expert,
            float(costs.comm_s(sent * model.row_bytes)) * by.comm,
        )

    def pass_s(self, micro_batch: float) -> float:
        """What comes once per pass."""
        return float(self.stage_costs(micro_batch).pass_s(micro_batch)) * self.task.factors.attention

    def stages(self, micro_batch: float) -> Stages:
        """The same, T_a with its share of what comes once per pass."""
        layer = self.layer_stages(micro_batch)
        attention_s = layer.attention_s + self.pass_s(micro_batch) / self.task.model.num_sparse_layers
        return Stages(attention_s, layer.expert_s, layer.comm_s)

    @property
    def memory_limit_bytes(self) -> float:
        """Of the whole machine."""
        return self.profile.num_cores * self.gpu.memory_bytes * self.task.given.memory_utilization

    def memory_bytes(self, micro_batch: int) -> tuple[float, float]:
        """Of one attention and one expert worker; what the runtime takes for itself is counted once per machine."""
        layout, model, given = self.layout, self.task.model, self.task.given
        given = replace(given, reserved_bytes=given.reserved_bytes / layout.num_attention)
        attention = attention_node_bytes(
            model,
            1,
            given,
            micro_batch=float(micro_batch),
            num_micro_batches=float(layout.num_micro_batches),
            mean_len=self.task.workload.mean_len,
            num_expert_nodes=float(layout.num_expert),
        )
        expert = expert_node_bytes(
            model,
            1,
            replace(given, reserved_bytes=0.0),
            micro_batch=float(micro_batch),
            num_micro_batches=float(layout.num_micro_batches),
            num_attention_nodes=float(layout.num_attention),
            experts_per_node=float(self.experts_per_node),
        )
        return float(attention), float(expert)

    def broken(self, micro_batch: int) -> Limit | None:
        """The limit that micro-batches of so many sequences break."""
        task, layout = self.task, self.layout
        batch = micro_batch * layout.num_micro_batches * layout.num_attention
        attention_bytes, expert_bytes = self.memory_bytes(micro_batch)
        if micro_batch > task.limits.max_micro_batch or (task.limits.max_batch and batch > task.limits.max_batch):
            return "batch limit"
        if attention_bytes * layout.num_attention + expert_bytes * layout.num_expert > self.memory_limit_bytes:
            return "attention memory"
        tpot_s = steady_pass_s(self.stages(micro_batch), layout.num_micro_batches, task.model.num_sparse_layers)
        return "tpot" if tpot_s > task.workload.tpot_s else None

    def best(self) -> Plan | None:
        """With the micro-batch of most tokens per second among those measured and the largest within the limits."""
        measured = {point.num_tokens for point in self.profile.attention if point.threads == self.layout.threads}
        sizes = {size for size in measured if self.broken(size) is None}
        largest = max(sizes, default=0)
        while largest < max(measured) and self.broken(largest + 1) is None:
            largest += 1
        plans = [self.plan(size) for size in sorted({largest, *sizes}) if size]
        return max(plans, key=lambda plan: plan.tokens_per_s, default=None)

    def plan(self, micro_batch: int) -> Plan:
        layout, layers = self.layout, self.task.model.num_sparse_layers
        stages = self.stages(micro_batch)
        tpot_s = steady_pass_s(stages, layout.num_micro_batches, layers)
        batch = micro_batch * layout.num_micro_batches * layout.num_attention
        cores = self.profile.num_cores
        attention_bytes, expert_bytes = self.memory_bytes(micro_batch)
        limit = self.memory_limit_bytes
        return Plan(
            kind="colocated" if layout.is_colocated else "disaggregated",
            attention_gpu=self.gpu.name,
            expert_gpu=self.gpu.name,
            tp_attention=1,
            tp_expert=1,
            num_attention_nodes=layout.num_attention,
            num_expert_nodes=layout.num_expert,
            experts_per_node=self.experts_per_node,
            num_micro_batches=layout.num_micro_batches,
            num_layers=layers,
            batch_size=batch,
            t_attention_s=stages.attention_s,
            t_expert_s=stages.expert_s,
            t_comm_s=stages.comm_s,
            step_s=isolated_pass_s(stages, layout.num_micro_batches, layers),
            tpot_s=tpot_s,
            tokens_per_s=batch / tpot_s,
            tokens_per_s_per_gpu=batch / tpot_s / cores,
            tokens_per_s_per_cost=batch / tpot_s / (cores * self.gpu.price),
            tokens_per_s_per_watt=batch / tpot_s / (cores * self.gpu.power_w),
            attention_memory_bytes=attention_bytes,
            expert_memory_bytes=expert_bytes,
            attention_memory_limit_bytes=limit / layout.num_attention - expert_bytes,
            expert_memory_limit_bytes=limit / layout.num_expert - attention_bytes,
            limited_by=self.broken(micro_batch + 1) or "batch limit",
            num_instances=1,
            threads_per_worker=layout.threads,
        )


def machine_for(task: Task, layout: Layout) -> Machine:
    """Raises ConfigError: the task's profile has no times for this layout."""
    profile, num_experts = task.profile, task.model.num_experts
    assert profile is not None
    transports = {point.transport for point in profile.comm}
    preferred = ("inproc", "shm", "tcp") if layout.is_colocated else ("shm", "tcp", "inproc")
    conditions = StageConditions(
        threads=layout.threads,
        num_experts=-(-num_experts // layout.num_expert),
        transport=next((one for one in preferred if one in transports), "shm"),
        num_attention=layout.num_attention,
        num_expert=layout.num_expert,
        num_micro_batches=layout.num_micro_batches,
        is_colocated=layout.is_colocated,
    )
    return Machine(task, profile, layout, ProfiledCosts(profile, conditions))


def machines(task: Task) -> Iterator[Machine]:
    """The layouts that the task's profile has times for."""
    assert task.profile is not None
    for layout in layouts(task.profile, task.limits.micro_batches, task.model.num_experts):
        try:
            yield machine_for(task, layout)
        except ConfigError:
            continue  # not measured with so many threads


def machine_of(task: Task, plan: Plan) -> Machine:
    """The layout of a plan. Raises ConfigError: the task's profile has no times for it."""
    workers = (plan.num_attention_nodes, plan.num_expert_nodes, plan.threads_per_worker)
    return machine_for(task, Layout(*workers, plan.num_micro_batches, plan.kind == "colocated"))


def machine_plans(task: Task, *, num_plans: int = 5) -> list[Plan]:
    """The best plans for the profiled machine, best first; colocated ones among them.

    Raises:
        ConfigError: no layout keeps the limits; says how fast the fastest is.
    """
    tried = list(machines(task))
    plans = [plan for machine in tried if (plan := machine.best()) is not None]
    if not plans:
        layers = task.model.num_sparse_layers
        fastest = min(
            (steady_pass_s(one.stages(1), one.layout.num_micro_batches, layers) for one in tried), default=0.0
        )
        raise ConfigError(
            f"{task.model.name}: no layout of this machine keeps a TPOT of {task.workload.tpot_s * 1e3:g} ms and its "
            f"memory; the fastest pass takes {fastest * 1e3:.1f} ms, with one sequence per micro-batch"
        )
    plans.sort(key=lambda plan: (-score_of(plan, task.objective), plan.num_gpus, plan.num_micro_batches))
    return plans[:num_plans]
