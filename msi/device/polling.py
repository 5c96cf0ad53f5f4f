"""Waiting at an eventfd: for a bounded time by looking at it again and again, then asleep.

Looking is one call into the C library, without the interpreter's lock: `lfind` goes through an array until a function
of two arguments says 0. Given elements of no size, and `eventfd_read` for that function, it reads one descriptor over
and over. A wake-up that was awaited so costs a fraction of one from sleep.

Looking takes a core. Where somebody else wants that core, what is awaited comes later, not sooner; so each wait that
looks in vain lets twice as many waits as the last one go by without looking, and one that is rewarded looks again.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from typing import Protocol

LOOKS_TIMED = 200  # to tell how long one takes
MOST_SKIPPED = 1024


class Look(Protocol):
    def __call__(self) -> bool:
        """True once the bell was rung, which takes the ring; False when it was not for some time."""

    def sleep(self) -> None:
        """Until it is rung, which takes the ring."""


class Bell:
    """An eventfd that one thread waits at.

    Args:
        poll_s: how long it looks before it sleeps; 0.0 sleeps at once.
        look: what looks, and sleeps; by default at the eventfd.
    """

    def __init__(self, poll_s: float = 0.0, look: Look | None = None) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK if poll_s else os.EFD_CLOEXEC)
        self._look = look or (_EventfdLook(self.fd, poll_s) if poll_s else None)
        self._skipped = 0
        self._to_skip = 0

    def wait(self) -> None:
        """Until it was rung since the last wait."""
        look = self._look
        if look is None:
            os.read(self.fd, 8)
            return
        if self._to_skip:
            self._to_skip -= 1
        elif look():
            self._skipped = 0
            return
        else:
            self._skipped = self._to_skip = min(2 * self._skipped + 1, MOST_SKIPPED)
        look.sleep()


class _EventfdLook:
    """Implements `Look`, within so many seconds."""

    def __init__(self, fd: int, within_s: float) -> None:
        library = ctypes.CDLL(None)
        find, read = library.lfind, library.eventfd_read
        find.restype = ctypes.c_void_p
        find.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._find = find
        self._value = ctypes.c_uint64()  # what was read
        self._count = ctypes.c_size_t(LOOKS_TIMED)
        self._arguments = (
            fd, ctypes.addressof(self._value), ctypes.addressof(self._count), 0, ctypes.cast(read, ctypes.c_void_p),
        )  # fmt: skip
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        started = time.perf_counter()
        self()
        self._count.value = max(1, int(within_s * LOOKS_TIMED / (time.perf_counter() - started)))

    def __call__(self) -> bool:
        return self._find(*self._arguments) is not None

    def sleep(self) -> None:
        self._poll.poll()
        os.eventfd_read(self._fd)
