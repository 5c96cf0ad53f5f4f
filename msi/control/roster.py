"""Who is or was in an instance, and which places of it are wanted: what the parts of `membership` decide about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from msi.control.members import InstancePlan, Member, Send
from msi.control.messages import HelloAgain

EXITS_REMEMBERED_S = 10.0  # what a process said before it ended may be read after that


class Roster:
    """Of one instance.

    Attributes:
        plan: its places, and its term, may change.
        members: by id; those that are lost, too.
        num_lanes: how many run; 0 until that is known.
    """

    def __init__(self, plan: InstancePlan) -> None:
        self.plan = plan
        self.members: dict[str, Member] = {}
        self.num_lanes = 0
        self._exited: dict[int, float] = {}  # processes that ended, and when

    def live(self, role: str) -> list[Member]:
        """Live members of a role, by place."""
        members = [member for member in self.members.values() if member.role == role and member.is_live]
        return sorted(members, key=lambda member: member.place.index)

    def member(self, route: bytes, worker_id: str, incarnation: int) -> Member | None:
        """The live member whose connection and present life this is."""
        member = self.members.get(worker_id)
        if member is None or not member.is_live or member.route != route or member.incarnation != incarnation:
            return None
        return member

    @staticmethod
    def whole_nodes(members: Iterable[Member]) -> list[Member]:
        """Those whose node's other ranks are among them, too."""
        given = list(members)
        num_ranks = Counter(member.place.node for member in given)
        return [member for member in given if num_ranks[member.place.node] == member.place.size]

    def begin_anew(self, route: bytes, reason: str) -> Send:
        """Tells a worker that its life here is over: it may come again."""
        return Send(route, HelloAgain(reason, self.plan.term))

    # -- processes that ended ----------------------------------------------------------------------------------------

    def exited(self, pid: int, now: float) -> None:
        self._exited[pid] = now

    def has_exited(self, pid: int) -> bool:
        """What it said before does not count any more."""
        return pid in self._exited

    def forget_exited(self, now: float) -> None:
        self._exited = {pid: at for pid, at in self._exited.items() if now - at < EXITS_REMEMBERED_S}
