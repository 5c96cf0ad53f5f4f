"""The in-process transport: workers of one process and one event loop, each with its own queue.

Every post copies from a staging outbox into the peer's seat, as a network card would; the shared-memory transport is
the one that maps. Addresses are names in a registry that lives as long as the process.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque

from msi.net.landing import Outbox, PlainLanding, seat_slots
from msi.net.local import LocalEndpoint, LocalTransport
from msi.net.regions import Allocator
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.net.transport import CompletionKind, Handler, Landing, Poller, Together

_listeners: dict[str, LocalTransport[InprocEndpoint]] = {}
_names = itertools.count()


class InprocEndpoint(LocalEndpoint):
    transport: InprocTransport

    def __init__(self, transport: InprocTransport, peer: bytes, landing: Landing, seat: int, layout: SlotLayout):
        super().__init__(transport, peer, landing, seat)
        self._outbox = Outbox(layout, landing.allocator)
        self.out_headers = self._outbox.headers
        self.out_rows = self._outbox.rows
        self._row_bytes = layout.row_bytes
        self._in_headers = landing.headers[seat]
        self._in_slots = seat_slots(landing, seat)

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        other = self._other
        if other is None:
            raise self._is_closed()
        if other.is_revoked:
            return  # the peer's memory is no longer ours to write
        if num_rows or note_bytes:
            header_bytes, num_bytes = HEADER_BYTES + note_bytes, num_rows * self._row_bytes
            other._in_slots[lane][:num_bytes] = self._outbox.slots[lane][:num_bytes]
            other._in_headers[lane][:header_bytes] = self.out_headers[lane][:header_bytes]
        other.transport.land(other, immediate)

    def _say_goodbye(self, other: InprocEndpoint) -> None:
        other.transport.end(other)


class InprocTransport(LocalTransport[InprocEndpoint]):
    """Implements `msi.net.transport.Transport`.

    Args:
        poller: takes immediates in place of the event loop.
    """

    def __init__(self, *, poller: Poller | None = None) -> None:
        super().__init__(_listeners, f"inproc://{next(_names)}")
        self._loop = asyncio.get_running_loop()
        self._landed: deque[tuple[InprocEndpoint, int, float]] = deque()
        self._taking = threading.Lock()  # held while they are handed over, so that they stay in order
        self._poller = poller
        if poller is not None:
            poller.add(self.take)

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> PlainLanding:
        return PlainLanding(num_seats, layout, allocator)

    def _new_end(self, peer: bytes, landing: Landing, seat: int, theirs: Landing, their_seat: int) -> InprocEndpoint:
        return InprocEndpoint(self, peer, landing, seat, theirs.layout)

    def deliver(self, handler: Handler, together: Together | None = None) -> None:
        with self._taking:
            super().deliver(handler, together)

    def land(self, endpoint: InprocEndpoint, immediate: int) -> None:
        """From any thread: something came for one of our endpoints."""
        self._landed.append((endpoint, immediate, 0.0))
        if self._poller is None:
            self._loop.call_soon_threadsafe(self.take)
        else:
            self._poller.ring()

    def end(self, endpoint: InprocEndpoint) -> None:
        """One of our endpoints was closed by its peer."""
        self._loop.call_soon_threadsafe(self._ended, endpoint)

    def _ended(self, endpoint: InprocEndpoint) -> None:
        self.take()  # what it posted before
        self.completed(endpoint, CompletionKind.CLOSED, 0, "the peer closed")

    def take(self) -> None:
        with self._taking:
            while self._landed:
                landed = []
                while self._landed:
                    landed.append(self._landed.popleft())
                self.completed.all(landed)

    async def close(self) -> None:
        await super().close()
        if self._poller is not None:
            self._poller.remove(self.take)
