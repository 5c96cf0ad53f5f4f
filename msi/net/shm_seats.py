"""Seats of shared memory: the ring that announces what landed, what lands, and a peer's seat as our outbox."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from time import monotonic_ns
from typing import NamedTuple

from msi.errors import TransportError
from msi.net.regions import Allocator, Region, SharesMemory
from msi.net.shared_memory import AddressRange, SharedRegion, pages
from msi.net.slots import HEADER_BYTES, MAX_LANES, NOTE_BYTES, SlotLayout

RING_ENTRIES = 8191
RING_BYTES = pages((2 * RING_ENTRIES + 1) * 8)  # the entries, and the reader's count in the last word
HEADERS_BYTES = pages(MAX_LANES * (HEADER_BYTES + NOTE_BYTES))  # behind the ring
ROWS_AT = RING_BYTES + HEADERS_BYTES
NOT_OURS = (
    "its rows land in the memory of a device, and what this process computes on cannot write there; give both the same "
    "kind of `device`, and `cuda_rows=host` where those differ"
)


class Ring:
    """Immediates from one writer to one reader, each with the time of its post: clocks of one host agree.

    An entry is two words; the second is written first, and the first one's upper half says which turn of the ring the
    entry belongs to.
    """

    def __init__(self, memory: memoryview) -> None:
        self._entries = memory.cast("Q")
        self._count = 0

    def push(self, immediate: int) -> bool:
        """False when the reader is a whole ring behind."""
        count = self._count
        if count - self._entries[2 * RING_ENTRIES] >= RING_ENTRIES:
            return False
        self._count = count + 1
        at = 2 * (count % RING_ENTRIES)
        self._entries[at + 1] = monotonic_ns()
        self._entries[at] = ((count + 1) & 0xFFFFFFFF) << 32 | immediate
        return True

    def drain(self) -> list[tuple[int, float]]:
        """(immediate, time of its post in seconds) of what came since."""
        entries, count = self._entries, self._count
        taken = []
        while (entry := entries[at := 2 * (count % RING_ENTRIES)]) >> 32 == (count + 1) & 0xFFFFFFFF:
            taken.append((entry & 0xFFFFFFFF, entries[at + 1] * 1e-9))
            count += 1
        if taken:
            self._count = count
            entries[2 * RING_ENTRIES] = count
        return taken


class OpenSeat(NamedTuple):
    """A seat's fresh memory, as its peer is told of it."""

    ring: memoryview
    fds: tuple[int, ...]  # of ring, headers and rows; of rows in a device's memory another


class ShmLanding:
    """Seats side by side in one address range; an unused or revoked seat is private zero memory."""

    def __init__(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> None:
        self.num_seats = num_seats
        self.layout = layout
        self.allocator = allocator
        self._headers_at = AddressRange(num_seats * HEADERS_BYTES)
        starts = range(0, num_seats * HEADERS_BYTES, HEADERS_BYTES)
        self.headers = tuple(layout.split_headers(self._headers_at.memory[start:]) for start in starts)
        self._stride = pages(layout.rows_bytes)
        self._on_device = allocator.seats(num_seats, self._stride) if isinstance(allocator, SharesMemory) else None
        if self._on_device is None:
            self._rows_at = AddressRange(num_seats * self._stride)
            self.rows = allocator.adopt(self._rows_at.memory, num_seats)
        else:
            self.rows = self._on_device.rows
        self._generations = [0] * num_seats

    def revoke(self, index: int) -> None:
        self._generations[index] += 1
        self._headers_at.clear(index * HEADERS_BYTES, HEADERS_BYTES)
        if self._on_device is None:
            self._rows_at.clear(index * self._stride, self._stride)
        else:
            self._on_device.clear(index)

    def generation(self, index: int) -> int:
        return self._generations[index]

    @contextlib.contextmanager
    def open(self, index: int) -> Iterator[OpenSeat]:
        """Fresh memory for a seat: a ring and the headers in front of the rows, which a device may have of its own."""
        with contextlib.ExitStack() as stack:
            rows_bytes = self._stride if self._on_device is None else 0
            region = stack.enter_context(SharedRegion.create(ROWS_AT + rows_bytes))
            region.map_into(self._headers_at, index * HEADERS_BYTES, RING_BYTES, HEADERS_BYTES)
            fds = [region.fd]
            with contextlib.nullcontext() if self.rows.remapping is None else self.rows.remapping(index):
                if self._on_device is None:
                    region.map_into(self._rows_at, index * self._stride, ROWS_AT, self._stride)
                else:
                    fds.append(self._on_device.open(index))
                    stack.callback(os.close, fds[-1])
            yield OpenSeat(region.host()[:RING_BYTES], tuple(fds))


class PeerSeat(NamedTuple):
    """Where our posts land: the peer's own memory."""

    ring: memoryview
    headers: tuple[memoryview, ...]  # by lane
    rows: Region

    @classmethod
    def open(cls, offered: bytes, fds: Sequence[int], allocator: Allocator, peer: str) -> PeerSeat:
        """Raises ProtocolError, TransportError: what the peer offers could fail us."""
        layout = SlotLayout.decode(offered)
        with SharedRegion.of_peer(fds[0], ROWS_AT + (0 if fds[1:] else pages(layout.rows_bytes)), peer) as region:
            memory = region.host()
        if not fds[1:]:
            rows = allocator.adopt(memory[ROWS_AT : ROWS_AT + layout.rows_bytes])
        elif isinstance(allocator, SharesMemory):
            rows = allocator.of_peer(fds[1], layout.rows_bytes, peer)
        else:
            raise TransportError(peer, NOT_OURS)
        return cls(memory[:RING_BYTES], layout.split_headers(memory[RING_BYTES:ROWS_AT]), rows)
