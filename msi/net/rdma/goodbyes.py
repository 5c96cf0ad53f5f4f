"""Connections that are closed in good order: what was posted before arrives before anybody hears of the end.

Whoever closes says over the control connection how many posts it made, and its peer waits until it has received as
many. Neither waits for longer than `LEAVE_S`. All of this happens on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from msi.errors import TransportError
from msi.net.rdma.endpoint import RdmaEndpoint

LEAVE_S = 1.0  # what was posted before a close may arrive so much later
COUNT_MASK = (1 << 31) - 1
GONE = 1 << 31  # said nothing

Told = Callable[[RdmaEndpoint], None]


class Goodbyes:
    """Of one transport.

    Args:
        has_seat: whether what a peer posts may still land.
        end: told of a peer that has closed, once all that it posted is here.
        release: told of one that we closed, once it has had its time to take all that we posted.

    Attributes:
        heard: endpoints that their peers closed, and how many posts each made.
    """

    def __init__(self, *, has_seat: Callable[[RdmaEndpoint], bool], end: Told, release: Told) -> None:
        self.heard: dict[RdmaEndpoint, int] = {}
        self._loop = asyncio.get_running_loop()
        self._has_seat, self._end, self._release = has_seat, end, release
        self._said: dict[RdmaEndpoint, asyncio.TimerHandle] = {}
        self._all_left = asyncio.Event()
        self._all_left.set()

    def say(self, endpoint: RdmaEndpoint) -> None:
        """We close it: the peer is told how much to wait for, and we wait until it has it."""
        self.heard.pop(endpoint, None)
        self._said[endpoint] = self._loop.call_later(LEAVE_S, self._release, endpoint)
        self._all_left.clear()
        assert endpoint.control is not None
        with contextlib.suppress(TransportError):
            endpoint.control.post(0, endpoint.num_posted & COUNT_MASK)

    def hear(self, endpoint: RdmaEndpoint, num_posted: int) -> None:
        """The peer closed it, or its process is `GONE`."""
        self.heard[endpoint] = num_posted
        self._loop.call_later(LEAVE_S, self._end_heard, endpoint)

    def settle(self) -> None:
        """Who left, and has posted nothing that is not here yet, is gone."""
        for endpoint, num_posted in list(self.heard.items()):
            has_all = endpoint.num_received & COUNT_MASK == num_posted
            if num_posted == GONE or not self._has_seat(endpoint) or has_all:
                self._end_heard(endpoint)

    def _end_heard(self, endpoint: RdmaEndpoint) -> None:
        if endpoint in self.heard:
            self._end(endpoint)

    def forget(self, endpoint: RdmaEndpoint) -> None:
        """Nothing is left of it. Idempotent."""
        self.heard.pop(endpoint, None)
        timer = self._said.pop(endpoint, None)
        if timer is not None:
            timer.cancel()
        if not self._said:
            self._all_left.set()

    async def all_said(self) -> None:
        """Until nobody whom we closed is waited for any more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._all_left.wait()
