"""The verbs-shaped interface of every transport: register memory, connect, write with an immediate, completions.

    landing   = transport.register(num_seats, layout, allocator)  # where peers' writes land
    transport.deliver(handler)                                    # completions: what happens at our endpoints
    endpoint  = await transport.connect(address, hello, landing, seat)
    endpoint.out_headers[lane][:] = ...; endpoint.out_rows ...    # laid out as the peer's landing seat
    endpoint.post(lane, immediate, num_rows)                      # header and rows, then the immediate

Headers are host memory, rows whatever the allocator gives: a transport that cannot write into that says so when it is
to register it. What is posted before an immediate is there when the immediate is; immediates of one endpoint arrive in
order. Where the peer's memory is mapped here (shared memory) the outbox *is* that memory and a post moves nothing;
elsewhere it is a staging buffer. Nobody above asks which, or computes an offset. A seat is one peer's: revoking it
shuts that peer out for good. `msi.net.contract` says all this as checks that any transport can be put to.

Completions are handed to a callback, not awaited: a future and a task step per wake-up cost as much as everything
else that a layer needs of the loop thread (tools/bench_cpu_budget.py). Where a device computes on a thread of this
process, that thread may take them itself: it is a `Poller`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from msi.net.regions import Allocator, Region
from msi.net.slots import SlotLayout

CONNECT_TIMEOUT_S = 10.0
MAX_HELLO_BYTES = 64 * 1024


class CompletionKind(Enum):
    IMMEDIATE = "immediate"
    CONNECTED = "connected"  # a peer that we accepted; its immediates follow
    CLOSED = "closed"  # nothing follows


class Admission(NamedTuple):
    """Our answer to a hello that we accept: a seat of a landing, and what to tell the peer."""

    landing: Landing
    seat: int
    welcome: bytes


class Landing(Protocol):
    """Registered memory: `num_seats` seats of `layout`, each a peer's. Addresses never change."""

    num_seats: int
    layout: SlotLayout
    allocator: Allocator  # whose memory the rows are

    @property
    def headers(self) -> Sequence[Sequence[memoryview]]:
        """[seat][lane]: a header with its note, in host memory."""

    @property
    def rows(self) -> Region:
        """[num_seats, stride]: the seats' rows, lane after lane, `num_bytes // num_seats` from seat to seat."""

    def revoke(self, index: int) -> None:
        """From now on nothing that the seat's peer writes is seen here; the seat reads zero and can be given away."""

    def generation(self, index: int) -> int:
        """How often the seat was revoked."""


class Endpoint(Protocol):
    """A connection to one peer. `seat` is our seat in which its writes land."""

    peer: bytes  # what the peer said: its hello if we accepted it, its welcome if it accepted us
    seat: int
    way: str  # how rows get there, for people
    came_at: float  # time.monotonic() when what is being handed over came; 0.0: now, as far as anybody knows

    @property
    def out_headers(self) -> Sequence[memoryview]:
        """[lane]: a header with its note, as the peer will have it."""

    @property
    def out_rows(self) -> Region:
        """[num_lanes, slot_rows, row_bytes] of the peer's layout: ours, or the peer's own memory."""

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        """A lane's header, so much of its note, and its first rows land at the peer, then the immediate. Never blocks.

        With neither rows nor note the immediate goes alone, and the header is not looked at. One thread at a time, but
        any thread; closing meanwhile is safe.

        Raises:
            TransportError: the connection is closed.
        """

    def close(self) -> None:
        """Ends the connection; the peer gets a CLOSED completion, we get none. Idempotent."""


class Poller(Protocol):
    """A thread that takes immediates between other work, and sleeps at its bell while it has none."""

    bell: int  # an eventfd: a write wakes the thread, from whatever process

    def add(self, take: Callable[[], object], wakes: int = -1) -> None:
        """From now on it calls `take`, which hands over what has come; once more before it sleeps if that says True.

        `wakes`: a descriptor that wakes the thread, too, each time that it becomes readable; `take` reads it.
        """

    def remove(self, take: Callable[[], object], wakes: int = -1) -> None:
        """Not any more, after the call that may be in progress. The descriptor may be closed then."""

    def ring(self) -> None:
        """Wakes the thread, unless it is the caller, which looks again by itself."""


# (endpoint, what happened, the immediate or 0, why it was closed or "")
Handler = Callable[[Endpoint, CompletionKind, int, str], None]
Landed = tuple[Endpoint, int, float]  # an immediate, for whom, and its `came_at`
Together = Callable[[Sequence[Landed]], None]


class Transport(Protocol):
    """One per worker, used from its event loop alone, but for `take` and `Endpoint.post`."""

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> Landing:
        """Memory for peers to write into, zeroed; its rows are the allocator's.

        Raises ConfigError where there is not enough, or it is none that this transport can write into.
        """

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        """Takes peers from now on and returns the address to give them.

        `accept` sees a peer's hello and admits it, or raises EngineError: the peer's connect then fails with its text.
        """

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        """Raises TransportError: nobody there, refused (with the peer's reason), or no answer within `timeout_s`."""

    def deliver(self, handler: Handler, together: Together | None = None) -> None:
        """Hands everything that happens to `handler`, one after the other and in order; what already did, at once.

        Immediates that a transport finds lying there at one time it may hand to `together` instead, all in one call.

        All of it on the event loop; but immediates on the poller's thread, if the transport was given one: those of a
        connection come after its CONNECTED and before its CLOSED, and after our own `close` one may be on its way.
        The handler must not raise.
        """

    def take(self) -> None:
        """Hands over what has come by now, before whoever usually does it comes round to it. Any thread.

        Does nothing where the event loop hands over all there is.
        """

    async def close(self) -> None:
        """Closes all endpoints and frees the landings. Idempotent."""
