"""A transport of cards that do not exist, for rows that lie in the memory of fake devices.

It keeps the contract of all transports (`msi.net.contract`) and uses what that leaves open: a post is read some time
after it was made, so whoever posts leaves header and rows as they are until an answer is there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable

from msi.device.fake.device import FakeDevice
from msi.device.fake.wire import BytesCopy, RowsCopy, Wire
from msi.net.landing import SeatedLanding
from msi.net.local import LocalEndpoint, LocalTransport
from msi.net.regions import Allocator
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.net.transport import CompletionKind, Landing

_listeners: dict[str, LocalTransport[FakeEndpoint]] = {}
_names = itertools.count()


class FakeLanding(SeatedLanding):
    """In the memory of a fake device."""

    def __init__(self, num_seats: int, layout: SlotLayout, device: FakeDevice) -> None:
        super().__init__(num_seats, layout, device)
        self.memory = device.memory


class FakeEndpoint(LocalEndpoint):
    transport: FakeTransport
    landing: FakeLanding

    def __init__(
        self, transport: FakeTransport, peer: bytes, landing: FakeLanding, seat: int, layout: SlotLayout
    ) -> None:
        super().__init__(transport, peer, landing, seat)
        device = transport.device
        self.out_headers = layout.split_headers(memoryview(bytearray(layout.headers_bytes)))
        self.out_rows = device.region(layout.rows_bytes)
        self._layout = layout
        self._wire = Wire(device.world)

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        other = self._other
        if other is None:
            raise self._is_closed()
        rows = header = None
        if num_rows or note_bytes:
            num_bytes = HEADER_BYTES + note_bytes
            at = other.landing.headers[other.seat][lane]
            header = BytesCopy(self.out_headers[lane][:num_bytes], at[:num_bytes], lambda: not other.is_revoked)
        if num_rows:
            rows = self._rows_to(other, lane, num_rows)
        self.transport.send(self._wire, rows, header, lambda: other.land(immediate))

    def _rows_to(self, other: FakeEndpoint, lane: int, num_rows: int) -> RowsCopy:
        start, num_bytes = lane * self._layout.slot_bytes, num_rows * self._layout.row_bytes
        theirs = other.seat * self._layout.rows_bytes + start
        return RowsCopy(
            self.out_rows.tensor()[start : start + num_bytes],
            self.transport.device.memory,
            other.landing.rows.tensor()[theirs : theirs + num_bytes],
            other.landing.memory,
            lambda: not other.is_revoked,
        )

    def land(self, immediate: int | None) -> None:
        """Something came for us; None is the end."""
        if not self.is_revoked or immediate is None:
            self.transport.land(self, immediate)

    def _say_goodbye(self, other: FakeEndpoint) -> None:
        other._wire.cut()
        self._wire.post(None, None, lambda: other.land(None))


Send = Callable[[Wire, RowsCopy | None, BytesCopy | None, Callable[[], None]], None]


class FakeTransport(LocalTransport[FakeEndpoint]):
    """Implements `msi.net.transport.Transport` for one worker on a fake device.

    Args:
        flush: in place of that of the landings' memory.
        send: what puts a post on a wire.
    """

    def __init__(self, device: FakeDevice, flush: Callable[[], None] | None = None, send: Send = Wire.post) -> None:
        super().__init__(_listeners, f"fake://{next(_names)}")
        self.device = device
        self.send = send
        self._flush = flush
        self._loop = asyncio.get_running_loop()
        self._landed: deque[tuple[FakeEndpoint, int | None]] = deque()  # None: closed
        self._is_open = True

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> FakeLanding:
        assert isinstance(allocator, FakeDevice), "fake cards write into the memory of fake devices"
        landing = FakeLanding(num_seats, layout, allocator)
        self._flush = self._flush or landing.rows.flush
        return landing

    def _new_end(self, peer: bytes, landing: Landing, seat: int, theirs: Landing, their_seat: int) -> FakeEndpoint:
        assert isinstance(landing, FakeLanding), landing
        return FakeEndpoint(self, peer, landing, seat, theirs.layout)

    def take(self) -> None:
        """Nothing: the event loop hands over all there is."""

    def land(self, endpoint: FakeEndpoint, immediate: int | None) -> None:
        """Something came for one of our endpoints; None is its end."""
        if not self._is_open:
            return
        self._landed.append((endpoint, immediate))
        self._loop.call_soon(self._take)

    def _take(self) -> None:
        if self._landed and self._flush is not None:
            self._flush()  # so that the device sees what came with them
        while self._landed:
            endpoint, immediate = self._landed.popleft()
            if immediate is None:
                self.completed(endpoint, CompletionKind.CLOSED, 0, "the peer closed")
            else:
                self.completed(endpoint, CompletionKind.IMMEDIATE, immediate)

    async def close(self) -> None:
        self._is_open = False
        await super().close()
        self._landed.clear()
