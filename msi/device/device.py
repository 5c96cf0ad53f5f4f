"""What a device is to the code above it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from msi.device.compute_thread import Program
from msi.device.queues import QueueDevice
from msi.kernels.kernels import Kernels
from msi.meter import StageMeter

T = TypeVar("T")


class Device(QueueDevice[Program], Protocol):
    """Queues, and memory. Used from one event loop; programs run elsewhere and must not touch the loop."""

    @property
    def kernels(self) -> Kernels:
        """What it computes with."""

    def submit(self, work: Callable[[], T], meter: StageMeter, name: str, lane: int) -> asyncio.Future[T]:
        """Enqueues work; the future has its result. `name` and `lane` label it in traces."""

    def enqueue(
        self, work: Callable[[], None], failed: Callable[[Exception], None], meter: StageMeter, name: str, lane: int
    ) -> None:
        """Enqueues work that passes its results on itself; should it raise, `failed` is called where it ran."""

    def compute_dtype(self, wanted: torch.dtype) -> torch.dtype:
        """The dtype to hold and compute weights in, for a checkpoint of dtype `wanted`."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that costs nothing until it is written, where the device has such."""

    def upload(self, tensor: Tensor) -> Tensor:
        """The tensor in the device's memory."""

    def free_memory_bytes(self) -> int:
        """Of the memory that KV cache goes into."""

    async def close(self) -> None:
        """Ends after the work in progress; what is still queued is dropped. Idempotent."""
