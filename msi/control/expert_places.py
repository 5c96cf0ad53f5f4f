"""Where the experts of an instance are, and are to be: which change begins when, and who may come or leave by it.

Decides; does not act. Knows members as they are, and no time but what it is told.
"""

from __future__ import annotations

from msi.control.due_changes import Choose, DueChanges
from msi.control.members import Instruction, Member, Send
from msi.control.messages import Drain
from msi.control.placing import Placing
from msi.control.roster import Roster
from msi.errors import ConfigError
from msi.placement_change import Chosen, changed, copies_of, lost_experts, with_node
from msi.types import Place


class ExpertPlaces:
    """Of one instance.

    Args:
        roster: with the plan of the start.

    Attributes:
        placing: the placement that is used, and the change to another one.
    """

    def __init__(self, roster: Roster) -> None:
        plan = roster.plan
        self.placing = Placing(plan.placement)
        copies = copies_of(plan.placement)
        if plan.rebalance.rebalance == "auto":  # which experts have more is decided anew while it runs
            copies = [min(copies)] * len(copies)
        self._due = DueChanges(plan.timeouts.reload_after_s, copies)
        self._expert_ranks = plan.expert_ranks
        self._is_colocated = plan.is_colocated
        self._roster = roster

    @property
    def _live(self) -> list[Member]:
        return self._roster.live("expert")

    @property
    def _staying(self) -> list[int]:
        return [member.place.node for member in self._live if member.state != "draining"]

    def is_of_use(self, member: Member) -> bool:
        """Whether rows go to an expert worker."""
        return member.state == "ready" and not self.placing.is_changing and self.placing.holds_any(member.place.node)

    # -- changes that begin ------------------------------------------------------------------------------------------

    def change(self, choose: Choose, remark: str) -> list[Instruction]:
        """Begins a change, where none is under way. Raises ConfigError: it cannot be."""
        if self._is_colocated:
            raise ConfigError("this instance runs colocated: all experts are in its one worker, and stay there")
        if not self._staying:
            raise ConfigError("all expert workers are about to leave: none is there that could hold other experts")
        return self._begin(choose(self.placing.placement, self._staying), remark)

    def share_with(self, member: Member) -> list[Instruction]:
        """A new expert worker gets its share: it is to load that, while the others serve."""
        wanted = with_node(self.placing.placement, member.place.node, self._staying, self._due.copies)
        return self._begin(wanted, f"{member.worker_id} came")

    def begin_what_is_due(self, now: float) -> list[Instruction]:
        if self.placing.is_changing or self._is_colocated:
            return []
        experts = [member for member in self._roster.members.values() if member.role == "expert"]
        due = self._due.next(self.placing.placement, experts, now)
        return [] if due is None else self._begin(due.wanted, due.remark)

    def begin_anew(self, now: float) -> None:
        """A coordinator has taken over: whoever is not there now has only just been missed."""
        self._due.begin(now)

    def _begin(self, chosen: Chosen, remark: str) -> list[Instruction]:
        nodes = [member.place.node for member in self._live]
        placement = changed(self.placing.placement, chosen)
        if nowhere := lost_experts(placement, nodes):
            raise ConfigError(f"experts {nowhere[:8]} would be on no worker that lives; nodes {nodes} are there")
        self.placing.begin(placement, remark)
        return [one for member in self._live for one in self.placing.to(member)]

    # -- the change that is under way --------------------------------------------------------------------------------

    def advance(self) -> list[Instruction]:
        """What follows for it, and once there is none."""
        if not self.placing.is_changing:
            return []
        instructions = self.placing.advance(self._live, self._roster.live("attention"))
        return instructions if self.placing.is_changing else [*instructions, *self.let_end()]

    # -- who may come, and who may leave -----------------------------------------------------------------------------

    def why_not_yet(self, index: int) -> str:
        """What an expert worker for this place waits for; "" where it may come."""
        if self._is_colocated or self.placing.holds_any(Place.at(index, self._expert_ranks).node):
            return ""
        if self.placing.is_changing:
            return f"waiting for a change of placement ({self.placing.remark})"
        nodes = self._staying
        if lost_experts(self.placing.placement, nodes):
            return "waiting for experts that are on no worker"
        if all(self.placing.placement.num_held_by(node) < 2 for node in nodes):
            return "waiting: every expert worker has one expert already"
        return ""

    def is_stuck(self, member: Member) -> bool:
        """Whether one that wants to leave cannot, since its experts have no other place."""
        if member.state != "draining" or self.placing.is_changing:
            return False
        return self._due.is_stuck(self.placing.placement, member, self._live)

    def let_end(self) -> list[Instruction]:
        """Those that want to end may, once nothing is computed by their experts."""
        leaving = [member for member in self._live if member.state == "draining"]
        free = [member for member in leaving if not self.placing.holds_any(member.place.node)]
        return [Send(member.route, Drain()) for member in free]
