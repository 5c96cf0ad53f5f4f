"""Control sockets: typed messages between the coordinator, its workers and its clients over ZeroMQ.

Whatever arrives and is not one of the messages is counted, logged and dropped. Sends never block: a peer that does
not read has its messages kept until it is closed.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import zmq
import zmq.asyncio

from msi.errors import ConfigError, ProtocolError
from msi.net.codec import Codec

log = logging.getLogger(__name__)

HEARTBEAT_MS = 1000
SILENT_MS = 5000
CONNECT_TIMEOUT_MS = 2000


class MessageServer(Protocol):
    """The coordinator's end: hears many peers, each known by an opaque route."""

    address: str

    def send(self, route: bytes, message: Any) -> None:
        """Never blocks; nobody says whether it came."""

    async def receive(self) -> tuple[bytes, Any]:
        """The next message and who sent it. Cancellation loses nothing."""

    def close(self) -> None: ...


class MessageClient(Protocol):
    """A worker's or client's end."""

    num_sent: int

    def send(self, message: Any) -> None:
        """Never blocks; nobody says whether it came."""

    async def receive(self) -> Any:
        """The next message. Cancellation loses nothing."""

    def close(self) -> None: ...


def _configure(socket: zmq.asyncio.Socket, max_bytes: int) -> None:
    socket.setsockopt(zmq.LINGER, 500)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    # a host that vanished says no goodbye: after that long its connection is dropped, and made anew once it is back
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)


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
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _configure(self._socket, codec.max_bytes)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
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

    def close(self) -> None:
        """What was sent is given half a second to leave."""
        self._socket.close()
        self._context.term()
