"""What happened at a transport's endpoints and was not yet taken: the queue behind `Transport.completions`."""

from __future__ import annotations

import asyncio

from msi.net.transport import Completion


class CompletionQueue:
    """Filled from event loop callbacks, emptied by one waiting coroutine."""

    def __init__(self) -> None:
        self._pending: list[Completion] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, completion: Completion) -> None:
        self._pending.append(completion)
        self.wake()

    def extend(self, completions: list[Completion]) -> None:
        self._pending.extend(completions)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Completion]:
        """Waits until there is something; all of it. Cancellation loses nothing."""
        while not self._pending:
            assert self._waiter is None, "one waiter at a time"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._pending = self._pending, []
        return taken
