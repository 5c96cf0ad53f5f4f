"""Which placement is used, and the change to another one, if one is under way. Decides; does not act.

    loading    expert workers load what is new and take rows of both placements; attention workers use the former
    swapping   all of them have: attention workers use the new one, pass by pass
    settled    nothing of the former is on its way: expert workers drop what only that one had

There is one change at a time. Where an expert worker cannot load its part, or one is lost without which experts would
be nowhere, a change that no attention worker has been told of goes back: to the former placement, as one more version.
Every message is said again with heartbeats until the member says that it is so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from msi.control.members import Instruction, Member, Send
from msi.control.messages import Placed, UsePlacement
from msi.placement import Placement
from msi.placement_change import lost_experts


class Placing:
    """Of one instance.

    Attributes:
        placement: that is used, or will be.
        former: that is used still; None where nothing changes.
        failure: why the last change came to nothing; "" where it did not.
        remark: what the change is for.
        num_changes: that came to their end, whatever it was.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.former: Placement | None = None
        self.failure = ""
        self.remark = ""
        self.num_changes = 0
        self._is_swapping = False

    @property
    def is_changing(self) -> bool:
        return self.former is not None

    @property
    def stage(self) -> str:
        return "settled" if self.former is None else "swapping" if self._is_swapping else "loading"

    def used_by(self, role: str) -> tuple[Placement, Placement | None]:
        """What a member of a role is to use, and what it has to take rows of besides."""
        if role == "attention":
            return (self.placement if self.former is None or self._is_swapping else self.former), None
        return self.placement, self.former

    def holds_any(self, node: int) -> bool:
        """Whether an expert node has experts in what it is to use now."""
        return bool(self.placement.held_by(node)) or (self.former is not None and bool(self.former.held_by(node)))

    def begin(self, placement: Placement, remark: str) -> None:
        """A change to this placement, which follows the one that is used; see `msi.placement_change.changed`."""
        assert self.former is None, f"the change to version {self.placement.version} has not ended"
        assert placement.version > self.placement.version, f"{placement} follows {self.placement}"
        self.former, self.placement, self._is_swapping = self.placement, placement, False
        self.failure, self.remark = "", remark

    def adopt(self, placement: Placement, *, is_first: bool) -> None:
        """A worker of the coordinator before uses this one. Where others use another, a change was under way."""
        if is_first:
            self.placement = placement
        elif placement.version > self.placement.version:
            self.former, self.placement = self.placement, placement
        elif placement.version < self.placement.version:
            self.former = placement

    def to(self, member: Member) -> list[Instruction]:
        """What a member does not use yet, nor works on: a placement of many layers takes long to say, and to read."""
        placement, former = self.used_by(member.role)
        if member.state == "loading" or _has(member, placement, former) or _follows(member, placement, former):
            return []
        return [Send(member.route, UsePlacement(placement, former))]

    def hear(self, member: Member, placed: Placed) -> None:
        """From an expert worker that was told of a placement."""
        if not placed.failure:
            member.placement_version, member.has_former = placed.version, placed.has_former
        elif placed.version == self.placement.version and self.former is not None and not self._is_swapping:
            self._go_back(f"{member.worker_id}: {placed.failure}")

    def advance(self, experts: Sequence[Member], attention: Iterable[Member]) -> list[Instruction]:
        """What follows from who is live, and what they have.

        Args:
            experts, attention: all who live, those who load their weights as well.
        """
        told = list(attention)
        instructions: list[Instruction] = []
        if self.stage == "loading":
            self._look_for_losses([member.place.node for member in experts])
            if all(_has(member, *self.used_by("expert")) for member in experts):
                self._is_swapping = True
                instructions += [one for member in told for one in self.to(member)]
        if self.stage == "swapping" and all(
            _has(member, self.placement, None) for member in told if member.state != "loading"
        ):
            self.former = None
            self.num_changes += 1
            instructions += [one for member in experts for one in self.to(member)]
        return instructions

    def _look_for_losses(self, nodes: Sequence[int]) -> None:
        assert self.former is not None
        if self.failure:
            return
        if vain := set(lost_experts(self.placement, nodes)) - set(lost_experts(self.former, nodes)):
            self._go_back(f"an expert worker was lost that was to hold experts {sorted(vain)[:8]}")

    def _go_back(self, failure: str) -> None:
        assert self.former is not None
        if not self.failure:
            self.failure = failure
            self.placement = replace(self.former, version=self.placement.version + 1)


def _follows(member: Member, placement: Placement, former: Placement | None) -> bool:
    return (member.follows_version, member.follows_former) == (placement.version, former is not None)


def _has(member: Member, placement: Placement, former: Placement | None) -> bool:
    return (member.placement_version, member.has_former) == (placement.version, former is not None)
