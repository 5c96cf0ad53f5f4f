"""Which change of placement is due, by who is there: experts leave with a worker, come to one, or are saved. Pure.

Each is tried once with the same workers: one that came to nothing is due again when somebody has come or gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from msi.control.members import Member
from msi.placement import Placement
from msi.placement_change import Chosen, is_as, lost_experts, repaired, scarce_experts, with_node, without_node

REPLICAS_AFTER = 4  # times as long: nobody waits for a replica, and a worker that is started again brings its own
# of the placement that is used, and the nodes that are there
Choose = Callable[[Placement, Sequence[int]], Chosen]


@dataclass(frozen=True, slots=True)
class Due:
    """A change that is to begin; `remark` says what for."""

    wanted: Chosen
    remark: str


class DueChanges:
    """Of one instance.

    Args:
        reload_after_s: experts that are nowhere wait so long for their worker; replicas `REPLICAS_AFTER` times.
        copies: of each expert, on how many nodes it is to be.
    """

    def __init__(self, reload_after_s: float, copies: Sequence[int] = ()) -> None:
        self.copies = copies
        self._reload_after_s = reload_after_s
        self._lost_from = -math.inf
        self._tried: set[tuple[str, frozenset[tuple[str, int]]]] = set()
        self._needless: dict[str, Hashable] = {}  # what would change nothing, and of which situation that was found

    def begin(self, now: float) -> None:
        """Who is not there now has only just been missed."""
        self._lost_from = now

    def next(self, placement: Placement, members: Sequence[Member], now: float) -> Due | None:
        """While nothing changes.

        Args:
            members: expert workers, live or lost.
        """
        live = [member for member in members if member.is_live]
        present = frozenset((member.worker_id, member.incarnation) for member in live)
        self._tried = {key for key in self._tried if key[1] == present}
        staying = [member.place.node for member in live if member.state != "draining"]
        situation = (present, tuple(staying), placement.version)
        self._needless = {key: found for key, found in self._needless.items() if found == situation}
        for key, remark, choose in self._possible(placement, members, staying, now):
            if (key, present) in self._tried or key in self._needless:
                continue
            if not is_as(placement, wanted := choose()):
                self._tried.add((key, present))
                return Due(wanted, remark)
            self._needless[key] = situation
        return None

    def is_stuck(self, placement: Placement, member: Member, members: Sequence[Member]) -> bool:
        """While nothing changes: whether a worker that wants to leave cannot, since its experts have no other place."""
        if not placement.held_by(member.place.node):
            return False
        has_others = any(one.is_live and one.state != "draining" for one in members)
        return not has_others or any(key == _leaves(member) for key, _ in self._tried)

    def _possible(
        self, placement: Placement, members: Sequence[Member], staying: Sequence[int], now: float
    ) -> Iterator[tuple[str, str, Callable[[], Chosen]]]:
        """By what it is known again, a remark, and what nodes are to hold, which takes long to choose."""
        live = [member.place.node for member in members if member.is_live]
        if live and (lost := lost_experts(placement, live)):
            if self._may_come(lost, placement, members, now, self._reload_after_s):
                return
            remark = f"experts {_named(lost)} are on no worker that lives"
            yield f"lost {lost}", remark, partial(repaired, placement, live)
            return
        if not staying:
            return
        for member in members:
            node, name = member.place.node, member.worker_id
            held = placement.held_by(node)
            if member.state == "draining" and held:
                yield _leaves(member), f"{name} leaves", partial(without_node, placement, node, staying)
            elif member.state == "ready" and not held:
                yield f"came {name}", f"{name} came", partial(with_node, placement, node, staying, self.copies)
        scarce = scarce_experts(placement, staying, self.copies)
        if scarce and not self._may_come(scarce, placement, members, now, REPLICAS_AFTER * self._reload_after_s):
            remark = f"experts {_named(scarce)} have lost replicas"
            yield f"scarce {scarce}", remark, partial(repaired, placement, staying, self.copies)

    def _may_come(
        self, lost: Sequence[int], placement: Placement, members: Sequence[Member], now: float, within_s: float
    ) -> bool:
        """Whether a worker that holds some of them was there a moment ago: it may be started again."""
        return now - self._lost_from < within_s or any(
            not member.is_live and not member.is_leaving and now - member.last_seen < within_s
            for member in members
            if set(lost) & set(placement.held_by(member.place.node))
        )


def _leaves(member: Member) -> str:
    return f"{member.worker_id} leaves"


def _named(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
