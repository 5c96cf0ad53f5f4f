"""How long a worker may be silent before it counts as lost: by how steadily its signs of life have come so far.

A thread sends them, which no busy loop starves, so on a machine with room they come like a clock, and a host that
vanished is known by three that are missing. Where machine or network are busy they come late, and that is no loss: the
patience grows with what they have been late by in the last minute, up to the bound that always holds. What came once is
no rhythm: a process that has just been put together, stopped or swapped out is late once, by much, and that is not to
have it missed seconds too late for a minute. So the longest pause counts for little more than itself, and the second
longest says how late signs come. Pure.
"""

from __future__ import annotations

import math

LEAST_S = 0.7  # three signs and a half
TIMES = 3.5  # as late as they have been, more than once
TIMES_ONCE = 1.5  # as long as the longest pause
KNOWN_FROM = 20  # signs of life
WINDOW_S = 30.0  # of two, the last and this one, pauses count


class Rhythm:
    """Of one worker's signs of life."""

    def __init__(self) -> None:
        self._num = 0
        self._last = math.inf
        self._began = 0.0
        self._pace_s = 0.0  # a mean of about the last `KNOWN_FROM`
        self._longest_s = self._longest_before_s = (0.0, 0.0)  # and the second longest, of each window
        self._new_s = 0.0  # the longest pause since `settle`

    def beat(self, now: float) -> None:
        """One came."""
        if now - self._began > WINDOW_S:
            self._began, self._longest_before_s, self._longest_s = now, self._longest_s, (0.0, 0.0)
        if self._num:
            pause_s = now - self._last
            self._new_s = max(self._new_s, pause_s)
            self._pace_s += (pause_s - self._pace_s) / min(self._num, KNOWN_FROM)
        self._last = now
        self._num += 1

    def settle(self, late_s: float) -> None:
        """What has come since the last time counts from now on.

        Args:
            late_s: by so much whoever reads them was late meanwhile: that much of a pause was not the worker's.
        """
        self._longest_s = _two_longest(*self._longest_s, self._new_s - late_s)
        self._new_s = 0.0

    def patience_s(self, most_s: float) -> float:
        """For its silence."""
        if self._num < KNOWN_FROM:
            return most_s
        longest_s, second_s = _two_longest(*self._longest_s, *self._longest_before_s)
        late_s = max(0.0, second_s - self._pace_s)
        return min(most_s, max(LEAST_S, self._pace_s + TIMES * late_s, TIMES_ONCE * longest_s))


def _two_longest(*pauses_s: float) -> tuple[float, float]:
    longest_s, second_s = sorted(pauses_s, reverse=True)[:2]
    return longest_s, second_s
