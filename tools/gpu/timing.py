"""How long device work takes: by events around replays of a captured graph, with a cold second-level cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from tools.gpu.runner import Place

FLUSH_BYTES = 256 << 20  # more than any second-level cache
WARM = 3


def seconds(place: Place, work: Callable[[], object], repeat: int = 20) -> float:
    """The median time of some work, launched as it is."""
    if place.is_dry:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM):
        work()
    pairs = []
    for _ in range(repeat):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return float(median(begin.elapsed_time(end) for begin, end in pairs)) / 1e3


def captured(place: Place, work: Callable[[], object], num_warm: int) -> Callable[[], object]:
    """Replays of the work as one graph, after so many runs. Raises RuntimeError where it cannot be captured."""
    if place.is_dry:
        return work
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(num_warm):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def device_seconds(place: Place, work: Callable[[], object], num_warm: int = WARM) -> tuple[float, str]:
    """The median time without that of launching, and how it was taken; with no warm runs, as it is launched."""
    if not num_warm:
        return seconds(place, work), "launched"
    try:
        return seconds(place, captured(place, work, num_warm)), "graph"
    except RuntimeError as error:
        torch.cuda.synchronize()
        return seconds(place, work), f"launched; no graph: {str(error).splitlines()[0][:80]}"
