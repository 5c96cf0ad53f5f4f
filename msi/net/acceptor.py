"""Taking connections from whoever may connect: a bounded number at a time may be strangers still.

Knows nothing of what is said. A connection counts as a stranger's until `greet` returns; when there is one too many the
oldest is cut off, so that a flood of silent ones does not keep out whoever speaks at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from msi.net.complaints import Complaints

MAX_STRANGERS = 256
BACKLOG = 128
PER_TURN = 64  # accepted before others on the event loop get their turn
ACCEPT_AGAIN_S = 0.5  # after descriptors or memory ran out
RAN_OUT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Greet = Callable[[socket.socket, str], Coroutine[Any, Any, None]]


class Acceptor:
    """Listens from now on.

    Args:
        listener: bound, and closed by `close`.
        greet: hears a stranger out within a time limit, and owns the connection; cancelling it cuts that off.
        why_not: says why a connection is not taken at all, which costs it no place; "" if it is.
        complain: told who was cut off.
    """

    def __init__(
        self,
        listener: socket.socket,
        greet: Greet,
        complain: Complaints,
        *,
        why_not: Callable[[socket.socket], str] = lambda sock: "",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._greet = greet
        self._complain = complain
        self._why_not = why_not
        self._strangers: dict[asyncio.Task[None], str] = {}  # in order of arrival
        self._again: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._watch()

    def _watch(self) -> None:
        self._again = None
        self._loop.add_reader(self._listener, self._incoming)

    def _incoming(self) -> None:
        for _ in range(PER_TURN):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in RAN_OUT:
                    self._pause(error)
                    return
                continue  # that one is gone again
            self._take(sock, address)

    def _take(self, sock: socket.socket, address: Any) -> None:
        name = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a process of this machine"
        try:
            why_not = self._why_not(sock)
        except OSError as error:
            why_not = error.strerror or str(error)
        if why_not:
            self._complain("other user", f"cut {name} off: {why_not}")
            sock.close()
            return
        if len(self._strangers) >= MAX_STRANGERS:
            oldest, its_name = next(iter(self._strangers.items()))
            del self._strangers[oldest]
            oldest.cancel()
            self._complain("too many", f"cut {its_name} off: {MAX_STRANGERS} others connected and have not said hello")
        sock.setblocking(False)
        task = self._loop.create_task(self._greet(sock, name))
        self._strangers[task] = name
        task.add_done_callback(lambda done: self._strangers.pop(done, None))

    def _pause(self, error: OSError) -> None:
        """Trying at once would only spin: the connection that waits cannot be taken, nor refused."""
        why = os.strerror(error.errno or 0)
        self._complain("no descriptors", f"no connection can be accepted: {why}; trying again")
        self._loop.remove_reader(self._listener)
        self._again = self._loop.call_later(ACCEPT_AGAIN_S, self._watch)

    async def close(self) -> None:
        """Whoever has not been heard out is cut off. Idempotent."""
        if self._again is not None:
            self._again.cancel()
        with contextlib.suppress(ValueError, OSError):
            self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in list(self._strangers):
            task.cancel()
        await asyncio.gather(*self._strangers, return_exceptions=True)
