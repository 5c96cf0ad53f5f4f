"""Which of several ways to compute the same is taken: by what they give, then by what they take. Knows no kernels."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

log = logging.getLogger(__name__)
TIMED_RUNS, ROUNDS = 10, 3


def choose(
    what: str,
    ways: Mapping[str, Callable[[], Tensor]],
    seconds: Callable[[Callable[[], object]], float],
    most_apart: float,
) -> str:
    """The name of the fastest way; the first is the one that others have to agree with, and that may always be taken.

    Args:
        what: is computed, for the log.
        seconds: that a way takes.
        most_apart: norm of the difference between two results that are the same, over the norm of the first.
    """
    first = next(iter(ways))
    truth = ways[first]().double()
    taken = {first: seconds(ways[first])}
    for name, way in ways.items():
        if name == first:
            continue
        try:
            apart = float((way().double() - truth).norm() / truth.norm())
            if not apart <= most_apart:  # neither where it is no number
                log.warning("%s: %s is left out, as it is %.2g from %s", what, name, apart, first)
                continue
            taken[name] = seconds(way)
        except Exception as error:  # somebody else's code: whatever goes wrong, there is another way
            log.warning("%s: %s is left out: %s: %s", what, name, type(error).__name__, str(error)[:200])
    best = min(taken, key=lambda name: taken[name])
    if len(ways) > 1:
        times = ", ".join(f"{name} {spent * 1e6:.1f} us" for name, spent in taken.items())
        log.info("%s by %s: %s", what, best, times)
    return best


def device_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of one run, the least of some rounds, after one that does not count."""
    work()
    if device.type == "cpu":
        began_s = time.perf_counter()
        work()
        return time.perf_counter() - began_s
    taken = []
    for _ in range(ROUNDS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        started.record()
        for _ in range(TIMED_RUNS):
            work()
        ended.record()
        ended.synchronize()
        taken.append(float(started.elapsed_time(ended)) / 1e3 / TIMED_RUNS)
    return min(taken)
