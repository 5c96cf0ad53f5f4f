"""The shared-memory transport: workers on one host write straight into each other's slots.

Each seat is a memfd of its own (a ring, headers, rows), mapped here into the landing's address ranges and at the peer
as its outbox, where the allocator adopts the rows; a post moves nothing but an immediate, through the ring, and one
eventfd write wakes whoever reads it: the peer's loop, or its poller. The handshake passes descriptors over an abstract
Unix socket (nothing is left in the file system), which stays open: its end is how the death of a peer is seen at once.
Only processes of the same user are taken.

The ring relies on stores becoming visible in order (x86-64); elsewhere the constructor says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import platform
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from time import monotonic_ns
from typing import NamedTuple

from msi.errors import ConfigError, EngineError, ProtocolError, TransportError
from msi.net.acceptor import Acceptor
from msi.net.complaints import Complaints
from msi.net.delivery import Delivery
from msi.net.regions import Allocator
from msi.net.shared_memory import AddressRange, SharedRegion, pages
from msi.net.slots import HEADER_BYTES, LAYOUT, MAX_LANES, NOTE_BYTES, SlotLayout
from msi.net.transport import (
    CONNECT_TIMEOUT_S,
    MAX_HELLO_BYTES,
    Admission,
    CompletionKind,
    Endpoint,
    Handler,
    Landed,
    Landing,
    Poller,
    Together,
)

log = logging.getLogger(__name__)

RING_ENTRIES = 8191
RING_BYTES = pages((2 * RING_ENTRIES + 1) * 8)  # the entries, and the reader's count in the last word
HEADERS_BYTES = pages(MAX_LANES * (HEADER_BYTES + NOTE_BYTES))  # behind the ring
ROWS_AT = RING_BYTES + HEADERS_BYTES
IMMEDIATE = CompletionKind.IMMEDIATE
ACCEPTED, REFUSED = b"\x01", b"\x00"
CONNECT_AGAIN_S = 0.02


def is_available() -> str | None:
    """None if this host can do it, else the reason why not."""
    if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
        return "shared memory needs Linux (memfd, eventfd)"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"shared memory needs x86-64's order of stores, this is {platform.machine()}"
    return None


class _Ring:
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


class ShmLanding:
    """Seats side by side in one address range; an unused or revoked seat is private zero memory."""

    def __init__(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> None:
        self.num_seats = num_seats
        self.layout = layout
        self.allocator = allocator
        self._stride = pages(layout.rows_bytes)
        self._headers_at = AddressRange(num_seats * HEADERS_BYTES)
        self._rows_at = AddressRange(num_seats * self._stride)
        starts = range(0, num_seats * HEADERS_BYTES, HEADERS_BYTES)
        self.headers = tuple(layout.split_headers(self._headers_at.memory[start:]) for start in starts)
        self.rows = allocator.adopt(self._rows_at.memory, num_seats)
        self._generations = [0] * num_seats

    def revoke(self, index: int) -> None:
        self._generations[index] += 1
        self._headers_at.clear(index * HEADERS_BYTES, HEADERS_BYTES)
        self._rows_at.clear(index * self._stride, self._stride)

    def generation(self, index: int) -> int:
        return self._generations[index]

    def open(self, index: int) -> SharedRegion:
        """Fresh shared memory for a seat, with a ring and the headers in front of the rows."""
        region = SharedRegion.create(seat_bytes(self.layout))
        region.map_into(self._headers_at, index * HEADERS_BYTES, RING_BYTES, HEADERS_BYTES)
        with contextlib.nullcontext() if self.rows.remapping is None else self.rows.remapping(index):
            region.map_into(self._rows_at, index * self._stride, ROWS_AT, self._stride)
        return region


def seat_bytes(layout: SlotLayout) -> int:
    """Of a seat's memory: ring, headers, rows."""
    return ROWS_AT + pages(layout.rows_bytes)


class _PeerSeat(NamedTuple):
    """Where our posts land: the peer's own memory."""

    ring: memoryview
    headers: tuple[memoryview, ...]  # by lane
    rows: memoryview

    @classmethod
    def open(cls, offered: bytes, fd: int, peer: str) -> _PeerSeat:
        """Raises ProtocolError, TransportError: what the peer offers could fail us."""
        layout = SlotLayout.decode(offered)
        with SharedRegion.of_peer(fd, seat_bytes(layout), peer) as region:
            memory = region.host()
        headers, rows = memory[RING_BYTES:ROWS_AT], memory[ROWS_AT : ROWS_AT + layout.rows_bytes]
        return cls(memory[:RING_BYTES], layout.split_headers(headers), rows)


class ShmEndpoint:
    def __init__(
        self, transport: ShmTransport, sock: socket.socket, peer: bytes, landing: ShmLanding, seat: int,
        peers: _PeerSeat, in_ring: memoryview, doorbell: int,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.seat = seat
        self.way = "shared memory"
        self.came_at = 0.0
        self.out_headers = peers.headers
        self.out_rows = landing.allocator.adopt(peers.rows)
        self.in_ring = _Ring(in_ring)
        self.sock = sock
        self._transport = transport
        self._out_ring = _Ring(peers.ring)
        self._doorbell = doorbell
        self._is_open = True
        self._posting = threading.Lock()  # the doorbell is not closed, and its number reused, under a post

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        with self._posting:
            if not self._is_open:
                raise TransportError(f"shared-memory peer at seat {self.seat}", "the connection is closed")
            if not self._out_ring.push(immediate):
                raise TransportError(f"shared-memory peer at seat {self.seat}", f"is {RING_ENTRIES} messages behind")
            os.eventfd_write(self._doorbell, 1)

    def close(self) -> None:
        with self._posting:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self._transport.forget(self)
            self.sock.close()
            os.close(self._doorbell)


class ShmTransport:
    """Implements `msi.net.transport.Transport`.

    Args:
        complain: told who is cut off.
        poller: reads the rings in place of the event loop.

    Raises:
        ConfigError: the host cannot do it; the message says why.
    """

    def __init__(self, *, complain: Complaints | None = None, poller: Poller | None = None) -> None:
        if (reason := is_available()) is not None:
            raise ConfigError(f"{reason}; use `transport=inproc`")
        self._deliver = Delivery()
        self._loop = asyncio.get_running_loop()
        self._poller = poller
        self._taking = threading.Lock()  # held while rings are read, so that each entry is handed over once
        self._endpoints: tuple[ShmEndpoint, ...] = ()
        self._complain = complain or Complaints(log)
        self._acceptor: Acceptor | None = None
        self._accept: Callable[[bytes], Admission] | None = None
        self._is_open = True
        if poller is None:
            self._doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._loop.add_reader(self._doorbell, self._rung)
        else:
            self._doorbell = os.dup(poller.bell)
            poller.add(self.take)

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> ShmLanding:
        return ShmLanding(num_seats, layout, allocator)

    # -- connections -------------------------------------------------------------------------------------------------

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        name = f"msi-{os.getpid()}-{secrets.token_hex(8)}"
        self._accept = accept
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind("\0" + name)
        self._acceptor = Acceptor(listener, self._welcome, self._complain, why_not=_why_not)
        return f"shm://{name}"

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        assert isinstance(landing, ShmLanding)
        assert len(hello) <= MAX_HELLO_BYTES, len(hello)
        if not address.startswith("shm://"):
            raise TransportError(address, "is not a shared-memory address (shm://...)")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            with landing.open(seat) as ours:
                async with asyncio.timeout(timeout_s):
                    await _connect(sock, "\0" + address.removeprefix("shm://"))
                    if why_not := _why_not(sock):  # before it gets any of our memory
                        raise TransportError(address, why_not)
                    socket.send_fds(sock, [landing.layout.encode() + hello], [ours.fd, self._doorbell])
                    reply, fds = await self._receive(sock)
            with _closing(fds):
                if reply[:1] != ACCEPTED or len(fds) != 2:
                    reason = reply[1:].decode(errors="replace") or "closed the connection"
                    raise TransportError(address, f"refused: {reason}")
                offered, welcome = reply[1 : 1 + LAYOUT.size], reply[1 + LAYOUT.size :]
                peers = _PeerSeat.open(offered, fds[0], address)
                doorbell = os.dup(fds[1])
        except TimeoutError as error:
            sock.close()
            raise TransportError(address, f"did not answer within {timeout_s:g} s") from error
        except OSError as error:
            sock.close()
            raise TransportError(address, f"cannot be reached: {error.strerror or error}") from error
        except ProtocolError as error:
            sock.close()
            raise TransportError(address, str(error)) from error
        except BaseException:
            sock.close()
            raise
        endpoint = ShmEndpoint(self, sock, welcome, landing, seat, peers, ours.host()[:RING_BYTES], doorbell)
        self._add(endpoint)
        return endpoint

    async def _welcome(self, sock: socket.socket, name: str) -> None:
        """The accepting half of the handshake. Whoever does not speak it is cut off."""
        assert self._accept is not None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                said, fds = await self._receive(sock)
            hello = said[LAYOUT.size :]
            with _closing(fds):
                if len(fds) != 2:
                    raise TransportError("peer", "sent no descriptors with its hello")
                peers = _PeerSeat.open(said[: LAYOUT.size], fds[0], "peer")
                admission = self._accept(hello)
                landing = admission.landing
                assert isinstance(landing, ShmLanding)
                doorbell = os.dup(fds[1])
            with landing.open(admission.seat) as ours:
                socket.send_fds(
                    sock, [ACCEPTED + landing.layout.encode() + admission.welcome], [ours.fd, self._doorbell]
                )
        except (EngineError, OSError, TimeoutError) as error:
            self._complain("refused", f"cut {name} off: {error or 'no hello in time'}")
            with contextlib.suppress(OSError):
                sock.send(REFUSED + str(error).encode()[:4096])
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        endpoint = ShmEndpoint(self, sock, hello, landing, admission.seat, peers, ours.host()[:RING_BYTES], doorbell)
        with self._taking:
            self._add(endpoint)
            self._deliver(endpoint, CompletionKind.CONNECTED)
        self.take()  # it may have posted already

    async def _receive(self, sock: socket.socket) -> tuple[bytes, list[int]]:
        """One message and its descriptors."""
        readable = asyncio.Event()
        self._loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(sock)
        message, fds, _, _ = socket.recv_fds(sock, LAYOUT.size + MAX_HELLO_BYTES + 1, 2)
        return message, fds

    def _add(self, endpoint: ShmEndpoint) -> None:
        self._endpoints = (*self._endpoints, endpoint)
        self._loop.add_reader(endpoint.sock, self._hung_up, endpoint)

    def forget(self, endpoint: ShmEndpoint) -> None:
        self._endpoints = tuple(other for other in self._endpoints if other is not endpoint)
        self._loop.remove_reader(endpoint.sock)

    # -- what happens ------------------------------------------------------------------------------------------------

    def _rung(self) -> None:
        os.eventfd_read(self._doorbell)
        self.take()

    def take(self) -> None:
        with self._taking:
            landed: list[Landed] = []
            for endpoint in self._endpoints:
                for immediate, came_at in endpoint.in_ring.drain():
                    landed.append((endpoint, immediate, came_at))
            if landed:
                self._deliver.all(landed)

    def _hung_up(self, endpoint: ShmEndpoint) -> None:
        """Nothing but the end comes over this socket after the handshake."""
        try:
            message = endpoint.sock.recv(1)
            reason = "spoke out of turn" if message else "its process is gone or closed the connection"
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return
            reason = str(error)
        self.take()  # what it posted before
        endpoint.close()
        self._deliver(endpoint, CompletionKind.CLOSED, 0, reason)

    def deliver(self, handler: Handler, together: Together | None = None) -> None:
        with self._taking:
            self._deliver.start(handler, together)

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if self._acceptor is not None:
            await self._acceptor.close()
        for endpoint in self._endpoints:
            endpoint.close()
        if self._poller is None:
            self._loop.remove_reader(self._doorbell)
        else:
            self._poller.remove(self.take)
        os.close(self._doorbell)


def _why_not(sock: socket.socket) -> str:
    """Why the process at the other end is none of ours; "" if it may be."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return "" if uid == os.geteuid() else f"runs as user {uid}, not {os.geteuid()}"


async def _connect(sock: socket.socket, name: str) -> None:
    """A listener whose queue is full for the moment is tried again, within the caller's time limit."""
    while True:
        try:
            sock.connect(name)
            return
        except BlockingIOError:
            await asyncio.sleep(CONNECT_AGAIN_S)


@contextlib.contextmanager
def _closing(fds: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)
