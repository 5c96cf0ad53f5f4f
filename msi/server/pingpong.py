"""Windows of all workers put together: what attention and experts did at the same time, and which rows went where.

Pure. Workers tell their windows when their heartbeats come; one is shown once all who tell any have told it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from msi.control.client_messages import WorkerStats
from msi.control.watched import Span, SpanWindow
from msi.server.event_values import in_order

MAX_ROWS = 24  # of a picture
MAX_LATE = 3  # windows: who is later is not waited for
MAX_CELLS = 2**14  # layers times experts that are told
SAME_CLOCK_S = 1.0  # clocks of one host that differ by more are not one
EXPERTS = "experts"  # the one name of spans that is the other side's

Bar = tuple[int, int, int, int]  # index into `names`, lane, start and duration in microseconds


@dataclass(frozen=True, slots=True)
class Row:
    """What one worker did, for one side.

    Attributes:
        busy: share of the window that it computed.
        bars: what it computed.
        away: rows of a lane at a peer: from post to answer.
    """

    worker_id: str
    role: str
    busy: float
    bars: list[Bar]
    away: list[Bar]


@dataclass(frozen=True, slots=True)
class Pingpong:
    """Event "pingpong", about once a second.

    Attributes:
        until_us: of the window, what all workers have told in full.
        num_left_out: workers, beyond MAX_ROWS.
    """

    number: int
    until_us: int
    names: list[str]
    rows: list[Row]
    num_left_out: int = 0


class PingpongWindows:
    """Collects them."""

    def __init__(self) -> None:
        self._windows: dict[str, dict[int, SpanWindow]] = {}
        self._shown = -1

    def take(self, workers: Iterable[WorkerStats]) -> Pingpong | None:
        """A picture, if there is a new one."""
        live = [worker for worker in in_order(workers) if worker.state != "lost"]
        ids = {worker.worker_id for worker in live}
        self._windows = {worker_id: windows for worker_id, windows in self._windows.items() if worker_id in ids}
        for worker in live:
            if worker.status.watched is not None:
                kept = self._windows.setdefault(worker.worker_id, {})
                kept |= {window.number: window for window in worker.status.watched.windows}
                for number in sorted(kept)[:-MAX_LATE]:
                    del kept[number]
        last = {worker_id: max(kept) for worker_id, kept in self._windows.items() if kept}
        newest = max(last.values(), default=-1)
        number = min((one for one in last.values() if one > newest - MAX_LATE), default=-1)
        if number <= self._shown:
            return None
        self._shown = number
        told = [(worker, self._windows.get(worker.worker_id, {}).get(number)) for worker in live]
        return picture(number, [(worker, window) for worker, window in told if window is not None])


def picture(number: int, told: list[tuple[WorkerStats, SpanWindow]]) -> Pingpong:
    """Of workers in order; those of one host by their common clock."""
    shown, names, rows = told[:MAX_ROWS], dict[str, int](), list[Row]()
    until_us = min((window.until_us for _, window in shown), default=0)
    began_s: dict[str, float] = {}
    for worker, window in shown:
        apart_s = window.began_s - began_s.setdefault(worker.host, window.began_s)
        shift_us = round(apart_s * 1e6) if abs(apart_s) < SAME_CLOCK_S else 0
        spans = [span for span in window.spans() if span.start_us + shift_us < until_us and span.end_us + shift_us > 0]
        computed_here = [one for one in spans if not one.is_away]
        has_both = {one.name == EXPERTS for one in computed_here} == {True, False}  # it is colocated
        for role in ("attention", "expert") if has_both else (worker.role,):
            computed = [one for one in computed_here if not has_both or (one.name == EXPERTS) == (role == "expert")]
            away = [one for one in spans if one.is_away and role == "attention"]
            rows.append(
                Row(
                    worker.worker_id, role, busy_share(computed, shift_us, until_us),
                    [bar(one, shift_us, names) for one in computed], [bar(one, shift_us, names) for one in away],
                )
            )  # fmt: skip
    rows.sort(key=lambda row: row.role != "attention")
    return Pingpong(number, until_us, list(names), rows, len(told) - len(shown))


def bar(span: Span, shift_us: int, names: dict[str, int]) -> Bar:
    return names.setdefault(span.name, len(names)), span.lane, span.start_us + shift_us, span.duration_us


def busy_share(spans: Iterable[Span], shift_us: int, until_us: int) -> float:
    """Of the window, what one device computed: one thing at a time."""
    inside = (max(0, min(until_us, span.end_us + shift_us) - max(0, span.start_us + shift_us)) for span in spans)
    return min(1.0, sum(inside) / until_us) if until_us > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Held:
    """Rows that one worker's experts computed since the last event, in all layers."""

    worker_id: str
    rows: int


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Event "experts", about once a second while rows are computed.

    Attributes:
        rows: [layer][expert] since the last event.
        workers: what of it each has computed.
    """

    rows: list[list[int]]
    workers: list[Held]


class ExpertCounts:
    """What has been counted, so that only what is new is told."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], list[dict[int, int]]] = {}

    def take(self, workers: Iterable[WorkerStats]) -> ExpertRows | None:
        """What was computed since the last call, by those that were there then; None where nothing was."""
        now: dict[tuple[str, int], list[dict[int, int]]] = {}
        new: list[tuple[str, list[dict[int, int]]]] = []
        for worker in in_order(workers):
            rows = worker.status.layer_rows.by_expert()
            if worker.status.watched is None or worker.state == "lost" or not any(rows):
                continue
            key = worker.worker_id, worker.incarnation
            now[key] = rows
            new.append((worker.worker_id, since(self._last.get(key, rows), rows)))
        self._last = now
        num_layers = max((len(rows) for _, rows in new), default=0)
        num_experts = max((1 + max(of_layer, default=-1) for _, rows in new for of_layer in rows), default=0)
        if num_layers * num_experts > MAX_CELLS or not any(any(one.values()) for _, rows in new for one in rows):
            return None
        cells = [[0] * num_experts for _ in range(num_layers)]
        for _, rows in new:
            for layer, of_layer in enumerate(rows):
                for expert, count in of_layer.items():
                    cells[layer][expert] += count
        return ExpertRows(cells, [Held(worker_id, sum(sum(one.values()) for one in rows)) for worker_id, rows in new])


def since(before: Sequence[Mapping[int, int]], now: Sequence[Mapping[int, int]]) -> list[dict[int, int]]:
    """What came to counts of each layer; all of one that began anew."""
    pairs = zip_longest(now, before[: len(now)], fillvalue=dict[int, int]())
    return [{expert: max(0, count - was.get(expert, 0)) for expert, count in one.items()} for one, was in pairs]
