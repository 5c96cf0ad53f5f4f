"""Regions as tensors: host memory that work on a device reads and writes, and memory of the device's alone."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from msi.errors import ConfigError
from msi.net.regions import HostRegion, Region, map_zeroed
from msi.net.slots import SlotLayout


class HostTensors:
    """An allocator of host memory that torch computes in; implements `msi.net.regions.Allocator`."""

    def region(self, num_bytes: int) -> HostRegion:
        return self.adopt(map_zeroed(num_bytes))

    def adopt(self, memory: memoryview, num_parts: int = 1) -> HostRegion:
        return HostRegion(memory, lambda memory: torch.frombuffer(memory, dtype=torch.uint8))


class DeviceRegion:
    """Memory of a device: the host knows that it is there and no more. Implements `msi.net.regions.Region`.

    Args:
        memory: uint8 [num_bytes].
        device: whose it is, for sentences.
        descriptor: what `export` hands out copies of; None where nobody else can have it.
        flush: as a region says it.
    """

    is_host = False
    remapping = None

    def __init__(
        self,
        memory: Tensor,
        device: str,
        descriptor: int | None = None,
        flush: Callable[[], None] | None = None,
    ) -> None:
        self.flush = flush
        self.num_bytes = memory.numel()
        self._memory = memory
        self._device = device
        self._descriptor = descriptor

    def host(self) -> memoryview:
        raise ConfigError(
            f"these {self.num_bytes} bytes are memory of {self._device}, which the host neither reads nor "
            f"writes; use a transport that registers a device's memory, or rows in host memory"
        )

    def tensor(self) -> Tensor:
        return self._memory

    def zero(self, start: int, num_bytes: int) -> None:
        self._memory[start : start + num_bytes].zero_()

    def export(self) -> int:
        if self._descriptor is None:
            raise ConfigError(f"these {self.num_bytes} bytes of {self._device} were allocated to be nobody else's")
        return os.dup(self._descriptor)


def slot_rows(region: Region, num_seats: int, layout: SlotLayout) -> Tensor:
    """The rows of a region's slots: uint8 [num_seats, num_lanes, slot_rows, row_bytes], sharing its memory."""
    memory: Tensor = region.tensor()
    seats = memory.view(num_seats, -1)[:, : layout.rows_bytes]
    return seats.view(num_seats, layout.num_lanes, layout.slot_rows, layout.row_bytes)
