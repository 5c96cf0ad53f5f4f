"""How long a worker may be silent before it counts as lost: by how steadily its signs of life have come so far.

A thread sends them, which no busy loop starves, so on a machine with room they come like a clock, and a host that
vanished is known by four that are missing. Where machine or network are busy they come late, and that is no loss: the
patience grows with the longest pause of the last minute, up to the bound that always holds. Pure.
"""

from __future__ import annotations

import math

LEAST_S = 0.7  # with a tick of the coordinator's and one sign's pace: within a second
TIMES = 3.5  # the longest pause there was
KNOWN_FROM = 20  # signs of life
WINDOW_S = 30.0  # of two, the last and this one, the longest pause counts


class Rhythm:
    """Of one worker's signs of life."""

    def __init__(self) -> None:
        self._num = 0
        self._last = math.inf
        self._began = 0.0
        self._pause_s = self._pause_before_s = 0.0
        self._new_s = 0.0  # the longest pause since `settle`

    def beat(self, now: float) -> None:
        """One came."""
        if now - self._began > WINDOW_S:
            self._began, self._pause_before_s, self._pause_s = now, self._pause_s, 0.0
        self._new_s = max(self._new_s, now - self._last)
        self._last = now
        self._num += 1

    def settle(self, late_s: float) -> None:
        """What has come since the last time counts from now on.

        Args:
            late_s: by so much whoever reads them was late meanwhile: that much of a pause was not the worker's.
        """
        self._pause_s = max(self._pause_s, self._new_s - late_s)
        self._new_s = 0.0

    def patience_s(self, most_s: float) -> float:
        """For its silence."""
        if self._num < KNOWN_FROM:
            return most_s
        return min(most_s, max(LEAST_S, TIMES * max(self._pause_s, self._pause_before_s)))
