"""Landing memory that peers reach through an endpoint of ours alone, and the outboxes that such endpoints copy from."""

from __future__ import annotations

from msi.net.regions import Allocator, Region, map_zeroed
from msi.net.slots import SlotLayout
from msi.net.transport import Landing


class SeatedLanding:
    """Seats whose headers are host memory, and whose rows are whatever the allocator gives.

    Raises ConfigError: there is not enough memory.
    """

    def __init__(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> None:
        self.num_seats = num_seats
        self.layout = layout
        self.allocator = allocator
        self.rows: Region = allocator.region(num_seats * layout.rows_bytes)
        size = layout.headers_bytes
        memory = map_zeroed(num_seats * size)
        self.headers = tuple(layout.split_headers(memory[seat * size : (seat + 1) * size]) for seat in range(num_seats))
        self._generations = [0] * num_seats

    def revoke(self, index: int) -> None:
        self._generations[index] += 1
        for header in self.headers[index]:
            header[:] = bytes(header.nbytes)
        stride = self.rows.num_bytes // self.num_seats
        self.rows.zero(index * stride, stride)

    def generation(self, index: int) -> int:
        return self._generations[index]


class PlainLanding(SeatedLanding):
    """An endpoint remembers its seat's generation and writes no more once it has changed.

    Raises ConfigError: there is not enough memory, or it is not the host's.
    """

    def __init__(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> None:
        super().__init__(num_seats, layout, allocator)
        self.rows.host()  # or it refuses


class Outbox:
    """Memory laid out as a peer's seat, from which posts are copied to it."""

    def __init__(self, layout: SlotLayout, allocator: Allocator) -> None:
        self.headers = layout.split_headers(memoryview(bytearray(layout.headers_bytes)))
        self.rows: Region = allocator.region(layout.rows_bytes)
        self.slots = layout.split_rows(self.rows.host())


def seat_rows(landing: Landing, index: int) -> memoryview:
    """The rows of one seat, in host memory. Raises ConfigError where they are a device's."""
    stride = landing.rows.num_bytes // landing.num_seats
    return landing.rows.host()[index * stride : index * stride + landing.layout.rows_bytes]


def seat_slots(landing: Landing, index: int) -> tuple[memoryview, ...]:
    """Each lane's rows of one seat, in host memory. Raises ConfigError where they are a device's."""
    return landing.layout.split_rows(seat_rows(landing, index))
