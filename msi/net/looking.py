"""Whether to look again and again for what is awaited, rather than to sleep until it wakes us.

Looking takes a core. Where somebody else wants that core, what is awaited comes later, not sooner. So nobody looks
while more threads run on this host, or wait to, than it has cores; nor after another one was given the core that we
looked on, which tells of crowded cores where we may use only some of them; nor where a quota leaves less than two
cores, or has run out. And each look in vain lets twice as many opportunities as the last one go by; one that is
rewarded takes the next.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SLICE_S = 20e-6  # of a look, from one question whether a core is free to the next
MOST_SKIPPED = 1024
QUOTA_EACH_S = 0.1  # a quota is per period of that length, nearly always
LEAST_QUOTA = 2.0  # cores: with less, who looks takes what who computes may have


class Vain:
    """Who may look next, by what looking has brought."""

    def __init__(self) -> None:
        self._skipped = self._to_skip = 0

    def may_look(self) -> bool:
        """An opportunity; whether to take it."""
        if self._to_skip:
            self._to_skip -= 1
            return False
        return True

    @property
    def num_to_skip(self) -> int:
        """Opportunities that go by before the next one to look."""
        return self._to_skip

    def skip_all(self) -> int:
        """Whoever lets so many go by need not ask at each of them."""
        to_skip, self._to_skip = self._to_skip, 0
        return to_skip

    def looked(self, is_rewarded: bool) -> None:
        self._skipped = self._to_skip = 0 if is_rewarded else min(2 * self._skipped + 1, MOST_SKIPPED)


class Seen(NamedTuple):
    """What the kernel says.

    Attributes:
        num_running: threads of this host that run or wait to; 0 where it does not say.
        num_pushed: how often another thread was given the core that the one who asks was running on.
        num_throttled: periods in which our quota ran out.
    """

    num_running: int
    num_pushed: int
    num_throttled: int


def is_free(num_cores: int, quota: float, before: Seen, now: Seen) -> bool:
    """Whether who asks may take a core for itself, of a host that has so many.

    Args:
        quota: cores that our group of processes may take; infinite without one.
        before: when it was asked last.
    """
    return (
        now.num_running <= num_cores
        and now.num_pushed == before.num_pushed
        and now.num_throttled == before.num_throttled
        and quota >= LEAST_QUOTA
    )


class Cores:
    """Those of this host, for one thread that asks.

    Args:
        proc, groups: where the kernel says it.
    """

    def __init__(
        self,
        *,
        proc: Path = Path("/proc"),
        groups: Path = Path("/sys/fs/cgroup"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = os.cpu_count() or 1
        self._clock = clock
        self._fds: list[int] = []
        self._loads = self._opened(proc / "loadavg")
        self.quota, told_by = quota_of(proc, groups)
        self._throttled = -1 if told_by is None else self._opened(told_by)
        self._throttled_at = -math.inf
        self._known = 0  # then
        self._seen = Seen(0, _num_pushed(), self._num_throttled())

    def one_is_free(self) -> bool:
        """As `is_free`, since it was asked last."""
        before = self._seen
        self._seen = now = Seen(self._num_running(), _num_pushed(), self._num_throttled())
        return is_free(self._count, self.quota, before, now)

    def close(self) -> None:
        """Nobody asks any more. Idempotent."""
        fds, self._fds, self._loads, self._throttled = self._fds, [], -1, -1
        for fd in fds:
            os.close(fd)

    def _num_running(self) -> int:
        if self._loads < 0:
            return 0
        running = os.pread(self._loads, 64, 0).split(b" ", 4)[3]  # such as 2/417: of all
        return int(running[: running.index(b"/")])

    def _num_throttled(self) -> int:
        """Not asked anew for some time: the kernel adds it up over all cores."""
        if self._throttled < 0:
            return 0
        if (now := self._clock()) - self._throttled_at >= QUOTA_EACH_S:
            self._throttled_at = now
            self._known = throttled_in(os.pread(self._throttled, 4096, 0).decode())
        return self._known

    def _opened(self, path: Path) -> int:
        try:
            self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return -1
        return self._fds[-1]


def _num_pushed() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def quota_of(proc: Path, groups: Path) -> tuple[float, Path | None]:
    """Cores that our group of processes may take, the least of all groups around it; the file that counts when it had
    no more.
    """
    least: tuple[float, Path | None] = math.inf, None
    for group in _groups_of(proc, groups):
        quota = _quota_in(group)
        if quota < least[0]:
            least = quota, group / "cpu.stat"
    return least


def _groups_of(proc: Path, groups: Path) -> list[Path]:
    """Those that may have a quota, of either version of the kernel's control groups."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / controllers if controllers else groups
        inner = top / path.lstrip("/")
        found += [inner, *(parent for parent in inner.parents if parent.is_relative_to(top))]
    return found


def _quota_in(group: Path) -> float:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return math.inf


def throttled_in(told: str) -> int:
    """What a file cpu.stat says."""
    words = told.split()
    return int(words[words.index("nr_throttled") + 1]) if "nr_throttled" in words[:-1] else 0
