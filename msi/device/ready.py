"""What a compute thread goes through: queues whose heads are open and, in between, what transports have brought."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from threading import Lock, get_ident
from typing import Generic, TypeVar

from msi.complaints import Complaints
from msi.device.polling import Bell

log = logging.getLogger(__name__)

Q = TypeVar("Q")


class Ready(Generic[Q]):
    """Queues in the order in which they opened, for the one thread that calls `get`; None among them is the end.

    Implements `msi.net.transport.Poller`: that thread looks for completions whenever a program is through, and sleeps
    at the bell while there is nothing to run. So an answer that lands is seen, and what waited for it runs, without a
    second thread in between.

    Args:
        poll_s: how long it looks at the bell before it sleeps.
    """

    def __init__(self, poll_s: float = 0.0) -> None:
        self._bell = Bell(poll_s)
        self.bell = self._bell.fd
        self._open: deque[Q | None] = deque()
        self._sources: tuple[Callable[[], object], ...] = ()
        self._thread = 0  # that calls `get`
        self._ringing = Lock()  # the bell is not closed, and its number reused, under a ring
        self._complaints = Complaints(log)

    def put(self, queue: Q | None) -> None:
        self._open.append(queue)
        self.ring()

    def get(self) -> Q | None:
        self._thread = get_ident()
        queues = self._open
        while True:
            if queues:
                return queues.popleft()
            if not self.look() and not queues:
                self._bell.wait()

    def close(self) -> None:
        """Nobody calls `get` any more. Idempotent."""
        with self._ringing:
            bell, self.bell = self.bell, -1
        if bell >= 0:
            self._bell.close()

    # -- msi.net.transport.Poller -------------------------------------------------------------------------------------

    def add(self, take: Callable[[], object], wakes: int = -1) -> None:
        self._sources = (*self._sources, take)
        if wakes >= 0:
            self._bell.follow(wakes)
        self.ring()

    def remove(self, take: Callable[[], object], wakes: int = -1) -> None:
        self._sources = tuple(source for source in self._sources if source != take)
        if wakes >= 0:
            self._bell.leave(wakes)

    def ring(self) -> None:
        if get_ident() != self._thread:
            with self._ringing:
                if self.bell >= 0:
                    os.eventfd_write(self.bell, 1)

    def look(self) -> bool:
        """Takes what has come by now; whether any source wants to be asked once more before the thread sleeps."""
        again = False
        for take in self._sources:
            try:
                if take():
                    again = True
            except Exception as error:
                self._complaints.say(error, "what came could not be taken")
        return again
