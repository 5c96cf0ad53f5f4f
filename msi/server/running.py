"""Requests that run in this process, and their end when it has to end. Knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from msi.errors import Unavailable


class Running:
    """Those of one gateway."""

    def __init__(self) -> None:
        self.is_ending = False  # nothing new is to begin
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_over = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __len__(self) -> int:
        return len(self._tasks)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Around what the calling task does for a request.

        Raises:
            Unavailable: it was ended by `end`.
        """
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._is_idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_over:
                raise
            task.uncancel()
            raise Unavailable("the server was shut down before this request had ended") from None
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._is_idle.set()

    async def wait_idle(self, timeout_s: float) -> None:
        """Until none runs, or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)

    def end(self) -> None:
        """Ends all that run."""
        self._is_over = True
        for task in list(self._tasks):
            task.cancel()
