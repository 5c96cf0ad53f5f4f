"""Choosing: the best plans for a task, their Pareto front, what limits them, and whether disaggregation is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from msi.errors import ConfigError
from msi.planner.assumptions import BASELINES, Baseline
from msi.planner.colocated import best_colocated
from msi.planner.machine import machine_of, machine_plans
from msi.planner.performance import DeploymentCosts
from msi.planner.plan import Plan
from msi.planner.search import node_pair_of, search
from msi.planner.stage_costs import StageCosts
from msi.planner.task import Pool, Task, score_of


def best_plans(task: Task, *, num_plans: int = 5) -> list[Plan]:
    """By the task's objective, best first: from a profile where the task has one, else from the roofline.

    Where only colocated deployments keep the limits, those.

    Raises:
        ConfigError: no plan keeps the limits; says which limit stands in the way.
    """
    if task.profile is not None:
        return machine_plans(task, num_plans=num_plans)
    try:
        return search(task, num_plans=num_plans)
    except ConfigError:
        colocated = sorted(_colocated(task).values(), key=lambda plan: -score_of(plan, task.objective))
        if not colocated:
            raise
        return colocated[:num_plans]


def costs_of(task: Task, plan: Plan, micro_batch: int = 0) -> StageCosts:
    """What the stages of a plan take, for the simulator and for comparing with what is measured.

    Args:
        micro_batch: the usual one, where costs depend on how far both sides overlap; 0 for the plan's.
    """
    if task.profile is not None:
        return machine_of(task, plan).stage_costs(micro_batch or plan.micro_batch)
    pair = node_pair_of(task, plan).costs
    return DeploymentCosts(pair, plan.num_attention_nodes, plan.num_expert_nodes, plan.experts_per_node)


def pareto_front(task: Task, *, num_points: int = 12) -> list[Plan]:
    """Plans of which none has both a lower TPOT and a higher score, by ascending TPOT, up to the task's limit.

    Raises:
        ConfigError: no plan keeps the task's own limits.
    """
    front: list[Plan] = []
    for step in reversed(range(num_points)):
        tpot_s = task.workload.tpot_s / 1.25**step
        try:
            plan = best_plans(replace(task, workload=replace(task.workload, tpot_s=tpot_s)), num_plans=1)[0]
        except ConfigError:
            if step == 0 and not front:
                raise
            continue
        if not front or score_of(plan, task.objective) > score_of(front[-1], task.objective) * (1 + 1e-9):
            front = [*(one for one in front if one.tpot_s < plan.tpot_s), plan]
    return front


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether disaggregation is worth it on this hardware.

    Attributes:
        best: the best disaggregated plan, if any.
        colocated: the best colocated plan of each way to deploy it, by name.
        gain: best over the best colocated, by the task's objective; 0.0 without the one, inf without the other.
    """

    best: Plan | None
    colocated: dict[str, Plan]
    gain: float

    @property
    def is_worth_it(self) -> bool:
        return self.gain > 1.0


def is_it_worth_it(task: Task, plans: Sequence[Plan]) -> Verdict:
    """Compares with the same hardware colocated; the baselines here batch as many sequences as they can.

    Args:
        plans: of this task; more are looked for where none of them is disaggregated.
    """
    best = next((plan for plan in plans if plan.kind == "disaggregated"), None)
    colocated: dict[str, Plan] = {}
    if task.profile is not None:
        every = best_plans(task, num_plans=1000)
        best = next((plan for plan in every if plan.kind == "disaggregated"), None)
        one_process = next((plan for plan in every if plan.kind == "colocated"), None)
        if one_process is not None:
            colocated["one process"] = one_process
    else:
        colocated = _colocated(task)
    scores = [score_of(plan, task.objective) for plan in colocated.values()]
    ours = 0.0 if best is None else score_of(best, task.objective)
    return Verdict(best, colocated, ours / max(scores) if scores else float("inf"))


def _colocated(task: Task) -> dict[str, Plan]:
    """The best of each way to deploy it, by name: tensor parallel as vLLM, with expert parallel as TensorRT-LLM."""
    found = {}
    for name, label in (("vllm", "tensor parallel"), ("tensorrt-llm", "tensor + expert parallel")):
        unlimited: Baseline = replace(BASELINES[name], max_num_seqs=0)
        plan = best_colocated(task, unlimited)
        if plan is not None:
            found[label] = plan
    return found


@dataclass(frozen=True, slots=True)
class Marginal:
    """What one more node of a side would bring.

    Attributes:
        change: relative, of the instance's tokens per second; None where it cannot be used.
    """

    side: str
    gpu: str
    num_gpus: int
    change: float | None


def one_more(task: Task, plan: Plan) -> list[Marginal]:
    """One more attention node and one more expert node of the plan's kinds, its m kept, B as large as it can be."""
    found = []
    for side, nodes, experts in (
        ("attention", plan.num_attention_nodes + 1, plan.num_expert_nodes),
        ("expert", plan.num_attention_nodes, plan.num_expert_nodes + 1),
    ):
        gpu, tp = (plan.attention_gpu, plan.tp_attention) if side == "attention" else (plan.expert_gpu, plan.tp_expert)
        more = None
        if task.profile is None and plan.kind == "disaggregated" and experts <= task.model.num_experts:
            wider = replace(task, attention=_one_more(task.attention, gpu, tp), expert=_one_more(task.expert, gpu, tp))
            more = node_pair_of(wider, plan).resized(nodes, experts, plan.num_micro_batches)
        found.append(Marginal(side, gpu, tp, None if more is None else more.tokens_per_s / plan.tokens_per_s - 1))
    return found


def balances(task: Task, plan: Plan) -> tuple[int, int] | None:
    """Attention nodes with T_a nearest T_e, and the most with T_e <= T_a (defect 8: both reported).

    Of the plan's micro-batch and expert nodes; 0 for the second where even one attention node leaves T_e the longer.
    None for plans that are not two groups of GPUs.
    """
    if task.profile is not None or plan.kind == "colocated":
        return None
    pair = node_pair_of(task, plan)
    found = [pair.with_attention_nodes(plan, number) for number in range(1, 4 * plan.num_attention_nodes + 1)]
    nearest = min(found, key=lambda one: abs(one.t_attention_s - one.t_expert_s))
    within = (one.num_attention_nodes for one in found if one.t_expert_s <= one.t_attention_s)
    return nearest.num_attention_nodes, max(within, default=0)


def _one_more(pools: tuple[Pool, ...], gpu: str, tp: int) -> tuple[Pool, ...]:
    return tuple(replace(pool, count=pool.count + tp) if pool.gpu.name == gpu else pool for pool in pools)
