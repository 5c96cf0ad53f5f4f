"""The control plane inside one process: messages pass as the frozen values that they are.

Nobody here is far or a stranger, so there is nothing to encode, to check or to keep alive. Those of other processes may
come through a socket beside it; the coordinator cannot tell.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from msi.net.alarm import Alarm
from msi.net.control import MessageServer

HERE, BESIDE = b"here/", b"beside/"  # before each route, so that nobody can take another's


class InprocServer:
    """Implements `msi.net.control.MessageServer`.

    Args:
        beside: hears those of other processes; closed with this one.
        hand_over: calls its first argument with the second, now or later; the simulator's messages take time.
    """

    def __init__(
        self,
        beside: MessageServer | None = None,
        *,
        hand_over: Callable[[Callable[[Any], None], Any], object] = lambda take, message: take(message),
    ) -> None:
        self.address = "inproc://coordinator" if beside is None else beside.address
        self._beside = beside
        self._hand_over = hand_over
        self._reading: asyncio.Future[tuple[bytes, Any]] | None = None  # the next one from beside
        self._arrived: deque[tuple[bytes, Any]] = deque()
        self._something_came = Alarm()
        self._clients: dict[bytes, InprocClient] = {}

    def connect(self, name: str) -> InprocClient:
        """A new peer; it takes the place of one with the same name."""
        route = HERE + name.encode()
        client = self._clients[route] = InprocClient(self, route)
        return client

    def succeed(self, former: InprocServer) -> None:
        """Takes the place of one whose coordinator was killed: whoever was connected to it is to this one."""
        for route, client in former._clients.items():
            client.reconnect(self)
            self._clients[route] = client
        former._clients = {}

    @property
    def is_connected(self) -> bool:
        """Whether anybody is."""
        return bool(self._clients)

    @property
    def dropped(self) -> Counter[str]:
        return Counter() if self._beside is None else self._beside.dropped

    def send(self, route: bytes, message: Any) -> None:
        if (client := self._clients.get(route)) is not None:
            self._hand_over(client.take, message)
        elif self._beside is not None and route.startswith(BESIDE):
            self._beside.send(route.removeprefix(BESIDE), message)

    async def receive(self) -> tuple[bytes, Any]:
        while True:
            if (read := self._read_beside()) is not None:
                return read
            if self._arrived:
                return self._arrived.popleft()
            await self._something_came.wait()

    def _read_beside(self) -> tuple[bytes, Any] | None:
        if self._beside is None:
            return None
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._beside.receive())
            self._reading.add_done_callback(lambda _: self._something_came.ring())
        if not self._reading.done():
            return None
        (route, message), self._reading = self._reading.result(), None
        return BESIDE + route, message

    @property
    def has_unread(self) -> bool:
        if self._arrived or (self._reading is not None and self._reading.done()):
            return True
        return self._beside is not None and self._beside.has_unread

    def close(self) -> None:
        self._clients.clear()
        if self._reading is not None:
            self._reading.cancel()
        if self._beside is not None:
            self._beside.close()

    # -- for its clients ---------------------------------------------------------------------------------------------

    def take(self, route: bytes, message: Any) -> None:
        """What a client says."""
        self._hand_over(self._take, (route, message))

    def _take(self, said: tuple[bytes, Any]) -> None:
        self._arrived.append(said)
        self._something_came.ring()

    def forget(self, client: InprocClient) -> None:
        """It is closed."""
        if self._clients.get(client.route) is client:
            del self._clients[client.route]


class InprocClient:
    """Implements `msi.net.control.MessageClient`. Closing it is all that a kill does: nobody is told."""

    def __init__(self, server: InprocServer, route: bytes) -> None:
        self.num_sent = 0
        self.address = server.address
        self.route = route
        self._server = server
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._is_open = True

    def send(self, message: Any) -> None:
        if self._is_open:
            self.num_sent += 1
            self._server.take(self.route, message)

    def reconnect(self, server: InprocServer) -> None:
        """Another coordinator's; what it says from now on goes there."""
        self._server = server

    def take(self, message: Any) -> None:
        """What the coordinator says."""
        self._arrived.put_nowait(message)

    async def receive(self) -> Any:
        return await self._arrived.get()

    @property
    def has_unread(self) -> bool:
        return not self._arrived.empty()

    def keep_alive(self, message: Callable[[float], Any], every_s: float) -> None:
        """Both ends share a loop: where one stands still the other does not look."""

    def close(self) -> None:
        self._is_open = False
        self._server.forget(self)
