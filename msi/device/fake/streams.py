"""A driver without a device: streams that a thread of this process goes through, in any order that waits allow.

Work that is launched runs late (`msi.device.fake.late`): operators of torch, and calls that `call` puts into a stream.
So whatever a program does when it is launched, rather than on its stream, sees what was there before its gate opened.
Device addresses are not those of the host, and only memory that was mapped is known.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from msi.device.cuda_driver import DeviceLost, host_address
from msi.device.fake.late import Late

APART = 1 << 44  # of an address here from that on the device
LOOK_AGAIN_S = 2e-5
_RANGE, _HALF = 1 << 32, 1 << 31

Step = Callable[[], object]
FakeGraph = list[Step]


class FakeEvent:
    def __init__(self) -> None:
        self.at = -1.0  # when the stream came to it


class FakeStream:
    """Steps in order; a wait is a step that says whether it is over."""

    def __init__(self) -> None:
        self.steps: deque[tuple[bool, Step]] = deque()  # whether it is a wait


class FakeStreams:
    """Implements `msi.device.cuda_driver.Driver`.

    Args:
        seed: of which stream goes on next.
    """

    def __init__(self, seed: int = 0) -> None:
        self.device = torch.device("cpu")
        self.num_launched = self.num_captured = self.num_replayed = 0
        self._chance = random.Random(seed)
        self._streams: list[FakeStream] = []
        self._mapped: dict[int, int] = {}
        self._failure: BaseException | None = None
        self._is_open = True
        self._thread: threading.Thread | None = None
        self._mine = threading.local()

    def enter(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="msi-fake-streams", daemon=True)
            self._thread.start()

    def stream(self) -> FakeStream:
        self.enter()
        stream = FakeStream()
        self._streams = [*self._streams, stream]
        return stream

    def launch(self, stream: FakeStream, work: Callable[[], object], reads: bool = False) -> None:
        self.num_launched += 1
        if reads:
            work()
            return
        self._mine.stream = stream
        with Late(lambda step: stream.steps.append((False, step))):
            work()

    def call(self, work: Step) -> None:
        """Within what is launched: `work` is called when the stream comes to it."""
        self._mine.stream.steps.append((False, work))

    def graph_memory(self) -> None: ...

    def capture(self, memory: object, work: Callable[[], object]) -> FakeGraph:
        """By the same operators on the same memory, however often it is replayed."""
        graph: FakeGraph = []
        with _disable_current_modes(), Late(graph.append, is_repeated=True):
            work()
        self.num_captured += 1
        return graph

    def replay(self, graph: FakeGraph) -> None:
        self.num_replayed += 1
        self._mine.stream.steps.extend((False, step) for step in graph)

    def wait(self, stream: FakeStream, address: int, at_least: int) -> None:
        word = self._word(address)
        stream.steps.append((True, lambda: (word.value - at_least) % _RANGE < _HALF))

    def write(self, stream: FakeStream, address: int, value: int) -> None:
        word = self._word(address)

        def write() -> None:
            word.value = value % _RANGE

        stream.steps.append((False, write))

    def event(self) -> FakeEvent:
        return FakeEvent()

    def record(self, stream: FakeStream, event: FakeEvent) -> None:
        event.at = -1.0

        def record() -> None:
            event.at = time.monotonic()

        stream.steps.append((False, record))

    def elapsed_s(self, start: FakeEvent, end: FakeEvent) -> float:
        assert 0 <= start.at <= end.at, "an event that is not over"
        return end.at - start.at

    def map_host(self, memory: memoryview) -> int:
        address = host_address(memory)
        assert address not in self._mapped, "mapped twice"
        self._mapped[address] = memory.nbytes
        return address + APART

    def unmap_host(self, memory: memoryview) -> None:
        del self._mapped[host_address(memory)]

    def tensor(self, memory: memoryview) -> Tensor:
        self._word(host_address(memory) + APART)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def upload(self, tensor: Tensor) -> Tensor:
        return torch.from_numpy(tensor.numpy().copy())

    def _word(self, address: int) -> ctypes.c_uint32:
        address -= APART
        assert any(start <= address < start + size for start, size in self._mapped.items()), "nothing is mapped there"
        return ctypes.c_uint32.from_address(address)

    def check(self) -> None:
        if self._failure is not None:
            raise DeviceLost(f"the fake device failed: {type(self._failure).__name__}: {self._failure}")

    def finish(self, stream: FakeStream) -> None:
        while stream.steps and self._failure is None:
            time.sleep(LOOK_AGAIN_S)

    def settle(self) -> None: ...

    def free_memory_bytes(self) -> int:
        return 1 << 30

    def synchronize(self) -> None:
        while any(stream.steps for stream in self._streams) and self._failure is None:
            time.sleep(LOOK_AGAIN_S)

    def close(self) -> None:
        """What is still in the streams is dropped. Idempotent."""
        self._is_open = False
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        with torch.inference_mode():
            while self._is_open and self._failure is None:
                streams = [stream for stream in self._streams if stream.steps]
                self._chance.shuffle(streams)
                try:
                    went_on = [self._go_on(stream) for stream in streams]
                    if True not in went_on:
                        time.sleep(LOOK_AGAIN_S)
                except BaseException as error:
                    self._failure = error

    def _go_on(self, stream: FakeStream) -> bool:
        """Some steps of a stream; whether there was any."""
        for number in range(self._chance.choice((1, 2, 8, 64))):
            if not stream.steps:
                return number > 0
            is_wait, step = stream.steps[0]
            if is_wait:
                if not step():
                    return number > 0
            else:
                step()
            stream.steps.popleft()  # only now: until then it is not through
        return True
