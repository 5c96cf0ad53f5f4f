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
from msi.errors import EngineError, TransportError
from msi.net.delivery import Delivery
from msi.net.regions import Allocator, map_zeroed
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.net.transport import CONNECT_TIMEOUT_S, Admission, CompletionKind, Endpoint, Handler, Landing

_listeners: dict[str, FakeTransport] = {}
_names = itertools.count()


class FakeLanding:
    """Implements `msi.net.transport.Landing`."""

    def __init__(self, num_seats: int, layout: SlotLayout, device: FakeDevice) -> None:
        self.num_seats = num_seats
        self.layout = layout
        self.allocator: Allocator = device
        self.memory = device.memory
        self.rows = device.region(num_seats * layout.rows_bytes)
        self._by_seat = self.rows.tensor().view(num_seats, -1)
        size = layout.headers_bytes
        self._headers = map_zeroed(num_seats * size)
        self.headers = tuple(
            layout.split_headers(self._headers[seat * size : (seat + 1) * size]) for seat in range(num_seats)
        )
        self._generations = [0] * num_seats

    def revoke(self, index: int) -> None:
        self._generations[index] += 1
        self.memory.flush()
        with self.memory.opened():
            self._by_seat[index].zero_()
        for header in self.headers[index]:
            header[:] = bytes(header.nbytes)

    def generation(self, index: int) -> int:
        return self._generations[index]


class FakeEndpoint:
    """Implements `msi.net.transport.Endpoint`."""

    def __init__(
        self, transport: FakeTransport, peer: bytes, landing: FakeLanding, seat: int, layout: SlotLayout
    ) -> None:
        self.peer = peer
        self.seat = seat
        self.came_at = 0.0
        self.landing = landing
        self.transport = transport
        device = transport.device
        self.out_headers = layout.split_headers(memoryview(bytearray(layout.headers_bytes)))
        self.out_rows = device.region(layout.rows_bytes)
        self._layout = layout
        self._generation = landing.generation(seat)
        self._wire = Wire(device.world)
        self._other: FakeEndpoint | None = None

    def join(self, other: FakeEndpoint) -> None:
        self._other, other._other = other, self

    @property
    def is_revoked(self) -> bool:
        """Whether its peer may write no more."""
        return self._generation != self.landing.generation(self.seat)

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        other = self._other
        if other is None:
            raise TransportError(f"fake peer at seat {self.seat}", "the connection is closed")
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

    def close(self) -> None:
        self.transport.endpoints.discard(self)
        other, self._other = self._other, None
        if other is not None:
            other._other = None
            other.transport.endpoints.discard(other)
            other._wire.cut()
            self._wire.post(None, None, lambda: other.land(None))


Send = Callable[[Wire, RowsCopy | None, BytesCopy | None, Callable[[], None]], None]


class FakeTransport:
    """Implements `msi.net.transport.Transport` for one worker on a fake device.

    Args:
        flush: in place of that of the landings' memory.
        send: what puts a post on a wire.
    """

    def __init__(self, device: FakeDevice, flush: Callable[[], None] | None = None, send: Send = Wire.post) -> None:
        self.device = device
        self.send = send
        self.endpoints: set[FakeEndpoint] = set()
        self._flush = flush
        self._loop = asyncio.get_running_loop()
        self._deliver = Delivery()
        self._landed: deque[tuple[FakeEndpoint, int | None]] = deque()  # None: closed
        self._address = f"fake://{next(_names)}"
        self._accept: Callable[[bytes], Admission] | None = None
        self._is_closed = False

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> FakeLanding:
        assert isinstance(allocator, FakeDevice), "fake cards write into the memory of fake devices"
        landing = FakeLanding(num_seats, layout, allocator)
        self._flush = self._flush or landing.rows.flush
        return landing

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        self._accept = accept
        _listeners[self._address] = self
        return self._address

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        listener = _listeners.get(address)
        if listener is None or listener._accept is None:
            raise TransportError(address, "nobody listens there in this process")
        try:
            admission = listener._accept(hello)
        except EngineError as error:
            raise TransportError(address, f"refused: {error}") from error
        theirs = admission.landing
        assert isinstance(landing, FakeLanding), landing
        assert isinstance(theirs, FakeLanding), theirs
        ours = FakeEndpoint(self, admission.welcome, landing, seat, theirs.layout)
        other = FakeEndpoint(listener, hello, theirs, admission.seat, landing.layout)
        ours.join(other)
        self.endpoints.add(ours)
        listener.endpoints.add(other)
        listener._deliver(other, CompletionKind.CONNECTED)
        return ours

    def deliver(self, handler: Handler) -> None:
        self._deliver.start(handler)

    def take(self) -> None:
        """Nothing: the event loop hands over all there is."""

    def land(self, endpoint: FakeEndpoint, immediate: int | None) -> None:
        """Something came for one of our endpoints; None is its end."""
        if self._is_closed:
            return
        self._landed.append((endpoint, immediate))
        self._loop.call_soon(self._take)

    def _take(self) -> None:
        if self._landed and self._flush is not None:
            self._flush()  # so that the device sees what came with them
        while self._landed:
            endpoint, immediate = self._landed.popleft()
            if immediate is None:
                self._deliver(endpoint, CompletionKind.CLOSED, 0, "the peer closed")
            else:
                self._deliver(endpoint, CompletionKind.IMMEDIATE, immediate)

    async def close(self) -> None:
        self._is_closed = True
        _listeners.pop(self._address, None)
        for endpoint in list(self.endpoints):
            endpoint.close()
        self._landed.clear()
