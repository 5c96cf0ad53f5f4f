"""What workers tell with their heartbeats only while somebody watches the instance: spans of short windows, and how
each link travels. All of it is bounded; whoever shows it reads it, the coordinator only passes it on.

Windows begin with each second of wall time and have one number everywhere, so that those of all workers belong
together; times within one are by its worker's own clock, which the workers of a host share.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from msi.control.counters import MAX_ID_CHARS, MAX_KEYS
from msi.errors import shown

WATCHED_FOR_S = 3.0  # after somebody asked
WINDOW_S = 0.4  # of each second
MAX_SPANS = 600  # of a window
MAX_WINDOWS = 2  # in one heartbeat
MAX_NAMES = 256
MAX_WAY_CHARS = 256
SPAN = struct.Struct("<BBBiI")  # name, lane, whether rows were away, start and duration in microseconds

Number = Annotated[int, range(2**40)]
Clock = Annotated[float, (-1e12, 1e12)]


@dataclass(frozen=True, slots=True)
class Span:
    """What a worker did for a lane, or (`is_away`) for how long a lane's rows were at the peer called `name`."""

    name: str
    lane: int
    is_away: bool
    start_us: int
    duration_us: int

    @property
    def end_us(self) -> int:
        return self.start_us + self.duration_us


@dataclass(frozen=True, slots=True)
class SpanWindow:
    """Spans of one window of one worker; `spans` of this reads them.

    Attributes:
        number: the second of wall time with which it began.
        began_s: the worker's clock then.
        until_us: from its beginning on, up to where all spans are told.
        packed: `SPAN` after `SPAN`; a span's first byte is an index into `names`.

    Raises:
        ValueError: it is none.
    """

    number: Number
    began_s: Clock
    until_us: Annotated[int, range(2**31)]
    names: tuple[str, ...]
    packed: bytes

    def __post_init__(self) -> None:
        if len(self.packed) % SPAN.size or len(self.packed) > MAX_SPANS * SPAN.size or len(self.names) > MAX_NAMES:
            raise ValueError(f"{len(self.packed)} bytes and {len(self.names)} names are no spans of a window")
        for name in self.names:
            if not name.isprintable() or len(name) > MAX_ID_CHARS:
                raise ValueError(f"{shown(name)} is no name of a span")

    @staticmethod
    def of(number: int, began_s: float, until_us: int, spans: Iterable[Span]) -> SpanWindow:
        """At most MAX_SPANS, whose names are few; times that no field holds are cut."""
        names: dict[str, int] = {}
        packed = b"".join(
            SPAN.pack(
                names.setdefault(one.name, len(names)), one.lane & 0xFF, one.is_away,
                max(-(2**31), min(one.start_us, 2**31 - 1)), max(0, min(one.duration_us, 2**32 - 1)),
            )
            for one in spans
        )  # fmt: skip
        return SpanWindow(number, began_s, until_us, tuple(names), packed)

    def spans(self) -> Iterator[Span]:
        """In the order in which they ended; those whose name is none are left out."""
        for name, lane, is_away, start_us, duration_us in SPAN.iter_unpack(self.packed):
            if name < len(self.names):
                yield Span(self.names[name], lane, bool(is_away), start_us, duration_us)


@dataclass(frozen=True, slots=True)
class Way:
    """How rows get to one peer, such as "shared memory: it is on this host"."""

    worker_id: str
    way: str


@dataclass(frozen=True, slots=True)
class Watched:
    """Of one worker.

    Attributes:
        windows: that were not told before.
        ways: of an attention worker, to each expert worker that is connected.

    Raises:
        ValueError: it is more than anybody shows.
    """

    windows: tuple[SpanWindow, ...] = ()
    ways: tuple[Way, ...] = ()

    def __post_init__(self) -> None:
        if len(self.windows) > MAX_WINDOWS or len(self.ways) > MAX_KEYS:
            raise ValueError(f"{len(self.windows)} windows, {len(self.ways)} ways; at most {MAX_WINDOWS}, {MAX_KEYS}")
        for one in self.ways:
            if not (one.worker_id + one.way).isprintable() or len(one.worker_id) + len(one.way) > MAX_WAY_CHARS:
                raise ValueError(f"{shown(one.way)} is no way to {shown(one.worker_id)}")


def window_number(wall_s: float) -> int:
    """Of the window that begins with this second, or began with it."""
    return max(0, math.floor(wall_s))
