"""The in-process transport: workers of one process and one event loop, each with its own queue.

Every post copies from a staging outbox into the peer's seat, as a network card would; the shared-memory transport is
the one that maps. Addresses are names in a registry that lives as long as the process.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Callable

from msi.errors import EngineError, TransportError
from msi.net.delivery import Delivery
from msi.net.landing import Outbox, PlainLanding, seat_slots
from msi.net.regions import Allocator
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.net.transport import CONNECT_TIMEOUT_S, Admission, CompletionKind, Endpoint, Handler, Landing, Poller

IMMEDIATE = CompletionKind.IMMEDIATE  # looked up once for each that lands, it would cost as much as the rest

_listeners: dict[str, InprocTransport] = {}
_names = itertools.count()


class InprocEndpoint:
    def __init__(self, transport: InprocTransport, peer: bytes, landing: PlainLanding, seat: int, layout: SlotLayout):
        self.peer = peer
        self.seat = seat
        self.came_at = 0.0
        self.landing = landing
        self.transport = transport
        self._outbox = Outbox(layout, landing.allocator)
        self.out_headers = self._outbox.headers
        self.out_rows = self._outbox.rows
        self._row_bytes = layout.row_bytes
        self._in_headers = landing.headers[seat]
        self._in_slots = seat_slots(landing, seat)
        self._generation = landing.generation(seat)
        self._other: InprocEndpoint | None = None

    def join(self, other: InprocEndpoint) -> None:
        self._other, other._other = other, self

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        other = self._other
        if other is None:
            raise TransportError(f"in-process peer at seat {self.seat}", "the connection is closed")
        if other._generation != other.landing.generation(other.seat):
            return  # revoked: the peer's memory is no longer ours to write
        if num_rows or note_bytes:
            header_bytes, num_bytes = HEADER_BYTES + note_bytes, num_rows * self._row_bytes
            other._in_slots[lane][:num_bytes] = self._outbox.slots[lane][:num_bytes]
            other._in_headers[lane][:header_bytes] = self.out_headers[lane][:header_bytes]
        other.transport.land(other, immediate)

    def close(self) -> None:
        self.transport.endpoints.discard(self)
        other, self._other = self._other, None
        if other is not None:
            other._other = None
            other.transport.endpoints.discard(other)
            other.transport.end(other)


class InprocTransport:
    """Implements `msi.net.transport.Transport`.

    Args:
        poller: takes immediates in place of the event loop.
    """

    def __init__(self, *, poller: Poller | None = None) -> None:
        self.endpoints: set[InprocEndpoint] = set()
        self._loop = asyncio.get_running_loop()
        self._deliver = Delivery()
        self._landed: deque[tuple[InprocEndpoint, int]] = deque()
        self._taking = threading.Lock()  # held while they are handed over, so that they stay in order
        self._poller = poller
        self._address = f"inproc://{next(_names)}"
        self._accept: Callable[[bytes], Admission] | None = None
        if poller is not None:
            poller.add(self.take)

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> PlainLanding:
        return PlainLanding(num_seats, layout, allocator)

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
        assert isinstance(landing, PlainLanding)
        theirs = admission.landing
        assert isinstance(theirs, PlainLanding)
        ours = InprocEndpoint(self, admission.welcome, landing, seat, theirs.layout)
        other = InprocEndpoint(listener, hello, theirs, admission.seat, landing.layout)
        ours.join(other)
        self.endpoints.add(ours)
        listener.endpoints.add(other)
        listener._deliver(other, CompletionKind.CONNECTED)
        return ours

    def deliver(self, handler: Handler) -> None:
        with self._taking:
            self._deliver.start(handler)

    def land(self, endpoint: InprocEndpoint, immediate: int) -> None:
        """From any thread: something came for one of our endpoints."""
        self._landed.append((endpoint, immediate))
        if self._poller is None:
            self._loop.call_soon_threadsafe(self.take)
        else:
            self._poller.ring()

    def end(self, endpoint: InprocEndpoint) -> None:
        """One of our endpoints was closed by its peer."""
        self._loop.call_soon_threadsafe(self._ended, endpoint)

    def _ended(self, endpoint: InprocEndpoint) -> None:
        self.take()  # what it posted before
        self._deliver(endpoint, CompletionKind.CLOSED, 0, "the peer closed")

    def take(self) -> None:
        with self._taking:
            while self._landed:
                endpoint, immediate = self._landed.popleft()
                self._deliver(endpoint, IMMEDIATE, immediate)

    async def close(self) -> None:
        _listeners.pop(self._address, None)
        for endpoint in list(self.endpoints):
            endpoint.close()
        if self._poller is not None:
            self._poller.remove(self.take)
