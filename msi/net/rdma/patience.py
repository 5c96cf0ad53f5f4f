"""How long an empty completion queue is looked at before it is slept for.

Completions come in bursts: the rows of all peers for a layer, within some microseconds. Waking for each costs more than
looking for the next, which may cost a core that somebody else wants. So each look in vain lets twice as many
opportunities as the last one go by, and one that is rewarded takes the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from msi.net.rdma.verbs import Completion

MOST_SKIPPED = 1024


class Patience:
    """Of one queue.

    Args:
        poll_s: for how long; 0.0 never looks.
    """

    def __init__(self, poll_s: float, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.is_none = not poll_s
        self._poll_s = poll_s
        self._clock = clock
        self._skipped = self._to_skip = 0

    def look(self, poll: Callable[[], Sequence[Completion]]) -> Sequence[Completion]:
        """What came in time."""
        if self.is_none:
            return ()
        if self._to_skip:
            self._to_skip -= 1
            return ()
        until = self._clock() + self._poll_s
        while self._clock() < until:
            if found := poll():
                self._skipped = 0
                return found
        self._skipped = self._to_skip = min(2 * self._skipped + 1, MOST_SKIPPED)
        return ()
