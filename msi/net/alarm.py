"""Waiting for a time or a word, whichever comes first."""

from __future__ import annotations

import asyncio
import math


class Alarm:
    """One coroutine waits; `ring` from the same loop ends its wait, or its next one if it does not wait now."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None
        self._is_ringing = False

    def ring(self) -> None:
        if self._waiter is None:
            self._is_ringing = True
        elif not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def is_ringing(self) -> bool:
        """Whether it was rung while nobody waited."""
        return self._is_ringing

    async def wait(self, delay_s: float = math.inf) -> None:
        """Returns after `delay_s` or when rung. Cancellation leaves nothing behind."""
        assert self._waiter is None, "one waiter at a time"
        if self._is_ringing:
            self._is_ringing = False
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if math.isinf(delay_s) else loop.call_later(max(delay_s, 0.0), self.ring)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
