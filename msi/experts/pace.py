"""How long waves wait, as measured, and what they count."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

EPSILON_S = 1e-9  # a timer may fire one rounding error early
TURNS_KEPT = 64
MEDIAN_EVERY = 8


@dataclass(slots=True)
class WaveCounters:
    """Counts since start; `wave_sizes[n]` counts the batches of n seats."""

    batches: int = 0
    alone_batches: int = 0
    evictions: int = 0
    readmissions: int = 0
    starts: int = 0
    wave_sizes: dict[int, int] = field(default_factory=dict)

    def batch_of(self, num_seats: int) -> None:
        self.batches += 1
        self.wave_sizes[num_seats] = self.wave_sizes.get(num_seats, 0) + 1


class Pace:
    """W, the median of the last turns, and what follows from it; one for all lanes of an expert node.

    Attributes:
        wait_s: W: how long a batch waits for members that were late before.
        trusting_wait_s: how long it waits for the others. More than W, so that one node's wait is never the cause of
            the next's.
        late_s: a member that lands longer than this after the first was late.
        two_passes_s: no rows wait longer.
    """

    def __init__(self, *, num_layers: int, default_wait_s: float, min_wait_s: float) -> None:
        self._num_layers = num_layers
        self._min_wait_s = min_wait_s
        self._turns: deque[float] = deque(maxlen=TURNS_KEPT)
        self._num_turns = 0
        self._set(default_wait_s)

    def measured(self, turn_s: float) -> None:
        """A lane has gone through a turn."""
        self._turns.append(turn_s)
        self._num_turns += 1
        if self._num_turns < MEDIAN_EVERY or self._num_turns % MEDIAN_EVERY == 0:
            self._set(median(self._turns))

    def _set(self, turn_s: float) -> None:
        self.wait_s = max(turn_s, self._min_wait_s)
        self.trusting_wait_s = 2 * self.wait_s
        self.late_s = self.wait_s + EPSILON_S
        self.two_passes_s = 2 * self._num_layers * self.wait_s
