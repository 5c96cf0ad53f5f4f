"""What transports have in common whose workers are all in one process: who listens where, and two ends that know each
other. How anything travels between these is each transport's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, TypeVar

from msi.errors import EngineError, TransportError
from msi.net.delivery import Delivery
from msi.net.regions import Region
from msi.net.transport import CONNECT_TIMEOUT_S, Admission, CompletionKind, Handler, Landing, Together


class LocalEndpoint:
    """One end of a connection. Theirs to add: outboxes, `post`, and how a goodbye travels.

    Implements `msi.net.transport.Endpoint`.

    Args:
        peer: what it said.
        landing, seat: where its writes land.
    """

    out_headers: Sequence[memoryview]
    out_rows: Region

    def __init__(self, transport: LocalTransport[Any], peer: bytes, landing: Landing, seat: int) -> None:
        self.peer = peer
        self.seat = seat
        self.way = "in this process"
        self.came_at = 0.0
        self.landing = landing
        self.transport = transport
        self._generation = landing.generation(seat)
        self._other: Self | None = None  # None: the connection is closed

    def join(self, other: Self) -> None:
        self._other, other._other = other, self

    @property
    def is_revoked(self) -> bool:
        """Whether its peer may write no more."""
        return self._generation != self.landing.generation(self.seat)

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        raise NotImplementedError

    def _is_closed(self) -> TransportError:
        return TransportError(f"peer at seat {self.seat} in this process", "the connection is closed")

    def close(self) -> None:
        self.transport.endpoints.pop(self, None)
        other, self._other = self._other, None
        if other is not None:
            other._other = None
            other.transport.endpoints.pop(other, None)
            self._say_goodbye(other)

    def _say_goodbye(self, other: Self) -> None:
        """`other`, which is closed now, is to be told so."""
        raise NotImplementedError


E = TypeVar("E", bound=LocalEndpoint)


class LocalTransport(Generic[E]):
    """One worker's. Theirs to add: `register`, `take`, and ends of their own kind.

    Args:
        listeners: by address; all who can reach each other have the same.

    Attributes:
        endpoints: that are open, oldest first.
        completed: to be told of all that happens.
    """

    def __init__(self, listeners: dict[str, LocalTransport[E]], address: str) -> None:
        self.endpoints: dict[E, None] = {}
        self.completed = Delivery()
        self._listeners = listeners
        self._address = address
        self._accept: Callable[[bytes], Admission] | None = None

    def _new_end(self, peer: bytes, landing: Landing, seat: int, theirs: Landing, their_seat: int) -> E:
        """Our end of a connection to a peer that writes into `seat` of `landing`, and we into `their_seat`."""
        raise NotImplementedError

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        self._accept = accept
        self._listeners[self._address] = self
        return self._address

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> E:
        listener = self._listeners.get(address)
        if listener is None or listener._accept is None:
            raise TransportError(address, "nobody listens there in this process")
        try:
            admission = listener._accept(hello)
        except EngineError as error:
            raise TransportError(address, f"refused: {error}") from error
        ours = self._new_end(admission.welcome, landing, seat, admission.landing, admission.seat)
        other = listener._new_end(hello, admission.landing, admission.seat, landing, seat)
        ours.join(other)
        self.endpoints[ours] = listener.endpoints[other] = None
        listener.completed(other, CompletionKind.CONNECTED)
        return ours

    def deliver(self, handler: Handler, together: Together | None = None) -> None:
        self.completed.start(handler, together)

    async def close(self) -> None:
        if self._listeners.get(self._address) is self:
            del self._listeners[self._address]
        for endpoint in list(self.endpoints):
            endpoint.close()
