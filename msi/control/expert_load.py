"""What experts had to do, window by window, from what expert workers count since their start. Decides nothing.

How popular an expert is does not hang on where it is, so windows are compared across changes of placement.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msi.control.counters import BatchTimes
from msi.control.worker_status import WorkerStatus
from msi.planner.rebalance import Load
from msi.planner.stage_costs import BatchMean

WINDOWS_KEPT = 10
MEANS_KEPT = 512


@dataclass(frozen=True, slots=True)
class _Totals:
    """Of one life, as it last said."""

    rows: Sequence[Mapping[int, int]]  # by layer
    batches: int
    busy_s: float
    times: Mapping[int, BatchTimes]


@dataclass(slots=True)
class _NodeWindow:
    """What a node did since the window began."""

    rows: dict[tuple[int, int], float] = field(default_factory=dict)  # by layer and expert
    batches: float = 0.0
    busy_s: float = 0.0
    times: dict[int, BatchTimes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Window:
    """What was counted.

    Attributes:
        rows: of all nodes, by layer and expert.
        load: the same of one wave.
        waves: of each layer.
        busy_s: of the node with most to do.
    """

    rows: Load
    load: Load
    waves: float
    busy_s: float


class ExpertLoad:
    """Of one instance.

    Attributes:
        before: rows of a wave by layer and expert, of the windows before the last, the oldest first.
        total: rows by layer and expert, since the beginning; [] before anybody told any.
        last: window; None before the first has ended.
        means: what batches took, by size and node, the last few windows'.
    """

    def __init__(self, num_experts: int) -> None:
        self.before: deque[Load] = deque(maxlen=WINDOWS_KEPT)
        self.last: Window | None = None
        self.means: list[BatchMean] = []
        self.total: list[list[float]] = []
        self._num_experts = num_experts
        self._known: dict[tuple[str, int], _Totals] = {}
        self._nodes: dict[int, _NodeWindow] = {}

    def hear(self, worker_id: str, incarnation: int, node: int, status: WorkerStatus) -> None:
        """A heartbeat of an expert worker; what it counted before the first of its life is nobody's."""
        if status.experts is None:
            return
        life, counted = (worker_id, incarnation), status.experts
        now = _Totals(
            status.layer_rows.by_expert(), counted.batches, counted.expert_batches_s,
            {one.most: one for one in status.batches},
        )  # fmt: skip
        before = self._known.get(life)
        self._known = {key: totals for key, totals in self._known.items() if key[0] != worker_id} | {life: now}
        if before is None:
            return
        if now.rows and len(now.rows) != len(self.total):  # it is the first to tell any, or somebody told others
            self.total = [[0.0] * self._num_experts for _ in now.rows]
            self.before.clear()
            self.last = None
            self._nodes.clear()
        window = self._nodes.setdefault(node, _NodeWindow())
        for layer, of_layer in enumerate(now.rows):
            was = before.rows[layer] if layer < len(before.rows) else {}
            self._count(window, layer, {expert: count - was.get(expert, 0) for expert, count in of_layer.items()})
        window.batches += max(0, now.batches - before.batches)
        window.busy_s += max(0.0, now.busy_s - before.busy_s)
        for most, one in now.times.items():
            since_then = one.since(before.times.get(most))
            window.times[most] = since_then.plus(window.times.get(most))

    def _count(self, window: _NodeWindow, layer: int, rows: Mapping[int, int]) -> None:
        for expert, count in rows.items():
            if expert < self._num_experts:
                window.rows[layer, expert] = window.rows.get((layer, expert), 0.0) + max(0, count)
                self.total[layer][expert] += max(0, count)

    def close(self, least_rows: int) -> Window | None:
        """Ends the window and begins the next; None where fewer rows of a layer were counted, and it goes on."""
        num_layers = len(self.total)
        cells = Counter[tuple[int, int]]()
        for one in self._nodes.values():
            cells.update(one.rows)
        waves = max((one.batches for one in self._nodes.values()), default=0.0) / max(1, num_layers)
        if cells.total() < least_rows * num_layers or not cells or not waves:
            return None
        nodes, self._nodes = self._nodes, {}
        means = (mean for one in nodes.values() for mean in _means(one, num_layers))
        self.means = [*self.means, *means][-MEANS_KEPT:]
        if self.last is not None:
            self.before.append(self.last.load)
        rows = tuple(
            tuple(float(cells[layer, expert]) for expert in range(self._num_experts)) for layer in range(num_layers)
        )
        load = tuple(tuple(count / waves for count in of_layer) for of_layer in rows)
        self.last = Window(rows, load, waves, max(one.busy_s for one in nodes.values()))
        return self.last


def _means(window: _NodeWindow, num_layers: int) -> list[BatchMean]:
    """By the sizes of batches: the rows that a token there has for each expert are known from all of them together."""
    tokens = sum(one.rows for one in window.times.values()) / num_layers  # of each layer
    if not tokens:
        return []
    per_token = [count / tokens for count in window.rows.values()]  # of every layer
    found = []
    for one in window.times.values():
        if one.num_batches:
            size = one.rows / one.num_batches
            hit = sum(-math.expm1(-size * share) for share in per_token) / num_layers
            rows = size * sum(per_token) / num_layers
            found.append(BatchMean(rows, hit, one.seconds / one.num_batches, one.num_batches))
    return found
