"""Regions of a fake device's memory, and how cards that are given a descriptor see them: as late as real ones may.

What a card has written there the device sees once it is flushed, or by luck before; what the device has written is the
card's when the operation that wrote it is through. So the descriptor is not of the device's memory, but of the card's
view of it; both are compared with what they had in common last.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from msi.device.fake.memory import DeviceMemory
from msi.device.regions import DeviceRegion

NAME = "the fake device"


class FakeRegion(DeviceRegion):
    """Implements `msi.net.regions.Region`; can be exported."""

    def __init__(self, memory: DeviceMemory, num_bytes: int, flush: Callable[[], None]) -> None:
        super().__init__(memory.allocate(num_bytes), NAME, flush=flush)
        self._of = memory
        self._view: CardView | None = None

    def zero(self, start: int, num_bytes: int) -> None:
        self._of.flush()  # or what a card has written before would come after
        with self._of.opened():
            super().zero(start, num_bytes)

    def export(self) -> int:
        if self._view is None:
            self._view = CardView(self.tensor())
            self._of.add(self._view)
        return os.dup(self._view.fd)


class CardView:
    """Of a run of a device's memory; implements `msi.device.fake.memory.View`."""

    def __init__(self, rows: Tensor) -> None:
        self.fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, rows.numel())
        self._device = rows
        self._card = torch.frombuffer(mmap.mmap(self.fd, rows.numel()), dtype=torch.uint8)
        self._common = torch.zeros(rows.numel(), dtype=torch.uint8)
        self._lock = threading.Lock()

    def show(self) -> None:
        self._copy(self._card, self._device)

    def tell(self) -> None:
        self._copy(self._device, self._card)

    def _copy(self, source: Tensor, target: Tensor) -> None:
        with self._lock:
            now = source.clone()
            changed = now != self._common
            target[changed] = self._common[changed] = now[changed]
