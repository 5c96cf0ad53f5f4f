"""What silence of others this process itself is to blame for: it was late, or has not read what they said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

READING_S = 0.05


class Inbox(Protocol):
    @property
    def has_unread(self) -> bool: ...


async def sleep_late(delay_s: float, clock: Callable[[], float], looks: int = 1) -> float:
    """Sleeps; how much later than asked it woke. A process that stood still did so all that time, and heard nobody.

    Args:
        looks: at the clock; where it stood still between two, all but the time between them is known.
    """
    began, late_s = clock(), 0.0
    for look in range(1, looks + 1):
        due = began + late_s + delay_s * look / looks
        await asyncio.sleep(due - clock())
        late_s += max(0.0, clock() - due)
    return late_s


async def read_first(inbox: Inbox, clock: Callable[[], float]) -> bool:
    """Lets whoever receives read what has come, for a short while; whether all was read."""
    until = clock() + READING_S
    await asyncio.sleep(0)  # what it has taken already
    while inbox.has_unread:
        if clock() > until:
            return False
        await asyncio.sleep(0)
    return True
