"""How long an empty completion queue is looked at before it is slept for.

Completions come in bursts: the rows of all peers for a layer, within some microseconds. Waking for each costs more than
looking for the next, unless that takes a core that somebody else wants; see `msi.net.looking`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from msi.net.looking import SLICE_S, Cores, Vain
from msi.net.rdma.verbs import Completion


class Patience:
    """Of one queue, and the one thread that looks at it.

    Args:
        poll_s: for how long; 0.0 never looks.
        cores: asked whether one is free, before and while it looks.
    """

    def __init__(
        self, poll_s: float, *, cores: Cores | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.is_none = not poll_s
        self._poll_s = poll_s
        self._clock = clock
        self._vain = Vain()
        self._cores = cores or (Cores() if poll_s else None)

    def look(self, poll: Callable[[], Sequence[Completion]]) -> Sequence[Completion]:
        """What came in time."""
        cores = self._cores
        if cores is None or not self._vain.may_look():
            return ()
        clock = self._clock
        now = clock()
        until, ask_at = now + self._poll_s, now
        while now < until:
            if now >= ask_at:
                if not cores.one_is_free():
                    break
                ask_at = now + SLICE_S
            if found := poll():
                self._vain.looked(is_rewarded=True)
                return found
            now = clock()
        self._vain.looked(is_rewarded=False)
        return ()

    def close(self) -> None:
        """Nobody looks any more. Idempotent."""
        if self._cores is not None:
            self._cores.close()
