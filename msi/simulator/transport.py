"""A transport whose messages take virtual time: what is posted at t lands at t + latency(num_bytes), in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from msi.errors import EngineError, TransportError
from msi.net.delivery import Delivery
from msi.net.landing import PlainLanding
from msi.net.transport import CONNECT_TIMEOUT_S, Admission, CompletionKind, Endpoint, Handler, Landing

Latency = Callable[[int], float]


class SimulatedNetwork:
    """Who listens where, and how long messages take. `latency` gets the bytes of a post, in seconds."""

    def __init__(self, latency: Latency) -> None:
        self.latency = latency
        self.listeners: dict[str, SimulatedTransport] = {}
        self.num_messages = 0


class SimulatedEndpoint:
    def __init__(self, transport: SimulatedTransport, peer: bytes, landing: PlainLanding, seat: int, size: int):
        self.peer = peer
        self.seat = seat
        self.outbox = memoryview(bytearray(size))
        self._transport = transport
        self._landing = landing.seat(seat)
        self._other: SimulatedEndpoint | None = None
        self._in_flight: deque[tuple[float, int, int, bytes]] = deque()

    def join(self, other: SimulatedEndpoint) -> None:
        self._other, other._other = other, self

    def post(self, immediate: int, offset: int = 0, num_bytes: int = 0) -> None:
        other = self._other
        if other is None:
            raise TransportError(f"simulated peer at seat {self.seat}", "the connection is closed")
        network, loop = self._transport.network, asyncio.get_running_loop()
        network.num_messages += 1
        at = loop.time() + network.latency(num_bytes)
        if other._in_flight:
            at = max(at, other._in_flight[-1][0])
        # only the header is moved: simulated rows have no content
        other._in_flight.append((at, immediate, offset, bytes(self.outbox[offset : offset + min(num_bytes, 64)])))
        loop.call_at(at, other._land)

    def _land(self) -> None:
        if not self._in_flight:
            return  # closed meanwhile
        _, immediate, offset, header = self._in_flight.popleft()
        self._landing[offset : offset + len(header)] = header
        self._transport.completed(self, CompletionKind.IMMEDIATE, immediate)

    def close(self) -> None:
        other, self._other = self._other, None
        self._in_flight.clear()
        if other is not None:
            other._other = None
            other._in_flight.clear()
            other._transport.completed(other, CompletionKind.CLOSED, 0, "the peer closed")


class SimulatedTransport:
    def __init__(self, network: SimulatedNetwork, address: str) -> None:
        self.network = network
        self.completed = Delivery()
        self._address = address
        self._accept: Callable[[bytes], Admission] | None = None
        self._endpoints: list[SimulatedEndpoint] = []

    def register(self, num_seats: int, seat_bytes: int) -> PlainLanding:
        return PlainLanding(num_seats, seat_bytes)

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        self._accept = accept
        self.network.listeners[self._address] = self
        return self._address

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        listener = self.network.listeners.get(address)
        if listener is None or listener._accept is None:
            raise TransportError(address, "nobody listens there")
        try:
            admission = listener._accept(hello)
        except EngineError as error:
            raise TransportError(address, f"refused: {error}") from error
        assert isinstance(landing, PlainLanding)
        assert isinstance(admission.landing, PlainLanding)
        ours = SimulatedEndpoint(self, admission.welcome, landing, seat, admission.landing.stride)
        other = SimulatedEndpoint(listener, hello, admission.landing, admission.seat, landing.stride)
        ours.join(other)
        self._endpoints.append(ours)
        listener._endpoints.append(other)
        listener.completed(other, CompletionKind.CONNECTED)
        return ours

    def deliver(self, handler: Handler) -> None:
        self.completed.start(handler)

    async def close(self) -> None:
        self.network.listeners.pop(self._address, None)
        for endpoint in self._endpoints:
            endpoint.close()
