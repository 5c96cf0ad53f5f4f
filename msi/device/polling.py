"""Waiting at an eventfd: for a bounded time by looking at it again and again, then asleep.

Looking is one call into the C library, without the interpreter's lock: `lfind` goes through an array until a function
of two arguments says 0. Given elements of no size, and `eventfd_read` for that function, it reads one descriptor over
and over. A wake-up that was awaited so costs a fraction of one from sleep.

A bell may follow other descriptors; then it waits for all of them by epoll, and looks at that. When it does not look,
as that takes a core, `msi.net.looking` says. To ask it may take longer than what is awaited: its answer holds for a
moment.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import time
from collections.abc import Callable
from typing import Protocol

from msi.net.looking import SLICE_S, Cores, Vain

LOOKS_TIMED = 200  # to tell how long one takes
RUNG_AT_A_TIME = 16  # descriptors; room for them is made anew for each call
FREE_FOR_S = 40e-6
LONG_REST = 16  # waits


class Look(Protocol):
    def __call__(self) -> bool:
        """True once the bell was rung, which takes the ring; False when it was not for some time."""

    def sleep(self) -> None:
        """Until it is rung, which takes the ring."""

    def rest(self) -> bool:
        """Whether reading the eventfd sleeps, too, until it looks again: that is one call of the kernel's."""


class Bell:
    """An eventfd that one thread waits at.

    Args:
        poll_s: how long it looks before it sleeps; 0.0 sleeps at once.
        look: what looks, and sleeps; by default at the eventfd, while a core is free.
    """

    def __init__(self, poll_s: float = 0.0, look: Look | None = None) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK if poll_s else os.EFD_CLOEXEC)
        self._poll_s = poll_s
        self._cores = Cores() if poll_s else None
        self._free_until = 0.0
        self._look = look or (_EventfdLook(self.fd, poll_s, self._has_core) if poll_s else None)
        self._may_look = self._look is not None
        self._all: select.epoll | None = None
        self._vain = Vain()
        self._num_asleep: float = 0 if self._look else math.inf  # waits at the eventfd alone, with no question asked

    def wait(self) -> None:
        """Until it was rung since the last wait, or one of those that it follows became readable since."""
        if self._num_asleep and self._all is None:
            self._num_asleep -= 1
            os.read(self.fd, 8)
            return
        look = self._look
        assert look is not None
        if self._may_look and self._vain.may_look():
            is_rung = look()
            self._vain.looked(is_rewarded=is_rung)
            if is_rung:
                return
            if self._vain.num_to_skip >= LONG_REST and look.rest():
                self._num_asleep = self._vain.skip_all()
        look.sleep()

    def follow(self, fd: int) -> None:
        """From the next wait on: ring it."""
        if self._all is None:
            of_all = select.epoll()
            of_all.register(self.fd, select.EPOLLIN)
            self._look = _EpollLook(of_all, self.fd, self._poll_s, self._has_core)
            self._all = of_all  # only now: another thread waits
        self._all.register(fd, select.EPOLLIN | select.EPOLLET)

    def leave(self, fd: int) -> None:
        """Not any more."""
        if self._all is not None and not self._all.closed:
            self._all.unregister(fd)

    def close(self) -> None:
        """Nobody waits any more."""
        if self._all is not None:
            self._all.close()
        if self._cores is not None:
            self._cores.close()
        os.close(self.fd)

    def _has_core(self) -> bool:
        if time.perf_counter() < self._free_until:
            return True
        if self._cores is None or not self._cores.one_is_free():
            return False
        self._free_until = time.perf_counter() + FREE_FOR_S
        return True


class _EventfdLook:
    """Implements `Look`, within so many seconds, while a core is free."""

    def __init__(self, fd: int, within_s: float, has_core: Callable[[], bool]) -> None:
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
        self._find(*self._arguments)
        slice_s = min(SLICE_S, within_s)
        self._count.value = max(1, int(slice_s * LOOKS_TIMED / (time.perf_counter() - started)))
        self._num_slices = math.ceil(within_s / slice_s)
        self._has_core = has_core
        self._blocks = False  # who reads the eventfd

    def __call__(self) -> bool:
        if self._blocks:
            self._set_blocking(False)
        find, arguments, has_core = self._find, self._arguments, self._has_core
        for _ in range(self._num_slices):
            if not has_core():
                return False
            if find(*arguments) is not None:
                return True
        return False

    def sleep(self) -> None:
        if not self._blocks:
            self._poll.poll()
        os.read(self._fd, 8)

    def rest(self) -> bool:
        self._set_blocking(True)
        return True

    def _set_blocking(self, blocks: bool) -> None:
        os.set_blocking(self._fd, blocks)
        self._blocks = blocks


class _EpollLook:
    """Implements `Look`: each look is a call of its own, in which others may have the interpreter's lock."""

    def __init__(self, all_of_them: select.epoll, bell: int, within_s: float, has_core: Callable[[], bool]) -> None:
        self._poll = all_of_them.poll
        self._bell = bell
        self._within_s = within_s
        self._has_core = has_core

    def __call__(self) -> bool:
        until = time.perf_counter() + self._within_s
        while self._has_core() and (now := time.perf_counter()) < until:
            while time.perf_counter() < now + SLICE_S:
                if self._taken(0):
                    return True
        return False

    def sleep(self) -> None:
        while not self._taken(-1):
            pass

    def rest(self) -> bool:
        return False  # others wake it, too

    def _taken(self, timeout_s: int) -> bool:
        rung = self._poll(timeout_s, RUNG_AT_A_TIME)
        for fd, _ in rung:
            if fd == self._bell:
                os.eventfd_read(fd)
        return bool(rung)
