"""One pair of node types: what its deployments are predicted to do, and how large a batch their limits leave.

Over arrays of candidates: experts per node, micro-batches and attention nodes, all at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msi.planner.assumptions import Assumptions, Quantity
from msi.planner.hardware import Gpu
from msi.planner.performance import (
    PairCosts,
    active_experts,
    attention_node_bytes,
    context_len,
    expert_node_bytes,
    nodes_per_token,
)
from msi.planner.pipeline import Stages, isolated_pass_s
from msi.planner.plan import Limit, Plan
from msi.planner.task import Limits, Objective, Pool, StageFactors, Task

UNCHANGED = StageFactors()
DENSE_UP_TO = 16  # every number of attention nodes up to here, then steps of 10 %


@dataclass(frozen=True, slots=True)
class Side:
    """One side's nodes: `tp` GPUs each."""

    gpu: Gpu
    tp: int
    count: int  # GPUs of the type

    def memory_limit_bytes(self, given: Assumptions) -> float:
        return self.tp * self.gpu.memory_bytes * given.memory_utilization


def sides(pools: Sequence[Pool], limits: Limits) -> Iterator[Side]:
    for pool in pools:
        for tp in limits.tp_sizes:
            if tp <= min(pool.gpu.gpus_per_node, pool.count):
                yield Side(pool.gpu, tp, pool.count)


def attention_gpus_beside(attention: Side, expert: Side, expert_gpus: int) -> int:
    """GPUs that attention may use when experts have so many; a type on both sides is one stock."""
    if attention.gpu != expert.gpu:
        return attention.count
    return min(attention.count, max(attention.count, expert.count) - expert_gpus)


def instances_that_fit(attention: Side, attention_gpus: Quantity, expert: Side, expert_gpus: Quantity) -> Quantity:
    """How many instances of so many GPUs on each side the counts allow."""
    fitting = np.minimum(attention.count // attention_gpus, expert.count // expert_gpus)
    if attention.gpu == expert.gpu:
        fitting = np.minimum(fitting, max(attention.count, expert.count) // (attention_gpus + expert_gpus))
    return fitting


@dataclass(frozen=True, slots=True)
class Candidates:
    """Deployments of one pair of sides: arrays of equal length."""

    num_attention_nodes: NDArray[np.float64]
    experts_per_node: NDArray[np.float64]
    num_expert_nodes: NDArray[np.float64]
    num_micro_batches: NDArray[np.float64]
    nodes_per_token: NDArray[np.float64]  # expert nodes that one token's rows go to

    def __len__(self) -> int:
        return len(self.num_micro_batches)

    def only(self, chosen: NDArray[Any]) -> Candidates:
        return Candidates(
            self.num_attention_nodes[chosen],
            self.experts_per_node[chosen],
            self.num_expert_nodes[chosen],
            self.num_micro_batches[chosen],
            self.nodes_per_token[chosen],
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of each candidate at its micro-batch."""

    attention_s: Quantity
    expert_s: Quantity
    comm_s: Quantity
    tpot_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class NodePair:
    """One pair of node types for a task: predicts candidates, and finds their largest micro-batches."""

    task: Task
    attention: Side
    expert: Side
    costs: PairCosts

    def predict(self, at: Candidates, micro_batch: NDArray[np.float64]) -> Prediction:
        """b_a m n_a = B; an expert node gets b_a n_a K / E rows for each of its experts."""
        task, model = self.task, self.task.model
        tokens = micro_batch * at.num_attention_nodes
        expert_rows = tokens * model.top_k * at.experts_per_node / model.num_experts
        active = active_experts(model, at.experts_per_node, tokens)
        mean_len = context_len(model, task.workload.mean_len)
        attention_s = self.costs.attention_s(micro_batch, micro_batch * mean_len)
        attention_s = attention_s + self.costs.pass_s(micro_batch) / model.num_sparse_layers
        expert_s = self.costs.expert_s(expert_rows, active, at.experts_per_node)
        message_rows = micro_batch * at.nodes_per_token / at.num_expert_nodes
        message_bytes = message_rows * model.row_bytes
        comm_s = self.costs.comm_s(message_bytes, at.num_attention_nodes, at.num_expert_nodes)
        if task.factors != UNCHANGED:
            attention_s, expert_s = attention_s * task.factors.attention, expert_s * task.factors.expert
            comm_s = comm_s * task.factors.comm
        forward_s = np.maximum(attention_s, expert_s)
        round_trip_s = attention_s + expert_s + 2 * comm_s
        tpot_s = model.num_sparse_layers * np.maximum(at.num_micro_batches * forward_s, round_trip_s)
        return Prediction(attention_s, expert_s, comm_s, np.asarray(tpot_s))

    def attention_bytes(self, at: Candidates, micro_batch: NDArray[np.float64]) -> Quantity:
        task = self.task
        return attention_node_bytes(
            task.model,
            self.attention.tp,
            task.given,
            micro_batch=micro_batch,
            num_micro_batches=at.num_micro_batches,
            mean_len=task.workload.mean_len,
            num_expert_nodes=at.num_expert_nodes,
        )

    def expert_bytes(self, at: Candidates, micro_batch: NDArray[np.float64]) -> Quantity:
        task = self.task
        return expert_node_bytes(
            task.model,
            self.expert.tp,
            task.given,
            micro_batch=micro_batch,
            num_micro_batches=at.num_micro_batches,
            num_attention_nodes=at.num_attention_nodes,
            experts_per_node=at.experts_per_node,
        )

    def violated(self, at: Candidates, micro_batch: NDArray[np.float64]) -> dict[Limit, NDArray[np.bool_]]:
        """By limit, which candidates break it with this micro-batch."""
        task = self.task
        batch = micro_batch * at.num_micro_batches * at.num_attention_nodes
        too_many = micro_batch > task.limits.max_micro_batch
        if task.limits.max_batch:
            too_many = too_many | (batch > task.limits.max_batch)
        return {
            "tpot": self._is_slow(at, micro_batch),
            "attention memory": np.asarray(
                self.attention_bytes(at, micro_batch) > self.attention.memory_limit_bytes(task.given)
            ),
            "expert memory": np.asarray(
                self.expert_bytes(at, micro_batch) > self.expert.memory_limit_bytes(task.given)
            ),
            "batch limit": too_many,
        }

    def largest_micro_batch(self, at: Candidates, worth: float = 0.0) -> NDArray[np.float64]:
        """Of each candidate; 0 where not even one sequence is within the limits, or the score would not exceed `worth`.

        Memory grows by the same bytes with every sequence, so its limit is a division; where the TPOT limit is lower,
        a search that halves the open range, and every second time cuts it where a line from the origin meets the
        limit: TPOT never falls with the micro-batch, and never rises faster than in proportion to it. For the same
        reason no candidate scores more than with the micro-batch that only memory limits.
        """
        largest = self._largest_in_memory(at)
        tpot_s = self.predict(at, np.maximum(largest, 1)).tpot_s
        if worth:
            largest = np.where(self._score(at, largest, tpot_s) > worth, largest, 0)
        is_slow = (largest > 0) & (tpot_s > self.task.workload.tpot_s * (1 + 1e-12))
        slow, searched = at.only(is_slow), np.flatnonzero(is_slow)
        low, high = np.zeros(len(slow)), largest[searched]
        limit_s = self.task.workload.tpot_s
        high_s = self.predict(slow, high).tpot_s
        is_cut = True
        while np.any(high - low > 1):
            tried = np.floor(high * limit_s / high_s if is_cut else (low + high) / 2)
            tried = np.clip(tried, low + 1, np.maximum(high - 1, low + 1))
            tried_s = self.predict(slow, tried).tpot_s
            is_open = high - low > 1
            too_slow = is_open & (tried_s > limit_s * (1 + 1e-12))
            high, high_s = np.where(too_slow, tried, high), np.where(too_slow, tried_s, high_s)
            low = np.where(is_open & ~too_slow, tried, low)
            is_cut = not is_cut
        largest[searched] = low
        return largest

    def _largest_in_memory(self, at: Candidates) -> NDArray[np.float64]:
        task = self.task
        largest = np.full(len(at), float(task.limits.max_micro_batch))
        if task.limits.max_batch:
            largest = np.minimum(largest, task.limits.max_batch // (at.num_micro_batches * at.num_attention_nodes))
        one, two = np.full(len(at), 1.0), np.full(len(at), 2.0)
        for needed, side in ((self.attention_bytes, self.attention), (self.expert_bytes, self.expert)):
            first = needed(at, one)
            room = side.memory_limit_bytes(task.given) - first
            largest = np.minimum(largest, np.floor(room / (needed(at, two) - first)) + 1)
        return np.asarray(np.maximum(largest, 0.0), dtype=np.float64)

    def _is_slow(self, at: Candidates, micro_batch: NDArray[np.float64]) -> NDArray[np.bool_]:
        limit_s = self.task.workload.tpot_s * (1 + 1e-12)
        is_slow: NDArray[np.bool_] = self.predict(at, micro_batch).tpot_s > limit_s
        return is_slow

    def candidates(self, attention_nodes: Iterable[int] | None = None) -> Candidates:
        """Every number of experts per node that divides E and fits, of m, and of attention nodes."""
        task, model = self.task, self.task.model
        grids = [np.empty((5, 0))]
        for experts_per_node in divisors(model.num_experts):
            num_expert_nodes = model.num_experts // experts_per_node
            expert_gpus = num_expert_nodes * self.expert.tp
            weights = experts_per_node * model.expert_bytes
            if expert_gpus > self.expert.count or weights > self.expert.memory_limit_bytes(task.given):
                continue
            most = attention_gpus_beside(self.attention, self.expert, expert_gpus) // self.attention.tp
            tried = [n for n in (spread_up_to(most) if attention_nodes is None else attention_nodes) if 1 <= n <= most]
            nodes, m = (one.ravel() for one in np.meshgrid(tried, task.limits.micro_batches))
            each = np.ones(len(nodes))
            reached = nodes_per_token(model, experts_per_node) * each
            grids.append(np.stack([nodes, experts_per_node * each, num_expert_nodes * each, m, reached]))
        return Candidates(*np.concatenate(grids, axis=1))

    def scores(self, at: Candidates, worth: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The score by the objective, and the largest micro-batch; a score of 0 where nothing is possible.

        Args:
            worth: candidates that cannot score more than this are given 0, unsearched: no TPOT limit helps them.
        """
        micro_batch = self.largest_micro_batch(at, worth)
        return self._score(at, micro_batch, self.predict(at, np.maximum(micro_batch, 1)).tpot_s), micro_batch

    def _score(
        self, at: Candidates, micro_batch: NDArray[np.float64], tpot_s: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        tokens_per_s = micro_batch * at.num_micro_batches * at.num_attention_nodes / tpot_s
        return tokens_per_s / self.spent(at, self.task.objective)

    def spent(self, at: Candidates, objective: Objective) -> NDArray[np.float64]:
        """What the objective divides tokens per second by, per instance."""
        attention_gpus = at.num_attention_nodes * self.attention.tp
        expert_gpus = at.num_expert_nodes * self.expert.tp
        match objective:
            case "gpu":
                return attention_gpus + expert_gpus
            case "cost":
                return attention_gpus * self.attention.gpu.price + expert_gpus * self.expert.gpu.price
            case "watt":
                return attention_gpus * self.attention.gpu.power_w + expert_gpus * self.expert.gpu.power_w
            case "cluster":
                return 1.0 / self.num_instances(at)

    def num_instances(self, at: Candidates) -> NDArray[np.float64]:
        attention_gpus = at.num_attention_nodes * self.attention.tp
        expert_gpus = at.num_expert_nodes * self.expert.tp
        return np.asarray(instances_that_fit(self.attention, attention_gpus, self.expert, expert_gpus))

    def plan(self, at: Candidates, micro_batch: float) -> Plan:
        """The one candidate of `at`, in full."""
        task, model = self.task, self.task.model
        given = np.array([micro_batch])
        predicted = self.predict(at, given)
        broken = self.violated(at, given + 1)
        stages = Stages(*(_one(value) for value in (predicted.attention_s, predicted.expert_s, predicted.comm_s)))
        num_micro_batches, num_attention_nodes = int(at.num_micro_batches[0]), int(at.num_attention_nodes[0])
        batch_size = int(micro_batch) * num_micro_batches * num_attention_nodes
        tokens_per_s = batch_size / float(predicted.tpot_s[0])

        def per(objective: Objective) -> float:
            return tokens_per_s / float(self.spent(at, objective)[0])

        return Plan(
            kind="disaggregated",
            attention_gpu=self.attention.gpu.name,
            expert_gpu=self.expert.gpu.name,
            tp_attention=self.attention.tp,
            tp_expert=self.expert.tp,
            num_attention_nodes=num_attention_nodes,
            num_expert_nodes=int(at.num_expert_nodes[0]),
            experts_per_node=int(at.experts_per_node[0]),
            num_micro_batches=num_micro_batches,
            num_layers=model.num_sparse_layers,
            batch_size=batch_size,
            t_attention_s=stages.attention_s,
            t_expert_s=stages.expert_s,
            t_comm_s=stages.comm_s,
            step_s=isolated_pass_s(stages, num_micro_batches, model.num_sparse_layers),
            tpot_s=float(predicted.tpot_s[0]),
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_gpu=per("gpu"),
            tokens_per_s_per_cost=per("cost"),
            tokens_per_s_per_watt=per("watt"),
            attention_memory_bytes=_one(self.attention_bytes(at, given)),
            expert_memory_bytes=_one(self.expert_bytes(at, given)),
            attention_memory_limit_bytes=self.attention.memory_limit_bytes(task.given),
            expert_memory_limit_bytes=self.expert.memory_limit_bytes(task.given),
            limited_by=next((limit for limit, is_broken in broken.items() if is_broken[0]), "batch limit"),
            num_instances=int(self.num_instances(at)[0]),
        )

    def resized(self, num_attention_nodes: int, num_expert_nodes: int, num_micro_batches: int) -> Plan | None:
        """The plan with so many nodes, with the largest B; where nodes do not divide E, the fullest one decides."""
        experts_per_node = -(-self.task.model.num_experts // num_expert_nodes)
        at = self._one(num_attention_nodes, experts_per_node, num_expert_nodes, num_micro_batches)
        micro_batch = float(self.largest_micro_batch(at)[0])
        return self.plan(at, micro_batch) if micro_batch else None

    def with_attention_nodes(self, plan: Plan, num_attention_nodes: int) -> Plan:
        """A plan with another number of attention nodes and the same micro-batch on each, whatever the limits."""
        at = self._one(num_attention_nodes, plan.experts_per_node, plan.num_expert_nodes, plan.num_micro_batches)
        return self.plan(at, float(plan.micro_batch))

    def _one(
        self, num_attention_nodes: int, experts_per_node: int, num_expert_nodes: int, num_micro_batches: int
    ) -> Candidates:
        reached = float(nodes_per_token(self.task.model, float(experts_per_node)))
        sizes = (num_attention_nodes, experts_per_node, num_expert_nodes, num_micro_batches, reached)
        return Candidates(*(np.array([float(size)]) for size in sizes))


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def spread_up_to(most: int) -> list[int]:
    """1, 2, 3 ... and from 16 on in steps of 10 %, up to `most`."""
    numbers = list(range(1, min(most, DENSE_UP_TO) + 1))
    while numbers and numbers[-1] < most:
        numbers.append(min(most, max(numbers[-1] + 1, int(numbers[-1] * 1.1))))
    return numbers


def _one(value: Quantity) -> float:
    return float(np.asarray(value).reshape(-1)[0])
