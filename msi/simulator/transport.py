"""A transport whose messages take virtual time: what is posted at t lands at t + latency, in order.

As with shared memory the outbox *is* the peer's landing seat, so a post moves nothing: headers lie where they are
read, rows take no memory worth the name and count with the bytes that they would have.
"""

from __future__ import annotations

from collections.abc import Callable

from msi.errors import EngineError, TransportError
from msi.net.delivery import Delivery
from msi.net.landing import PlainLanding, seat_rows
from msi.net.regions import Allocator
from msi.net.slots import SlotLayout
from msi.net.transport import CONNECT_TIMEOUT_S, Admission, CompletionKind, Endpoint, Handler, Landing
from msi.simulator.clock import virtual_loop

Latency = Callable[[int], float]


class SimulatedNetwork:
    """Who listens where, and how long messages take; use it inside a virtual loop.

    Args:
        latency: of a post of so many bytes, in seconds; asked once for each size.
        is_collapsing: messages that land at the same instant are one event. Makes no difference but in cost.
    """

    def __init__(self, latency: Latency, *, is_collapsing: bool = True) -> None:
        self.latency = latency
        self.listeners: dict[str, SimulatedTransport] = {}
        self.num_messages = 0
        self.loop = virtual_loop()
        self._is_collapsing = is_collapsing
        self._flying: dict[float, list[tuple[SimulatedEndpoint, int]]] = {}  # by when they land

    def send(self, at: float, to: SimulatedEndpoint, immediate: int) -> None:
        self.num_messages += 1
        if not self._is_collapsing:
            self.loop.land_at(at, to.land, immediate)
        elif (together := self._flying.get(at)) is not None:
            together.append((to, immediate))
        else:
            self._flying[at] = [(to, immediate)]
            self.loop.land_at(at, self._land, at)

    def _land(self, at: float) -> None:
        for endpoint, immediate in self._flying.pop(at):
            endpoint.land(immediate)


class SimulatedEndpoint:
    def __init__(
        self, transport: SimulatedTransport, peer: bytes, seat: int, peers_landing: PlainLanding, its_seat: int
    ):
        self.peer = peer
        self.seat = seat
        self.came_at = 0.0
        self.out_headers = peers_landing.headers[its_seat]
        self.out_rows = peers_landing.allocator.adopt(seat_rows(peers_landing, its_seat))
        self._transport = transport
        self._network = transport.network
        self._latencies = transport.latencies
        self._other: SimulatedEndpoint | None = None
        self._last_at = 0.0  # when the last post lands

    def join(self, other: SimulatedEndpoint) -> None:
        self._other, other._other = other, self

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        other = self._other
        if other is None:
            raise TransportError(f"simulated peer at seat {self.seat}", "the connection is closed")
        network = self._network
        latency = self._latencies.get(num_rows)
        if latency is None:
            latency = self._transport.latency(num_rows)
        at = network.loop.time() + latency
        if at < self._last_at:
            at = self._last_at
        self._last_at = at
        network.send(at, other, immediate)

    def land(self, immediate: int) -> None:
        if self._other is not None:  # else closed meanwhile
            self._transport.completed(self, CompletionKind.IMMEDIATE, immediate)

    def close(self) -> None:
        other, self._other = self._other, None
        if other is not None:
            other._other = None
            other._transport.completed(other, CompletionKind.CLOSED, 0, "the peer closed")


class SimulatedTransport:
    """One worker's.

    Args:
        wire_bytes: what a post of so many rows would be with rows of their true size.
    """

    def __init__(
        self, network: SimulatedNetwork, address: str, wire_bytes: Callable[[int], int] = lambda num_rows: num_rows
    ) -> None:
        self.network = network
        self.completed = Delivery()
        self.latencies: dict[int, float] = {}  # by rows of a post
        self._wire_bytes = wire_bytes
        self._address = address
        self._accept: Callable[[bytes], Admission] | None = None
        self._endpoints: list[SimulatedEndpoint] = []

    def latency(self, num_rows: int) -> float:
        latency = self.latencies[num_rows] = self.network.latency(self._wire_bytes(num_rows))
        return latency

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> PlainLanding:
        return PlainLanding(num_seats, layout, allocator)

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
        ours = SimulatedEndpoint(self, admission.welcome, seat, admission.landing, admission.seat)
        other = SimulatedEndpoint(listener, hello, admission.seat, landing, seat)
        ours.join(other)
        self._endpoints.append(ours)
        listener._endpoints.append(other)
        listener.completed(other, CompletionKind.CONNECTED)
        return ours

    def deliver(self, handler: Handler) -> None:
        self.completed.start(handler)

    def take(self) -> None:
        """Nothing: what lands is handed over when it does."""

    async def close(self) -> None:
        if self.network.listeners.get(self._address) is self:
            del self.network.listeners[self._address]
        for endpoint in self._endpoints:
            endpoint.close()
