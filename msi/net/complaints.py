"""What strangers and broken peers did: every one is counted, and of each kind a few are told."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

TELL_EVERY_S = 60.0


class Complaints:
    """Call it with a kind (one of few words, never what a stranger said) and a sentence.

    The first of a kind is logged, then one a minute with how many there were.

    Attributes:
        counts: by kind.
    """

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[str] = Counter()
        self._log = log
        self._clock = clock
        self._told: dict[str, tuple[float, int]] = {}  # when last, and how many there were then

    def __call__(self, kind: str, sentence: str) -> None:
        self.counts[kind] += 1
        now, count = self._clock(), self.counts[kind]
        told_at, told = self._told.get(kind, (-TELL_EVERY_S, 0))
        if not told or now - told_at >= TELL_EVERY_S:
            self._told[kind] = (now, count)
            more = count - told - 1
            self._log.warning("%s%s", _short(sentence), f" (and {more} more of this kind)" if more else "")


def _short(sentence: str) -> str:
    """One line of it: what strangers say may be in there."""
    line = "".join(letter if letter.isprintable() else "?" for letter in sentence)
    return line if len(line) <= 300 else line[:297] + "..."
