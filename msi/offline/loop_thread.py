"""An event loop on a thread of its own, for callers that have none, or whose own must not wait. Knows no engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
ENDS_WITHIN_S = 10.0


class LoopThread:
    """Runs coroutines for threads that wait. `close` at the end."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work returns. Whatever interrupts the wait, such as Ctrl-C, cancels the work before it goes on."""
        result: concurrent.futures.Future[T] = concurrent.futures.Future()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda task: _tell(task, result))

        try:
            self._loop.call_soon_threadsafe(start)
        except RuntimeError:
            work.close()
            raise
        try:
            return result.result()
        except BaseException:
            if not result.done():  # it is the wait that was interrupted
                self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                with contextlib.suppress(Exception, concurrent.futures.CancelledError):
                    result.result(ENDS_WITHIN_S)
            raise

    def close(self) -> None:
        """Idempotent; what runs is cancelled."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ENDS_WITHIN_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


def _tell(task: asyncio.Task[T], result: concurrent.futures.Future[T]) -> None:
    """How the work ended, to who waits."""
    if task.cancelled():
        result.cancel()
        result.set_running_or_notify_cancel()
    elif (error := task.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(task.result())
