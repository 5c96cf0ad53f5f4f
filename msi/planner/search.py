"""The deployment search: the paper's Algorithm 1 with every count searched, over arrays of candidates.

For each pair of GPU types and tensor-parallel sizes, all candidates of `msi.planner.node_pair`; the best by the
objective, or the sentence that says why there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from msi.errors import ConfigError
from msi.planner.node_pair import DENSE_UP_TO, Candidates, NodePair, sides
from msi.planner.performance import Roofline
from msi.planner.plan import Plan
from msi.planner.task import Task

STEP_MATTERS = 0.02  # scores between two steps of attention nodes are at most so much higher


def search(task: Task, *, num_plans: int = 5) -> list[Plan]:
    """The best plans by the task's objective, best first; at most one per pair of node types and m.

    Raises:
        ConfigError: no plan keeps the limits; says which limit stands in the way.
    """
    found: list[_Found] = []
    for pair in node_pairs(task):
        worth = found[-1].score if len(found) == num_plans else 0.0
        found = sorted([*found, *_best_of(pair, worth)], key=lambda one: -one.score)[:num_plans]
    if not found:
        raise ConfigError(why_none(task))
    return [one.pair.plan(one.at, one.micro_batch) for one in found]


@dataclass(frozen=True, slots=True)
class _Found:
    score: float
    pair: NodePair
    at: Candidates  # one
    micro_batch: float


def _best_of(pair: NodePair, worth: float) -> Iterator[_Found]:
    """For each m, the best of one pair of node types, if it may score more than `worth`.

    Attention nodes between the steps are tried in a second round.
    """
    coarse = pair.candidates()
    if not len(coarse):
        return
    scores, micro_batch = pair.scores(coarse, worth * (1 - STEP_MATTERS))
    for m in pair.task.limits.micro_batches:
        of_m = np.flatnonzero((coarse.num_micro_batches == m) & (scores > 0))
        if not len(of_m):
            continue
        best = of_m[np.argmax(scores[of_m])]
        at, score, size = coarse.only(np.array([best])), scores[best], micro_batch[best]
        nodes = int(coarse.num_attention_nodes[best])
        if nodes > DENSE_UP_TO:
            near = pair.candidates(range(int(nodes / 1.11), int(nodes * 1.11) + 2))
            near = near.only((near.num_micro_batches == m) & (near.experts_per_node == at.experts_per_node[0]))
            near_scores, near_sizes = pair.scores(near)
            if near_scores.max(initial=0.0) > score:
                chosen = int(np.argmax(near_scores))
                at, score, size = near.only(np.array([chosen])), near_scores[chosen], near_sizes[chosen]
        yield _Found(float(score), pair, at, float(size))


def node_pairs(task: Task) -> Iterator[NodePair]:
    """Every pair of GPU types and tensor-parallel sizes whose weights fit (the two outer loops of Algorithm 1)."""
    model, given = task.model, task.given
    for attention in sides(task.attention, task.limits):
        if model.attention_bytes > attention.memory_limit_bytes(given):
            continue
        for expert in sides(task.expert, task.limits):
            if model.expert_bytes <= expert.memory_limit_bytes(given):
                costs = Roofline(model, attention.gpu, attention.tp, expert.gpu, expert.tp, given)
                yield NodePair(task, attention, expert, costs)


def node_pair_of(task: Task, plan: Plan) -> NodePair:
    """The pair of node types whose nodes a disaggregated plan uses."""
    for pair in node_pairs(task):
        sides = (pair.attention.gpu.name, pair.attention.tp, pair.expert.gpu.name)
        if (*sides, pair.expert.tp) == (plan.attention_gpu, plan.tp_attention, plan.expert_gpu, plan.tp_expert):
            return pair
    raise AssertionError(f"no such nodes: {plan}")


def why_none(task: Task) -> str:
    """The sentence for a task that no plan satisfies."""
    model, given, workload = task.model, task.given, task.workload
    needed = {"attention": (task.attention, model.attention_bytes), "one expert": (task.expert, model.expert_bytes)}
    for what, (pools, weights) in needed.items():
        largest = max((side.memory_limit_bytes(given) for side in sides(pools, task.limits)), default=0.0)
        if weights > largest:
            names = ", ".join(pool.gpu.name for pool in pools)
            return (
                f"{model.name}: {what} needs {weights / 1e9:.1f} GB of weights, and the largest group of {names} that "
                f"may be used has {largest / 1e9:.1f} GB; give GPUs with more memory, or more of them"
            )
    tight: dict[str, float] = {}
    is_there = fits_memory = False
    for pair in node_pairs(task):
        at = pair.candidates()
        if not len(at):
            continue
        is_there = True
        broken = pair.violated(at, np.ones(len(at)))
        fits = ~(broken["attention memory"] | broken["expert memory"])
        fits_memory |= bool(np.any(fits))
        fits &= ~broken["batch limit"]
        if np.any(fits):
            fastest = float(np.min(pair.predict(at, np.ones(len(at))).tpot_s[fits]))
            tight["tpot"] = min(tight.get("tpot", fastest), fastest)
    if "tpot" in tight:
        return (
            f"{model.name}: no plan keeps a TPOT of {workload.tpot_s * 1e3:g} ms; the fastest possible here is "
            f"{math.ceil(tight['tpot'] * 1e4) / 10:.1f} ms, with one sequence per micro-batch; raise `tpot_s`"
        )
    gpus = ", ".join(f"{pool.count} {pool.gpu.name}" for pool in dict.fromkeys((*task.attention, *task.expert)))
    if not is_there:
        total_gb = (model.attention_bytes + model.num_experts * model.expert_bytes) / 1e9
        return f"{model.name} ({total_gb:.0f} GB of weights) does not fit on {gpus}; give more GPUs or larger ones"
    if fits_memory:
        return (
            f"{model.name}: at most {task.limits.max_batch} sequences per instance and {task.limits.max_micro_batch} "
            f"per micro-batch leave none for one of {' or '.join(map(str, task.limits.micro_batches))} micro-batches; "
            "raise the limit"
        )
    return (
        f"{model.name}: not one sequence of {workload.mean_len:g} tokens fits beside the weights on {gpus}; give more "
        "GPUs, larger ones, or shorter lengths"
    )
