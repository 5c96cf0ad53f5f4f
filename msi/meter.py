"""Counting stage times: what a worker reports as T_a, T_e, T_c, busy and bubble; and percentiles of times."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

SAMPLES_KEPT = 256


class StageMeter:
    """Durations of one stage, in seconds: how many, their sum, and the last few for a median."""

    __slots__ = ("count", "recent", "total_s")

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self.recent: deque[float] = deque(maxlen=SAMPLES_KEPT)

    def add(self, duration_s: float) -> None:
        self.count += 1
        self.total_s += duration_s
        self.recent.append(duration_s)

    @property
    def median_s(self) -> float:
        """Median of the last samples; 0.0 before the first."""
        return median(self.recent) if self.recent else 0.0

    def clear_recent(self) -> None:
        """Forgets the samples behind the median, not the totals."""
        self.recent.clear()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed; 0.0 of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0
