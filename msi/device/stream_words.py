"""The words of a device with streams: host memory that its streams read and write in place."""

from __future__ import annotations

import threading
from collections.abc import Callable

from msi.device.cuda_driver import Driver
from msi.device.queues import Changed
from msi.net.regions import map_zeroed

WORD_BYTES = 64  # a cache line each
MAX_WORDS = 1 << 14  # all of it is pinned
_STRIDE, _RANGE, _HALF = WORD_BYTES // 4, 1 << 32, 1 << 31


class StreamWords:
    """Implements `msi.device.queues.Words`.

    Args:
        opened: called after each rise that the host made, on the thread that made it.

    Attributes:
        followers: by word: who is told of its signals.
    """

    def __init__(self, driver: Driver, opened: Callable[[], None]) -> None:
        self.followers: dict[int, Changed] = {}
        self._memory = map_zeroed(MAX_WORDS * WORD_BYTES)
        self._values = self._memory.cast("I")
        self._at = driver.map_host(self._memory)
        self._driver = driver
        self._opened = opened
        self._lock = threading.Lock()  # over the host's writes
        self._taken = 0

    def take(self) -> int:
        with self._lock:
            assert self._taken < MAX_WORDS, f"all {MAX_WORDS} words are taken"
            self._taken += 1
            return self._taken - 1

    def give_back(self, word: int) -> None:
        self.followers.pop(word, None)

    def is_there(self, word: int, at_least: int) -> bool:
        return (self._values[word * _STRIDE] - at_least) % _RANGE < _HALF

    def open(self, word: int, value: int) -> None:
        at = word * _STRIDE
        with self._lock:
            if (self._values[at] - value) % _RANGE < _HALF:
                return
            self._values[at] = value % _RANGE
        self._opened()

    def address(self, word: int) -> int:
        """As the device addresses it."""
        return self._at + word * WORD_BYTES

    def close(self) -> None:
        """No stream waits for any of them, or writes one."""
        self.followers.clear()
        self._driver.unmap_host(self._memory)
