"""Who coordinates an instance for which one coordinator stands by for another, and whom workers and clients follow.

Each coordinator has a term, a number that no other has: the first ones have even terms, those that stand by odd ones,
and whoever takes an instance over has a higher term than any that a worker of it has followed. Whoever takes part
follows one coordinator at a time. It looks for another only when that one has been silent, or was never heard, as
whoever comes cannot know which one leads; it goes to whoever answers first, and from then on hears nothing of the
former. So a coordinator that only slept orders nobody about when it wakes: it learns that it is superseded and ends.
Where both believe that they coordinate, each has followers of its own until they hear of each other; then the lower
term gives way.

Decides; does not act. Knows no sockets or clock.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

SILENT_S = 3.0  # of a coordinator: those who follow it look for another, and who stands by takes over
UNSEEN_S = 30.0  # who stands by for one that was never there does so for so long


def next_term(seen: int, like: int) -> int:
    """The least that is higher than `seen`, and odd where `like` is."""
    return seen + 1 + (seen + 1 - like) % 2


class Step(enum.Enum):
    """What a coordinator that stands by does next."""

    WAIT = enum.auto()
    TAKE_OVER = enum.auto()  # it coordinates from now on
    CLAIM = enum.auto()  # it coordinates, and tells the other that it does
    GIVE_WAY = enum.auto()  # it coordinates no more, and stands by again


class Succession:
    """Of a coordinator that stands by for another.

    Attributes:
        term: of its own, 0 while it stands by.
    """

    def __init__(self, now: float) -> None:
        self.term = 0
        self._seen = 0  # the other's highest term
        self._heard_at = now
        self._was_heard = False

    def hears(self, term: int, now: float) -> None:
        """The other one speaks."""
        self._seen = max(self._seen, term)
        self._heard_at, self._was_heard = now, True

    def follows(self, term: int) -> None:
        """Workers that it took over make its own term higher."""
        self.term = max(self.term, term)

    def next(self, now: float, *, late_s: float = 0.0, has_followers: bool = False) -> Step:
        """What is to be done now.

        Args:
            late_s: of the silence, what is to be blamed on this process itself.
            has_followers: workers have come to it since it took over.
        """
        self._heard_at += late_s
        silent_s = now - self._heard_at
        is_there = self._was_heard and silent_s <= SILENT_S
        if not self.term:
            if silent_s <= (SILENT_S if self._was_heard else UNSEEN_S):
                return Step.WAIT
            self.term = next_term(self._seen, 1)
            return Step.TAKE_OVER
        if is_there and (self._seen > self.term or not has_followers):
            self.term = 0
            return Step.GIVE_WAY
        return Step.CLAIM if is_there else Step.WAIT


class Allegiance:
    """Of a worker or a client: the coordinator that it follows, of those at several addresses.

    Attributes:
        address: that one's.
    """

    def __init__(self, addresses: Sequence[str], now: float) -> None:
        self.address = addresses[0]
        self._addresses = list(addresses)
        self._heard_at = now
        self._was_heard = False  # anybody
        self._is_looking = False

    def hears(self, address: str, now: float) -> bool:
        """Somebody speaks; whether it counts: it is followed. Of those that are asked the first one is."""
        if address != self.address and not self._is_looking:
            return False
        self.address, self._heard_at, self._is_looking = address, now, False
        self._was_heard = True
        return True

    def asked(self, now: float, *, late_s: float = 0.0) -> list[str]:
        """Addresses at which it asks now whether somebody coordinates there; none while it hears of its own one."""
        self._heard_at += late_s
        self._is_looking = not self._was_heard or now - self._heard_at > SILENT_S
        return [one for one in self._addresses if one != self.address] if self._is_looking else []

    def sent_on(self, address: str, now: float) -> None:
        """Its own coordinator says that the one there has taken over; "" for any of the others."""
        others = [one for one in self._addresses if one != self.address]
        if address and address not in self._addresses:
            self._addresses.append(address)
        if address or others:
            self.address = address or others[0]
        self._heard_at, self._is_looking = now, False
