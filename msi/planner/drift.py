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
    """What one worker's heartbeat says; all but `comm_s` are running totals.

    Attributes:
        role: "attention" workers measure T_a and T_c, "expert" workers T_e.
        compute_s: spent on layers: an attention worker's turns, an expert worker's batches.
        batches: of an expert worker.
        comm_s: T_c of an attention worker, the median of its last turns.
        passes, batch_tokens, batch_contexts: of an attention worker: micro-batches run, their rows and context lengths.
    """

    worker_id: str
    role: str
    compute_s: float
    batches: float = 0.0
    comm_s: float = 0.0
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
        """What has newly parted from the plan; each worker's stage once, until it is back within the fraction.

        Compares means since the last look, when every attention worker that ran anything has run enough.
        """
        workers = list(workers)
        since = [_since(worker, self._seen.get(worker.worker_id)) for worker in workers]
        running = [one for one in since if one.role == "attention" and one.passes > 0]
        if not running or min(one.passes for one in running) < MIN_PASSES:
            return []
        self._seen = {worker.worker_id: worker for worker in workers}
        rows = sum(one.batch_tokens / one.passes for one in running) / len(running)
        return [drift for one in since for drift in self._of(one, rows) if self._is_news(drift)]

    def _is_news(self, drift: Drift) -> bool:
        key = (drift.worker_id, drift.stage)
        self._ratios[key] = drift.ratio
        parted = max(drift.ratio, 1 / drift.ratio) > 1 + self._fraction
        if drift.stage == "comm":  # it matters as far as it lengthens a round trip
            parted &= 2 * abs(drift.measured_s - drift.planned_s) > self._fraction * self._file.plan.stages.round_trip_s
        if not parted:
            self._said.discard(key)
        elif key not in self._said:
            self._said.add(key)
            self.num_alarms += 1
            return True
        return False

    def _of(self, one: Observation, rows: float) -> list[Drift]:
        """What this worker measured since the last look, at the batches that it ran.

        `rows`: of a micro-batch on an attention worker, in the mean of all.
        """
        plan, model = self._file.plan, self._file.task.model
        drifts = []
        if one.role == "attention" and one.passes > 0:
            size, contexts = one.batch_tokens / one.passes, one.batch_contexts / one.passes
            costs = costs_of(self._file.task, plan, max(1, round(size)))
            planned_s = costs.attention_s(max(1, round(size)), max(1, round(contexts)))
            drifts.append(Drift(one.worker_id, "attention", planned_s, one.compute_s / one.passes / plan.num_layers))
            if plan.kind == "disaggregated" and one.comm_s > 0:
                sent = size * float(nodes_per_token(model, float(plan.experts_per_node))) / plan.num_expert_nodes
                num_bytes = max(1, round(sent * model.row_bytes))
                drifts.append(Drift(one.worker_id, "comm", costs.comm_s(num_bytes), one.comm_s))
        elif one.role == "expert" and one.batches > 0:
            tokens = rows * plan.num_attention_nodes
            pairs = tokens * model.top_k * plan.experts_per_node / model.num_experts
            active = max(1, round(float(active_experts(model, float(plan.experts_per_node), tokens))))
            planned_s = costs_of(self._file.task, plan, max(1, round(rows))).expert_s(pairs, active)
            drifts.append(Drift(one.worker_id, "expert", planned_s, one.compute_s / one.batches))
        return [drift for drift in drifts if drift.measured_s > 0 and drift.planned_s > 0]

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


def _since(now: Observation, before: Observation | None) -> Observation:
    """What happened since an earlier look; all of it where that was another life."""
    if before is None or now.compute_s < before.compute_s or now.passes < before.passes or now.batches < before.batches:
        return now
    return replace(
        now,
        compute_s=now.compute_s - before.compute_s,
        batches=now.batches - before.batches,
        passes=now.passes - before.passes,
        batch_tokens=now.batch_tokens - before.batch_tokens,
        batch_contexts=now.batch_contexts - before.batch_contexts,
    )


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
