"""Workers that have been slow for long are let go, as if an operator had asked, where others can take what they have.

An expert worker's experts go to others by a change of placement, and are as safe afterwards as before. An attention
worker gets no more requests, and ends once those that it runs have. There is never more than one on its way, and never
nobody left. Where somebody starts workers here, another one comes in the place of one that has gone (`replacements`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from msi.control.members import Member
from msi.control.membership import Cluster
from msi.control.replacements import Replacements
from msi.control.slowness import Done, Life, Slowness
from msi.errors import ConfigError
from msi.placement_change import copies_of, lost_experts
from msi.settings import SlowWorkers

log = logging.getLogger(__name__)


class SlowWorkerPolicy:
    """Of one instance.

    Args:
        let_go: a worker is to leave, and is not started again; told why. Raises ConfigError: it cannot.
        can_start: whether workers can be started from here.

    Attributes:
        num_let_go: workers that were told to leave.
    """

    def __init__(
        self,
        settings: SlowWorkers,
        cluster: Cluster,
        let_go: Callable[[Member, str], None],
        can_start: Callable[[], bool] = lambda: False,
    ) -> None:
        self.num_let_go = 0
        self._cluster = cluster
        self._let_go = let_go
        self._can_start = can_start
        self._replacements = Replacements()
        self._is_on = settings.drain_slow_after_s > 0
        self._by_role = {role: Slowness(settings) for role in ("attention", "expert")}
        self._asked: set[Life] = set()  # once in a life: who stayed, stays
        self._told: dict[Life, str] = {}

    def counters(self) -> dict[str, float]:
        slow = sum(len(slowness.slow) for slowness in self._by_role.values())
        return {"slow_workers": float(slow), "slow_workers_drained": float(self.num_let_go)}

    def ratio(self, worker_id: str, incarnation: int) -> float:
        """How many times as long as its peers a worker takes; 0 where that is not known."""
        return max(slowness.ratio((worker_id, incarnation)) for slowness in self._by_role.values())

    def look(self, now: float) -> None:
        """At what workers said last."""
        if not self._is_on or self._cluster.plan.is_colocated:
            return
        for role, slowness in self._by_role.items():
            live = {_life(member): member for member in self._cluster.live(role)}
            slowness.look({life: done for life, member in live.items() if (done := _done(member)) is not None}, now)
            for life in slowness.slow_for_long:
                self._consider(live[life], slowness.ratio(life), now)

    def replacements_due(self, now: float) -> list[str]:
        """Of these roles a worker is to be started now, as one that was slow has gone."""
        return self._replacements.due({role: len(self._cluster.live(role)) for role in self._by_role}, now)

    def _consider(self, member: Member, ratio: float, now: float) -> None:
        life = _life(member)
        if life in self._asked or member.is_leaving:
            return
        if objection := self.why_stays(member):
            if self._told.get(life) != objection:
                self._told[life] = objection
                log.warning("%s takes %.1f times as long as the others; it stays: %s", life[0], ratio, objection)
            return
        self._asked.add(life)
        try:
            self._let_go(member, f"it took {ratio:.1f} times as long as the others")
        except ConfigError as error:
            log.warning("%s takes %.1f times as long as the others; it stays: %s", life[0], ratio, error)
            return
        self.num_let_go += 1
        goes = "its experts go to others" if member.role == "expert" else "requests go to others, and what it runs ends"
        log.warning(
            "%s takes %.1f times as long as the others, and leaves: %s; %s",
            life[0], ratio, goes, self._who_comes(member, now),
        )  # fmt: skip

    def _who_comes(self, member: Member, now: float) -> str:
        """In its place."""
        if not self._can_start():
            return f"msi-launch --role {member.role} brings one in its place"
        pause_s = self._replacements.begin(member, len(self._cluster.live(member.role)), now)
        soonest = f", in {pause_s:.0f} s at the soonest, as the one before came not long ago" if pause_s else ""
        return f"once it has gone, another one is started in its place{soonest}"

    def why_stays(self, member: Member) -> str:
        """Why one that is slow is not let go now; "" where it may be."""
        cluster = self._cluster
        everybody = [*cluster.live("attention"), *cluster.live("expert")]
        if cluster.plan.ranks[member.role] != 1:
            return "it is one of several of its node"
        if not cluster.serving or any(one.state == "loading" for one in everybody):
            return "workers are still loading"
        if leaving := [one.worker_id for one in everybody if one.is_leaving]:
            return f"{leaving[0]} leaves already"
        if member.role == "attention":
            others = [name for name in cluster.serving if name != member.worker_id]
            return "" if others else "nobody else takes requests"
        return self._why_experts_stay(member)

    def _why_experts_stay(self, member: Member) -> str:
        placing, node = self._cluster.placing, member.place.node
        if placing.is_changing:
            return "experts are being placed"
        others = {one.place.node for one in self._cluster.live("expert") if one is not member and one.state == "ready"}
        held = set(placing.placement.held_by(node))
        if alone := [expert for expert in lost_experts(placing.placement, others) if expert in held]:
            return f"no other worker holds expert {alone[0]}"
        if len(others) < (copies := min(copies_of(placing.placement))):
            return f"each expert is on {copies} workers, and without it no more than {len(others)} are there"
        return ""


def _life(member: Member) -> Life:
    return member.worker_id, member.incarnation


def _done(member: Member) -> Done | None:
    status = member.status
    counted = status.attention if member.role == "attention" else status.experts
    return None if counted is None or member.state == "loading" else Done.by(counted)
