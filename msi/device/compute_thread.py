"""Ordered queues on threads of this process: a thread takes whichever of its queues has an open head.

A queue is cut at its waits into stretches. A stretch is run through without a break, and stretches take turns in the
order in which they opened: so what was ready first runs first, whatever queue it lies in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from msi.complaints import Complaints
from msi.device.host_words import HostWords
from msi.device.queues import Changed
from msi.device.ready import Ready
from msi.errors import one_line
from msi.meter import StageMeter
from msi.net.transport import Poller
from msi.tracing import Spans

log = logging.getLogger(__name__)


class Program:
    """Work for a queue, to be run as often as it is enqueued.

    Args:
        run: what it does; on the device's thread.
        failed: called there with what `run` raised, before what comes behind it in the queue; must not raise.
        meter: gets the time of each run.
        name, lane: its label in traces.
        reads: it reads values of the device (`item`, `tolist`): it runs once all before it in the queue is through, as
            programs of a device that computes on threads do anyway.

    Attributes:
        spent_s: device time of the run that was through last.
    """

    __slots__ = ("failed", "lane", "meter", "name", "reads", "run", "spent_s")

    def __init__(
        self,
        run: Callable[[], None],
        failed: Callable[[Exception], None],
        meter: StageMeter,
        name: str,
        lane: int,
        reads: bool = False,
    ) -> None:
        self.run = run
        self.failed = failed
        self.meter = meter
        self.name = name
        self.lane = lane
        self.reads = reads
        self.spent_s = 0.0


class _Stretch:
    __slots__ = ("at_least", "is_over", "steps", "word")

    def __init__(self, word: int, at_least: int) -> None:
        self.word = word  # that it waits for; -1: it does not
        self.at_least = at_least
        self.steps: deque[Program | tuple[int, int]] = deque()  # a tuple is a signal
        self.is_over = False  # nothing can be added any more


class ComputeQueue:
    """Implements `msi.device.queues.Queue` on a thread."""

    def __init__(self, words: HostWords, ready: Ready[ComputeQueue]) -> None:
        self._words = words
        self._lock = words.lock
        self._ready = ready
        self._stretches: deque[_Stretch] = deque()  # not yet taken
        self._last: _Stretch | None = None  # takes what is added
        self._is_ready = False  # lies in `ready`
        self._known: set[int] = set()  # words that rouse us

    def wait(self, word: int, at_least: int) -> None:
        stretch = _Stretch(word, at_least)
        with self._lock:
            if word not in self._known:
                self._known.add(word)
                self._words.rouse(word, self._look)
            self._add(stretch)

    def run(self, program: Program) -> None:
        self._step(program)

    def signal(self, word: int, value: int) -> None:
        self._step((word, value))

    def _step(self, step: Program | tuple[int, int]) -> None:
        with self._lock:
            last = self._last
            if last is None or last.is_over:
                last = _Stretch(-1, 0)
                last.steps.append(step)
                self._add(last)
            else:
                last.steps.append(step)

    def _add(self, stretch: _Stretch) -> None:
        self._last = stretch
        self._stretches.append(stretch)
        self._look()

    def _look(self) -> None:
        """Whether the head is open now. Needs the lock."""
        if not self._is_ready and self._stretches:
            head = self._stretches[0]
            if head.word < 0 or self._words.is_there(head.word, head.at_least):
                self._is_ready = True
                self._ready.put(self)

    # -- for the thread ----------------------------------------------------------------------------------------------

    def take(self) -> _Stretch:
        with self._lock:
            head = self._stretches.popleft()
            self._is_ready = False
            self._look()
            return head

    def is_over(self, stretch: _Stretch) -> bool:
        """Whether all steps of a stretch that was taken are through; if so, what is added begins another."""
        with self._lock:
            stretch.is_over = not stretch.steps
            return stretch.is_over


class ComputeThread:
    """A thread that serves queues, inside a context that is entered once.

    Args:
        context: entered on the thread before the first work.
        done: called after each program that did not raise, with its label, meter, start and end.
        fence: called after each program; returns once what it has set going elsewhere is through and visible.
        poll_s: how long the thread looks for something to do before it sleeps.

    Attributes:
        ready: what it goes through; takes transports' completions, too, where it is given any.
    """

    def __init__(
        self,
        name: str,
        words: HostWords,
        context: Callable[[], AbstractContextManager[object]],
        done: Callable[[Program, float, float], None],
        fence: Callable[[], None] | None = None,
        poll_s: float = 0.0,
    ) -> None:
        self._words = words
        self._context = context
        self._done = done
        self._fence = fence
        self.ready = Ready[ComputeQueue](poll_s)
        self._is_open = True
        self._complaints = Complaints(log)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def queue(self) -> ComputeQueue:
        return ComputeQueue(self._words, self.ready)

    def close(self) -> None:
        """Returns after the program in progress; what is still queued is dropped. Idempotent."""
        self._is_open = False
        self.ready.put(None)
        self._thread.join()
        self.ready.close()

    def _run(self) -> None:
        try:
            with self._context():
                self._serve(self._do)
        except BaseException as error:  # there is no device: all work fails, rather than waits for ever
            self._complaints.say(error, f"{self._thread.name} cannot work")
            broken = error
            self._serve(lambda program: self._tell(program, broken))

    def _serve(self, do: Callable[[Program], None]) -> None:
        while (queue := self.ready.get()) is not None:
            self._run_through(queue, do)
            del queue  # while nothing is to be done, nothing is held

    def _run_through(self, queue: ComputeQueue, do: Callable[[Program], None]) -> None:
        stretch = queue.take()
        steps = stretch.steps
        while self._is_open and (steps or not queue.is_over(stretch)):
            step = steps.popleft()
            if type(step) is tuple:
                self.ready.look()  # first: what came while it computed counts for what is done next
                self._words.signal(*step)
            else:
                assert isinstance(step, Program)
                do(step)

    def _do(self, program: Program) -> None:
        started = time.monotonic()
        try:
            program.run()
            if self._fence is not None:
                self._fence()
        except BaseException as error:
            self._tell(program, error)
            return
        ended = time.monotonic()
        program.spent_s = ended - started
        try:
            self._done(program, started, ended)
        except Exception as error:
            self._complaints.say(error, "a stage could not be counted")

    def _tell(self, program: Program, error: BaseException) -> None:
        try:
            program.failed(as_failure(error))
        except Exception as second:
            self._complaints.say(second, "failed work could not be reported")


def as_failure(error: BaseException) -> Exception:
    """As it is, unless an await would take it for its own end, its cancellation or that of the process."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError(one_line(error))
    wrapped.__cause__ = error
    return wrapped


class ThreadedDevice:
    """What devices with compute threads have in common: words, and what all their programs took together.

    Attributes:
        busy_s: time spent computing since the start, all queues together.
        tracer: gets a span for all work.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.tracer: Spans | None = None
        self.words = HostWords()
        self._is_closed = False

    def queue(self, name: str) -> ComputeQueue:
        raise NotImplementedError

    def threads(self) -> Iterable[ComputeThread]:
        """All that were started."""
        raise NotImplementedError

    @property
    def graphs(self) -> None:
        """Its threads launch everything piece by piece."""
        return None

    @property
    def poller(self) -> Poller | None:
        """The thread that may take completions for all queues; None where they do not share one."""
        return None

    def follow(self, word: int, changed: Changed) -> None:
        self.words.follow(word, changed)

    def watch(self, word: int, changed: Changed) -> None:
        self.words.watch(word, changed)

    async def close(self) -> None:
        """Ends after the programs in progress; what is still queued is dropped. Idempotent."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(None, thread.close) for thread in self.threads()))
        if not self._is_closed:
            self._is_closed = True
            self.words.close()

    def _through(self, program: Program, started: float, ended: float) -> None:
        self.busy_s += ended - started
        program.meter.add(ended - started)
        if (tracer := self.tracer) is not None:  # which another thread may take away
            tracer.span(program.name, program.lane, started, ended)
