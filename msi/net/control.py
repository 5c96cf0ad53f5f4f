"""Control sockets: typed messages between the coordinator, its workers and its clients over ZeroMQ.

On a Unix socket (ipc://) only processes of the same user are heard, or of root. Over TCP, those who hold the instance's
secret: keys for CURVE derive from it, so that it is proved and everything is encrypted, and it is never sent.

Whatever arrives and is not one of the messages is counted and dropped. Sends never block: a client's wait for its
coordinator, and a peer of the coordinator's that does not read is given up once it is a bound behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from msi.errors import ConfigError, ProtocolError
from msi.net.codec import Codec
from msi.net.complaints import Complaints
from msi.net.control_socket import HANDSHAKE_FAILED, ControlSocket, Event, curve_pair, open_socket
from msi.net.pulse import PulseThread
from msi.net.secret import VARIABLE, Secret
from msi.net.socket_dir import check_private

log = logging.getLogger(__name__)

REFUSED_TIMES = 3  # in a row: it is not the network
REFUSED_WITHIN_S = 2.0  # of connecting; who takes longer is slow, or stopped
CONNECT_AGAIN_S = 0.25
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

    address: str  # the coordinator's
    num_sent: int

    def send(self, message: Any) -> None:
        """Never blocks; nobody says whether it came. Of one that is closed nothing does."""

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


class ControlClient:
    """Connects, and reconnects by itself.

    Args:
        secret: the instance's, for an address of TCP; None where it has none.

    Raises:
        ConfigError: the address is not one.
    """

    def __init__(self, address: str, codec: Codec, secret: Secret | None = None) -> None:
        self.num_sent = 0
        self.address = address
        self._codec = codec
        self._secret = secret
        self._complain = Complaints(log)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        raw = open_socket(self._context, zmq.DEALER, codec.max_bytes)
        self._socket = ControlSocket(raw)
        self._pulse: PulseThread | None = None
        self._events: ControlSocket | None = None
        self._watching: asyncio.Task[None] | None = None
        try:
            if not is_address(address):
                raise zmq.ZMQError(zmq.EINVAL)
            if address.startswith("ipc://"):
                check_private(Path(address.removeprefix("ipc://")))
            self._prove(raw)
            self._events = ControlSocket(raw.get_monitor_socket(ON_THE_WAY))
            raw.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"{address!r} is not a coordinator's address; give tcp://HOST:PORT") from error
        except ConfigError:
            self.close()
            raise

    def send(self, message: Any) -> None:
        if self._socket.raw.closed:
            return
        self.num_sent += 1
        try:
            self._socket.raw.send(self._codec.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._complain("unsent", f"the coordinator at {self.address} takes no more messages; one is lost")
        self._socket.sent()

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
        if self._secret is not None and self.address.startswith("tcp://"):
            raw.curve_serverkey = curve_pair(self._secret, "server")[0]
            raw.curve_publickey, raw.curve_secretkey = curve_pair(self._secret, "client")

    @property
    def has_unread(self) -> bool:
        return self._socket.look()

    def keep_alive(self, message: Callable[[float], Any], every_s: float) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        raw = open_socket(self._context, zmq.DEALER, self._codec.max_bytes)
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.IMMEDIATE, 1)  # none is kept for later: an old sign of life is none
        self._prove(raw)
        raw.connect(self.address)
        self._pulse = PulseThread(raw, lambda late_s: self._codec.encode(message(late_s)), every_s)

    def _connect_again(self) -> None:
        if not self._socket.raw.closed:
            with contextlib.suppress(zmq.ZMQError):
                self._socket.raw.disconnect(self.address)
            with contextlib.suppress(zmq.ZMQError):
                self._socket.raw.connect(self.address)

    def _why_refused(self) -> str:
        if self._secret is None:
            return (
                f"the coordinator at {self.address} asks for a secret, and this process was given none: give it the "
                f"coordinator's `secret_file` (or {VARIABLE}); or it is no coordinator that listens there"
            )
        return (
            f"the secret differs: the coordinator at {self.address} has another than this process, or none; give all "
            f"processes of an instance the same `secret_file` (or {VARIABLE}); or it is no coordinator that listens "
            "there"
        )

    def close(self) -> None:
        """What was sent is given half a second to leave; a thread waits for that, not the caller's loop."""
        if self._watching is not None:
            self._watching.cancel()
        if self._pulse is not None:
            self._pulse.stop()
        if self._events is not None:
            self._socket.raw.disable_monitor()
            self._events.close()
        self._socket.close()
        threading.Thread(target=self._context.term, name="control closes").start()
