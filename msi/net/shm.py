"""The shared-memory transport: workers on one host write straight into each other's slots.

Each seat is a memfd of its own (a ring, headers, rows), mapped here into the landing's address ranges and at the peer
as its outbox, where the allocator adopts the rows; a post moves nothing but an immediate, through the ring, and one
eventfd write wakes whoever reads it: the peer's loop, or its poller. Where a device's memory can be handed to other
processes (`msi.net.regions.SharesMemory`), a seat's rows are that, by a descriptor of their own. The handshake passes
descriptors over an abstract Unix socket (nothing is left in the file system), which stays open: its end is how the
death of a peer is seen at once. Only processes of the same user are taken, and of these who proves to be of the same
instance (`msi.net.link_proof`): first the listening end, for the name that it listens by, so that nobody who took that
name, or passes on what others say, gets any memory of the dialling end's.

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

from msi.errors import ConfigError, EngineError, ProtocolError, TransportError
from msi.net.acceptor import Acceptor
from msi.net.complaints import Complaints
from msi.net.delivery import Delivery
from msi.net.link_proof import CHALLENGE_BYTES, PROVED_BYTES, Proofs
from msi.net.regions import HOST_MEMORY, Allocator
from msi.net.shm_seats import RING_ENTRIES, PeerSeat, Ring, ShmLanding
from msi.net.slots import LAYOUT, SlotLayout
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

IMMEDIATE = CompletionKind.IMMEDIATE
REFUSED, ACCEPTED, CHALLENGED = b"\x00", b"\x01", b"\x02"
NUM_FDS = (2, 3)  # that travel with a hello or a welcome: a doorbell, ring with headers and rows, or rows by themselves
CONNECT_AGAIN_S = 0.02


def is_available() -> str | None:
    """None if this host can do it, else the reason why not."""
    if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
        return "shared memory needs Linux (memfd, eventfd)"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"shared memory needs x86-64's order of stores, this is {platform.machine()}"
    return None


class ShmEndpoint:
    def __init__(
        self, transport: ShmTransport, sock: socket.socket, peer: bytes, landing: ShmLanding, seat: int,
        peers: PeerSeat, in_ring: memoryview, doorbell: int,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.seat = seat
        self.way = "shared memory"
        self.came_at = 0.0
        self.out_headers = peers.headers
        self.out_rows = peers.rows
        self.in_ring = Ring(in_ring)
        self.sock = sock
        self._transport = transport
        self._out_ring = Ring(peers.ring)
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
        key: what peers have to prove that they hold (`Trust.link_key`); None takes whoever comes.
        complain: told who is cut off.
        poller: reads the rings in place of the event loop.

    Raises:
        ConfigError: the host cannot do it; the message says why.
    """

    def __init__(
        self, *, key: bytes | None = None, complain: Complaints | None = None, poller: Poller | None = None
    ) -> None:
        if (reason := is_available()) is not None:
            raise ConfigError(f"{reason}; use `transport=inproc`")
        self._proofs = Proofs(key)
        self._name = b""  # that we listen by
        self._deliver = Delivery()
        self._loop = asyncio.get_running_loop()
        self._poller = poller
        self._taking = threading.Lock()  # held while rings are read, so that each entry is handed over once
        self._endpoints: tuple[ShmEndpoint, ...] = ()
        self._complain = complain or Complaints(log)
        self._acceptor: Acceptor | None = None
        self._accept: Callable[[bytes], Admission] | None = None
        self._allocator: Allocator = HOST_MEMORY  # whose the landings are: one per worker
        self._is_open = True
        if poller is None:
            self._doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._loop.add_reader(self._doorbell, self._rung)
        else:
            self._doorbell = os.dup(poller.bell)
            poller.add(self.take)

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> ShmLanding:
        self._allocator = allocator
        return ShmLanding(num_seats, layout, allocator)

    # -- connections -------------------------------------------------------------------------------------------------

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        name = f"msi-{os.getpid()}-{secrets.token_hex(8)}"
        self._accept, self._name = accept, name.encode()
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
        name, layout = address.removeprefix("shm://"), landing.layout.encode()
        try:
            with landing.open(seat) as ours:
                async with asyncio.timeout(timeout_s):
                    await _connect(sock, "\0" + name)
                    if why_not := _why_not(sock):  # before it gets any of our memory
                        raise TransportError(address, why_not)
                    said = self._proofs.hello(await self._challenge(sock, address), hello, layout)
                    socket.send_fds(sock, [layout + said], [self._doorbell, *ours.fds])
                    reply, fds = await self._receive(sock)
            with _closing(fds):
                if reply[:1] != ACCEPTED or len(fds) not in NUM_FDS:
                    raise _refused(address, reply)
                offered, welcome = reply[1 : 1 + LAYOUT.size], reply[1 + LAYOUT.size :]
                peers = PeerSeat.open(offered, fds[1:], landing.allocator, address)
                doorbell = os.dup(fds[0])
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
        endpoint = ShmEndpoint(self, sock, welcome, landing, seat, peers, ours.ring, doorbell)
        self._add(endpoint)
        return endpoint

    async def _challenge(self, sock: socket.socket, address: str) -> bytes:
        """What the accepting end wants answered, once it has proved to be of our instance and to listen there."""
        nonce = self._proofs.challenge()
        sock.send(nonce)
        reply, fds = await self._receive(sock)
        with _closing(fds):
            if reply[:1] != CHALLENGED:
                raise _refused(address, reply)
            challenge, proof = reply[1 : 1 + CHALLENGE_BYTES], reply[1 + CHALLENGE_BYTES :]
            self._proofs.check_welcome(challenge, nonce, proof, address.removeprefix("shm://").encode())
        return challenge

    async def _challenged(self, sock: socket.socket) -> bytes:
        """The accepting half of that. Returns our challenge."""
        nonce, fds = await self._receive(sock)
        with _closing(fds):
            if len(nonce) != CHALLENGE_BYTES:
                raise ProtocolError(f"a challenge of {len(nonce)} bytes")
            challenge = self._proofs.challenge()
            sock.send(CHALLENGED + challenge + self._proofs.welcome(challenge, nonce, b"", self._name))
        return challenge

    async def _welcome(self, sock: socket.socket, name: str) -> None:
        """The accepting half of the handshake. Whoever does not speak it is cut off."""
        assert self._accept is not None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                challenge = await self._challenged(sock)
                said, fds = await self._receive(sock)
            with _closing(fds):
                layout = said[: LAYOUT.size]
                hello = self._proofs.check_hello(challenge, said[LAYOUT.size :], layout)
                if len(fds) not in NUM_FDS:
                    raise TransportError("peer", "sent no descriptors with its hello")
                peers = PeerSeat.open(layout, fds[1:], self._allocator, "peer")
                admission = self._accept(hello)
                landing = admission.landing
                assert isinstance(landing, ShmLanding)
                doorbell = os.dup(fds[0])
            with landing.open(admission.seat) as ours:
                socket.send_fds(
                    sock, [ACCEPTED + landing.layout.encode() + admission.welcome], [self._doorbell, *ours.fds]
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
        endpoint = ShmEndpoint(self, sock, hello, landing, admission.seat, peers, ours.ring, doorbell)
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
        message, fds, _, _ = socket.recv_fds(sock, LAYOUT.size + PROVED_BYTES + MAX_HELLO_BYTES, max(NUM_FDS))
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


def _refused(address: str, reply: bytes) -> TransportError:
    reason = reply[1:].decode(errors="replace") or "closed the connection"
    return TransportError(address, f"refused: {reason}")


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
