"""What a worker does only while somebody watches: its spans are kept, and links say their ways.

The coordinator says with each answer to a heartbeat whether somebody does. Nobody: the device and the link have nothing
more to do than a look at a None.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msi.attention.role import AttentionRole
from msi.control.watched import (
    MAX_SPANS,
    MAX_WAY_CHARS,
    MAX_WINDOWS,
    WINDOW_S,
    Span,
    SpanWindow,
    Watched,
    Way,
    window_number,
)
from msi.tracing import COMPUTE_ROW, Spans, Tracer
from msi.worker.host import Host

SETTLED_S = 0.05  # after the end of a window: what began in it may still run
NUM_KEPT = 3  # windows: a heartbeat may be late


class SpanRecorder:
    """Keeps the spans of windows until they are told. `span` may be called from any thread.

    Args:
        clock: of the spans, seconds; by it the workers of one host belong together.
        wall: seconds since the epoch; by it windows of all hosts do.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._offset_s = wall() - clock()
        self._first = window_number(wall()) + 1  # the one that runs was not seen from its beginning
        self._windows: dict[int, list[Span]] = {}
        self._until_us: dict[int, int] = {}  # of those that were full

    def span(
        self, name: str, lane: int, started: float, ended: float, row: int = COMPUTE_ROW, **details: float
    ) -> None:
        """Kept if some of it lies in a window."""
        number = int(ended + self._offset_s)
        start_us = round((started + self._offset_s - number) * 1e6)
        if number < self._first or start_us >= WINDOW_S * 1e6:
            return
        spans = self._windows.setdefault(number, [])
        if len(spans) >= MAX_SPANS:
            self._until_us.setdefault(number, start_us)
            return
        spans.append(Span(name, lane, row != COMPUTE_ROW, start_us, round((ended - started) * 1e6)))

    def windows(self) -> tuple[SpanWindow, ...]:
        """Those that are over and were not given before, the last MAX_WINDOWS at most."""
        wall_s = self._wall()
        last = window_number(wall_s - WINDOW_S - SETTLED_S)
        offset_s = self._offset_s
        told = []
        for number in range(max(self._first, last - MAX_WINDOWS + 1), last + 1):
            spans = self._windows.get(number, [])
            until_us = min(self._until_us.get(number, round(WINDOW_S * 1e6)), round(WINDOW_S * 1e6))
            told.append(SpanWindow.of(number, number - offset_s, max(0, until_us), spans[:MAX_SPANS]))
        self._first = max(self._first, last + 1)
        for kept in (self._windows, self._until_us):
            for number in [one for one in list(kept) if one <= last]:
                del kept[number]
        self._offset_s = wall_s - self._clock()
        return tuple(told)


class _Both:
    """Spans for a trace, and for whoever watches."""

    def __init__(self, one: Spans, other: Spans) -> None:
        self._one = one
        self._other = other

    def span(
        self, name: str, lane: int, started: float, ended: float, row: int = COMPUTE_ROW, **details: float
    ) -> None:
        self._one.span(name, lane, started, ended, row, **details)
        self._other.span(name, lane, started, ended, row, **details)


class Watching:
    """Of one worker, through all of its lives.

    Attributes:
        tracer: writes a trace, whether somebody watches or not.
    """

    def __init__(self, host: Host) -> None:
        self.tracer: Tracer | None = None
        self._host = host
        self._recorder: SpanRecorder | None = None

    @property
    def spans(self) -> Spans | None:
        """Where spans go now."""
        if self._recorder is None or self.tracer is None:
            return self._recorder or self.tracer
        return _Both(self.tracer, self._recorder)

    def trace(self, tracer: Tracer) -> None:
        """All work gets a span in it from now on."""
        self.tracer = tracer
        self._host.use_tracer(self.spans)

    def flush(self) -> None:
        """Into the trace, where there is one."""
        if self.tracer is not None:
            self.tracer.flush()

    def follow(self, is_watched: bool, attention: AttentionRole | None) -> None:
        """As the coordinator says, once a heartbeat; the role is that of this life."""
        if is_watched != (self._recorder is not None):
            self._recorder = SpanRecorder(self._host.clock) if is_watched else None
            self._host.use_tracer(self.spans)
        if attention is not None:
            attention.trace(self.spans)

    def told(self, attention: AttentionRole | None) -> Watched | None:
        """For a heartbeat; None while nobody watches."""
        if self._recorder is None:
            return None
        ways = () if attention is None else tuple(attention.links.link.nodes.ways.items())
        return Watched(
            self._recorder.windows(),
            tuple(Way(worker_id, way[: MAX_WAY_CHARS - len(worker_id)]) for worker_id, way in ways),
        )
