"""The sockets of a transport: which have something to read or to write is asked once a turn, for all of them.

The event loop waits for one descriptor, an epoll of all connections. So what lies at several of them is read in one
turn, and handed over together. Rows too large for the buffer that heads pass through are told of at once: reading
what others sent would cost more than handing over does.
"""

from __future__ import annotations

import asyncio
import select
from typing import Protocol

from msi.net.delivery import Delivery

READABLE, WRITABLE = select.EPOLLIN, select.EPOLLOUT
MOST_AT_ONCE = 256


class Waiting(Protocol):
    """A connection."""

    def read(self) -> bool:
        """Takes what has come, up to a limit; whether there may be more that no descriptor tells of."""

    def write_on(self) -> None:
        """Sends what waits for room."""


class Sockets:
    """Used from the event loop, but for `watch_writing`."""

    def __init__(self, deliver: Delivery) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._epoll = select.epoll()
        self._waiting: dict[int, Waiting] = {}
        self._unread: list[int] = []  # that said that there may be more
        self._loop.add_reader(self._epoll.fileno(), self._ready)

    def add(self, fd: int, waiting: Waiting) -> None:
        """Is read from now on, beginning with what has come already."""
        self._waiting[fd] = waiting
        self._epoll.register(fd, READABLE)
        self._again(fd)

    def watch_writing(self, fd: int, is_waiting: bool) -> None:
        """Whether it has something to write. From any thread that keeps the descriptor open meanwhile."""
        self._epoll.modify(fd, READABLE | WRITABLE if is_waiting else READABLE)

    def remove(self, fd: int) -> None:
        """Before it is closed. Does nothing if it was not added."""
        if self._waiting.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Nobody is added any more. Idempotent."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _again(self, fd: int) -> None:
        if not self._unread:
            self._loop.call_soon(self._read_on)
        self._unread.append(fd)

    def _ready(self) -> None:
        waiting = self._waiting
        for fd, events in self._epoll.poll(0, MOST_AT_ONCE):
            if (one := waiting.get(fd)) is None:
                continue  # closed by what happened to another
            if events & ~WRITABLE and one.read():
                self._again(fd)
            if events & WRITABLE and fd in waiting:
                one.write_on()
        self._deliver.hand_over()

    def _read_on(self) -> None:
        unread, self._unread = self._unread, []
        for fd in unread:
            if (one := self._waiting.get(fd)) is not None and one.read():
                self._again(fd)
        self._deliver.hand_over()
