"""What a device is to the code above it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from msi.device.compute_thread import Program
from msi.device.queues import QueueDevice
from msi.kernels.kernels import Kernels
from msi.net.regions import Region


class Graphs(Protocol):
    """Work that is recorded once, and launched again by one call. All calls are made from within programs."""

    def graph_memory(self) -> Any:
        """For graphs that run one after another, in the order in which they are captured."""

    def capture(self, memory: Any, work: Callable[[], object]) -> Any:
        """A graph of what `work` launches, which does not run: from and to the memory that it names now. What it takes
        anew is kept in `memory` for as long as anyone refers to it.

        Raises:
            RuntimeError: it cannot be recorded.
        """

    def replay(self, graph: Any) -> None:
        """It runs when the program's queue comes to it."""


class Device(QueueDevice[Program], Protocol):
    """Queues, and memory. Used from one event loop; programs run elsewhere and must not touch the loop."""

    @property
    def kernels(self) -> Kernels:
        """What it computes with."""

    @property
    def graphs(self) -> Graphs | None:
        """None where work is launched piece by piece."""

    def compute_dtype(self, wanted: torch.dtype) -> torch.dtype:
        """The dtype to hold and compute weights in, for a checkpoint of dtype `wanted`."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that costs nothing until it is written, where the device has such."""

    def region(self, num_bytes: int) -> Region:
        """As `msi.net.regions.Allocator` says: a device is one."""

    def adopt(self, memory: memoryview, num_parts: int = 1) -> Region:
        """As `msi.net.regions.Allocator` says."""

    def host_region(self, num_bytes: int) -> Region:
        """Host memory that the device sees in place, zeroed: what programs write there the host reads behind a signal,
        and the other way round behind a gate.
        """

    def upload(self, tensor: Tensor) -> Tensor:
        """The tensor in the device's memory."""

    def free_memory_bytes(self) -> int:
        """Of the memory that KV cache goes into."""

    async def close(self) -> None:
        """Ends after the work in progress; what is still queued is dropped. Idempotent."""
