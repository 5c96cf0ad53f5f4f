"""How late this process itself is: what silence of others it is to blame for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def sleep_late(delay_s: float, clock: Callable[[], float]) -> float:
    """Sleeps; how much later than asked it woke. A process that stood still did so all that time, and heard nobody."""
    due = clock() + delay_s
    await asyncio.sleep(delay_s)
    return max(0.0, clock() - due)
