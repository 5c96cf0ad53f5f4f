"""Rows in a GPU's own memory: what processes of one host write into each other's, and what cards write and read.

A seat's memory is made anew for each peer, who gets a descriptor of that; taking it back puts other memory at the
seat's addresses, whatever the peer still holds. Seats that nobody has share one piece of zeroes.

Not yet run on hardware.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from msi.device.cuda_memory import CudaMemory, Mapping, Piece, Refused
from msi.errors import ConfigError, TransportError
from msi.net.regions import Region


class Launching(Protocol):
    """The device whose memory it is, as far as it matters here."""

    def adopt(self, memory: memoryview, num_parts: int = 1) -> Region: ...

    def wait_quiet(self) -> bool:
        """Until nothing that was launched can go on without a gate, but not for long; whether it came to that."""

    def lose(self, reason: str) -> None:
        """What it computes is right no more: all work fails from now on. From any thread."""


class CudaRegion:
    """Implements `msi.net.regions.Region`."""

    is_host = False

    def __init__(
        self,
        memory: CudaMemory,
        mapping: Mapping,
        tensor: Tensor,
        flush: Callable[[], None] | None = None,
        remapping: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.num_bytes = tensor.numel()
        self.flush = flush
        self.remapping = remapping
        self._memory = memory
        self._mapping = mapping
        self._tensor = tensor

    def host(self) -> memoryview:
        raise ConfigError(
            f"these {self.num_bytes} bytes are memory of {self._memory.name}, which the host neither reads nor "
            "writes; use a transport that registers a device's memory, or `cuda_rows=host`"
        )

    def tensor(self) -> Tensor:
        return self._tensor

    def zero(self, start: int, num_bytes: int) -> None:
        self._memory.zero(self._mapping.address + start, num_bytes)

    def export(self) -> int:
        """A dma-buf."""
        if self.remapping is not None:
            raise ConfigError(f"these {self.num_bytes} bytes of {self._memory.name} are for processes of this host")
        try:
            return self._memory.dma_buf(self._mapping.address, self._mapping.num_bytes)
        except Refused as error:
            raise ConfigError(f"{error}; with `cuda_rows=host` cards reach rows by their address") from error


class CudaRows:
    """Implements `msi.net.regions.Allocator` and `SharesMemory`, for one device.

    Args:
        tensor: uint8 [num_bytes] of the device's memory at an address; refers to what it is given last.

    Raises:
        ConfigError: nothing would say when what cards write is there.
    """

    def __init__(self, memory: CudaMemory, device: Launching, tensor: Callable[[int, int, object], Tensor]) -> None:
        self.memory = memory
        self._device = device
        self._tensor = tensor
        self._flush_memory = memory.flushing()
        self._gone: list[tuple[Piece, list[Piece]]] = []  # that nobody refers to; what was launched may still read it
        self._is_open = True

    # -- msi.net.regions.Allocator -----------------------------------------------------------------------------------

    def region(self, num_bytes: int) -> CudaRegion:
        memory, size = self.memory, self.memory.whole(num_bytes)
        with _enough(num_bytes):
            mapping = self._mapped(memory.create(size), size)
            memory.zero(mapping.address, size)
        flush = None if self._flush_memory is None else self._flush
        return CudaRegion(memory, mapping, self._tensor(mapping.address, num_bytes, mapping), flush)

    def adopt(self, memory: memoryview, num_parts: int = 1) -> Region:
        return self._device.adopt(memory, num_parts)

    # -- msi.net.regions.SharesMemory --------------------------------------------------------------------------------

    def seats(self, num_seats: int, seat_bytes: int) -> CudaSeats:
        with _enough(num_seats * seat_bytes):
            return CudaSeats(self, num_seats, self.memory.whole(seat_bytes))

    def of_peer(self, fd: int, num_bytes: int, peer: str) -> CudaRegion:
        memory = self.memory
        try:
            mapping = self._mapped(memory.of_descriptor(fd), memory.whole(num_bytes))
        except Refused as error:
            raise TransportError(
                peer, f"offered {num_bytes} bytes that are no memory which {memory.name} reaches: {error}"
            ) from error
        return CudaRegion(memory, mapping, self._tensor(mapping.address, num_bytes, mapping))

    def close(self) -> None:
        """Nothing that was launched goes on. What is still referred to goes with who refers to it."""
        self._is_open = False
        self._free_gone()

    # -- for seats ---------------------------------------------------------------------------------------------------

    def reserved(self, size: int) -> Mapping:
        """Addresses, and nothing there. Raises Refused."""
        self._free_if_quiet()
        return Mapping(self.memory.reserve(size), size, self._let_go)

    def all_of(self, mapping: Mapping) -> CudaRegion:
        """As one region of parts that are mapped anew."""
        tensor = self._tensor(mapping.address, mapping.num_bytes, mapping)
        return CudaRegion(self.memory, mapping, tensor, remapping=self._remapping)

    @contextlib.contextmanager
    def _remapping(self, index: int) -> Iterator[None]:
        self._free_if_quiet()
        yield

    # -- memory that comes and goes ----------------------------------------------------------------------------------

    def _mapped(self, handle: Any, size: int) -> Mapping:
        """The memory of a handle, which is used up, at addresses of its own. Raises Refused."""
        try:
            mapping = self.reserved(size)
            mapping.put(self.memory, handle, mapping.address, size)
            return mapping
        finally:
            self.memory.release(handle)

    def _let_go(self, addresses: Piece, pieces: list[Piece]) -> None:
        """Nobody refers to it any more; on whatever thread."""
        self._gone.append((addresses, pieces))
        if not self._is_open:
            with contextlib.suppress(Refused):  # the device itself may be gone
                self._free_gone()

    def _free_if_quiet(self) -> None:
        if self._device.wait_quiet():
            self._free_gone()

    def _free_gone(self) -> None:
        while self._gone:
            addresses, pieces = self._gone.pop()
            for piece in pieces:
                self.memory.take(*piece)
            self.memory.free(*addresses)

    def _flush(self) -> None:
        """As a region says it: where it fails, so does all that comes after."""
        assert self._flush_memory is not None
        try:
            self._flush_memory()
        except Refused as error:
            self._device.lose(str(error))


class CudaSeats:
    """Implements `msi.net.regions.SeatMemory`. Raises Refused."""

    def __init__(self, rows: CudaRows, num_seats: int, stride: int) -> None:
        self._memory = memory = rows.memory
        self._stride = stride
        mapping = rows.reserved(num_seats * stride)
        self._start = mapping.address
        self._nothing = memory.create(stride)
        weakref.finalize(self, _release, memory, self._nothing).atexit = False
        for index in range(num_seats):
            mapping.put(memory, self._nothing, self._start + index * stride, stride)
        memory.zero(self._start, stride)
        self.rows = rows.all_of(mapping)

    def open(self, index: int) -> int:
        memory = self._memory
        with _enough(self._stride), contextlib.ExitStack() as undo:
            fresh = memory.create(self._stride)
            undo.callback(memory.release, fresh)  # it stays as long as it is mapped, here or at the peer
            with contextlib.ExitStack() as failed:
                fd = memory.descriptor(fresh)
                failed.callback(os.close, fd)
                self._replace(index, fresh)
                memory.zero(self._start + index * self._stride, self._stride)
                failed.pop_all()
            return fd

    def clear(self, index: int) -> None:
        self._replace(index, self._nothing)

    def _replace(self, index: int, handle: Any) -> None:
        at = self._start + index * self._stride
        self._memory.take(at, self._stride)
        try:
            self._memory.put(handle, at, self._stride)
        except Refused:
            self._memory.put(self._nothing, at, self._stride)
            raise


def _release(memory: CudaMemory, handle: Any) -> None:
    with contextlib.suppress(Refused):  # the device itself may be gone
        memory.release(handle)


@contextlib.contextmanager
def _enough(num_bytes: int) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        raise ConfigError(
            f"{error}, for {num_bytes} bytes of rows; use fewer or smaller slots, a smaller `gpu_memory_utilization`, "
            "or `cuda_rows=host`"
        ) from error
