"""Drift: what workers measure against what the plan predicted for the batches that they really run.

Decides from values; the coordinator says it. Predictions are made at the observed micro-batch and context, so that a
quiet hour is no drift.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from msi.errors import ConfigError
from msi.planner.choose import best_plans, costs_of
from msi.planner.performance import active_experts, nodes_per_token
from msi.planner.plan import Plan
from msi.planner.plan_file import PlanFile
from msi.planner.task import StageFactors, Task, score_of

MIN_PASSES = 32  # between two looks at a worker
STAGES = ("attention", "expert", "comm")
SYMBOLS = {"attention": "T_a", "expert": "T_e", "comm": "T_c"}


@dataclass(frozen=True, slots=True)
class Observation:
    """What one worker's heartbeat says; counters are running totals.

    Attributes:
        role: "attention" workers measure T_a and T_c, and T_e of their turns; "expert" workers T_e.
        passes, batch_tokens, batch_contexts: of an attention worker: micro-batches run, their rows and context lengths.
    """

    worker_id: str
    role: str
    attention_s: float
    expert_s: float
    comm_s: float
    passes: float = 0.0
    batch_tokens: float = 0.0
    batch_contexts: float = 0.0


@dataclass(frozen=True, slots=True)
class Drift:
    """One stage of one worker that parted from the plan."""

    worker_id: str
    stage: str
    planned_s: float
    measured_s: float

    @property
    def ratio(self) -> float:
        return self.measured_s / self.planned_s

    def __str__(self) -> str:
        symbol = SYMBOLS[self.stage]
        measured_ms, planned_ms = self.measured_s * 1e3, self.planned_s * 1e3
        return (
            f"{self.worker_id}: {symbol} is {measured_ms:.3f} ms, {self.ratio:.2f} of the planned {planned_ms:.3f} ms"
        )


class DriftWatch:
    """Compares one instance with its plan.

    Args:
        fraction: how far a stage may part, either way: 0.3 lets it be between 1 / 1.3 and 1.3 of what was planned.
    """

    def __init__(self, file: PlanFile, fraction: float) -> None:
        self._file = file
        self._fraction = fraction
        self._seen: dict[str, Observation] = {}
        self._batch: dict[str, tuple[float, float]] = {}  # mean rows and context of a micro-batch, by attention worker
        self._ratios: dict[tuple[str, str], float] = {}
        self._said: set[tuple[str, str]] = set()
        self.num_alarms = 0

    @property
    def ratios(self) -> dict[str, float]:
        """Measured over planned by stage, of the worker that is farthest from 1."""
        worst: dict[str, float] = {}
        for (_, stage), ratio in self._ratios.items():
            if max(ratio, 1 / ratio) >= max(worst.get(stage, 1.0), 1 / worst.get(stage, 1.0)):
                worst[stage] = ratio
        return worst

    def look(self, workers: Iterable[Observation]) -> list[Drift]:
        """What has newly parted from the plan; each worker's stage once, until it is back within the fraction."""
        workers = list(workers)
        fresh = [one for one in workers if one.role == "attention" and self._measure_batch(one)]
        if not fresh:
            return []
        micro_batch = sum(batch for batch, _ in self._batch.values()) / len(self._batch)
        found = []
        for worker in workers:
            if worker.role == "attention" and worker not in fresh:
                continue
            for stage, planned_s, measured_s in self._compared(worker, micro_batch):
                drift = Drift(worker.worker_id, stage, planned_s, measured_s)
                key = (worker.worker_id, stage)
                self._ratios[key] = drift.ratio
                if max(drift.ratio, 1 / drift.ratio) <= 1 + self._fraction:
                    self._said.discard(key)
                elif key not in self._said:
                    self._said.add(key)
                    self.num_alarms += 1
                    found.append(drift)
        return found

    def _measure_batch(self, worker: Observation) -> bool:
        """Whether enough passes went by for a mean micro-batch of this attention worker."""
        nothing = replace(worker, passes=0.0, batch_tokens=0.0, batch_contexts=0.0)
        before = self._seen.setdefault(worker.worker_id, nothing)
        passes = worker.passes - before.passes
        if passes < 0:  # a new life
            del self._seen[worker.worker_id]
            return False
        if passes < MIN_PASSES:
            return False
        rows = (worker.batch_tokens - before.batch_tokens) / passes
        self._batch[worker.worker_id] = rows, (worker.batch_contexts - before.batch_contexts) / passes
        self._seen[worker.worker_id] = worker
        return rows > 0

    def _compared(self, worker: Observation, micro_batch: float) -> list[tuple[str, float, float]]:
        """(stage, planned, measured) of what this worker measures, at its batch."""
        plan, model = self._file.plan, self._file.task.model
        rows, contexts = self._batch.get(worker.worker_id, (micro_batch, 0.0))
        size = max(1, round(rows))
        costs = costs_of(self._file.task, plan, size)
        if worker.role == "attention":
            sent = rows * float(nodes_per_token(model, float(plan.experts_per_node))) / plan.num_expert_nodes
            num_bytes = max(1, round(sent * model.hidden_size * model.value_bytes))
            stages = [("attention", costs.attention_s(size, max(size, round(contexts))), worker.attention_s)]
            if plan.kind == "disaggregated":
                stages.append(("comm", costs.comm_s(num_bytes), worker.comm_s))
        else:
            tokens = micro_batch * plan.num_attention_nodes
            pairs = tokens * model.top_k * plan.experts_per_node / model.num_experts
            active = float(active_experts(model, float(plan.experts_per_node), tokens))
            stages = [("expert", costs.expert_s(pairs, max(1, round(active))), worker.expert_s)]
        return [(stage, planned, measured) for stage, planned, measured in stages if measured > 0 and planned > 0]

    def choice_now(self) -> str:
        """The plan that would be chosen with the stage times as they are measured: a sentence."""
        file = self._file
        worst = self.ratios
        factors = StageFactors(*(worst.get(stage, 1.0) for stage in STAGES))
        task = replace(file.task, factors=factors)
        try:
            plan = best_plans(task, num_plans=1)[0]
        except ConfigError as error:
            return f"with these stage times: {error}"
        if _deployment(plan) == _deployment(file.plan):
            return "the plan that runs would be chosen again"
        return f"the plan to choose now: {describe(plan, task)}"


def _deployment(plan: Plan) -> tuple[object, ...]:
    return (
        plan.kind, plan.attention_gpu, plan.tp_attention, plan.num_attention_nodes, plan.expert_gpu, plan.tp_expert,
        plan.num_expert_nodes, plan.num_micro_batches, plan.threads_per_worker,
    )  # fmt: skip


def describe(plan: Plan, task: Task) -> str:
    """A plan in a line."""
    score = f"{score_of(plan, task.objective):.4g} per {task.objective}"
    predicted = f"B = {plan.batch_size}, {plan.tokens_per_s:.0f} tokens/s ({score})"
    if plan.kind == "colocated":
        return f"colocated on {plan.num_gpus} {plan.attention_gpu}, {predicted}"
    return (
        f"{plan.num_attention_nodes} attention ({plan.tp_attention} {plan.attention_gpu}) + {plan.num_expert_nodes} "
        f"expert nodes ({plan.tp_expert} {plan.expert_gpu}), m = {plan.num_micro_batches}, {predicted}"
    )
