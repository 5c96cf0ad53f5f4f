"""Memory with an owner: a device allocates regions, a transport registers what it is given.

A region may be memory that no host instruction reaches. So nothing above a transport slices bytes: work on the device
gets a tensor, and what the host must read (headers, counts) never lies in a region of a device's.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from msi.errors import ConfigError


class Region(Protocol):
    """A run of bytes whose address never changes."""

    @property
    def num_bytes(self) -> int: ...

    @property
    def is_host(self) -> bool:
        """Whether `host` gives it."""

    @property
    def flush(self) -> Callable[[], None] | None:
        """What cards have written into it is seen by all work on the device that starts after this was called.

        None where it is seen anyway: in host memory, and where a GPU orders what cards write. A transport whose cards
        write into regions asks once, and calls it when a completion was seen and before anybody is told of it. From
        any thread; must not raise.
        """

    @property
    def remapping(self) -> Callable[[int], AbstractContextManager[None]] | None:
        """Within what this gives of a part, by its number, a transport puts other memory at that part's addresses; None
        where nobody minds. No work that is launched reads or writes that part any more.
        """

    def host(self) -> memoryview:
        """Its bytes, writable. Raises ConfigError for a device's memory: nothing is copied by accident."""

    def tensor(self) -> Any:
        """uint8 [num_bytes], sharing its memory; of a device's memory, for work on that device alone.

        Raises ConfigError where its allocator knows no tensors.
        """

    def zero(self, start: int, num_bytes: int) -> None:
        """Clears so much of it. No work that is launched reads or writes that part any more."""

    def export(self) -> int:
        """A descriptor of it for another process or a card, closed by the caller. Raises ConfigError: there is none."""


class Allocator(Protocol):
    """A device, or plain host memory where nothing computes."""

    def region(self, num_bytes: int) -> Region:
        """Memory of the device's, zeroed; costs nothing until it is written, where there is such memory.

        Raises ConfigError where there is not enough.
        """

    def adopt(self, memory: memoryview, num_parts: int = 1) -> Region:
        """Host memory that a transport maps, as work on the device sees it; of equal parts, each of which may be mapped
        anew (`Region.remapping`).
        """


class SeatMemory(Protocol):
    """Seats side by side in a device's own memory, each of which another process on this host may be given to write."""

    @property
    def rows(self) -> Region:
        """All of them; a seat's part takes `num_bytes // num_seats`, which may be more than was asked for."""

    def open(self, index: int) -> int:
        """Fresh zeroed memory lies at the seat's addresses; a descriptor of it for its peer, closed by the caller."""

    def clear(self, index: int) -> None:
        """What the peer still maps lies there no more. No work that is launched reads that seat."""


@runtime_checkable
class SharesMemory(Protocol):
    """What an allocator is, too, whose device's memory processes of one host write into directly, by POSIX descriptors.

    Not by handles that cannot be taken back: what a peer holds is the memory of its life, and a seat gets other memory.
    """

    def seats(self, num_seats: int, seat_bytes: int) -> SeatMemory:
        """Raises ConfigError where there is not enough."""

    def of_peer(self, fd: int, num_bytes: int, peer: str) -> Region:
        """A peer's seat, as our work writes it, mapped until nobody holds it. Raises TransportError: it is no such."""


class HostRegion:
    """A region in host memory.

    Args:
        as_tensor: what `tensor` calls with the memory.
        remapping: as a region says it.
    """

    is_host = True
    flush = None

    def __init__(
        self,
        memory: memoryview,
        as_tensor: Callable[[memoryview], Any] | None = None,
        remapping: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.remapping = remapping
        self.num_bytes = memory.nbytes
        self._memory = memory
        self._as_tensor = as_tensor

    def host(self) -> memoryview:
        return self._memory

    def tensor(self) -> Any:
        if self._as_tensor is None:
            raise ConfigError(f"these {self.num_bytes} bytes belong to no device; ask a device for a region of its own")
        return self._as_tensor(self._memory)

    def zero(self, start: int, num_bytes: int) -> None:
        self._memory[start : start + num_bytes] = bytes(num_bytes)

    def export(self) -> int:
        raise ConfigError(f"these {self.num_bytes} bytes of host memory have no descriptor; a memfd's region has one")


class HostMemory:
    """An allocator of plain host memory, for those who compute nothing."""

    def region(self, num_bytes: int) -> HostRegion:
        return HostRegion(map_zeroed(num_bytes))

    def adopt(self, memory: memoryview, num_parts: int = 1) -> HostRegion:
        return HostRegion(memory)


HOST_MEMORY = HostMemory()


def map_zeroed(num_bytes: int) -> memoryview:
    """Host memory that starts on a page and takes none until it is written. Raises ConfigError: there is not enough."""
    try:
        return memoryview(mmap.mmap(-1, num_bytes))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot map {num_bytes} bytes: {error}; use fewer or smaller slots") from error
