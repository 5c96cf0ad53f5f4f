"""The coordinator's end of the control plane: hears many peers, and guards who they are and how many.

Whoever does not read its messages is given up once it is a bound behind; what is no message is counted and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from msi.errors import ConfigError, ProtocolError
from msi.net.codec import Codec
from msi.net.complaints import Complaints
from msi.net.control_socket import HANDSHAKE_FAILED, MAX_BEHIND, ControlSocket, Event, curve_pair, open_socket
from msi.net.secret import Secret
from msi.net.socket_dir import check_private

log = logging.getLogger(__name__)

MAX_GIVEN_UP = 4096  # routes to remember
MAX_CONNECTIONS = 4096
SHARED_FROM = 64 * 1024  # bytes of a message that is kept as long as it is the same one
ZAP_ADDRESS, ZAP_DOMAIN = "inproc://zeromq.zap.01", "msi"
AT_THE_DOOR = Event.ACCEPTED | Event.ACCEPT_FAILED | Event.DISCONNECTED | HANDSHAKE_FAILED


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
        self._socket = ControlSocket(open_socket(self._context, zmq.ROUTER, codec.max_bytes))
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
            self._socket.raw.send_multipart([route, self._encoded(message)], zmq.NOBLOCK)
            self._socket.sent()
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
        self._asked: ControlSocket | None = None  # hears of those who proved that they know the server's key
        self._events: ControlSocket | None = None
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
            public, private = curve_pair(self._secret, "server")
            self._client_key = z85.decode(curve_pair(self._secret, "client")[0])
            asked = self._context.socket(zmq.REP)
            self._asked = ControlSocket(asked)
            asked.setsockopt(zmq.LINGER, 0)
            asked.bind(ZAP_ADDRESS)
            self._socket.curve_publickey, self._socket.curve_secretkey = public, private
            self._socket.curve_server = True
            self._socket.setsockopt_string(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        self._events = ControlSocket(self._socket.get_monitor_socket(AT_THE_DOOR))
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

    async def _judge(self, asked: ControlSocket) -> None:
        """Who has proved to know the server's key has to hold the clients', too (RFC 27)."""
        while True:
            frames = await asked.receive()
            version, request_id, mechanism = frames[0], frames[1], frames[5] if len(frames) > 5 else b""
            is_known = mechanism == b"CURVE" and len(frames) == 7 and frames[6] == self._client_key
            answer = (b"200", b"OK", b"member") if is_known else (b"400", b"the secret differs", b"")
            asked.raw.send_multipart([version, request_id, *answer, b""], zmq.NOBLOCK)
            asked.sent()

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
