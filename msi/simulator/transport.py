"""A transport whose messages take virtual time: what is posted at t lands at t + latency, in order.

As with shared memory the outbox *is* the peer's landing seat, so a post moves nothing: headers lie where they are
read, rows take no memory worth the name and count with the bytes that they would have.
"""

from __future__ import annotations

from collections.abc import Callable

from msi.net.landing import PlainLanding, seat_rows
from msi.net.local import LocalEndpoint, LocalTransport
from msi.net.regions import Allocator
from msi.net.slots import SlotLayout
from msi.net.transport import CompletionKind, Landing
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
        self.listeners: dict[str, LocalTransport[SimulatedEndpoint]] = {}
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


class SimulatedEndpoint(LocalEndpoint):
    transport: SimulatedTransport

    def __init__(
        self, transport: SimulatedTransport, peer: bytes, landing: Landing, seat: int, theirs: Landing, their_seat: int
    ):
        super().__init__(transport, peer, landing, seat)
        self.out_headers = theirs.headers[their_seat]
        self.out_rows = theirs.allocator.adopt(seat_rows(theirs, their_seat))
        self._network = transport.network
        self._latencies = transport.latencies
        self._last_at = 0.0  # when the last post lands

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        other = self._other
        if other is None:
            raise self._is_closed()
        network = self._network
        latency = self._latencies.get(num_rows)
        if latency is None:
            latency = self.transport.latency(num_rows)
        at = network.loop.time() + latency
        if at < self._last_at:
            at = self._last_at
        self._last_at = at
        network.send(at, other, immediate)

    def land(self, immediate: int) -> None:
        if self._other is not None:  # else closed meanwhile
            self.transport.completed(self, CompletionKind.IMMEDIATE, immediate)

    def _say_goodbye(self, other: SimulatedEndpoint) -> None:
        other.transport.completed(other, CompletionKind.CLOSED, 0, "the peer closed")


class SimulatedTransport(LocalTransport[SimulatedEndpoint]):
    """One worker's.

    Args:
        wire_bytes: what a post of so many rows would be with rows of their true size.
    """

    def __init__(
        self, network: SimulatedNetwork, address: str, wire_bytes: Callable[[int], int] = lambda num_rows: num_rows
    ) -> None:
        super().__init__(network.listeners, address)
        self.network = network
        self.latencies: dict[int, float] = {}  # by rows of a post
        self._wire_bytes = wire_bytes

    def latency(self, num_rows: int) -> float:
        latency = self.latencies[num_rows] = self.network.latency(self._wire_bytes(num_rows))
        return latency

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> PlainLanding:
        return PlainLanding(num_seats, layout, allocator)

    def _new_end(self, peer: bytes, landing: Landing, seat: int, theirs: Landing, their_seat: int) -> SimulatedEndpoint:
        return SimulatedEndpoint(self, peer, landing, seat, theirs, their_seat)

    def take(self) -> None:
        """Nothing: what lands is handed over when it does."""
