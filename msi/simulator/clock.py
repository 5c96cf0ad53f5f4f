"""An event loop whose time jumps to the next timer instead of passing."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


class SimulationStalled(RuntimeError):
    """Everybody waits and no timer is set: in reality this would hang."""


class _InstantSelector(selectors.DefaultSelector):
    """Never blocks: what the loop would have slept is added to its clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise SimulationStalled("every coroutine waits and no timer is set")
        if timeout > 0:
            self.now += timeout
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and moves only when nothing is left to run at the current instant."""

    def __init__(self) -> None:
        self._instant_selector = _InstantSelector()
        super().__init__(self._instant_selector)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._instant_selector.now

    def call_soon_threadsafe(  # type: ignore[override]  # there is one thread, and nothing to wake
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end under a virtual clock. Raises SimulationStalled where reality would hang."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)
