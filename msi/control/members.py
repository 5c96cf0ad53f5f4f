"""The values that membership decides about: an instance's plan, its members, and what is to be done about them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from msi.control.messages import Assignment, WorkerHello
from msi.control.rhythm import Rhythm
from msi.control.worker_status import WorkerStatus
from msi.placement import Placement
from msi.precision import Precision
from msi.settings import (
    AttentionBalance,
    LinkShape,
    Rebalance,
    SchedulerLimits,
    ServiceLevel,
    SlowWorkers,
    Timeouts,
)
from msi.types import Place, StageTimes

LOADING_PATIENCE = 5  # a worker that loads may be silent for so many times longer
NO_STATUS = WorkerStatus(0, 0, 0, 0, 0, StageTimes())


@dataclass(frozen=True, slots=True)
class InstancePlan:
    """The shape of an instance; see `msi.control.messages.Assignment` for what is not said here.

    Attributes:
        num_attention, num_expert: nodes.
        attention_ranks, expert_ranks: workers of each node.
        limits: without zeros that stand for something else.
        precision: as it was asked for; "auto" leaves it to the first worker.
        max_resumptions: how often a request goes on elsewhere when its attention worker is lost.
        max_attention, max_expert: as many nodes as may be there while it runs; 0: no more than at the start.
        places: of workers that are wanted now, by role; None: as many as at the start.
        num_changes: of `places`, since the instance began.
        term: of its coordinator; see `msi.control.succession`.
        is_on_network: a worker's host may vanish without a word; here somebody sees processes end.
    """

    instance: str
    num_attention: int
    num_expert: int
    is_colocated: bool
    placement: Placement
    limits: SchedulerLimits
    link: LinkShape = LinkShape()
    timeouts: Timeouts = Timeouts()
    precision: Precision = Precision()
    attention_ranks: int = 1
    expert_ranks: int = 1
    max_resumptions: int = 3
    service: ServiceLevel = ServiceLevel()
    rebalance: Rebalance = Rebalance()
    slow: SlowWorkers = SlowWorkers()
    balance: AttentionBalance = AttentionBalance()
    max_attention: int = 0
    max_expert: int = 0
    places: Mapping[str, tuple[int, ...]] | None = None
    num_changes: int = 0
    term: int = 0
    is_on_network: bool = False

    @property
    def ranks(self) -> dict[str, int]:
        """Workers per node, by role."""
        return {"attention": self.attention_ranks, "expert": self.expert_ranks}

    @property
    def wanted(self) -> dict[str, int]:
        """Workers per role."""
        return {role: len(places) for role, places in self.wanted_places.items()}

    @property
    def wanted_places(self) -> Mapping[str, tuple[int, ...]]:
        """By role."""
        if self.places is not None:
            return self.places
        num_expert = 0 if self.is_colocated else self.num_expert
        num_attention = self.num_attention * self.attention_ranks
        return {"attention": tuple(range(num_attention)), "expert": tuple(range(num_expert * self.expert_ranks))}

    @property
    def most(self) -> dict[str, int]:
        """Workers per role that there is room for."""
        wanted = self.wanted
        if self.is_colocated or (self.attention_ranks, self.expert_ranks) != (1, 1):
            return wanted
        return {
            "attention": self.max_attention or self.num_attention,
            "expert": self.max_expert or self.num_expert,
        }

    def with_place(self, role: str, index: int) -> InstancePlan:
        """One worker more, where it is not one of them."""
        if index in self.wanted_places[role]:
            return self
        places = dict(self.wanted_places)
        places[role] = tuple(sorted({*places[role], index}))
        return replace(self, places=places, num_changes=self.num_changes + 1)

    def without_place(self, role: str, index: int) -> InstancePlan:
        """One less; the last one of a role stays wanted."""
        places = dict(self.wanted_places)
        if places[role] == (index,) or index not in places[role]:
            return self
        places[role] = tuple(one for one in places[role] if one != index)
        return replace(self, places=places, num_changes=self.num_changes + 1)

    def at_most(self, counts: Mapping[str, int], held: Mapping[str, Collection[int]]) -> InstancePlan:
        """No more places of these roles than so many, but those that somebody has; the last one stays wanted."""
        plan = self
        for role, count in counts.items():
            free = [index for index in plan.wanted_places[role] if index not in held[role]]
            while free and len(plan.wanted_places[role]) > max(1, count):
                plan = plan.without_place(role, free.pop())
        return plan


@dataclass(frozen=True, slots=True)
class Send:
    """Instruction: give this message to the worker behind `route`."""

    route: bytes
    message: Any


@dataclass(frozen=True, slots=True)
class Lost:
    """Instruction: the requests of this attention worker are lost with it.

    Attributes:
        has_crashed: it ended by itself, so that one of them may be why.
    """

    worker_id: str
    reason: str
    has_crashed: bool = False


Instruction = Send | Lost


@dataclass(slots=True)
class Member:
    """A worker that is or was there. `state`: loading, ready, draining or lost.

    Attributes:
        last_seen: when it last gave a sign of life; later where we were late ourselves.
        heard_at: when it last gave a sign of life.
        reason: why it is lost.
        has_lanes: it was told how many to run.
        num_acks: HeartbeatAcks that were sent to it.
        num_passes: PassDones that came from it.
        placement_version, has_former: of what it uses, as it last said; see `msi.control.placing`.
        follows_version, follows_former: the same of what it was told to use and works on, as it last said.
        is_leaving: it wants to end, or somebody wants that; also once it is lost, until its place is given up.
        leaves_by: whatever it runs goes on elsewhere then.
        why_leaves: where it was not asked to by name.
        rhythm: of its signs of life.
    """

    worker_id: str
    role: str
    place: Place
    incarnation: int
    route: bytes
    pid: int
    host: str
    last_seen: float
    process: str = ""
    state: str = "loading"
    reason: str = ""
    heard_at: float = 0.0
    address: str = ""
    num_blocks: int = 0
    is_linked: bool = False
    has_lanes: bool = False
    has_beaten: bool = False
    num_acks: int = 0
    num_passes: int = 0
    placement_version: int = 0
    has_former: bool = False
    follows_version: int = 0
    follows_former: bool = False
    is_leaving: bool = False
    leaves_by: float = math.inf
    why_leaves: str = ""
    loop_lag_s: float = 0.0
    rhythm: Rhythm = field(default_factory=Rhythm)
    status: WorkerStatus = field(default=NO_STATUS)

    @property
    def is_live(self) -> bool:
        return self.state != "lost"

    def patience_s(self, plan: InstancePlan) -> float:
        """With its silence."""
        most_s = plan.timeouts.lost_after_s
        if self.state == "loading":
            return most_s * LOADING_PATIENCE
        return self.rhythm.patience_s(most_s) if plan.is_on_network else most_s

    def with_why(self, reason: str) -> str:
        """Its end, with what it left for."""
        return f"{reason}: {self.why_leaves}" if self.why_leaves else reason


@dataclass(slots=True)
class Applicant:
    """A worker that has no place yet: others may come that want a certain role, or another holds the place it wants."""

    route: bytes
    hello: WorkerHello
    asked_at: float
    last_seen: float


def assignment(
    plan: InstancePlan, member: Member, precision: Precision, placement: Placement, former: Placement | None = None
) -> Assignment:
    """What a member is told; `precision` has no "auto" left."""
    return Assignment(
        instance=plan.instance,
        worker_id=member.worker_id,
        role=member.role,
        place=member.place,
        incarnation=member.incarnation,
        placement=placement,
        former=former,
        num_seats=2 * max(plan.most["attention"], plan.wanted["attention"]) + 2,
        is_colocated=plan.is_colocated,
        memory_share=1 / max(1, plan.wanted["attention"]),
        limits=plan.limits,
        link=plan.link,
        timeouts=plan.timeouts,
        precision=precision,
        term=plan.term,
    )
