"""The TCP transport: workers on different hosts, one connection per pair.

    magic 4 | version 2 | kind 2 | bytes that follow 4 | bytes of my seat 8 | the hello, the welcome or the refusal

go each way first, within a time limit and a length limit; then frames (see `msi.net.tcp_endpoint`). Whoever sends
anything else is cut off, which is counted and logged; nothing that strangers send reaches a seat.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

from msi.errors import ConfigError, EngineError, TransportError
from msi.net.delivery import Delivery
from msi.net.landing import PlainLanding
from msi.net.tcp_endpoint import TcpEndpoint
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

GREETING_MAGIC = b"MSIT"
VERSION = 1
GREETING = struct.Struct("<4sHHIQ")  # magic, version, kind, bytes that follow, bytes of the sender's seat
HELLO, ACCEPTED, REFUSED = 1, 2, 3
MAX_SEAT_BYTES = 1 << 40
MAX_HANDSHAKES = 256  # at a time
BUFFER_BYTES = 4 << 20  # of a socket, each way: a large post leaves in one write
SILENT_MS = 10_000  # the kernel gives up a peer that acknowledges nothing for so long; links give up sooner


class TcpTransport:
    """Create it on its event loop.

    Args:
        host: this host's address as peers reach it; also where to listen, where it is one of this host's own.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.num_cut_off: Counter[str] = Counter()  # connections, by reason
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._deliver = Delivery()
        self._endpoints: set[TcpEndpoint] = set()
        self._listener: socket.socket | None = None
        self._accept: Callable[[bytes], Admission] | None = None
        self._handshakes: set[asyncio.Task[None]] = set()

    def register(self, num_seats: int, seat_bytes: int) -> PlainLanding:
        return PlainLanding(num_seats, seat_bytes)

    def deliver(self, handler: Handler) -> None:
        self._deliver.start(handler)

    # -- connections -------------------------------------------------------------------------------------------------

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        self._accept = accept
        self._listener = await self._bind()
        self._listener.listen(128)
        self._loop.add_reader(self._listener, self._incoming)
        return _address(self._host, self._listener.getsockname()[1])

    async def _bind(self) -> socket.socket:
        try:
            found = await self._loop.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"{self._host!r} is no address of a host: {error.strerror or error}") from error
        family, kind, protocol, _, at = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        _size_buffers(sock)  # accepted ones inherit it
        try:
            sock.bind(at)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                sock.close()
                raise ConfigError(f"cannot listen on {self._host}: {error.strerror}") from error
            sock.bind(("", 0))  # an address that is translated on its way to this host
        return sock

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        assert len(hello) <= MAX_HELLO_BYTES, len(hello)
        host, port = split_address(address)
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                family, kind, protocol, _, at = found[0]
                sock = socket.socket(family, kind, protocol)
                sock.setblocking(False)
                _size_buffers(sock)
                await self._loop.sock_connect(sock, at)
                await self._loop.sock_sendall(sock, _greeting(HELLO, hello, landing.stride))
                answer, outbox_bytes, welcome = await self._receive_greeting(sock, address)
            if answer != ACCEPTED:
                raise TransportError(address, f"refused: {welcome.decode(errors='replace')}")
            endpoint = self._endpoint(sock, address, welcome, landing, seat, outbox_bytes)
        except TimeoutError as error:
            _close(sock)
            raise TransportError(address, f"did not answer within {timeout_s:g} s") from error
        except OSError as error:
            _close(sock)
            raise TransportError(address, f"cannot be reached: {error.strerror or error}") from error
        except BaseException:
            _close(sock)
            raise
        endpoint.start()
        return endpoint

    def _incoming(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                sock, (host, port, *_) = self._listener.accept()
                name = f"{host}:{port}"
                sock.setblocking(False)
                if len(self._handshakes) >= MAX_HANDSHAKES:
                    self._cut_off(name, "one handshake too many")
                    sock.close()
                    continue
                task = self._loop.create_task(self._welcome(sock, name))
                self._handshakes.add(task)
                task.add_done_callback(self._handshakes.discard)

    async def _welcome(self, sock: socket.socket, name: str) -> None:
        """The accepting half of the handshake. Whoever does not speak it is cut off."""
        assert self._accept is not None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                kind, outbox_bytes, hello = await self._receive_greeting(sock, name)
            if kind != HELLO:
                raise TransportError(name, f"sent greeting {kind} instead of a hello")
            admission = self._accept(hello)
            endpoint = self._endpoint(sock, name, hello, admission.landing, admission.seat, outbox_bytes)
        except TimeoutError:
            self._cut_off(name, f"no hello within {CONNECT_TIMEOUT_S:g} s")
            sock.close()
            return
        except (EngineError, OSError) as error:
            self._cut_off(name, "refused" if isinstance(error, EngineError) else "connection lost", str(error))
            with contextlib.suppress(OSError):
                sock.send(_greeting(REFUSED, str(error).encode()[:4096], 0))
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        # From here on the seat is taken: a connection that is broken already ends like any other.
        with contextlib.suppress(TransportError):
            endpoint.write(_greeting(ACCEPTED, admission.welcome, admission.landing.stride))
        self._deliver(endpoint, CompletionKind.CONNECTED)
        endpoint.start()

    def _endpoint(
        self, sock: socket.socket, name: str, peer: bytes, landing: Landing, seat: int, outbox_bytes: int
    ) -> TcpEndpoint:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_USER_TIMEOUT", SILENT_MS), ("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 1)):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        endpoint = TcpEndpoint(
            sock, name=name, peer=peer, landing=landing, seat=seat, outbox_bytes=outbox_bytes,
            deliver=self._deliver, forget=self._endpoints.discard, cut_off=self._cut_off,
        )  # fmt: skip
        self._endpoints.add(endpoint)
        return endpoint

    def _cut_off(self, name: str, reason: str, details: str = "") -> None:
        self.num_cut_off[reason] += 1
        log.warning("cut %s off: %s", name, details or reason)

    # -- greetings ---------------------------------------------------------------------------------------------------

    async def _receive_greeting(self, sock: socket.socket, name: str) -> tuple[int, int, bytes]:
        """Kind, bytes of the peer's seat, and what it says."""
        greeting = await self._receive(sock, GREETING.size, name)
        magic, version, kind, num_bytes, seat_bytes = GREETING.unpack(greeting)
        if magic != GREETING_MAGIC:
            raise TransportError(name, "does not speak our protocol")
        if version != VERSION:
            raise TransportError(name, f"speaks version {version} of the protocol, we speak {VERSION}")
        if num_bytes > MAX_HELLO_BYTES:
            raise TransportError(name, f"greets with {num_bytes} bytes; at most {MAX_HELLO_BYTES} are allowed")
        if kind != REFUSED and not 0 < seat_bytes <= MAX_SEAT_BYTES:
            raise TransportError(name, f"offers a seat of {seat_bytes} bytes")
        return kind, seat_bytes, await self._receive(sock, num_bytes, name)

    async def _receive(self, sock: socket.socket, num_bytes: int, name: str) -> bytes:
        buffer = bytearray(num_bytes)
        left = memoryview(buffer)
        while left:
            num_read = await self._loop.sock_recv_into(sock, left)
            if not num_read:
                raise TransportError(name, "closed the connection before its greeting was complete")
            left = left[num_read:]
        return bytes(buffer)

    async def close(self) -> None:
        for task in list(self._handshakes):
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        for endpoint in list(self._endpoints):
            endpoint.close()
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT. Raises TransportError."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not address.startswith("tcp://") or not host or not port:
        raise TransportError(address, "is not a TCP address (tcp://HOST:PORT)")
    return host, port


def address_towards(host: str, port: int) -> str:
    """This host's address on the way to `host`; sends nothing. Raises ConfigError."""
    try:
        family, _, _, _, at = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(at)
            return str(sock.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"cannot tell by which address others reach this host ({host}: {error.strerror or error}); "
            f"give --advertise-host"
        ) from error


def _address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _greeting(kind: int, text: bytes, seat_bytes: int) -> bytes:
    return GREETING.pack(GREETING_MAGIC, VERSION, kind, len(text), seat_bytes) + text


def _size_buffers(sock: socket.socket) -> None:
    """Before connecting: the window's scale follows from it. A smaller limit of the host's leaves it to the kernel,
    whose own tuning then goes further than what could be set.
    """
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/sys/net/core/{limit}") as file:
            if int(file.read()) >= BUFFER_BYTES:
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()
