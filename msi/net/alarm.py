"""Waiting for a time or a word, whichever comes first."""

from __future__ import annotations

import asyncio
import math


class Alarm:
    """One coroutine waits; `ring` from the same loop ends the wait early."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Ends the current wait; does nothing when nobody waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, delay_s: float = math.inf) -> None:
        """Returns after `delay_s` or when rung. Cancellation leaves nothing behind."""
        assert self._waiter is None, "one waiter at a time"
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if math.isinf(delay_s) else loop.call_later(max(delay_s, 0.0), self.ring)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
