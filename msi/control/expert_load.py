"""What experts had to do, window by window, from what expert workers count since their start. Decides nothing.

How popular an expert is does not hang on where it is, so windows are compared across changes of placement.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from msi.control.counters import BatchTimes
from msi.control.worker_status import WorkerStatus
from msi.planner.stage_costs import BatchMean

WINDOWS_KEPT = 10
MEANS_KEPT = 512


@dataclass(frozen=True, slots=True)
class _Totals:
    """Of one life, as it last said."""

    rows: Mapping[int, int]
    batches: int
    busy_s: float
    times: Mapping[int, BatchTimes]


@dataclass(slots=True)
class _NodeWindow:
    """What a node did since the window began."""

    rows: dict[int, float] = field(default_factory=dict)
    batches: float = 0.0
    busy_s: float = 0.0
    times: dict[int, BatchTimes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Window:
    """What was counted.

    Attributes:
        rows: of all nodes, by expert.
        load: the same of one wave.
        waves: of a layer.
        busy_s: of the node with most to do.
    """

    rows: tuple[float, ...]
    load: tuple[float, ...]
    waves: float
    busy_s: float


class ExpertLoad:
    """Of one instance.

    Attributes:
        before: rows of a wave by expert, of the windows before the last, the oldest first.
        total: rows by expert, since the beginning.
        last: window; None before the first has ended.
        means: what batches took, by size and node, the last few windows'.
    """

    def __init__(self, num_experts: int) -> None:
        self.before: deque[tuple[float, ...]] = deque(maxlen=WINDOWS_KEPT)
        self.last: Window | None = None
        self.means: list[BatchMean] = []
        self.total = [0.0] * num_experts
        self._num_experts = num_experts
        self._known: dict[tuple[str, int], _Totals] = {}
        self._nodes: dict[int, _NodeWindow] = {}

    def hear(self, worker_id: str, incarnation: int, node: int, status: WorkerStatus) -> None:
        """A heartbeat of an expert worker; what it counted before the first of its life is nobody's."""
        if status.experts is None:
            return
        life, counted = (worker_id, incarnation), status.experts
        now = _Totals(
            counted.expert_rows, counted.batches, counted.expert_batches_s, {one.most: one for one in status.batches}
        )
        before = self._known.get(life)
        self._known = {key: totals for key, totals in self._known.items() if key[0] != worker_id} | {life: now}
        if before is None:
            return
        window = self._nodes.setdefault(node, _NodeWindow())
        for expert, count in now.rows.items():
            if expert < self._num_experts:
                since = max(0, count - before.rows.get(expert, 0))
                window.rows[expert] = window.rows.get(expert, 0.0) + since
                self.total[expert] += since
        window.batches += max(0, now.batches - before.batches)
        window.busy_s += max(0.0, now.busy_s - before.busy_s)
        for most, one in now.times.items():
            since_then = one.since(before.times.get(most))
            window.times[most] = since_then.plus(window.times.get(most))

    def close(self, least_rows: int) -> Window | None:
        """Ends the window and begins the next; None where fewer rows were counted, and it goes on."""
        rows = [sum(one.rows.get(expert, 0.0) for one in self._nodes.values()) for expert in range(self._num_experts)]
        waves = max((one.batches for one in self._nodes.values()), default=0.0)
        if sum(rows) < least_rows or not waves:
            return None
        nodes, self._nodes = self._nodes, {}
        self.means = [*self.means, *(mean for one in nodes.values() for mean in _means(one))][-MEANS_KEPT:]
        if self.last is not None:
            self.before.append(self.last.load)
        load = tuple(count / waves for count in rows)
        self.last = Window(tuple(rows), load, waves, max(one.busy_s for one in nodes.values()))
        return self.last


def _means(window: _NodeWindow) -> list[BatchMean]:
    """By the sizes of batches: the rows that a token there has for each expert are known from all of them together."""
    tokens = sum(one.rows for one in window.times.values())
    if not tokens:
        return []
    per_token = [count / tokens for count in window.rows.values()]
    found = []
    for one in window.times.values():
        if one.num_batches:
            size = one.rows / one.num_batches
            hit = sum(-math.expm1(-size * share) for share in per_token)
            found.append(BatchMean(size * sum(per_token), hit, one.seconds / one.num_batches, one.num_batches))
    return found
