"""How late an event loop is, and what it stood at.

A timer on the loop leaves its mark every few hundredths of a second; a thread beside it looks whether the mark is
there, so a loop that stands is seen while it stands. Costs two short wake-ups per period, and spins nowhere. For real
processes only: under a virtual clock nothing is ever late.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

log = logging.getLogger(__name__)

PERIOD_S = 0.025
SAID_FROM_S = 0.1  # stalls from here on are counted apart, and logged
SAID_EVERY_S = 10.0
SHOWN_FRAMES = 8
LOOPS = ("runners.py", "selectors.py", "base_events.py")  # where a loop is that runs nothing
BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class LoopWatch:
    """Watches one event loop from `start`, called on that loop, to `stop`.

    Args:
        name: of the process, in log lines.
        say: told what stands, at most every ten seconds; from a thread.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        say: Callable[[str], None] = log.warning,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._say = say
        self._clock = clock
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._sum_s = 0.0
        self._num_long = 0
        self._max_s = 0.0
        self._marked_at = clock()
        self._timer: asyncio.TimerHandle | None = None
        self._loop_thread = 0
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    @property
    def lag_s(self) -> float:
        """How late the loop is at this moment; may be asked from any thread, and grows while the loop stands."""
        return 0.0 if self._thread is None else max(0.0, self._clock() - self._marked_at - PERIOD_S)

    def counters(self) -> dict[str, float]:
        """Everything measured so far: `loop_stall_le_*` are the counts of a cumulative histogram."""
        values: dict[str, float] = {}
        total = 0
        for bound, count in zip((*BUCKETS_S, "inf"), self._counts, strict=True):
            total += count
            values[f"loop_stall_le_{bound}"] = total
        return values | {
            "loop_stall_sum_s": self._sum_s,
            "loop_stall_max_s": self._max_s,
            "loop_stalls": self._num_long,
        }

    def start(self) -> None:
        """Idempotent."""
        if self._thread is not None:
            return
        self._loop_thread = threading.get_ident()
        self._loop = asyncio.get_running_loop()
        self._marked_at = self._clock()
        self._timer = self._loop.call_later(PERIOD_S, self._mark)
        self._thread = threading.Thread(target=self._watch, name="loop watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Idempotent; on the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def _mark(self) -> None:
        now = self._clock()
        self._count(max(0.0, now - self._marked_at - PERIOD_S))
        self._marked_at = now
        self._timer = self._loop.call_later(PERIOD_S, self._mark)

    def _count(self, late_s: float) -> None:
        self._counts[bisect.bisect_left(BUCKETS_S, late_s)] += 1
        self._sum_s += late_s
        self._max_s = max(self._max_s, late_s)
        if late_s >= SAID_FROM_S:
            self._num_long += 1

    # -- the thread --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        said_at, num_unsaid, seen = -SAID_EVERY_S, 0, 0.0
        looked_at = self._clock()
        while not self._stopped.wait(PERIOD_S):
            now, before = self._clock(), looked_at
            looked_at = now
            marked_at = self._marked_at
            late_s = now - marked_at - PERIOD_S
            if late_s < SAID_FROM_S or marked_at == seen:
                continue
            seen = marked_at  # once per stall
            if now - said_at < SAID_EVERY_S:
                num_unsaid += 1
                continue
            own_late_s = now - before - PERIOD_S
            stood_at = stack_of(sys._current_frames().get(self._loop_thread))
            self._say(sentence(self._name, late_s, own_late_s, stood_at, num_unsaid))
            said_at, num_unsaid = now, 0


def sentence(name: str, late_s: float, own_late_s: float, stood_at: str, num_unsaid: int) -> str:
    """What is said of a stall.

    Args:
        late_s: the loop's lateness.
        own_late_s: that of the thread that looks: who is late as well cannot say that the loop's code was to blame.
    """
    more = f"; {num_unsaid} other stalls since the last such line" if num_unsaid else ""
    if own_late_s > late_s / 2:
        why = "stopped, short of processor time, or one call kept the interpreter; it is"
        return f"{name}: the process stood for {late_s:.2f} s: {why} at {stood_at}{more}"
    return f"{name}: the loop has stood for {late_s:.2f} s, at {stood_at}{more}"


def stack_of(frame: FrameType | None) -> str:
    """The innermost calls of a thread, in one line, outermost first."""
    if frame is None:
        return "nothing: its thread has ended"
    if frame.f_code.co_filename.rpartition("/")[2] in LOOPS:
        return "no code of its own: the loop itself waited for the processor, or ran a callback in C"
    frames = traceback.extract_stack(frame)[-SHOWN_FRAMES:]
    return " > ".join(f"{one.filename.rpartition('/')[2]}:{one.lineno} {one.name}" for one in frames)
