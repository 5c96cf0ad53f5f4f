"""A control channel whose messages take virtual time, whole and in order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from msi.simulator.clock import virtual_loop


class SimulatedServer:
    """Implements `msi.net.control.MessageServer`. Messages are handed over as they are: they are frozen values.

    Args:
        latency_s: of every message, either way.
    """

    def __init__(self, latency_s: float) -> None:
        self.address = "simulated://coordinator"
        self.latency_s = latency_s
        self.dropped: Counter[str] = Counter()
        self.loop = virtual_loop()
        self.arrived: asyncio.Queue[tuple[bytes, Any]] = asyncio.Queue()
        self._clients: dict[bytes, SimulatedClient] = {}

    def connect(self, name: str) -> SimulatedClient:
        """A new peer, under a route of its own; it takes the place of one with the same name."""
        client = self._clients[name.encode()] = SimulatedClient(self, name.encode())
        return client

    def send(self, route: bytes, message: Any) -> None:
        if (client := self._clients.get(route)) is not None:
            self.loop.call_later(self.latency_s, client.arrived.put_nowait, message)

    async def receive(self) -> tuple[bytes, Any]:
        return await self.arrived.get()

    @property
    def has_unread(self) -> bool:
        return not self.arrived.empty()

    def close(self) -> None:
        self._clients.clear()

    def forget(self, client: SimulatedClient) -> None:
        if self._clients.get(client.route) is client:
            del self._clients[client.route]


class SimulatedClient:
    """Implements `msi.net.control.MessageClient`. Closing it is all that a kill does: nobody is told."""

    def __init__(self, server: SimulatedServer, route: bytes) -> None:
        self.num_sent = 0
        self.route = route
        self.arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._server = server
        self._is_open = True

    def send(self, message: Any) -> None:
        if self._is_open:
            self.num_sent += 1
            server = self._server
            server.loop.call_later(server.latency_s, server.arrived.put_nowait, (self.route, message))

    async def receive(self) -> Any:
        return await self.arrived.get()

    @property
    def has_unread(self) -> bool:
        return not self.arrived.empty()

    def keep_alive(self, message: Callable[[float], Any], every_s: float) -> None:
        """No loop is ever busy here."""

    def close(self) -> None:
        self._is_open = False
        self._server.forget(self)
