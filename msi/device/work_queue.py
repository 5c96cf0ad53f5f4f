"""Ordered work on a thread of its own, and what every device that has such threads does with it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import TypeVar

from msi.complaints import Complaints
from msi.errors import one_line
from msi.meter import StageMeter
from msi.tracing import Tracer

log = logging.getLogger(__name__)

T = TypeVar("T")
_Item = tuple[Callable[[], None], Callable[[Exception], None], StageMeter, str, int]


class WorkQueue:
    """A thread that runs work in order, inside a context that is entered once.

    Args:
        context: entered on the thread before the first work.
        done: called on the thread after each work that succeeded, with (started, ended, meter, name, lane).
    """

    def __init__(
        self,
        name: str,
        context: Callable[[], AbstractContextManager[object]],
        done: Callable[[float, float, StageMeter, str, int], None],
    ) -> None:
        self._context = context
        self._done = done
        self._items: SimpleQueue[_Item | None] = SimpleQueue()
        self._is_open = True
        self._complaints = Complaints(log)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(
        self, work: Callable[[], None], failed: Callable[[Exception], None], meter: StageMeter, name: str, lane: int
    ) -> None:
        self._items.put((work, failed, meter, name, lane))

    def close(self) -> None:
        """Returns after the work in progress; what is still queued is dropped. Idempotent."""
        self._is_open = False
        self._items.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._context():
                while (item := self._items.get()) is not None:
                    if self._is_open:
                        self._do(*item)
        except BaseException as error:  # there is no device: all work fails, rather than waits for ever
            self._complaints.say(error, f"{self._thread.name} cannot work")
            while (item := self._items.get()) is not None:
                self._tell(item[1], error)

    def _do(
        self, work: Callable[[], None], failed: Callable[[Exception], None], meter: StageMeter, name: str, lane: int
    ) -> None:
        started = time.monotonic()
        try:
            work()
        except BaseException as error:
            self._tell(failed, error)
            return
        try:
            self._done(started, time.monotonic(), meter, name, lane)
        except Exception as error:
            self._complaints.say(error, "a stage could not be counted")

    def _tell(self, failed: Callable[[Exception], None], error: BaseException) -> None:
        try:
            failed(_awaitable(error))
        except Exception as second:
            self._complaints.say(second, "failed work could not be reported")


def _awaitable(error: BaseException) -> Exception:
    """As it is, unless an await would take it for its own end, its cancellation or that of the process."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError(one_line(error))
    wrapped.__cause__ = error
    return wrapped


class QueuedDevice:
    """What devices with work queues have in common.

    Attributes:
        busy_s: time spent computing since the start, all queues together.
        tracer: gets a span for all work.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.tracer: Tracer | None = None
        self._loop = asyncio.get_running_loop()

    def queue_of(self, lane: int) -> WorkQueue:
        """The queue for a lane's work."""
        raise NotImplementedError

    def queues(self) -> list[WorkQueue]:
        """All that were used."""
        raise NotImplementedError

    def submit(self, work: Callable[[], T], meter: StageMeter, name: str, lane: int) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self._loop.create_future()

        def resolve() -> None:
            self._loop.call_soon_threadsafe(_resolve, done, work())

        def failed(error: Exception) -> None:
            self._loop.call_soon_threadsafe(_fail, done, error)

        self.enqueue(resolve, failed, meter, name, lane)
        return done

    def enqueue(
        self, work: Callable[[], None], failed: Callable[[Exception], None], meter: StageMeter, name: str, lane: int
    ) -> None:
        self.queue_of(lane).put(work, failed, meter, name, lane)

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(None, queue.close) for queue in self.queues()))

    def _worked(self, started: float, ended: float, meter: StageMeter, name: str, lane: int) -> None:
        self.busy_s += ended - started
        meter.add(ended - started)
        if self.tracer is not None:
            self.tracer.span(name, lane, started, ended)


def _resolve(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[T], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
