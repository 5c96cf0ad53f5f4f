"""What stages take under given conditions, from a profile of the machine: between measured sizes, and under contention.

`ProfiledCosts` answers what the pipeline asks (`msi.planner.stage_costs.StageCosts`). Knows what workers that share a
machine do to each other; knows no models and no clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from msi.errors import ConfigError
from msi.planner.interpolation import Curve, Size, Surface, like
from msi.planner.profile import AttentionPoint, ExpertPoint, PassPoint, Profile, select


@dataclass(frozen=True, slots=True)
class StageConditions:
    """What stages run on, as far as it changes what they take.

    Attributes:
        threads: of each worker.
        num_experts: on each expert node.
        transport: between the two sides.
        num_attention, num_expert: workers of each side that share one machine (1 each on machines of their own).
        num_micro_batches: m; with one, the two sides never compute at the same time.
        is_colocated: one process computes both sides in turn, so they never do.
    """

    threads: int
    num_experts: int
    transport: str
    num_attention: int = 1
    num_expert: int = 1
    num_micro_batches: int = 1
    is_colocated: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether a side computes while the other one does."""
        return self.num_micro_batches > 1 and not self.is_colocated


class ProfiledCosts:
    """Implements `msi.planner.stage_costs.StageCosts` for one set of conditions, for numbers and numpy arrays alike.

    Workers of one side compute at the same time (a wave gathers them); those of the other side too, in turn with m = 1
    and beside them with more. What was measured is one worker alone, and one beside a worker of the other side. When
    more run at a time than the machine has cores for, they share it fairly.

    Args:
        attention_overlap, expert_overlap: share of a side's work that is done while the other side computes; see
            `settled`. By default all of it where the sides overlap at all.

    Raises:
        ConfigError: the profile has nothing for so many threads, or this transport.
    """

    def __init__(
        self,
        profile: Profile,
        conditions: StageConditions,
        *,
        attention_overlap: Size | None = None,
        expert_overlap: Size | None = None,
    ) -> None:
        default = float(conditions.overlaps)
        self.attention_overlap: Size = default if attention_overlap is None else attention_overlap
        self.expert_overlap: Size = default if expert_overlap is None else expert_overlap
        self._profile = profile
        self._conditions = conditions
        comm = [point for point in profile.comm if point.transport == conditions.transport]
        if not comm:
            measured = ", ".join(dict.fromkeys(point.transport for point in profile.comm))
            raise ConfigError(f"the profile has no transport {conditions.transport!r}; it has {measured}")
        by_bytes: dict[float, float] = {point.num_bytes: point.seconds for point in comm}
        self._comm = Curve({0.0: 0.0} if conditions.is_colocated else by_bytes)  # nothing lies between the sides there
        self._scheduling = Curve({point.num_seqs: point.seconds for point in profile.scheduling} or {0.0: 0.0})
        self._attention = self._by_contention("attention", profile.attention, conditions.num_attention, _attention)
        self._pass = self._by_contention("pass", profile.passes, conditions.num_attention, _passes)
        nearest = _nearest([point.num_experts for point in profile.expert], conditions.num_experts)
        expert = tuple(point for point in profile.expert if point.num_experts == nearest)
        self._expert = self._by_contention("expert", expert, conditions.num_expert, _expert)

    def _by_contention(
        self, name: str, points: Sequence[Any], num_workers: int, interpolate: Callable[[Sequence[Any]], Surface]
    ) -> _Contended:
        """How long this side's work takes without and with the other side."""
        conditions = self._conditions
        alone = beside = interpolate(select(self._profile, name, points, conditions.threads, "alone"))
        if conditions.overlaps or num_workers > 1:
            beside = interpolate(select(self._profile, name, points, conditions.threads, "overlapped"))
        together = conditions.num_attention + conditions.num_expert
        return _Contended(
            apart=alone if num_workers == 1 else beside,
            apart_factor=1.0 if num_workers == 1 else self._crowding(num_workers),
            beside=beside,
            beside_factor=self._crowding(together),
        )

    def _crowding(self, num_workers: int) -> float:
        """How much longer work takes than beside one other worker (two at a time are measured, more are not)."""
        cores, threads = self._profile.num_cores, self._conditions.threads
        return max(1.0, num_workers * threads / cores) / max(1.0, 2 * threads / cores)

    def settled(
        self, num_tokens: Size, num_context_tokens: Size, num_expert_rows: Size, num_active_experts: Size
    ) -> ProfiledCosts:
        """These costs for a pipeline of such micro-batches: how far the sides overlap follows from what they take.

        The shorter stage runs beside the longer one from its start to its end; the longer one has the device to
        itself for the rest.
        """
        if not self._conditions.overlaps:
            return self
        attention = self._attention.beside_factor * self._attention.beside.at(
            num_tokens, _mean(num_context_tokens, num_tokens)
        )
        expert = self._expert.beside_factor * self._expert.beside.at(
            num_active_experts, _mean(num_expert_rows, num_active_experts)
        )
        return ProfiledCosts(
            self._profile,
            self._conditions,
            attention_overlap=like(np.minimum(1.0, expert / attention)),
            expert_overlap=like(np.minimum(1.0, attention / expert)),
        )

    @overload
    def attention_s(self, num_tokens: int, num_context_tokens: int) -> float: ...
    @overload
    def attention_s(self, num_tokens: Size, num_context_tokens: Size) -> Size: ...
    def attention_s(self, num_tokens: Size, num_context_tokens: Size) -> Size:
        return self._attention.at(self.attention_overlap, num_tokens, _mean(num_context_tokens, num_tokens))

    @overload
    def pass_s(self, num_logit_rows: int) -> float: ...
    @overload
    def pass_s(self, num_logit_rows: Size) -> Size: ...
    def pass_s(self, num_logit_rows: Size) -> Size:
        return like(self._pass.at(self.attention_overlap, 1.0, num_logit_rows) + self._scheduling.at(num_logit_rows))

    @overload
    def expert_s(self, num_expert_rows: float, num_active_experts: int) -> float: ...
    @overload
    def expert_s(self, num_expert_rows: Size, num_active_experts: Size) -> Size: ...
    def expert_s(self, num_expert_rows: Size, num_active_experts: Size) -> Size:
        return self._expert.at(self.expert_overlap, num_active_experts, _mean(num_expert_rows, num_active_experts))

    @overload
    def comm_s(self, num_bytes: int) -> float: ...
    @overload
    def comm_s(self, num_bytes: Size) -> Size: ...
    def comm_s(self, num_bytes: Size) -> Size:
        return self._comm.at(num_bytes)


@dataclass(frozen=True, slots=True)
class _Contended:
    """One kind of work: while the other side rests (`apart`), and while it computes (`beside`)."""

    apart: Surface
    apart_factor: float
    beside: Surface
    beside_factor: float

    def at(self, overlap: Size, outer: Size, inner: Size) -> Size:
        apart = self.apart_factor * self.apart.at(outer, inner)
        return like(apart + overlap * (self.beside_factor * self.beside.at(outer, inner) - apart))


def _attention(points: Sequence[AttentionPoint]) -> Surface:
    return Surface({(point.num_tokens, point.context_len): point.seconds for point in points})


def _expert(points: Sequence[ExpertPoint]) -> Surface:
    """Over the rows of each active expert: what an expert costs beside its weights depends on those."""
    return Surface(
        {
            (point.num_active_experts, point.num_expert_rows / point.num_active_experts): point.seconds
            for point in points
        }
    )


def _passes(points: Sequence[PassPoint]) -> Surface:
    return Surface({(1, point.num_seqs): point.seconds for point in points})


def _nearest(measured: Sequence[int], wanted: int) -> int:
    """The least that is enough, else the most."""
    enough = [one for one in measured if one >= wanted]
    return min(enough) if enough else max(measured)


def _mean(total: Size, count: Size) -> Size:
    """Per one of `count`; of none, nothing."""
    return like(np.asarray(total, dtype=np.float64) / np.maximum(count, 1e-9))
