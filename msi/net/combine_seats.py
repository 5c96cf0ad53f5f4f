"""Who sits at the combining end of a link, what has landed in each of a seat's lanes, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from msi.net.link_hello import LinkHello
from msi.net.regions import Region
from msi.net.transport import Endpoint

# seat, sequence number, rows or 0 for the word that there are none, whether more follows, and the link's clock; whether
# the listener has something to do now
Told = Callable[[int, int, int, bool, float], bool]


class Listener(Protocol):
    """Who batches rows. Called on the event loop unless said otherwise; must not raise, but for what `told` gives."""

    def joined(self, seat: int, node: int, out_rows: Region) -> None:
        """A peer, `node` among its kind, has taken a seat; answers to it go into `out_rows`."""

    def left(self, seat: int) -> None:
        """A peer is gone; its seat may be given away."""

    def told(self, lane: int) -> Told:
        """What is called for rows that land in a lane.

        On whatever thread takes immediates, with the link's lock held; `landed_again` and `all_landed` likewise.
        """

    def landed_again(self, seat: int, lane: int, seq: int, num_rows: int) -> bool:
        """Rows of a sequence number that landed before, packed anew since another node was lost."""

    def not_taken(self, seat: int, lane: int, seq: int, error: Exception) -> None:
        """What was called for these raised this."""

    def all_landed(self) -> None:
        """What lay there together is told, and of some of it there was something to do."""


@dataclass(slots=True)
class Slot:
    """One lane of a seat: what landed there last, and what would be next if the peer goes on as it does."""

    header: memoryview
    out_header: memoryview
    seq: int
    immediate: int  # of rows of `seq`, if more follows: one step from the next, but where its few bits run over
    opening: bytes  # of a header, if more follows and the placement stays
    post: Callable[[int, int, int], None]
    tell: Told
    landed_at: float = 0.0
    again: tuple[int, int] = (-1, 0)  # the sequence number that rows landed for again, and their attempt


def _no_post(lane: int, immediate: int, num_rows: int) -> None:
    raise AssertionError(f"lane {lane} is none")


def _no_rows(seat: int, seq: int, num_rows: int, more: bool, now: float) -> bool:
    raise AssertionError(f"rows of seat {seat} in no lane")


NO_IMMEDIATE = -(1 << 32)  # nor is the next after it one
# of lanes that there are not
NO_SLOT = Slot(memoryview(b""), memoryview(b""), 0, NO_IMMEDIATE, b"", _no_post, _no_rows)


@dataclass(slots=True)
class Seat:
    """A peer that was admitted."""

    index: int
    hello: LinkHello
    payload: bytes  # the hello as it came
    endpoint: Endpoint | None = None  # None between the admission and the connection
    slots: tuple[Slot, ...] = ()  # for every lane that an immediate can name; from the connection on
