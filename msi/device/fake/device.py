"""The fake device: queues whose heads go on in any order, signals that the host sees late, memory of its own."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from msi.complaints import Complaints
from msi.device.compute_thread import Program, as_failure
from msi.device.fake.card_view import FakeRegion
from msi.device.fake.kernels import FakeKernels
from msi.device.fake.memory import DeviceMemory
from msi.device.fake.seats import FakeSeats, of_peer
from msi.device.fake.world import Actor, FakeWorld
from msi.device.queues import Changed
from msi.device.regions import HostTensors
from msi.net.regions import Region
from msi.tracing import Spans

log = logging.getLogger(__name__)

LASTS = (0, 0, 4, 16)  # turns of its queue that a program takes before it is through
_RANGE, _HALF = 1 << 32, 1 << 31


class FakeWords:
    """Implements `msi.device.queues.Words`.

    Args:
        risen: called after each rise, on the thread that made it.
    """

    def __init__(self, risen: Callable[[], None]) -> None:
        self.followers: dict[int, Changed] = {}
        self._risen = risen
        self._lock = threading.Lock()
        self._values: list[int] = []

    def take(self) -> int:
        with self._lock:
            self._values.append(0)
            return len(self._values) - 1

    def give_back(self, word: int) -> None:
        self.followers.pop(word, None)

    def is_there(self, word: int, at_least: int) -> bool:
        return (self._values[word] - at_least) % _RANGE < _HALF

    def open(self, word: int, value: int) -> None:
        with self._lock:
            if not self.is_there(word, value):
                self._values[word] = value % _RANGE
        self._risen()


class FakeQueue:
    """Implements `msi.device.queues.Queue`; one step is a wait, a program or a signal."""

    def __init__(self, device: FakeDevice, name: str) -> None:
        self.name = name
        self._device = device
        self._steps: deque[Program | tuple[int, int, bool]] = deque()  # word, value, whether it is a wait
        self._lasts = -1  # turns that the program at the head still takes; -1 before it has begun

    def wait(self, word: int, at_least: int) -> None:
        self._add((word, at_least, True))

    def run(self, program: Program) -> None:
        self._add(program)

    def signal(self, word: int, value: int) -> None:
        self._add((word, value, False))

    def _add(self, step: Program | tuple[int, int, bool]) -> None:
        self._steps.append(step)
        self._device.world.poke()

    def is_ready(self) -> bool:
        if not self._steps:
            return False
        head = self._steps[0]
        return isinstance(head, Program) or not head[2] or self._device.words.is_there(head[0], head[1])

    def step(self) -> None:
        head = self._steps[0]
        if isinstance(head, Program) and self._is_running():
            return
        self._steps.popleft()
        if isinstance(head, Program):
            self._device.compute(head)
        elif not head[2]:
            self._device.signalled(head[0], head[1])

    def _is_running(self) -> bool:
        """Whether the program at the head goes on: what it does is done at its end."""
        if self._lasts < 0:
            self._lasts = self._device.world.chance.choice(LASTS)
        self._lasts -= 1
        return self._lasts >= 0


class _Sight:
    """The host's look at the words that were signalled: some time after, and in order."""

    def __init__(self, words: FakeWords) -> None:
        self.signals: deque[tuple[int, int]] = deque()
        self._words = words
        self._complaints = Complaints(log)

    def is_ready(self) -> bool:
        return bool(self.signals)

    def step(self) -> None:
        word, value = self.signals.popleft()
        try:
            if (changed := self._words.followers.get(word)) is not None:
                changed(value)
        except Exception as error:
            self._complaints.say(error, "whoever was told of a word's value failed")


class FakeDevice:
    """One device of a world. Implements `msi.device.queues.QueueDevice`.

    Attributes:
        busy_s: time that its programs took.
        num_flushes: that were asked for.
    """

    def __init__(self, world: FakeWorld) -> None:
        self.world = world
        self.memory = DeviceMemory(world.chance)
        self.words = FakeWords(world.poke)
        self.kernels = FakeKernels(self.upload, self.zeros)
        self.graphs = None  # everything is launched piece by piece
        self.busy_s = 0.0
        self.num_flushes = 0
        self.tracer: Spans | None = None
        self._sight = _Sight(self.words)
        self._queues: list[FakeQueue] = []
        self._complaints = Complaints(log)
        world.join(self._sight)

    # -- queues ------------------------------------------------------------------------------------------------------

    def queue(self, name: str) -> FakeQueue:
        queue = FakeQueue(self, name)
        self._queues.append(queue)
        self.world.join(queue)
        return queue

    def follow(self, word: int, changed: Changed) -> None:
        self.words.followers[word] = changed

    def watch(self, word: int, changed: Changed) -> None:
        self.words.followers[word] = changed

    async def close(self) -> None:
        """What is queued is dropped. Idempotent."""
        actors: list[Actor] = [*self._queues, self._sight]
        for actor in actors:
            self.world.leave(actor)

    def compute(self, program: Program) -> None:
        """What a step of a queue does with a program."""
        self.memory.perhaps_show()
        started = time.monotonic()
        try:
            with self.memory.opened(), torch.inference_mode():
                program.run()
        except BaseException as error:
            self._tell(program, error)
            return
        ended = time.monotonic()
        program.spent_s = ended - started
        self.busy_s += ended - started
        program.meter.add(ended - started)
        if self.tracer is not None:
            self.tracer.span(program.name, program.lane, started, ended)

    def _tell(self, program: Program, error: BaseException) -> None:
        try:
            program.failed(as_failure(error))
        except Exception as second:
            self._complaints.say(second, "failed work could not be reported")

    def signalled(self, word: int, value: int) -> None:
        """Other queues see it at once, the host when it looks."""
        self.words.open(word, value)
        self._sight.signals.append((word, value))

    # -- memory ------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """What cards have written to this device's memory is seen by all that starts after this."""
        self.num_flushes += 1
        self.memory.flush()

    def compute_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return torch.float32

    def free_memory_bytes(self) -> int:
        return self.memory.free_bytes

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.memory.allocate(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def region(self, num_bytes: int) -> Region:
        return FakeRegion(self.memory, num_bytes, self.flush)

    def seats(self, num_seats: int, seat_bytes: int) -> FakeSeats:
        return FakeSeats(self.memory, num_seats, seat_bytes)

    def of_peer(self, fd: int, num_bytes: int, peer: str) -> Region:
        return of_peer(self.memory, fd, num_bytes, peer)

    def host_region(self, num_bytes: int) -> Region:
        return HostTensors().region(num_bytes)

    def adopt(self, memory: memoryview, num_parts: int = 1) -> Region:
        return HostTensors().adopt(memory)

    def upload(self, tensor: Tensor) -> Tensor:
        """A copy, at once."""
        if not tensor.numel():
            return tensor.clone()
        with self.memory.opened():
            return self.zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)
