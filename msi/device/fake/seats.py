"""A device's memory that processes of one host share, as a real one's by POSIX descriptors of what was allocated.

Memory of a seat is made anew for each peer and put at the seat's addresses, which programs have been told; taking it
away puts other memory there, whatever the peer still holds. Neither side's host can touch it.
"""

from __future__ import annotations

import weakref

from msi.device.fake.memory import DeviceMemory
from msi.device.regions import DeviceRegion
from msi.net.shared_memory import SharedRegion, pages

NAME = "the fake device"


class FakeSeats:
    """Implements `msi.net.regions.SeatMemory`."""

    def __init__(self, memory: DeviceMemory, num_seats: int, seat_bytes: int) -> None:
        self._memory = memory
        self._stride = pages(seat_bytes)
        self._start = memory.reserve(num_seats * self._stride)
        self.rows = DeviceRegion(memory.at(self._start, num_seats * self._stride), NAME)

    def open(self, index: int) -> int:
        with SharedRegion.create(self._stride) as fresh:
            fresh.map_into(self._memory, self._start + index * self._stride, 0, self._stride)
            return fresh.export()

    def clear(self, index: int) -> None:
        self._memory.clear(self._start + index * self._stride, self._stride)


def of_peer(memory: DeviceMemory, fd: int, num_bytes: int, peer: str) -> DeviceRegion:
    """As `msi.net.regions.SharesMemory` says it."""
    size = pages(num_bytes)
    with SharedRegion.of_peer(fd, size, peer) as theirs:
        at = memory.reserve(size)
        theirs.map_into(memory, at, 0, size)
    region = DeviceRegion(memory.at(at, num_bytes), NAME)
    weakref.finalize(region, memory.clear, at, size)
    return region
