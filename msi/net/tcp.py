"""The TCP transport: workers on different hosts, one connection per pair.

    magic 4 | version 2 | kind 2 | bytes that follow 4 | layout of my seat 12 | challenge, hello, welcome or refusal

The accepting end challenges, the other says hello, and is welcomed or refused, within a time limit and a length limit;
both prove that they are of one instance (`msi.net.link_proof`) before anything is made for them. Then frames
(see `msi.net.tcp_endpoint`). All that follows the challenge is encrypted and signed (`msi.net.tls`) where both ends are
told so; else nothing is. Whoever sends anything else is cut off, which is counted and logged; nothing that strangers
send reaches a seat.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from msi.errors import ConfigError, EngineError, ProtocolError, TransportError
from msi.net.acceptor import Acceptor
from msi.net.complaints import Complaints
from msi.net.delivery import Delivery
from msi.net.landing import PlainLanding
from msi.net.link_proof import DIFFERS, PROOF_BYTES, PROVED_BYTES, Proofs
from msi.net.regions import Allocator
from msi.net.slots import LAYOUT, SlotLayout
from msi.net.tcp_endpoint import StreamSocket, TcpEndpoint, TurnDelivery
from msi.net.tls import Tls, until_ready
from msi.net.transport import (
    CONNECT_TIMEOUT_S,
    MAX_HELLO_BYTES,
    Admission,
    CompletionKind,
    Endpoint,
    Handler,
    Landing,
    Together,
)

log = logging.getLogger(__name__)

GREETING_MAGIC = b"MSIT"
VERSION = 4
GREETING = struct.Struct("<4sHHI12s")  # magic, version, kind, bytes that follow, layout of the sender's seat
HELLO, ACCEPTED, REFUSED, CHALLENGE, ENCRYPTED = 1, 2, 3, 4, 5  # the last: a challenge, and TLS follows
ENCRYPTION_DIFFERS = "only one of both ends is told to encrypt rows: give all processes `encrypt_rows`, or none"
NO_LAYOUT = bytes(LAYOUT.size)  # of who offers no seat
MAX_GREETING_BYTES = MAX_HELLO_BYTES + max(PROVED_BYTES, PROOF_BYTES)
BUFFER_BYTES = 4 << 20  # of a socket, each way: a large post leaves in one write
SILENT_MS = 10_000  # the kernel gives up a peer that acknowledges nothing for so long; links give up sooner


class TcpTransport:
    """Create it on its event loop.

    Args:
        host: this host's address as peers reach it; also where to listen, where it is one of this host's own.
        key: what peers have to prove that they hold (`Trust.link_key`); None takes whoever comes.
        encrypt: all that is said on connections; needs a key, and peers that do it, too.
        complain: told who is cut off.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        *,
        key: bytes | None = None,
        encrypt: bool = False,
        complain: Complaints | None = None,
    ) -> None:
        self._host = host
        self._tls = _tls(key) if encrypt else None
        self._challenge = CHALLENGE if self._tls is None else ENCRYPTED
        self._proofs = Proofs(key)
        self._complain = complain or Complaints(log)
        self._loop = asyncio.get_running_loop()
        self._deliver = Delivery()
        self._turn = TurnDelivery(self._deliver)
        self._endpoints: set[TcpEndpoint] = set()
        self._acceptor: Acceptor | None = None
        self._accept: Callable[[bytes], Admission] | None = None

    @property
    def num_cut_off(self) -> Counter[str]:
        """Connections, by reason."""
        return self._complain.counts

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> PlainLanding:
        return PlainLanding(num_seats, layout, allocator)

    def deliver(self, handler: Handler, together: Together | None = None) -> None:
        self._deliver.start(handler, together)

    def take(self) -> None:
        """Nothing: the event loop hands over all there is."""

    # -- connections -------------------------------------------------------------------------------------------------

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        self._accept = accept
        listener = await self._bind()
        self._acceptor = Acceptor(listener, self._welcome, self._complain)
        return _address(self._host, listener.getsockname()[1])

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
        address = next((one for one in address.split() if one.startswith("tcp://")), address)  # of several ways
        host, port = split_address(address)
        sock: StreamSocket | None = None
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                family, kind, protocol, _, at = found[0]
                sock = plain = socket.socket(family, kind, protocol)
                plain.setblocking(False)
                _size_buffers(plain)
                await self._loop.sock_connect(plain, at)
                _set_options(plain)
                challenge = await self._expect(self._challenge, sock, address)
                if self._tls is not None:
                    sock = await self._tls.wrap(plain, is_accepting=False)
                offered = landing.layout.encode()
                said = self._proofs.hello(challenge.text, hello, offered)
                await _send(sock, _greeting(HELLO, said, offered))
                answer = await self._expect(ACCEPTED, sock, address)
            welcome = self._proofs.check_welcome(challenge.text, said, answer.text, answer.layout)
            endpoint = self._endpoint(sock, address, welcome, landing, seat, SlotLayout.decode(answer.layout))
        except TimeoutError as error:
            _close(sock)
            raise TransportError(address, f"did not answer within {timeout_s:g} s") from error
        except ssl.SSLEOFError as error:
            _close(sock)
            raise TransportError(address, "closed the connection before encryption began") from error
        except ssl.SSLError as error:
            _close(sock)
            raise TransportError(address, f"{DIFFERS} ({error.reason})") from error
        except OSError as error:
            _close(sock)
            raise TransportError(address, f"cannot be reached: {error.strerror or error}") from error
        except ProtocolError as error:
            if sock is not None:  # the other end is to know why, too
                with contextlib.suppress(OSError):
                    sock.sendmsg((_greeting(REFUSED, str(error).encode()),))
            _close(sock)
            raise TransportError(address, str(error)) from error
        except BaseException:
            _close(sock)
            raise
        endpoint.start()
        return endpoint

    async def _welcome(self, plain: socket.socket, name: str) -> None:
        """The accepting half of the handshake. Whoever does not speak it is cut off."""
        assert self._accept is not None
        sock: StreamSocket = plain
        try:
            _set_options(plain)
            challenge = self._proofs.challenge()
            plain.send(_greeting(self._challenge, challenge))  # a few bytes, into a socket that is empty
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if self._tls is not None:
                    sock = await self._tls.wrap(plain, is_accepting=True)
                said = await self._expect(HELLO, sock, name)
            hello = self._proofs.check_hello(challenge, said.text, said.layout)
            layout = SlotLayout.decode(said.layout)
            admission = self._accept(hello)
            endpoint = self._endpoint(sock, name, hello, admission.landing, admission.seat, layout)
        except TimeoutError:
            self._cut_off(name, "no hello", f"no hello within {CONNECT_TIMEOUT_S:g} s")
            sock.close()
            return
        except (EngineError, OSError) as error:
            self._cut_off(name, "refused" if isinstance(error, EngineError) else "connection lost", str(error))
            with contextlib.suppress(OSError):
                sock.sendmsg((_greeting(REFUSED, str(error).encode()[:4096]),))
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        # From here on the seat is taken: a connection that is broken already ends like any other.
        ours = admission.landing.layout.encode()
        welcome = self._proofs.welcome(challenge, said.text, admission.welcome, ours)
        accepted = _greeting(ACCEPTED, welcome, ours)
        with contextlib.suppress(TransportError):
            endpoint.write((accepted,), len(accepted))
        self._deliver(endpoint, CompletionKind.CONNECTED)
        endpoint.start()

    def _endpoint(
        self, sock: StreamSocket, name: str, peer: bytes, landing: Landing, seat: int, layout: SlotLayout
    ) -> TcpEndpoint:
        endpoint = TcpEndpoint(
            sock, name=name, peer=peer, landing=landing, seat=seat, out_layout=layout,
            deliver=self._turn, forget=self._endpoints.discard, cut_off=self._cut_off,
        )  # fmt: skip
        self._endpoints.add(endpoint)
        return endpoint

    def _cut_off(self, name: str, reason: str, details: str = "") -> None:
        self._complain(reason, f"cut {name} off: {details or reason}")

    # -- greetings ---------------------------------------------------------------------------------------------------

    async def _expect(self, expected: int, sock: StreamSocket, name: str) -> Greeting:
        """The peer's next greeting, which has to be of this kind. Raises TransportError: it is not, or a refusal."""
        magic, version, kind, num_bytes, layout = GREETING.unpack(await self._receive(sock, GREETING.size, name))
        if magic != GREETING_MAGIC:
            raise TransportError(name, "does not speak our protocol")
        if version != VERSION:
            raise TransportError(name, f"speaks version {version} of the protocol, we speak {VERSION}")
        if num_bytes > MAX_GREETING_BYTES:
            raise TransportError(name, f"greets with {num_bytes} bytes; at most {MAX_GREETING_BYTES} are allowed")
        if kind in (HELLO, ACCEPTED):
            SlotLayout.decode(layout)  # before anything follows
        if {kind, expected} == {CHALLENGE, ENCRYPTED}:
            raise TransportError(name, ENCRYPTION_DIFFERS)
        if kind not in (expected, REFUSED):
            raise TransportError(name, f"sent greeting {kind} instead of {expected}")
        text = await self._receive(sock, num_bytes, name)
        if kind != expected:
            raise TransportError(name, f"refused: {text.decode(errors='replace')}")
        return Greeting(text, layout)

    async def _receive(self, sock: StreamSocket, num_bytes: int, name: str) -> bytes:
        buffer = bytearray(num_bytes)
        left = memoryview(buffer)
        while left:
            try:
                num_read = sock.recv_into(left)
            except BlockingIOError:
                await until_ready(sock)
                continue
            if not num_read:
                raise TransportError(name, "closed the connection before its greeting was complete")
            left = left[num_read:]
        return bytes(buffer)

    async def close(self) -> None:
        if self._acceptor is not None:
            await self._acceptor.close()
            self._acceptor = None
        for endpoint in list(self._endpoints):
            endpoint.close()


class Greeting(NamedTuple):
    text: bytes
    layout: bytes  # of the sender's seat


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
            "give `advertise_host`"
        ) from error


def _address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _greeting(kind: int, text: bytes, layout: bytes = NO_LAYOUT) -> bytes:
    return GREETING.pack(GREETING_MAGIC, VERSION, kind, len(text), layout) + text


def _size_buffers(sock: socket.socket) -> None:
    """Before connecting: the window's scale follows from it. A smaller limit of the host's leaves it to the kernel,
    whose own tuning then goes further than what could be set.
    """
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/sys/net/core/{limit}") as file:
            if int(file.read()) >= BUFFER_BYTES:
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _set_options(sock: socket.socket) -> None:
    """Before TLS takes it over."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_USER_TIMEOUT", SILENT_MS), ("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 1)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _tls(key: bytes | None) -> Tls:
    if key is None:
        raise ConfigError("`encrypt_rows` needs a key that both ends hold")
    return Tls(hmac.digest(key, b"tls", "sha256"))


async def _send(sock: StreamSocket, greeting: bytes) -> None:
    left = memoryview(greeting)
    while left:
        try:
            left = left[sock.sendmsg((left,)) :]
        except BlockingIOError:
            await until_ready(sock, to_write=True)


def _close(sock: StreamSocket | None) -> None:
    if sock is not None:
        sock.close()
