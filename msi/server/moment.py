"""Python code that runs for a moment or not at all: what is not through by then is interrupted where it stands.

For work that is small nearly always, on a loop that others wait for. Time is what this process computes, so a busy
machine interrupts nothing. It works on the main thread only; elsewhere there is no limit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

AGAIN_EVERY_S = 0.02  # where Python swallowed the first interruption, as in a destructor


class Interrupted(BaseException):
    """The moment is over; no `Exception`, as what is interrupted may catch those."""


@contextlib.contextmanager
def for_a_moment(limit_s: float) -> Iterator[None]:
    """Around what may compute for `limit_s`. Not to be nested.

    Raises:
        Interrupted: it took longer; what it was about to do may be half done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_running = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if is_running:
            raise Interrupted

    former = signal.signal(signal.SIGPROF, interrupt)
    try:
        signal.setitimer(signal.ITIMER_PROF, limit_s, AGAIN_EVERY_S)
        yield
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
