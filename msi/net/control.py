"""Control sockets: typed messages between the coordinator, its workers and its clients over ZeroMQ.

On a Unix socket (ipc://) only processes of the same user are heard, or of root. Over TCP, those who hold the instance's
secret: keys for CURVE derive from it, so that it is proved and everything is encrypted, and it is never sent.

Whatever arrives and is not one of the messages is counted and dropped. Sends never block: a client's wait for its
coordinator, and a peer of the coordinator's that does not read is given up once it is a bound behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from msi.errors import ConfigError, ProtocolError
from msi.net.codec import Codec
from msi.net.complaints import Complaints
from msi.net.pulse import PulseThread
from msi.net.secret import VARIABLE, Secret
from msi.net.socket_dir import check_private

log = logging.getLogger(__name__)

HEARTBEAT_MS = 1000
SILENT_MS = 15_000  # longer than a process may stand still: its connections survive that
CONNECT_TIMEOUT_MS = 2000
HANDSHAKE_MS = 5000  # whoever connects has so long to say and prove who it is
MAX_BEHIND = 16 * 1024  # messages that a peer has not read
MAX_UNREAD = 4096  # messages of one peer that were not read; then its connection stands, and breaks if that lasts
MAX_GIVEN_UP = 4096  # routes to remember
MAX_CONNECTIONS = 4096
SHARED_FROM = 64 * 1024  # bytes of a message that is kept as long as it is the same one
TAKEN_PER_TURN = 64  # messages in a row before others on the event loop get their turn
REFUSED_TIMES = 3  # in a row: it is not the network
REFUSED_WITHIN_S = 2.0  # of connecting; who takes longer is slow, or stopped
CONNECT_AGAIN_S = 0.25
ZAP_ADDRESS, ZAP_DOMAIN = "inproc://zeromq.zap.01", "msi"
Event = zmq.Event
HANDSHAKE_FAILED = (
    Event.HANDSHAKE_FAILED_PROTOCOL | Event.HANDSHAKE_FAILED_NO_DETAIL | Event.HANDSHAKE_FAILED_AUTH
)  # fmt: skip
AT_THE_DOOR = Event.ACCEPTED | Event.ACCEPT_FAILED | Event.DISCONNECTED | HANDSHAKE_FAILED
ON_THE_WAY = Event.CONNECTED | Event.HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED


class MessageServer(Protocol):
    """The coordinator's end: hears many peers, each known by an opaque route."""

    address: str

    @property
    def dropped(self) -> Counter[str]:
        """What was not taken, by kind: messages, and connections."""

    def send(self, route: bytes, message: Any) -> None:
        """Never blocks; nobody says whether it came."""

    async def receive(self) -> tuple[bytes, Any]:
        """The next message and who sent it. Cancellation loses nothing."""

    @property
    def has_unread(self) -> bool:
        """Whether messages have come that were not received yet."""

    def close(self) -> None: ...


class MessageClient(Protocol):
    """A worker's or client's end."""

    num_sent: int

    def send(self, message: Any) -> None:
        """Never blocks; nobody says whether it came."""

    async def receive(self) -> Any:
        """The next message. Cancellation loses nothing.

        Raises:
            ConfigError: the coordinator does not take this process.
        """

    @property
    def has_unread(self) -> bool:
        """Whether messages have come that were not received yet."""

    def keep_alive(self, message: Callable[[float], Any], every_s: float) -> None:
        """Sends a message that often until it is closed, however busy the event loop is; over a connection of its own.

        Under a virtual clock no loop is ever busy, and nothing is sent.

        Args:
            message: makes it, on another thread; is told how late that thread itself is.
        """

    def close(self) -> None: ...


def is_address(text: str) -> bool:
    """Whether this is where a coordinator may be reached."""
    return text.startswith(("tcp://", "ipc://"))


class _Socket:
    """A ZeroMQ socket on the running event loop, for one task that receives."""

    def __init__(self, raw: zmq.Socket[bytes]) -> None:
        self.raw = raw
        self._num_taken = 0
        self._failure = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def send(self, frames: list[Any]) -> None:
        """Raises zmq.ZMQError: there is no room (zmq.Again), or nobody."""
        self.raw.send_multipart(frames, zmq.NOBLOCK)
        if self._waiter is not None:
            self.look()  # sending may have acknowledged what announced a message

    def fail(self, sentence: str) -> None:
        """Nothing will come any more."""
        self._failure = sentence
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> list[bytes]:
        """Raises ConfigError once it has failed."""
        self._num_taken += 1
        if self._num_taken % TAKEN_PER_TURN == 0:
            await asyncio.sleep(0)
        while True:
            if self._failure:
                raise ConfigError(self._failure)
            try:
                return self.raw.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await self._readable()

    async def _readable(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self.raw.FD, self.look)
        assert self._waiter is None, "two tasks receive"
        self._waiter = self._loop.create_future()
        try:
            self.look()
            await self._waiter
        finally:
            self._waiter = None

    def look(self) -> bool:
        """Whether a message has come; wakes whoever waits for one.

        Asking acknowledges the descriptor, whose readiness says that something changed, not that a message came.
        """
        has_message = bool(int(self.raw.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
        if has_message and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return has_message

    def close(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.remove_reader(self.raw.FD)
            self._loop = None
        self.raw.close()


def _open(context: zmq.Context[zmq.Socket[bytes]], kind: int, max_bytes: int) -> zmq.Socket[bytes]:
    opened = context.socket(kind)
    opened.setsockopt(zmq.LINGER, 500)
    opened.setsockopt(zmq.SNDHWM, MAX_BEHIND)
    opened.setsockopt(zmq.RCVHWM, MAX_UNREAD)
    opened.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    opened.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    # a host that vanished says no goodbye: after that long its connection is dropped, and made anew once it is back
    opened.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    opened.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
    opened.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
    opened.setsockopt(zmq.RECONNECT_IVL, 100)
    opened.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    return opened


def _curve_pair(secret: Secret, end: str) -> tuple[bytes, bytes]:
    """Public and secret key of an end, which all who hold the secret know."""
    if not zmq.has("curve"):
        raise ConfigError(
            "this ZeroMQ was built without CURVE, so it cannot prove a secret; install pyzmq from PyPI's wheels"
        )
    private = z85.encode(secret.key(f"control {end}"))
    return zmq.curve_public(private), private


class ControlServer:
    """Binds; peers are known by an opaque route.

    Args:
        secret: what peers over TCP have to hold; None takes whoever comes.

    Raises:
        ConfigError: the address is not one, or its port is in use.
    """

    def __init__(self, bind: str, codec: Codec, secret: Secret | None = None) -> None:
        self._codec = codec
        self._complain = Complaints(log)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # ZeroMQ counts its routes from a number of rand(), which nobody seeds, and ends the process when a peer's next
        # one is taken already: who could guess it could take it.
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), "little"))
        self._socket = _Socket(_open(self._context, zmq.ROUTER, codec.max_bytes))
        self._socket.raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._door = _Door(self._context, self._socket.raw, secret, self._complain)
        self._given_up: dict[bytes, None] = {}
        self._shared: tuple[Any, zmq.Frame | None] = (None, None)  # a large message, and its bytes
        try:
            self.address = self._door.open(bind)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"cannot listen on {bind}: {zmq.strerror(error.errno or 0)}; "
                f"choose another port, or 0 for any that is free"
            ) from error
        except ConfigError:
            self.close()
            raise

    @property
    def dropped(self) -> Counter[str]:
        return self._complain.counts

    def send(self, route: bytes, message: Any) -> None:
        if route in self._given_up:
            return
        try:
            self._socket.send([route, self._encoded(message)])
        except ProtocolError as error:
            self._complain("too_large", f"cannot tell {_name(route)}: {error}")
        except zmq.Again:
            self._give_up(route)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._complain.counts["gone"] += 1  # it left; whoever asks it hears of that from elsewhere

    def _encoded(self, message: Any) -> bytes | zmq.Frame:
        same, frame = self._shared
        if message is same and frame is not None:
            return frame
        payload = self._codec.encode(message)
        if len(payload) < SHARED_FROM:
            return payload
        frame = zmq.Frame(payload, copy=True)
        self._shared = (message, frame)  # a greeting with a tokenizer costs its memory once, however many wait for it
        return frame

    def _give_up(self, route: bytes) -> None:
        """From now on it counts as silent, and is lost for that."""
        while len(self._given_up) >= MAX_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]
        self._given_up[route] = None
        self._complain("unread", f"gave up {_name(route)}: it has not read {MAX_BEHIND} messages")

    async def receive(self) -> tuple[bytes, Any]:
        """The next message and who sent it. Cancellation loses nothing."""
        self._door.watch()
        while True:
            frames = await self._socket.receive()
            if frames[0] in self._given_up:
                self._complain.counts["unread"] += 1
                continue
            try:
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames)} frames instead of one message")
                return frames[0], self._codec.decode(frames[1])
            except ProtocolError as error:
                self._complain("not_a_message", f"dropped a message from {_name(frames[0])}: {error}")

    @property
    def has_unread(self) -> bool:
        return self._socket.look()

    def close(self) -> None:
        self._door.close()
        self._socket.close()
        self._context.term()


class _Door:
    """Who may connect to a server, and how many at a time."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        router: zmq.Socket[bytes],
        secret: Secret | None,
        complain: Complaints,
    ) -> None:
        self._context = context
        self._socket = router
        self._secret = secret
        self._complain = complain
        self._asked: _Socket | None = None  # hears of those who proved that they know the server's key
        self._events: _Socket | None = None
        self._client_key = b""
        self._tasks: list[asyncio.Task[None]] = []
        self._num_connections = 0
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_connections = MAX_CONNECTIONS if descriptors < 0 else min(MAX_CONNECTIONS, descriptors // 4)
        self._address = ""

    def open(self, bind: str) -> str:
        """Listens; the address. Raises ConfigError and zmq.ZMQError."""
        if bind.startswith("ipc://"):
            check_private(Path(bind.removeprefix("ipc://")))
            with contextlib.suppress(zmq.ZMQError):  # where the kernel does not say who connects, the directory guards
                for user in {os.geteuid(), 0}:
                    self._socket.setsockopt(zmq.IPC_FILTER_UID, user)
        elif self._secret is not None:
            public, private = _curve_pair(self._secret, "server")
            self._client_key = z85.decode(_curve_pair(self._secret, "client")[0])
            asked = self._context.socket(zmq.REP)
            self._asked = _Socket(asked)
            asked.setsockopt(zmq.LINGER, 0)
            asked.bind(ZAP_ADDRESS)
            self._socket.curve_publickey, self._socket.curve_secretkey = public, private
            self._socket.curve_server = True
            self._socket.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        self._events = _Socket(self._socket.get_monitor_socket(AT_THE_DOOR))
        self._socket.bind(bind)
        self._address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if bind.startswith("ipc://"):
            os.chmod(self._address.removeprefix("ipc://"), 0o600)
        return self._address

    def watch(self) -> None:
        """Starts to answer the door, on the running event loop."""
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks.append(loop.create_task(self._follow(), name="connections"))
            if self._asked is not None:
                self._tasks.append(loop.create_task(self._judge(self._asked), name="secrets"))

    async def _judge(self, asked: _Socket) -> None:
        """Who has proved to know the server's key has to hold the clients', too (RFC 27)."""
        while True:
            frames = await asked.receive()
            version, request_id, mechanism = frames[0], frames[1], frames[5] if len(frames) > 5 else b""
            is_known = mechanism == b"CURVE" and len(frames) == 7 and frames[6] == self._client_key
            answer = (b"200", b"OK", b"member") if is_known else (b"400", b"the secret differs", b"")
            asked.send([version, request_id, *answer, b""])

    async def _follow(self) -> None:
        assert self._events is not None
        while True:
            event = parse_monitor_message(await self._events.receive())
            match event["event"]:
                case Event.ACCEPTED:
                    self._num_connections += 1
                    if self._num_connections > self._max_connections:
                        self._complain(
                            "too_many", f"{self._max_connections} connections to {self._address} are the most"
                        )
                        self._refuse(event["value"])
                case Event.DISCONNECTED:
                    self._num_connections -= 1
                case Event.ACCEPT_FAILED if event["value"]:
                    self._complain("no_descriptors", f"no connection can be taken: {os.strerror(event['value'])}")
                case Event.ACCEPT_FAILED:
                    self._complain("other_user", f"another user tried to connect to {self._address}")
                case Event.HANDSHAKE_FAILED_PROTOCOL | Event.HANDSHAKE_FAILED_NO_DETAIL | Event.HANDSHAKE_FAILED_AUTH:
                    why = "holds another secret than this instance's, or none, or does not speak its protocol"
                    if self._secret is None:
                        why = "offers a secret, and the coordinator has none, or does not speak its protocol"
                    self._complain("handshake", f"refused a connection to {self._address}: whoever made it {why}")

    def _refuse(self, fd: int) -> None:
        """Hangs up a connection that was just accepted. If it is gone already its number may be that of another."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connection:
            here = connection.getsockname()
            if self._address.endswith(f":{here[1]}" if isinstance(here, tuple) else here or "nowhere"):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._events is not None:
            self._socket.disable_monitor()
            self._events.close()
        if self._asked is not None:
            self._asked.close()


def _name(route: bytes) -> str:
    return route.hex()[:16]


class ControlClient:
    """Connects, and reconnects by itself.

    Args:
        secret: the instance's, for an address of TCP; None where it has none.

    Raises:
        ConfigError: the address is not one.
    """

    def __init__(self, address: str, codec: Codec, secret: Secret | None = None) -> None:
        self.num_sent = 0
        self._address = address
        self._codec = codec
        self._secret = secret
        self._complain = Complaints(log)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        raw = _open(self._context, zmq.DEALER, codec.max_bytes)
        self._socket = _Socket(raw)
        self._pulse: PulseThread | None = None
        self._events: _Socket | None = None
        self._watching: asyncio.Task[None] | None = None
        try:
            if not is_address(address):
                raise zmq.ZMQError(zmq.EINVAL)
            if address.startswith("ipc://"):
                check_private(Path(address.removeprefix("ipc://")))
            self._prove(raw)
            self._events = _Socket(raw.get_monitor_socket(ON_THE_WAY))
            raw.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"{address!r} is not a coordinator's address; give tcp://HOST:PORT") from error
        except ConfigError:
            self.close()
            raise

    def send(self, message: Any) -> None:
        self.num_sent += 1
        try:
            self._socket.send([self._codec.encode(message)])
        except zmq.Again:
            self._complain("unsent", f"the coordinator at {self._address} takes no more messages; one is lost")

    async def receive(self) -> Any:
        """The next message. Cancellation loses nothing.

        Raises:
            ConfigError: the coordinator does not take this process: it has another secret.
        """
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._follow(), name="connection")
        while True:
            frames = await self._socket.receive()
            try:
                return self._codec.decode(frames[-1])
            except ProtocolError as error:
                self._complain("not_a_message", f"dropped a message from the coordinator: {error}")

    async def _follow(self) -> None:
        """Until it is clear that the coordinator will not take us."""
        assert self._events is not None
        connected_at, num_refused = 0.0, 0
        while True:
            event = parse_monitor_message(await self._events.receive())["event"]
            now = time.monotonic()
            match event:
                case Event.CONNECTED:
                    connected_at = now
                case Event.HANDSHAKE_SUCCEEDED:
                    num_refused = 0
                case Event.HANDSHAKE_FAILED_PROTOCOL | Event.HANDSHAKE_FAILED_AUTH:  # ZeroMQ itself gives up then
                    num_refused += 1
                    asyncio.get_running_loop().call_later(CONNECT_AGAIN_S, self._connect_again)
                case Event.HANDSHAKE_FAILED_NO_DETAIL if now - connected_at < REFUSED_WITHIN_S:
                    num_refused += 1
            if num_refused >= REFUSED_TIMES:
                self._socket.fail(self._why_refused())
                return

    def _prove(self, raw: zmq.Socket[bytes]) -> None:
        if self._secret is not None and self._address.startswith("tcp://"):
            raw.curve_serverkey = _curve_pair(self._secret, "server")[0]
            raw.curve_publickey, raw.curve_secretkey = _curve_pair(self._secret, "client")

    @property
    def has_unread(self) -> bool:
        return self._socket.look()

    def keep_alive(self, message: Callable[[float], Any], every_s: float) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        raw = _open(self._context, zmq.DEALER, self._codec.max_bytes)
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.IMMEDIATE, 1)  # none is kept for later: an old sign of life is none
        self._prove(raw)
        raw.connect(self._address)
        self._pulse = PulseThread(raw, lambda late_s: self._codec.encode(message(late_s)), every_s)

    def _connect_again(self) -> None:
        if not self._socket.raw.closed:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.raw.disconnect(self._address)
            with contextlib.suppress(zmq.ZMQError):
                self._socket.raw.connect(self._address)

    def _why_refused(self) -> str:
        if self._secret is None:
            return (
                f"the coordinator at {self._address} asks for a secret, and this process was given none: give it the "
                f"coordinator's --secret-file (or {VARIABLE}); or it is no coordinator that listens there"
            )
        return (
            f"the secret differs: the coordinator at {self._address} has another than this process, or none; give all "
            f"processes of an instance the same --secret-file (or {VARIABLE}); or it is no coordinator that listens "
            "there"
        )

    def close(self) -> None:
        """What was sent is given half a second to leave."""
        if self._watching is not None:
            self._watching.cancel()
        if self._pulse is not None:
            self._pulse.stop()
        if self._events is not None:
            self._socket.raw.disable_monitor()
            self._events.close()
        self._socket.close()
        self._context.term()
