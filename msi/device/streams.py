"""Ordered queues on a driver's streams: nobody waits for the device, and one thread launches for all queues.

    run      its closure is called when it is launched; what it launches comes to its turn on the stream
    signal   the stream writes the word; the event loop looks at those that will be signalled while any may be, and
             sleeps otherwise
    wait     what comes after it is launched once the loop sees the word; or, with `gates`, at once, and the stream
             itself waits for the word

With gates the device goes on without the host, but whatever a call of the driver waits for (memory, a kernel that is
loaded) it may wait for behind a closed gate, and hang: so it did on the first GPU. A program that reads values of the
device is launched once a flag says that all before it is through.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from msi.complaints import Complaints
from msi.device.compute_thread import Program, as_failure
from msi.device.cuda_driver import DeviceLost, Driver
from msi.device.queues import Changed
from msi.device.stream_words import StreamWords
from msi.tracing import Spans

log = logging.getLogger(__name__)

CHECKED_EACH_S = 0.1  # whether the device has failed, while flags are looked for
DRAINED_WITHIN_S = 2.0  # at the end, once all gates are open
JOINED_EACH_S = 0.05  # until then
QUIET_WITHIN_S = 0.2  # of a layer or two


class _Wait(NamedTuple):
    word: int
    at_least: int


class _Signal(NamedTuple):
    word: int
    value: int


class _Hold(NamedTuple):
    """A gate that the host waits at: what comes after it is launched once the word is there."""

    word: int
    value: int


class _Ran(NamedTuple):
    """Launched, between two events."""

    program: Program
    start: Any
    end: Any


class _Read(NamedTuple):
    """A program that is launched once the queue's mark is there."""

    program: Program
    word: int
    value: int


Step = _Wait | _Signal | Program


class StreamQueue:
    """Implements `msi.device.queues.Queue`."""

    def __init__(self, streams: Streams, name: str, stream: Any) -> None:
        self.name = name
        self.stream = stream
        self.held: deque[Step] = deque()  # behind a program that is to be launched later
        self.out: deque[_Wait | _Hold | _Signal | _Ran | _Read] = deque()  # launched, not yet seen to be through
        self.is_held = False
        self.mark = -1  # the word of its programs that read
        self.num_marks = 0
        self._streams = streams

    def wait(self, word: int, at_least: int) -> None:
        self._streams.enqueue(self, _Wait(word, at_least))

    def run(self, program: Program) -> None:
        self._streams.enqueue(self, program)

    def signal(self, word: int, value: int) -> None:
        self._streams.enqueue(self, _Signal(word, value))


class Streams:
    """All queues of one device.

    Args:
        gates: streams wait at gates themselves; else nothing is launched behind a closed gate, and so no call of the
            driver can wait for one.

    Attributes:
        busy_s: device time of all programs together.
        lost: why the device takes no more work; None while it does.
        tracer: gets a span for all work.
    """

    def __init__(self, driver: Driver, gates: bool = False) -> None:
        self.busy_s = 0.0
        self.lost: DeviceLost | None = None
        self._losing = threading.Lock()
        self.tracer: Spans | None = None
        self.driver = driver
        self._gates = gates
        self.words = StreamWords(driver, self._look_soon)
        self._queues: tuple[StreamQueue, ...] = ()
        self._of_names: dict[str, Any] = {}  # streams
        self._events: list[Any] = []  # that are free
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._is_looking = False
        self._checked_at = 0.0
        self._is_open = True
        self._complaints = Complaints(log)
        self._todo: SimpleQueue[tuple[StreamQueue, Step | _Read | None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="msi-launch", daemon=True)
        self._thread.start()

    def queue(self, name: str) -> StreamQueue:
        """On the stream that the last queue of that name had: kernels keep memory for streams."""
        stream = self._of_names.get(name)
        if stream is None:
            stream = self._of_names[name] = self.driver.stream()  # now: while work is out, it might wait for that
        queue = StreamQueue(self, name, stream)
        self._queues = (*self._queues, queue)
        return queue

    def follow(self, word: int, changed: Changed) -> None:
        self.words.followers[word] = changed

    def enqueue(self, queue: StreamQueue, step: Step) -> None:
        self._todo.put((queue, step))

    @property
    def is_launching(self) -> bool:
        """Whether the calling thread is the one that launches."""
        return threading.current_thread() is self._thread

    async def close(self) -> bool:
        """Ends after what is being launched; gates are opened, so that nothing stays on the device. Idempotent.

        Whether nothing is left there, and nothing is being launched any more.
        """
        if not self._is_open:
            return False
        self._is_open = False
        self._todo.put(None)
        until = time.monotonic() + DRAINED_WITHIN_S
        while self._thread.is_alive() and time.monotonic() < until:
            for queue in self._queues:
                self._is_out(queue)  # the call of the driver that it is in may wait for a gate
            await asyncio.to_thread(self._thread.join, JOINED_EACH_S)
        is_out = True
        while is_out and self.lost is None and time.monotonic() < until:
            is_out = sum(self._is_out(queue) for queue in self._queues) > 0
            await asyncio.sleep(0.001 * is_out)
        if is_out or self.lost is not None or self._thread.is_alive():
            return False
        for queue in self._queues:
            await asyncio.to_thread(self.driver.finish, queue.stream)
        self.words.close()
        return True

    def wait_quiet(self) -> bool:
        """Until nothing that was launched can go on without a gate; on the loop, and soon: it launches no more.

        Whether it came to that.
        """
        until = time.monotonic() + QUIET_WITHIN_S
        while is_busy := any(map(self._is_busy, self._queues)):
            if time.monotonic() >= until:
                break
            time.sleep(QUIET_WITHIN_S / 1000)
        return not is_busy

    def _is_busy(self, queue: StreamQueue) -> bool:
        for index in range(len(queue.out)):
            step = queue.out[index]
            if isinstance(step, _Wait) and not self.words.is_there(step.word, step.at_least):
                return False
            if isinstance(step, _Signal | _Read) and not self.words.is_there(step.word, step.value):
                return True
        return False

    def _is_out(self, queue: StreamQueue) -> bool:
        """Opens its gates, whatever they wait for; whether a flag behind them is still to come."""
        is_out = False
        for index in range(len(queue.out)):
            step = queue.out[index]
            if isinstance(step, _Wait):
                self.words.open(step.word, step.at_least)
            elif isinstance(step, _Signal | _Read):
                is_out |= not self.words.is_there(step.word, step.value)
        return is_out

    # -- launching, on its thread ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        self.driver.enter()
        with torch.inference_mode():
            while (todo := self._todo.get()) is not None and self._is_open:
                queue, step = todo
                del todo  # while nothing is to be launched, nothing is held
                try:
                    if step is None or isinstance(step, _Read):
                        self._go_on(queue, step)
                    elif queue.is_held:
                        queue.held.append(step)
                    else:
                        self._launch(queue, step)
                except DeviceLost as error:
                    self.lose(error)
                except BaseException as error:
                    self._complaints.say(error, "launching failed")
                del queue, step

    def _go_on(self, queue: StreamQueue, read: _Read | None) -> None:
        """With a program that reads, where it did not fail, and what was held behind it, up to the next such one."""
        if read is not None:
            self._read(queue, read.program)
        queue.is_held = False
        while queue.held and not queue.is_held:
            self._launch(queue, queue.held.popleft())

    def _launch(self, queue: StreamQueue, step: Step) -> None:
        lost = self.lost
        if lost is not None:
            self._drop(step, lost)
            return
        try:
            if isinstance(step, _Signal):
                self.driver.write(queue.stream, self.words.address(step.word), step.value)
                queue.out.append(step)
                self._look_soon()
            elif isinstance(step, _Wait):
                if self.words.is_there(step.word, step.at_least):
                    pass
                elif not self._gates:
                    queue.is_held = True
                    queue.out.append(_Hold(step.word, step.at_least))
                    self._look_soon()
                else:
                    self.driver.wait(queue.stream, self.words.address(step.word), step.at_least)
                    queue.out.append(step)
            elif isinstance(step, Program):
                self._run(queue, step)
        except DeviceLost as error:
            self._drop(step, self.lose(error))
        if self.lost is not None:  # the loop may have said so, and dropped what was out, before this step was
            self._loop.call_soon_threadsafe(self._drop_all)

    def _run(self, queue: StreamQueue, program: Program) -> None:
        if program.reads:
            self._mark(queue, program)
            return
        start, end = self._event(), self._event()
        self.driver.record(queue.stream, start)
        try:
            self.driver.launch(queue.stream, program.run)
        except DeviceLost:
            raise
        except BaseException as error:
            self.driver.check()  # or the device itself has failed
            self._events.extend((start, end))
            self._tell_failed(program, error)
            return
        self.driver.record(queue.stream, end)
        queue.out.append(_Ran(program, start, end))

    def _event(self) -> Any:
        return self._events.pop() if self._events else self.driver.event()

    def _mark(self, queue: StreamQueue, program: Program) -> None:
        """What comes after it is held until it has run."""
        if queue.mark < 0:
            queue.mark = self.words.take()
        queue.num_marks += 1
        self.driver.write(queue.stream, self.words.address(queue.mark), queue.num_marks)
        queue.is_held = True
        queue.out.append(_Read(program, queue.mark, queue.num_marks))
        self._look_soon()

    def _read(self, queue: StreamQueue, program: Program) -> None:
        started = time.monotonic()
        try:
            self.driver.launch(queue.stream, program.run, reads=True)
        except BaseException as error:
            self._tell_failed(program, error)
            self.driver.check()
            return
        self._through(program, time.monotonic() - started)

    def _tell_failed(self, program: Program, error: BaseException) -> None:
        try:
            program.failed(as_failure(error))
        except Exception as second:
            self._complaints.say(second, "failed work could not be reported")

    # -- a device that failed ----------------------------------------------------------------------------------------

    def lose(self, error: DeviceLost) -> DeviceLost:
        """All work fails from now on, rather than waits for ever; what it fails with. From any thread."""
        with self._losing:
            if self.lost is not None:
                return self.lost
            self.lost = error
        self._complaints.say(error, "no more work is taken")
        self._loop.call_soon_threadsafe(self._drop_all)
        return error

    def _drop(self, step: Step, error: DeviceLost) -> None:
        if isinstance(step, Program):
            self._tell_failed(step, error)
        elif isinstance(step, _Signal):
            self.words.open(step.word, step.value)
            self._loop.call_soon_threadsafe(self._tell, step)

    def _drop_all(self) -> None:
        """What was out comes to nothing; on the loop."""
        assert self.lost is not None
        for queue in self._queues:
            while queue.out:
                step = queue.out.popleft()
                if isinstance(step, _Ran | _Read):
                    self._tell_failed(step.program, self.lost)
                if isinstance(step, _Read | _Hold):
                    self._todo.put((queue, None))
                if isinstance(step, _Signal):
                    self.words.open(step.word, step.value)
                    self._tell(step)

    # -- sight, on the loop ----------------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        """Something may be seen from now on. From any thread."""
        if not self._is_looking:
            if threading.get_ident() == self._loop_thread:
                self._is_looking = True
                self._loop.call_soon(self._look)
            elif self._is_open:
                self._loop.call_soon_threadsafe(self._look_soon)

    def _look(self) -> None:
        if not self._is_open or self.lost is not None:
            return
        if self._advance():
            self._loop.call_soon(self._look)
            return
        self._is_looking = False
        if self._advance():  # launched, or opened, since
            self._look_soon()

    def _advance(self) -> bool:
        """Tells of all flags that are there; whether more may come without the host's doing."""
        is_out = False
        for queue in self._queues:
            if queue.out:
                while (through := self._next_flag(queue)) > 0:
                    is_out = True
                    self._see(queue, through)
                is_out |= through == 0
        if is_out and (now := time.monotonic()) - self._checked_at > CHECKED_EACH_S:
            self._checked_at = now
            try:
                self.driver.check()
            except DeviceLost as error:
                self.lose(error)
        return is_out

    def _next_flag(self, queue: StreamQueue) -> int:
        """How many steps the next flag that is there says to be through; 0: it is not there yet, -1: it cannot come."""
        out = queue.out
        for index in range(len(out)):
            step = out[index]
            if isinstance(step, _Wait):
                if not self.words.is_there(step.word, step.at_least):
                    return -1
            elif isinstance(step, _Hold):
                if not self.words.is_there(step.word, step.value):
                    return -1
                out.pop()  # it is the last: what is behind it is held
                self._todo.put((queue, None))
                return 0
            elif not isinstance(step, _Ran):
                return index + 1 if self.words.is_there(step.word, step.value) else 0
        return -1

    def _see(self, queue: StreamQueue, num_steps: int) -> None:
        for _ in range(num_steps):
            step = queue.out.popleft()
            if isinstance(step, _Ran):
                self._through(step.program, self.driver.elapsed_s(step.start, step.end))
                self._events.extend((step.start, step.end))
            elif isinstance(step, _Signal):
                self._tell(step)
            elif isinstance(step, _Read):
                self._todo.put((queue, step))

    def _tell(self, signal: _Signal) -> None:
        try:
            if (changed := self.words.followers.get(signal.word)) is not None:
                changed(signal.value)
        except Exception as error:
            self._complaints.say(error, "whoever was told of a word's value failed")

    def _through(self, program: Program, spent_s: float) -> None:
        self.busy_s += spent_s
        program.spent_s = spent_s
        program.meter.add(spent_s)
        if (tracer := self.tracer) is not None:  # which another thread may take away
            now = time.monotonic()
            tracer.span(program.name, program.lane, now - spent_s, now)
