"""Memory that the C library keeps for itself goes back to the system.

What a long prompt needed lies, once it is freed, between smaller things that are still there, in an arena of each
thread that computed: the C library gives back the end of an arena alone, so that a process that has served all kinds of
requests stays as large as all of them together made it.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

EVERY_S = 15.0
GROWN_BYTES = 16 << 20  # less is not worth walking through the arenas, which takes some milliseconds


def start_giving_back() -> None:
    """From now on, on a thread that sleeps; does nothing where the C library cannot."""
    if (trim := trimming()) is not None:
        threading.Thread(target=_give_back, args=(trim,), name="msi-memory", daemon=True).start()


def trimming() -> Callable[[], object] | None:
    """What gives back all pages in which nothing is, those amid others, too; None without glibc."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return lambda: trim(0)


def anonymous_bytes() -> int:
    """What this process has in memory that is of no file and not shared; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


def _give_back(trim: Callable[[], object]) -> None:
    had = anonymous_bytes()
    while True:
        time.sleep(EVERY_S)
        if anonymous_bytes() > had + GROWN_BYTES:
            trim()
            had = anonymous_bytes()
