"""Memory of a device that this process cannot touch, except while an operation of the device or of a card runs.

It is this process's own memory, but neither readable nor writable otherwise: host code that touches it dies at that
very line, which `faulthandler` prints. What a card has written lies ready and unseen until it is flushed, or by luck
before.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from msi.net.shared_memory import PAGE, clear_at, map_at, pages

ALIGNMENT = 256
CAPACITY = 1 << 30  # of address space; only what is written takes memory
LUCK = 0.3  # how often something that was not flushed is seen all the same
_NONE, _READ_WRITE = 0, 3
_mprotect = ctypes.PyDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class View(Protocol):
    """Of a part of a device's memory, through which cards see it. Called while that memory is open."""

    def show(self) -> None:
        """What cards have written is in the device's memory."""

    def tell(self) -> None:
        """What the device has written is in the cards'."""


class DeviceMemory:
    """One device's; starts as zeros. What was allocated is not given back before the device is gone.

    Args:
        chance: decides what of unflushed writes is seen.
    """

    def __init__(self, chance: Random, capacity: int = CAPACITY) -> None:
        self._chance = chance
        self._memory = mmap.mmap(-1, capacity)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._num_used = 0
        self._lock = threading.Lock()
        self._num_inside = 0
        self._unseen: deque[tuple[Tensor, Tensor]] = deque()  # what cards wrote: where, and what
        self._views: list[View] = []
        self._protect(_NONE)

    @property
    def free_bytes(self) -> int:
        return len(self._memory) - self._num_used

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], zeroed. Raises MemoryError."""
        return self.at(self._take(num_bytes, ALIGNMENT), num_bytes)

    def reserve(self, num_bytes: int) -> int:
        """Whole pages, into which other memory can be put; where they begin. Raises MemoryError."""
        return self._take(pages(num_bytes), PAGE)

    def at(self, start: int, num_bytes: int) -> Tensor:
        """uint8 [num_bytes]."""
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=num_bytes, offset=start)

    def map(self, at: int, size: int, flags: int, fd: int, offset: int) -> None:
        """Puts memory that processes share into reserved pages; as `msi.net.shared_memory.Place`."""
        with self._lock:
            map_at(self._address + at, size, flags, fd, offset)
            self._protect(_READ_WRITE if self._num_inside else _NONE)

    def clear(self, at: int, size: int) -> None:
        """Zeroes of our own again."""
        with self._lock:
            clear_at(self._address + at, size)
            self._protect(_READ_WRITE if self._num_inside else _NONE)

    def _take(self, num_bytes: int, alignment: int) -> int:
        with self._lock:
            at = -(-self._num_used // alignment) * alignment
            if at + num_bytes > len(self._memory):
                raise MemoryError(f"{num_bytes} bytes of {self.free_bytes} that are left on the fake device")
            self._num_used = at + num_bytes
        return at

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """While an operation of the device runs, or of a card."""
        with self._lock:
            if not self._num_inside:
                self._protect(_READ_WRITE)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                for view in self._views:
                    view.tell()
                self._num_inside -= 1
                if not self._num_inside:
                    self._protect(_NONE)

    def add(self, view: View) -> None:
        with self.opened():
            self._views.append(view)

    def write_unseen(self, target: Tensor, values: Tensor) -> None:
        """A card's write: `target`, in this memory, has `values` once that is flushed."""
        self._unseen.append((target, values))

    def flush(self) -> None:
        """What cards have written is seen by whatever starts after this."""
        self._show(len(self._unseen))
        self._show_views()

    def perhaps_show(self) -> None:
        """Hardware may show writes early: that is luck, and no order."""
        if self._views and self._chance.random() < LUCK:
            self._show_views()
        if self._unseen and self._chance.random() < LUCK:
            self._show(self._chance.randint(1, len(self._unseen)))

    def _show(self, num_writes: int) -> None:
        if num_writes:
            with self.opened():
                for _ in range(num_writes):
                    target, values = self._unseen.popleft()
                    target.copy_(values)

    def _show_views(self) -> None:
        if self._views:
            with self.opened():
                for view in self._views:
                    view.show()

    def _protect(self, access: int) -> None:
        if _mprotect(self._address, len(self._memory), access):
            raise OSError(ctypes.get_errno(), f"mprotect: {os.strerror(ctypes.get_errno())}")
