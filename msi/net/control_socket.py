"""What both ends of the control plane stand on: a ZeroMQ socket on an event loop, and keys made from the secret."""

from __future__ import annotations

import asyncio
import contextlib

import zmq
from zmq.utils import z85

from msi.errors import ConfigError
from msi.net.secret import Secret

HEARTBEAT_MS = 1000
SILENT_MS = 15_000  # longer than a process may stand still: its connections survive that
CONNECT_TIMEOUT_MS = 2000
HANDSHAKE_MS = 5000  # whoever connects has so long to say and prove who it is
MAX_BEHIND = 16 * 1024  # messages that a peer has not read
MAX_UNREAD = 4096  # messages of one peer that were not read; then its connection stands, and breaks if that lasts
TAKEN_PER_TURN = 64  # messages in a row before others on the event loop get their turn
READABLE = int(zmq.POLLIN)  # an enumeration's member costs more to compare with than the socket to ask
Event = zmq.Event
HANDSHAKE_FAILED = (
    Event.HANDSHAKE_FAILED_PROTOCOL | Event.HANDSHAKE_FAILED_NO_DETAIL | Event.HANDSHAKE_FAILED_AUTH
)  # fmt: skip


class ControlSocket:
    """A ZeroMQ socket on the running event loop, for one task that receives. Whoever sends by `raw` says so: `sent`."""

    def __init__(self, raw: zmq.Socket[bytes]) -> None:
        self.raw = raw
        self._num_taken = 0
        self._failure = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def sent(self) -> None:
        """Sending may have acknowledged what announced a message: to be called after it, or that is found late."""
        if self._waiter is not None:
            self.look()

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
            self._check()
            if not self.look():
                await self._readable()
                self._check()
            try:
                return self._received()
            except zmq.Again:
                pass

    def _check(self) -> None:
        """Raises ConfigError."""
        if self._failure:
            raise ConfigError(self._failure)

    def _received(self) -> list[bytes]:
        """Raises zmq.Again."""
        frames = []
        while True:
            frame = self.raw.recv(zmq.NOBLOCK, copy=False)
            frames.append(frame.bytes)
            if not frame.more:
                return frames

    async def _readable(self) -> None:
        """Right after a look at which there was nothing."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self.raw.FD, self.look)
        assert self._waiter is None, "two tasks receive"
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def look(self) -> bool:
        """Whether a message has come; wakes whoever waits for one.

        Asking acknowledges the descriptor, whose readiness says that something changed, not that a message came.
        """
        has_message = bool(int(self.raw.getsockopt(zmq.EVENTS)) & READABLE)
        if has_message and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return has_message

    def close(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.remove_reader(self.raw.FD)
            self._loop = None
        self.raw.close()


def open_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, max_bytes: int) -> zmq.Socket[bytes]:
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
    opened.setsockopt(zmq.RECONNECT_IVL_MAX, 250)  # streams wait for a coordinator that is started again
    return opened


def curve_pair(secret: Secret, end: str) -> tuple[bytes, bytes]:
    """Public and secret key of an end, which all who hold the secret know."""
    if not zmq.has("curve"):
        raise ConfigError(
            "this ZeroMQ was built without CURVE, so it cannot prove a secret; install pyzmq from PyPI's wheels"
        )
    private = z85.encode(secret.key(f"control {end}"))
    return zmq.curve_public(private), private
