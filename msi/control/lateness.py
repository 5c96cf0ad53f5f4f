"""What silence of others this process itself is to blame for: it was late, or has not read what they said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

READING_S = 0.05


class Inbox(Protocol):
    @property
    def has_unread(self) -> bool: ...


async def sleep_late(delay_s: float, clock: Callable[[], float]) -> float:
    """Sleeps; how much later than asked it woke. A process that stood still did so all that time, and heard nobody."""
    due = clock() + delay_s
    await asyncio.sleep(delay_s)
    return max(0.0, clock() - due)


async def read_first(inbox: Inbox, clock: Callable[[], float]) -> bool:
    """Lets whoever receives read what has come, for a short while; whether all was read."""
    until = clock() + READING_S
    await asyncio.sleep(0)  # what it has taken already
    while inbox.has_unread:
        if clock() > until:
            return False
        await asyncio.sleep(0)
    return True
