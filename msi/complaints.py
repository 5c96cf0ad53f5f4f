"""Exceptions that are bugs, said in the log once a minute each, however often they come."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

SAY_AGAIN_S = 60.0
MAX_KINDS = 256


class Complaints:
    """What one part of msi has to say about exceptions that it survived. From any thread.

    Args:
        log: where to.
        clock: seconds, monotonic.
    """

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0  # since the start
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._said: dict[tuple[type, str], tuple[float, int]] = {}  # by kind: when, and how often since then

    def say(self, error: BaseException, what: str) -> None:
        """With a stack trace, unless the same was said less than a minute ago; then it is only counted."""
        kind, now = (type(error), what), self._clock()
        with self._lock:
            self.count += 1
            said_at, num_since = self._said.get(kind, (-SAY_AGAIN_S, 0))
            is_due = now - said_at >= SAY_AGAIN_S
            if len(self._said) >= MAX_KINDS and kind not in self._said:
                self._said.clear()
            self._said[kind] = (now, 0) if is_due else (said_at, num_since + 1)
        if is_due:
            more = f" ({num_since} more of these since it was said last)" if num_since else ""
            self._log.error("%s%s", what, more, exc_info=error)
