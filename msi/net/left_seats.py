"""Seats of nodes that were lost: wiped, and free for whoever comes next, once nobody reads what these had answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msi.net.passes import Node
from msi.net.transport import Landing


class LeftSeats:
    """Of one landing. On the event loop, but for `bool`: whether there are any."""

    def __init__(self, landing: Landing) -> None:
        self._landing = landing
        self._left: dict[int, Node] = {}
        self._wiped = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._left)

    def add(self, node: Node) -> None:
        self._left[node.index] = node

    def wipe(self, is_read: Callable[[Node], bool]) -> None:
        """Those that nobody reads."""
        for index, node in list(self._left.items()):
            if not is_read(node):
                self._landing.revoke(index)
                del self._left[index]
                self._wiped.set()

    async def until_wiped(self, index: int) -> None:
        """A pass reads for less than a turn."""
        while index in self._left:
            self._wiped.clear()
            await self._wiped.wait()
