"""Chrome traces: what each worker did when, as Perfetto shows it: a track per worker, a colour per lane."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Protocol

LANE_COLOURS = ("thread_state_running", "rail_response", "rail_animation", "cq_build_passed")
MAX_SPANS = 1_000_000
COMPUTE_ROW = 0  # of a worker's track; row 1 + lane shows that lane's exchanges, each under its peer's name


class Spans(Protocol):
    """Takes spans, from any thread."""

    def span(
        self, name: str, lane: int, started: float, ended: float, row: int = COMPUTE_ROW, **details: float
    ) -> None:
        """Something that took from `started` to `ended`, for a lane."""


class Tracer:
    """Spans of one worker, appended to its part of the trace whenever `flush` is called.

    Times are CLOCK_MONOTONIC seconds, which all processes of a host share. `span` may be called from any thread.
    """

    def __init__(self, track: str, parts_dir: Path) -> None:
        self._pid = zlib.crc32(track.encode()) % 100_000
        self._part = parts_dir / f"{track}.part"
        self._spans: list[tuple[str, int, int, float, float, dict[str, float]]] = []
        self._num_spans = 0
        self._append([{"name": "process_name", "ph": "M", "pid": self._pid, "args": {"name": track}}])

    def span(
        self, name: str, lane: int, started: float, ended: float, row: int = COMPUTE_ROW, **details: float
    ) -> None:
        """Something that took from `started` to `ended`, for a lane. Spans past MAX_SPANS are dropped."""
        if self._num_spans < MAX_SPANS:
            self._num_spans += 1
            self._spans.append((name, lane, row, started, ended, details))

    def flush(self) -> None:
        spans, self._spans = self._spans, []
        self._append(
            [
                {
                    "name": name,
                    "cat": f"lane {lane}",
                    "ph": "X",
                    "ts": started * 1e6,
                    "dur": (ended - started) * 1e6,
                    "pid": self._pid,
                    "tid": row,
                    "cname": LANE_COLOURS[lane % len(LANE_COLOURS)],
                    "args": {"lane": lane, **details},
                }
                for name, lane, row, started, ended, details in spans
            ]
        )

    def _append(self, events: list[dict[str, object]]) -> None:
        with self._part.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)


def merge(parts_dir: Path, into: Path) -> int:
    """Joins the parts of all workers into one Chrome trace; returns the number of its events."""
    events = [json.loads(line) for part in sorted(parts_dir.glob("*.part")) for line in part.read_bytes().splitlines()]
    into.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return len(events)
