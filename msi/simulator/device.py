"""Simulated devices: the queues, gates and words of a device whose programs take virtual time and compute nothing.

What opened first is computed first, as on a CPU. How long a program takes is asked when it opens.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from msi.complaints import Complaints
from msi.device.queues import Changed
from msi.simulator.clock import virtual_loop
from msi.tracing import Spans

log = logging.getLogger(__name__)


class SimulatedProgram:
    """Work for a simulated queue.

    Args:
        duration_s: asked each time that it opens; None: there is nothing to do, and it takes no turn of the device.
        through: called with the time that it took, once that is over.
        name, lane: its label in traces.
    """

    __slots__ = ("duration_s", "lane", "name", "through")

    def __init__(
        self, duration_s: Callable[[], float | None], through: Callable[[float], None], name: str, lane: int
    ) -> None:
        self.duration_s = duration_s
        self.through = through
        self.name = name
        self.lane = lane


class SimulatedWords:
    """Implements `msi.device.queues.Words`; virtual time ends before 32 bits do."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._waiting: list[list[SimulatedQueue]] = []
        self._followers: dict[int, Changed] = {}
        self._complaints = Complaints(log)
        self._loop = virtual_loop()

    def take(self) -> int:
        self._values.append(0)
        self._waiting.append([])
        return len(self._values) - 1

    def give_back(self, word: int) -> None:
        self._waiting[word] = []
        self._followers.pop(word, None)

    def is_there(self, word: int, at_least: int) -> bool:
        return self._values[word] >= at_least

    def open(self, word: int, value: int) -> None:
        """Queues go on after all that happens at this instant already: as if a coroutine had to be woken."""
        if self._values[word] < value:
            self._values[word] = value
            for queue in self._waiting[word]:
                self._loop.call_soon(queue.look)

    def rouse(self, word: int, queue: SimulatedQueue) -> None:
        if queue not in self._waiting[word]:
            self._waiting[word].append(queue)

    def signal(self, word: int, value: int) -> None:
        self.open(word, value)
        if (changed := self._followers.get(word)) is not None:
            try:
                changed(value)
            except Exception as error:
                self._complaints.say(error, "whoever was told of a word's value failed")

    def follow(self, word: int, changed: Changed) -> None:
        self._followers[word] = changed


_Step = SimulatedProgram | tuple[int, int]  # a tuple is a signal


class SimulatedQueue:
    """Implements `msi.device.queues.Queue`: cut at its waits into stretches, of one program each."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._steps: deque[_Step | tuple[int, int, None]] = deque()  # with a None: a wait
        self.is_out = False  # its program waits for the device, or runs

    def wait(self, word: int, at_least: int) -> None:
        self._device.words.rouse(word, self)
        self._add((word, at_least, None))

    def run(self, program: SimulatedProgram) -> None:
        self._add(program)

    def signal(self, word: int, value: int) -> None:
        self._add((word, value))

    def _add(self, step: _Step | tuple[int, int, None]) -> None:
        self._steps.append(step)
        if len(self._steps) > 1 or self.is_out:
            return
        if isinstance(step, tuple) and len(step) == 2:
            virtual_loop().call_soon(self.look)  # nobody is told within a call
        else:
            self.look()

    def look(self) -> None:
        """Goes on as far as the gates are open, up to a program that takes time."""
        while self._steps and not self.is_out:
            step = self._steps[0]
            if isinstance(step, SimulatedProgram):
                self._steps.popleft()
                duration_s = step.duration_s()
                if duration_s is not None:
                    self.is_out = True
                    self._device.enqueue(self, step, duration_s)
            elif len(step) == 2:
                self._steps.popleft()
                self._device.words.signal(*step)
            elif self._device.words.is_there(step[0], step[1]):
                self._steps.popleft()
            else:
                return


_Work = tuple[SimulatedQueue, SimulatedProgram, float]


class SimulatedDevice:
    """One device: programs, one after another. Implements `msi.device.queues.QueueDevice`.

    Attributes:
        busy_s: time spent computing since the start.
        slowness: multiplies the duration of what starts from now on.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.slowness = 1.0
        self.tracer: Spans | None = None
        self.words = SimulatedWords()
        self._waiting: deque[_Work] = deque()
        self._running: _Work | None = None
        self._free_at = 0.0
        self._stalled_s = 0.0  # by which what runs is to end later
        self._stalled_until = 0.0
        self._is_closed = False
        self._loop = virtual_loop()

    def queue(self, name: str) -> SimulatedQueue:
        return SimulatedQueue(self)

    def follow(self, word: int, changed: Changed) -> None:
        self.words.follow(word, changed)

    def watch(self, word: int, changed: Changed) -> None:
        self.words.follow(word, changed)  # all is the event loop's here

    def enqueue(self, queue: SimulatedQueue, program: SimulatedProgram, duration_s: float) -> None:
        """Runs a program of a queue when its turn comes, and then has the queue go on."""
        work = (queue, program, duration_s)
        if self._is_closed:
            return
        if self._running is None:
            self._start(work)
        else:
            self._waiting.append(work)

    def stall(self, duration_s: float) -> None:
        """Nothing gets on for a while; of two at a time, until the later ends."""
        now = self._loop.time()
        since, self._stalled_until = max(self._stalled_until, now), max(self._stalled_until, now + duration_s)
        duration_s = self._stalled_until - since
        if self._running is None:
            self._free_at = max(self._free_at, now) + duration_s
        else:
            self._stalled_s += duration_s

    def close(self) -> None:
        """What runs is not finished, and what is queued dropped. Idempotent."""
        self._is_closed = True
        self._running = None
        self._waiting.clear()

    def _start(self, work: _Work) -> None:
        self._running = work
        duration_s = work[2] * self.slowness
        self._free_at = max(self._free_at, self._loop.time()) + duration_s
        self._loop.compute_until(self._free_at, self._done, work, duration_s)

    def _done(self, work: _Work, duration_s: float) -> None:
        if self._running is not work:
            return  # closed meanwhile
        if self._stalled_s:
            self._free_at, self._stalled_s = self._free_at + self._stalled_s, 0.0
            self._loop.compute_until(self._free_at, self._done, work, duration_s)
            return
        self.busy_s += duration_s
        queue, program, _ = work
        if self.tracer is not None:
            self.tracer.span(program.name, program.lane, self._free_at - duration_s, self._free_at)
        self._running = None
        if self._waiting:
            self._start(self._waiting.popleft())
        queue.is_out = False
        program.through(duration_s)
        queue.look()
