"""When another worker is started in the place of a slow one that left. Decides; does not act.

The first comes as soon as its predecessor has gone. If one that came is slow as well, it may be the host that is, and
each change costs loading and moving: so the next of its role comes no sooner than ten minutes after that one, and
twice as late each time that this goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from msi.control.members import Member

FIRST_PAUSE_S = 600.0
MOST_PAUSE_S = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class _Last:
    """Of a role, the replacement that was started last, and how long the next one is to wait from then."""

    at: float = -math.inf
    pause_s: float = 0.0

    @property
    def next_at(self) -> float:
        return self.at + self.pause_s

    def after(self, now: float) -> _Last:
        """One is started now: it was long ago that one had to be, or it goes on."""
        is_calm = now - self.at >= 2 * max(self.pause_s, FIRST_PAUSE_S)
        return _Last(now, FIRST_PAUSE_S if is_calm else min(2 * self.pause_s, MOST_PAUSE_S))


@dataclass(frozen=True, slots=True)
class _Leaver:
    """Whose place is to be another's; of its role so many were there with it."""

    member: Member
    num_there: int

    @property
    def stays(self) -> bool:
        """It could not leave."""
        return self.member.is_live and not self.member.is_leaving


class Replacements:
    """Of one instance."""

    def __init__(self) -> None:
        self._last = {"attention": _Last(), "expert": _Last()}
        self._leavers: list[_Leaver] = []

    def begin(self, member: Member, num_there: int, now: float) -> float:
        """It is to leave; in how many seconds, at the soonest, another one comes."""
        self._leavers.append(_Leaver(member, num_there))
        return max(0.0, self._last[member.role].next_at - now)

    def due(self, num_there: Mapping[str, int], now: float) -> list[str]:
        """Of these roles one is to be started now; called whenever time has passed.

        Args:
            num_there: workers of each role: where as many are there as were with the one that left, nobody comes.
        """
        self._leavers = [one for one in self._leavers if not one.stays]
        roles: list[str] = []
        for leaver in [one for one in self._leavers if not one.member.is_live]:
            role = leaver.member.role
            if now < self._last[role].next_at:
                continue
            self._leavers.remove(leaver)
            if num_there[role] < leaver.num_there:
                self._last[role] = self._last[role].after(now)
                roles.append(role)
        return roles
