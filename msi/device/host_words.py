"""The words of a device that computes on threads of this process, and who is told when they change."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import threading
from collections.abc import Callable

from msi.complaints import Complaints
from msi.device.queues import Changed

log = logging.getLogger(__name__)

WORD_BYTES = 64  # a cache line each
MAX_WORDS = 1 << 18  # of address space; only those that are taken take memory
_STRIDE, _RANGE, _HALF = WORD_BYTES // 4, 1 << 32, 1 << 31


class HostWords:
    """Implements `msi.device.queues.Words`, on an event loop. One descriptor is rung for all words that it watches."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # over what waits
        self._values = memoryview(mmap.mmap(-1, MAX_WORDS * WORD_BYTES)).cast("I")
        self._waiting: list[list[Callable[[], None]]] = []  # by word: who looks again when it rises
        self._followers: dict[int, Changed] = {}
        self._watchers: dict[int, Changed] = {}
        self._seen: dict[int, int] = {}  # of watched words
        self._loop = asyncio.get_running_loop()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._loop.add_reader(self._bell, self._rung)
        self._complaints = Complaints(log)

    def take(self) -> int:
        with self.lock:
            assert len(self._waiting) < MAX_WORDS, f"all {MAX_WORDS} words are taken"
            self._waiting.append([])
            return len(self._waiting) - 1

    def give_back(self, word: int) -> None:
        with self.lock:
            self._waiting[word] = []
        self._followers.pop(word, None)
        self._watchers.pop(word, None)

    def is_there(self, word: int, at_least: int) -> bool:
        return (self._values[word * _STRIDE] - at_least) % _RANGE < _HALF

    def open(self, word: int, value: int) -> None:
        at = word * _STRIDE
        with self.lock:
            if (self._values[at] - value) % _RANGE >= _HALF:
                self._values[at] = value % _RANGE
                for look in self._waiting[word]:
                    look()

    # -- for the device's queues -------------------------------------------------------------------------------------

    def rouse(self, word: int, look: Callable[[], None]) -> None:
        """From now on `look` is called, with the lock held, whenever the word rises. Needs the lock."""
        self._waiting[word].append(look)

    def signal(self, word: int, value: int) -> None:
        """`open`, and tells who follows or watches."""
        self.open(word, value)
        if (changed := self._followers.get(word)) is not None:
            self._tell(changed, value)
        if word in self._watchers:
            os.eventfd_write(self._bell, 1)

    def follow(self, word: int, changed: Changed) -> None:
        self._followers[word] = changed

    def watch(self, word: int, changed: Changed) -> None:
        self._seen[word] = self._values[word * _STRIDE]
        self._watchers[word] = changed

    def close(self) -> None:
        """Nobody is told any more. No signal comes after it."""
        self._loop.remove_reader(self._bell)
        os.close(self._bell)
        self._followers.clear()
        self._watchers.clear()

    def _rung(self) -> None:
        os.eventfd_read(self._bell)
        for word, changed in list(self._watchers.items()):
            value = self._values[word * _STRIDE]
            if value != self._seen[word]:
                self._seen[word] = value
                self._tell(changed, value)

    def _tell(self, changed: Changed, value: int) -> None:
        try:
            changed(value)
        except Exception as error:
            self._complaints.say(error, "whoever was told of a word's value failed")
