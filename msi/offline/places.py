"""How many choices an instance has at a time, for one who has many more to ask: as many as it takes, and no error where
it is full. Knows no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msi.errors import Unavailable

T = TypeVar("T")
AGAIN_AFTER_S = 1.0  # a refusal, where nothing of ours ends before
PATIENCE_S = 300.0  # with an instance that others keep full


class Places:
    """Of one asker, on one event loop.

    Args:
        most: choices; a request with more of them is asked alone.
        is_ready: whether the instance takes requests: if it does and refuses one, it is full.
    """

    def __init__(self, most: int, is_ready: Callable[[], bool]) -> None:
        self._most = most
        self._is_ready = is_ready
        self._taken = 0
        self._ended = asyncio.Event()
        self._last_end_at = time.monotonic()

    async def run(self, num_choices: int, work: Callable[[], Awaitable[T]]) -> T:
        """What the work returns; it is done again where the instance was full.

        Raises:
            Unavailable: the instance takes nothing, or was full for `PATIENCE_S` in which nothing of ours ended.
        """
        while True:
            while self._taken and self._taken + num_choices > self._most:
                await self._ended.wait()
            self._taken += num_choices
            try:
                result = await work()
            except Unavailable:
                if not self._is_ready() or time.monotonic() - self._last_end_at > PATIENCE_S:
                    raise
            else:
                self._last_end_at = time.monotonic()
                return result
            finally:
                self._taken -= num_choices
                self._ended.set()  # wakes all who wait now
                self._ended = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_AFTER_S):
                    await self._ended.wait()
