"""When a worker process that ended is started again, and when that would not help. Decides; does not act.

A worker that was ready once is started again without end, each time a little later: whatever ended it may pass, and the
others serve on meanwhile. One that never was ready is given up when it says why it cannot work, or after a few tries.
"""

from __future__ import annotations

FIRST_DELAY_S = 1.0  # of the second start in a row; the first is at once
MOST_DELAY_S = 30.0
HEALTHY_AFTER_S = 10.0  # a life that long, ready, was no failure to start: whoever ended it, waiting would not help
TRIES = 4  # of a worker that never was ready


def restart_delay_s(num_failed: int) -> float:
    """Before the next start, after so many lives in a row that were short: 0, 1, 2, 4 ... 30 s."""
    return 0.0 if num_failed <= 1 else min(MOST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(num_failed - 2, 10))


class Restarts:
    """Of one worker id."""

    def __init__(self) -> None:
        self.has_been_ready = False
        self._ready_at: float | None = None
        self._num_failed = 0

    def ready(self, now: float) -> None:
        self.has_been_ready = True
        self._ready_at = now

    def ended(self, now: float, *, has_said_why: bool) -> float | None:
        """It ended; seconds until it is to be started again, or None where that would not help.

        Args:
            has_said_why: it ended with a sentence that says why it cannot work.
        """
        if self._ready_at is not None and now - self._ready_at >= HEALTHY_AFTER_S:
            self._num_failed = 0
        self._ready_at = None
        self._num_failed += 1
        if not self.has_been_ready and (has_said_why or self._num_failed >= TRIES):
            return None
        return restart_delay_s(self._num_failed)
