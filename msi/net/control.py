"""Control sockets: typed messages between the coordinator, its workers and its clients over ZeroMQ.

Whatever arrives and is not one of the messages is counted, logged and dropped. Sends never block: a peer that does
not read has its messages kept until it is closed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import zmq
import zmq.asyncio

from msi.errors import ConfigError, ProtocolError
from msi.net.codec import Codec

log = logging.getLogger(__name__)

HEARTBEAT_MS = 1000
SILENT_MS = 15_000  # longer than a process may stand still: connections survive that
CONNECT_TIMEOUT_MS = 2000


class MessageServer(Protocol):
    """The coordinator's end: hears many peers, each known by an opaque route."""

    address: str

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
        """The next message. Cancellation loses nothing."""

    @property
    def has_unread(self) -> bool:
        """Whether messages have come that were not received yet."""

    def keep_alive(self, message: Callable[[float], Any], every_s: float) -> None:
        """Sends a message that often until it is closed, however busy the event loop is; from a thread of its own.

        Under a virtual clock no loop is ever busy, and nothing is sent.

        Args:
            message: makes it; is told how late the thread itself is.
        """

    def close(self) -> None: ...


def _configure(socket: zmq.Socket[Any], max_bytes: int) -> None:
    socket.setsockopt(zmq.LINGER, 500)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    # a host that vanished says no goodbye: after that long its connection is dropped, and made anew once it is back
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)


def is_address(text: str) -> bool:
    """Whether this is where a coordinator may be reached."""
    return text.startswith(("tcp://", "ipc://"))


class ControlServer:
    """Binds; peers are known by an opaque route.

    Raises:
        ConfigError: the address is not one, or its port is in use.
    """

    def __init__(self, bind: str, codec: Codec) -> None:
        self.num_dropped = 0
        self._codec = codec
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _configure(self._socket, codec.max_bytes)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"cannot listen on {bind}: {zmq.strerror(error.errno or 0)}; "
                f"choose another port, or 0 for any that is free"
            ) from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, route: bytes, message: Any) -> None:
        self._socket.send_multipart([route, self._codec.encode(message)])

    async def receive(self) -> tuple[bytes, Any]:
        """The next message and who sent it. Cancellation loses nothing."""
        while True:
            frames = await self._socket.recv_multipart()
            try:
                if len(frames) != 2:
                    raise ProtocolError(f"{len(frames)} frames instead of one message")
                return frames[0], self._codec.decode(frames[1])
            except ProtocolError as error:
                self.num_dropped += 1
                log.warning("dropped a message from %s: %s", frames[0].hex()[:16], error)

    @property
    def has_unread(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class ControlClient:
    """Connects, and reconnects by itself.

    Raises:
        ConfigError: the address is not one.
    """

    def __init__(self, address: str, codec: Codec) -> None:
        self.num_dropped = 0
        self.num_sent = 0
        self._codec = codec
        self._address = address
        self._pulse: Pulse | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _configure(self._socket, codec.max_bytes)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"{address!r} is not a coordinator's address; give tcp://HOST:PORT") from error

    def send(self, message: Any) -> None:
        self.num_sent += 1
        self._socket.send(self._codec.encode(message))

    async def receive(self) -> Any:
        """The next message. Cancellation loses nothing."""
        while True:
            payload = await self._socket.recv()
            try:
                return self._codec.decode(payload)
            except ProtocolError as error:
                self.num_dropped += 1
                log.warning("dropped a message from the coordinator: %s", error)

    @property
    def has_unread(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def keep_alive(self, message: Callable[[float], Any], every_s: float) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        socket: zmq.Socket[Any] = zmq.Context.shadow(self._context).socket(zmq.DEALER)
        _configure(socket, self._codec.max_bytes)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # none is kept for later: an old sign of life is none
        socket.connect(self._address)
        self._pulse = Pulse(socket, lambda late_s: self._codec.encode(message(late_s)), every_s)

    def close(self) -> None:
        """What was sent is given half a second to leave."""
        if self._pulse is not None:
            self._pulse.stop()
        self._socket.close()
        self._context.term()


class Pulse:
    """A thread that sends a message at a steady pace through a socket that is its own.

    Args:
        payload: makes the message; is told how late the thread itself is.
    """

    def __init__(self, socket: zmq.Socket[Any], payload: Callable[[float], bytes], every_s: float) -> None:
        self._socket = socket
        self._payload = payload
        self._every_s = every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Idempotent; its socket is closed then."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        late_s = 0.0
        while True:
            with contextlib.suppress(zmq.Again):  # there is no connection now
                self._socket.send(self._payload(late_s), zmq.NOBLOCK)
            due = time.monotonic() + self._every_s
            if self._is_over.wait(self._every_s):
                break
            late_s = max(0.0, time.monotonic() - due)
        self._socket.close()
