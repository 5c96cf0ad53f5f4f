"""What a captured graph costs the host, and what one with its gate and flag inside does.

`replays(row, dry)`; row(name, value, unit, floor, note).
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from msi.device.cuda_driver import CudaDriver

Row = Callable[..., None]


def replays(row: Row, dry: bool = False) -> None:
    if dry:
        row("replays of captured graphs", "not in a dry run")
        return
    driver = CudaDriver()
    driver.enter()
    cu = driver._cu
    memory = memoryview(mmap.mmap(-1, 1 << 14))
    words, at = memory.cast("I"), driver.map_host(memory)
    streams = [driver.stream() for _ in range(3)]
    x = torch.zeros(3, 1024, device=driver.device)
    torch.cuda.synchronize()
    for num in (1, 10, 40):
        graph = _captured(streams[0], lambda num=num: [x[0].add_(1) for _ in range(num)])  # type: ignore[misc]
        _host_time(row, f"replay of {num} kernels", graph.replay)
        raw = graph.raw_cuda_graph_exec() if hasattr(graph, "raw_cuda_graph_exec") else None
        if raw is not None:
            handle = streams[0].cuda_stream
            _host_time(row, f"cuGraphLaunch of {num} kernels", lambda: cu.cuGraphLaunch(raw, handle))  # noqa: B023
    graphs = [
        _captured(stream, lambda mine=mine: [mine.add_(1) for _ in range(10)])  # type: ignore[misc]
        for stream, mine in zip(streams, x, strict=True)
    ]

    def a_layer(turn: int) -> None:
        for lane, graph in enumerate(graphs):
            stream = streams[lane]
            driver.wait(stream, at + 64 * lane, 0)
            driver.launch(stream, graph.replay)
            driver.write(stream, at + 1024 + 64 * lane, turn)

    turns = iter(range(1, 1 << 30))
    _host_time(row, "wait, replay of ten kernels and write, on three streams in turn", lambda: a_layer(next(turns)))
    _pool_shared(row, streams, x)
    del words
    torch.cuda.synchronize()
    driver.unmap_host(memory)


def _captured(stream: Any, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    torch.cuda.synchronize()
    return graph


def _host_time(row: Row, name: str, call: Callable[[], object]) -> None:
    times = []
    for number in range(400):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
        if number % 20 == 19:
            torch.cuda.synchronize()
    times.sort()
    row(f"host time of {name}, p50", round(statistics.median(times) * 1e6, 2), "us")
    row(f"host time of {name}, p99", round(times[int(0.99 * len(times))] * 1e6, 2), "us")


def _pool_shared(row: Row, streams: list[Any], x: torch.Tensor) -> None:
    """What many graphs take of memory and of time to capture, in one pool."""
    before, started = torch.cuda.mem_get_info()[0], time.perf_counter()
    pool = torch.cuda.graph_pool_handle()
    kept = []
    for number in range(60):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=streams[number % 3]):
            for _ in range(20):
                x[number % 3].mul_(1.0).add_(x[0].exp())
        kept.append(graph)
    torch.cuda.synchronize()
    took, taken = time.perf_counter() - started, before - torch.cuda.mem_get_info()[0]
    row("capturing a graph of 60 kernels", round(took / 60 * 1e3, 2), "ms", note=f"{taken / 60 / 1e3:.0f} KB each")
