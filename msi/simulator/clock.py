"""An event loop whose time jumps to the next timer instead of passing."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")

LANDING, TIMER = 0, 1  # at one instant, what lands comes before what was timed


class SimulationStalled(RuntimeError):
    """Everybody waits and no timer is set, or the time that was allowed is over: in reality this would hang."""


class VirtualClockLoop(asyncio.BaseEventLoop):
    """`time()` starts at 0 and moves only when nothing is left to run at the current instant.

    Timers of one instant run in the order in which they were set, after all that lands at it: so it makes no
    difference whether messages that land together are one event or many.
    """

    _ready: deque[asyncio.Handle]
    _stopping: bool

    def __init__(self, limit_s: float = math.inf) -> None:
        super().__init__()
        self._limit_s = limit_s
        self._now = 0.0
        self._events: list[_Event] = []  # a heap
        self._num_events = 0

    def time(self) -> float:
        return self._now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._push(when, TIMER, _run, (handle,))
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def compute_until(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """`call_at` for a device: cannot be cancelled, and costs less. The callback must not raise."""
        self._push(when, TIMER, callback, args)

    def land_at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """`call_at` for what arrives over a network. The callback must not raise."""
        self._push(when, LANDING, callback, args)

    def _push(self, when: float, kind: int, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, kind, self._num_events, callback, args))

    def call_soon_threadsafe(  # type: ignore[override]  # there is one thread, and nothing to wake
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]  # at once: threads know no virtual time
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def _run_once(self) -> None:
        """All that is ready now, then all that is due now, again and again until the loop is stopped."""
        ready, events = self._ready, self._events
        while not self._stopping:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle.cancelled():
                    handle._run()
            if not ready and not self._stopping:
                if not events:
                    raise SimulationStalled("every coroutine waits and no timer is set")
                self._now = max(self._now, events[0][0])
                if self._now > self._limit_s:
                    raise SimulationStalled(f"{self._limit_s:g} s of virtual time were not enough")
            now = self._now
            while events and events[0][0] <= now:
                _, _, _, callback, args = heapq.heappop(events)
                callback(*args)


_Event = tuple[float, int, int, Callable[..., object], tuple[Any, ...]]  # when, kind, number, what


def _run(handle: asyncio.Handle) -> None:
    if not handle.cancelled():
        handle._run()


def run_virtual(main: Coroutine[Any, Any, T], limit_s: float = math.inf) -> T:
    """Runs a coroutine to its end under a virtual clock. Raises SimulationStalled where reality would hang."""
    with asyncio.Runner(loop_factory=lambda: VirtualClockLoop(limit_s)) as runner:
        return runner.run(main)


def virtual_loop() -> VirtualClockLoop:
    """The running loop, which is one."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop), loop
    return loop
