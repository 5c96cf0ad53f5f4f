"""A device whose queues are streams: `Streams` for work, and host memory that the device reads and writes in place.

Rows that transports move lie in host memory, pinned and mapped: kernels take them from there and put them there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from msi.device.cuda_driver import DeviceLost, Driver
from msi.device.device import Graphs
from msi.device.queues import Changed
from msi.device.stream_words import StreamWords
from msi.device.streams import StreamQueue, Streams
from msi.errors import ConfigError
from msi.kernels.kernels import Kernels
from msi.net.regions import HostRegion, map_zeroed
from msi.tracing import Spans


class StreamDevice:
    """Implements `msi.device.device.Device`, on an event loop.

    Args:
        driver: of the device; closed with it.
        kernels: that launch what they compute, and read no values.
        gates: as `Streams` says.
        uses_graphs: programs may capture graphs; not with gates, as nobody knows what a driver waits for meanwhile.
    """

    def __init__(self, driver: Driver, kernels: Kernels, gates: bool = False, uses_graphs: bool = False) -> None:
        driver.enter()
        self.kernels = kernels
        self.driver = driver
        self.has_gates = gates
        self.graphs: Graphs | None = driver if uses_graphs and not gates else None
        self._streams = Streams(driver, gates)
        self._mapped: list[memoryview] = []
        self._at_end: list[Callable[[], None]] = []

    @property
    def words(self) -> StreamWords:
        return self._streams.words

    @property
    def busy_s(self) -> float:
        return self._streams.busy_s

    @property
    def lost(self) -> DeviceLost | None:
        """Why it takes no more work; None while it does."""
        return self._streams.lost

    @property
    def tracer(self) -> Spans | None:
        return self._streams.tracer

    @tracer.setter
    def tracer(self, tracer: Spans | None) -> None:
        self._streams.tracer = tracer

    @property
    def poller(self) -> None:
        """The event loop takes completions, as it looks at the words."""
        return None

    def queue(self, name: str) -> StreamQueue:
        self._settle()
        return self._streams.queue(name)

    def follow(self, word: int, changed: Changed) -> None:
        self._streams.follow(word, changed)

    watch = follow  # all are told on the event loop

    async def close(self) -> None:
        """Ends after what is being launched; what is still queued is dropped. Idempotent."""
        if await self._streams.close():
            for memory in self._mapped:
                self.driver.unmap_host(memory)
            for call in self._at_end:
                call()
        self._mapped, self._at_end = [], []
        self.driver.close()

    def at_end(self, call: Callable[[], None]) -> None:
        """Calls it when the device closes, once nothing is left on it; not where something may be."""
        self._at_end.append(call)

    def wait_quiet(self) -> bool:
        return self._streams.wait_quiet()

    def lose(self, reason: str) -> None:
        self._streams.lose(DeviceLost(reason))

    # -- memory ------------------------------------------------------------------------------------------------------

    def compute_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted

    def free_memory_bytes(self) -> int:
        return self.driver.free_memory_bytes()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        zeros = torch.zeros(shape, dtype=dtype, device=self.driver.device)
        self._settle()
        return zeros

    def region(self, num_bytes: int) -> HostRegion:
        return self.adopt(map_zeroed(num_bytes))

    def host_region(self, num_bytes: int) -> HostRegion:
        return self.adopt(map_zeroed(num_bytes))

    def adopt(self, memory: memoryview, num_parts: int = 1) -> HostRegion:
        size = memory.nbytes // num_parts
        parts = [memory[start : start + size] for start in range(0, num_parts * size, size)]
        for part in parts:
            try:
                self.driver.map_host(part)
            except DeviceLost as error:
                raise ConfigError(
                    f"{error}; so {memory.nbytes} bytes of host memory cannot be pinned for it"
                ) from error
            self._mapped.append(part)

        @contextlib.contextmanager
        def remapping(index: int) -> Iterator[None]:
            self._streams.wait_quiet()
            self.driver.unmap_host(parts[index])
            yield
            self.driver.map_host(parts[index])

        return HostRegion(memory, self.driver.tensor, remapping)

    def upload(self, tensor: Tensor) -> Tensor:
        if self._streams.is_launching:
            return self.driver.upload(tensor)
        on_device = tensor.to(self.driver.device)
        self._settle()
        return on_device

    def _settle(self) -> None:
        """What was put into the device's memory outside queues is there for what they run."""
        self.driver.settle()
