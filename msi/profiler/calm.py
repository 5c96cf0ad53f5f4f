"""Measuring on a machine that others use too: how much of it they took, and waiting until they rest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

CALM = 0.08  # share of all cores' time that others may take
LOOK_S = 0.5
COUNTED_S = 0.03  # the system counts in hundredths of a second, for each process on its own


class Others:
    """What processes other than ours take of the processors. Where the system does not say, they take nothing.

    Args:
        pids: ours, this one aside.
        patience_s: how long all waits together may take; then things are measured as they are.
    """

    def __init__(self, pids: Callable[[], Iterable[int]], patience_s: float) -> None:
        self.left_s = patience_s
        self._pids = pids
        self._tick = os.sysconf("SC_CLK_TCK")

    def mark(self) -> tuple[float, float]:
        """Now: wall time, and seconds that others computed since the machine started."""
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        except (OSError, ValueError):
            return time.monotonic(), 0.0
        busy = sum(fields[:3]) + sum(fields[5:8])  # all but idle, waiting for disks, and what is counted twice
        ours = sum(self._ticks(pid) for pid in (os.getpid(), *self._pids()))
        return time.monotonic(), (busy - ours) / self._tick

    def share_since(self, mark: tuple[float, float]) -> float:
        """Of all cores' time since then, what others took."""
        now = self.mark()
        elapsed = (now[0] - mark[0]) * (os.cpu_count() or 1)
        return max(0.0, now[1] - mark[1] - COUNTED_S) / elapsed if elapsed > 0 else 0.0

    def wait_calm(self) -> None:
        """Until others rest, or patience is at an end."""
        while self.left_s > 0:
            mark = self.mark()
            time.sleep(min(LOOK_S, self.left_s))
            if self.share_since(mark) <= CALM:
                return
            self.left_s -= LOOK_S

    def _ticks(self, pid: int) -> int:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        return int(fields[11]) + int(fields[12])
