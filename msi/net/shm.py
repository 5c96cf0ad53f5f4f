"""The shared-memory transport: workers on one host write straight into each other's slots.

Each seat is a memfd of its own, mapped here into the landing's address range and at the peer as its outbox; a post
moves nothing but an immediate, through a ring in front of the seat, and one eventfd write wakes the peer's loop. The
handshake passes descriptors over an abstract Unix socket (nothing is left in the file system), which stays open: its
end is how the death of a peer is seen at once. Only processes of the same user are taken.

The ring relies on stores becoming visible in order (x86-64); elsewhere the constructor says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import platform
import secrets
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator

from msi.errors import ConfigError, EngineError, TransportError
from msi.net.acceptor import Acceptor
from msi.net.complaints import Complaints
from msi.net.delivery import Delivery
from msi.net.transport import (
    CONNECT_TIMEOUT_S,
    MAX_HELLO_BYTES,
    Admission,
    CompletionKind,
    Endpoint,
    Handler,
    Landing,
)

log = logging.getLogger(__name__)

PAGE = mmap.PAGESIZE
RING_ENTRIES = 8191
RING_BYTES = -(-(RING_ENTRIES + 1) * 8 // PAGE) * PAGE  # the entries, and the reader's count in the last word
MAX_REGION_BYTES = 1 << 40
ACCEPTED, REFUSED = b"\x01", b"\x00"
CONNECT_AGAIN_S = 0.02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def _map(address: int | None, size: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    mapped = _libc.mmap(address, size, _READ_WRITE, flags, fd, offset)
    if mapped is None or mapped == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise ConfigError(f"cannot map {size} bytes: {os.strerror(code)}; use fewer or smaller slots")
    return int(mapped)


def is_available() -> str | None:
    """None if this host can do it, else the reason why not."""
    if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
        return "shared memory needs Linux (memfd, eventfd)"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"shared memory needs x86-64's order of stores, this is {platform.machine()}"
    return None


class _Ring:
    """Immediates from one writer to one reader; an entry's upper half says which turn of the ring it belongs to."""

    def __init__(self, memory: memoryview) -> None:
        self._entries = memory.cast("Q")
        self._count = 0

    def push(self, immediate: int) -> bool:
        """False when the reader is a whole ring behind."""
        count = self._count
        if count - self._entries[RING_ENTRIES] >= RING_ENTRIES:
            return False
        self._count = count + 1
        self._entries[count % RING_ENTRIES] = ((count + 1) & 0xFFFFFFFF) << 32 | immediate
        return True

    def drain(self) -> list[int]:
        entries, count = self._entries, self._count
        taken = []
        while (entry := entries[count % RING_ENTRIES]) >> 32 == (count + 1) & 0xFFFFFFFF:
            taken.append(entry & 0xFFFFFFFF)
            count += 1
        if taken:
            self._count = count
            entries[RING_ENTRIES] = count
        return taken


class ShmLanding:
    """Seats side by side in one address range; an unused or revoked seat is private zero memory."""

    def __init__(self, num_seats: int, seat_bytes: int) -> None:
        self.num_seats = num_seats
        self.stride = -(-seat_bytes // PAGE) * PAGE
        size = num_seats * self.stride
        self._base = _map(None, size, _ANONYMOUS)
        array = (ctypes.c_char * size).from_address(self._base)
        weakref.finalize(array, _libc.munmap, self._base, size)  # once no view of it is left
        self.memory = memoryview(array).cast("B")
        self._generations = [0] * num_seats

    def seat(self, index: int) -> memoryview:
        return self.memory[index * self.stride : (index + 1) * self.stride]

    def revoke(self, index: int) -> None:
        self._generations[index] += 1
        _map(self._base + index * self.stride, self.stride, _ANONYMOUS | _MAP_FIXED)

    def generation(self, index: int) -> int:
        return self._generations[index]

    def open(self, index: int) -> tuple[int, memoryview]:
        """Fresh shared memory for a seat: its descriptor (the caller closes it) and the ring in front of it."""
        fd = os.memfd_create("msi-seat", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, RING_BYTES + self.stride)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        _map(self._base + index * self.stride, self.stride, mmap.MAP_SHARED | _MAP_FIXED, fd, RING_BYTES)
        return fd, memoryview(mmap.mmap(fd, RING_BYTES))


def _open_peer(fd: int, peer: str) -> tuple[memoryview, memoryview]:
    """A peer's seat: its ring, and the outbox behind it. Raises TransportError for a descriptor that could fail us."""
    size = os.fstat(fd).st_size
    try:
        is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        is_sealed = 0
    if not is_sealed or not RING_BYTES < size <= MAX_REGION_BYTES:
        raise TransportError(peer, f"offered {size} bytes that are not a sealed seat")
    memory = memoryview(mmap.mmap(fd, size))
    return memory[:RING_BYTES], memory[RING_BYTES:]


class ShmEndpoint:
    def __init__(
        self, transport: ShmTransport, sock: socket.socket, peer: bytes, seat: int,
        outbox: memoryview, out_ring: memoryview, in_ring: memoryview, doorbell: int,
    ) -> None:  # fmt: skip
        self.peer = peer
        self.seat = seat
        self.outbox = outbox
        self.in_ring = _Ring(in_ring)
        self.sock = sock
        self._transport = transport
        self._out_ring = _Ring(out_ring)
        self._doorbell = doorbell
        self._is_open = True
        self._posting = threading.Lock()  # the doorbell is not closed, and its number reused, under a post

    def post(self, immediate: int, offset: int = 0, num_bytes: int = 0) -> None:
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
    """Raises ConfigError where the host cannot do it; the message says why."""

    def __init__(self, *, complain: Complaints | None = None) -> None:
        if (reason := is_available()) is not None:
            raise ConfigError(f"{reason}; use `transport=inproc`")
        self._deliver = Delivery()
        self._loop = asyncio.get_running_loop()
        self._doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop.add_reader(self._doorbell, self._rung)
        self._endpoints: list[ShmEndpoint] = []
        self._complain = complain or Complaints(log)
        self._acceptor: Acceptor | None = None
        self._accept: Callable[[bytes], Admission] | None = None
        self._is_open = True

    def register(self, num_seats: int, seat_bytes: int) -> ShmLanding:
        return ShmLanding(num_seats, seat_bytes)

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
        fd, in_ring = landing.open(seat)
        try:
            async with asyncio.timeout(timeout_s):
                await _connect(sock, "\0" + address.removeprefix("shm://"))
                if why_not := _why_not(sock):  # before it gets any of our memory
                    raise TransportError(address, why_not)
                socket.send_fds(sock, [hello], [fd, self._doorbell])
                reply, fds = await self._receive(sock)
            with _closing(fds):
                if reply[:1] != ACCEPTED or len(fds) != 2:
                    reason = reply[1:].decode(errors="replace") or "closed the connection"
                    raise TransportError(address, f"refused: {reason}")
                out_ring, outbox = _open_peer(fds[0], address)
                doorbell = os.dup(fds[1])
        except TimeoutError as error:
            sock.close()
            raise TransportError(address, f"did not answer within {timeout_s:g} s") from error
        except OSError as error:
            sock.close()
            raise TransportError(address, f"cannot be reached: {error.strerror or error}") from error
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(fd)
        endpoint = ShmEndpoint(self, sock, reply[1:], seat, outbox, out_ring, in_ring, doorbell)
        self._add(endpoint)
        return endpoint

    async def _welcome(self, sock: socket.socket, name: str) -> None:
        """The accepting half of the handshake. Whoever does not speak it is cut off."""
        assert self._accept is not None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                hello, fds = await self._receive(sock)
            with _closing(fds):
                if len(fds) != 2:
                    raise TransportError("peer", "sent no descriptors with its hello")
                out_ring, outbox = _open_peer(fds[0], "peer")
                admission = self._accept(hello)
                assert isinstance(admission.landing, ShmLanding)
                doorbell = os.dup(fds[1])
            fd, in_ring = admission.landing.open(admission.seat)
            try:
                socket.send_fds(sock, [ACCEPTED + admission.welcome], [fd, self._doorbell])
            finally:
                os.close(fd)
        except (EngineError, OSError, TimeoutError) as error:
            self._complain("refused", f"cut {name} off: {error or 'no hello in time'}")
            with contextlib.suppress(OSError):
                sock.send(REFUSED + str(error).encode()[:4096])
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        endpoint = ShmEndpoint(self, sock, hello, admission.seat, outbox, out_ring, in_ring, doorbell)
        self._add(endpoint)
        self._deliver(endpoint, CompletionKind.CONNECTED)
        self._read_rings()  # it may have posted already

    async def _receive(self, sock: socket.socket) -> tuple[bytes, list[int]]:
        """One message and its descriptors."""
        readable = asyncio.Event()
        self._loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(sock)
        message, fds, _, _ = socket.recv_fds(sock, MAX_HELLO_BYTES + 1, 2)
        return message, fds

    def _add(self, endpoint: ShmEndpoint) -> None:
        self._endpoints.append(endpoint)
        self._loop.add_reader(endpoint.sock, self._hung_up, endpoint)

    def forget(self, endpoint: ShmEndpoint) -> None:
        self._endpoints.remove(endpoint)
        self._loop.remove_reader(endpoint.sock)

    # -- what happens ------------------------------------------------------------------------------------------------

    def _rung(self) -> None:
        os.eventfd_read(self._doorbell)
        self._read_rings()

    def _read_rings(self) -> None:
        deliver, kind = self._deliver, CompletionKind.IMMEDIATE
        for endpoint in self._endpoints.copy():
            for immediate in endpoint.in_ring.drain():
                deliver(endpoint, kind, immediate)

    def _hung_up(self, endpoint: ShmEndpoint) -> None:
        """Nothing but the end comes over this socket after the handshake."""
        try:
            message = endpoint.sock.recv(1)
            reason = "spoke out of turn" if message else "its process is gone or closed the connection"
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return
            reason = str(error)
        self._read_rings()  # what it posted before
        endpoint.close()
        self._deliver(endpoint, CompletionKind.CLOSED, 0, reason)

    def deliver(self, handler: Handler) -> None:
        self._deliver.start(handler)

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if self._acceptor is not None:
            await self._acceptor.close()
        for endpoint in list(self._endpoints):
            endpoint.close()
        self._loop.remove_reader(self._doorbell)
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
