"""Who leaves an instance while it runs: those that want to end, and those that an operator asks to.

Decides; does not act. What an attention worker runs finishes, or goes on elsewhere when its time is over; an expert
worker may end once its experts are on others, and serves on where they can be on none.
"""

from __future__ import annotations

import math

from msi.control.expert_places import ExpertPlaces
from msi.control.formation import Formation
from msi.control.members import Instruction, Member, Send
from msi.control.messages import Drain
from msi.control.roster import Roster
from msi.errors import ConfigError, shown


class Leaving:
    """From one instance."""

    def __init__(self, roster: Roster, formation: Formation, places: ExpertPlaces) -> None:
        self._roster = roster
        self._formation = formation
        self._places = places
        self._staying: list[str] = []

    def ask(self, worker_id: str, by: float, why: str = "") -> Member:
        """A worker is to leave: what runs on it finishes, or goes on elsewhere from `by` on. Then call `begin`.

        Args:
            why: where nobody asks for it by name.

        Raises:
            ConfigError: there is no such worker, or nothing would run without it.
        """
        roster = self._roster
        member = roster.members.get(worker_id)
        if member is None or not member.is_live or roster.plan.is_colocated:
            there = ", ".join(one.worker_id for role in roster.plan.wanted for one in roster.live(role))
            raise ConfigError(f"there is no worker {shown(worker_id)} that could leave; there are {there}")
        staying = [one for one in roster.live(member.role) if one is not member and one.state == "ready"]
        if not staying:
            raise ConfigError(f"{worker_id} is the only {member.role} worker that serves; add another one first")
        if member.state == "loading":
            raise ConfigError(f"{worker_id} is still loading; it can leave once it is ready")
        member.leaves_by, member.why_leaves = by, why
        return member

    @staticmethod
    def begin(member: Member) -> list[Instruction]:
        """It leaves: an attention worker as soon as its requests have ended, an expert worker when all have."""
        member.state, member.is_leaving = "draining", True
        return [Send(member.route, Drain())] if member.role == "attention" else []

    def is_stuck(self, member: Member) -> bool:
        """Whether an expert worker that wants to leave cannot: its experts have no other place."""
        if member.role != "expert":
            return False
        if not self._formation.has_served:
            return member.state == "draining" and not self._places.placing.is_changing
        return self._places.is_stuck(member)

    def let_stay(self) -> None:
        """Those that an operator asked to leave, and that cannot, serve on."""
        for member in self._roster.live("expert"):
            if member.leaves_by < math.inf and self.is_stuck(member):
                member.state, member.is_leaving, member.leaves_by = "ready", False, math.inf
                self._staying.append(member.worker_id)

    def take_staying(self) -> list[str]:
        """Workers that were to leave, and stay since they cannot."""
        staying, self._staying = self._staying, []
        return staying

    def late(self, now: float) -> list[Member]:
        """Attention workers whose time to finish what they run is over."""
        return [one for one in self._roster.live("attention") if one.state == "draining" and now > one.leaves_by]

    def nothing_runs(self) -> list[Instruction]:
        """Expert workers that want to end, and whose experts have no other place, may."""
        return [Send(member.route, Drain()) for member in self._roster.live("expert") if self.is_stuck(member)]

    def gone(self, member: Member) -> None:
        """One that was to leave is gone, and not wanted any more, unless it has experts that are nowhere else."""
        if member.is_live or not member.is_leaving:
            return
        roster = self._roster
        if any(one.place == member.place for one in roster.live(member.role)):
            member.is_leaving = False  # another has its place
        elif member.role == "attention" or not self._places.placing.holds_any(member.place.node):
            member.is_leaving = False
            roster.plan = roster.plan.without_place(member.role, member.place.index)
