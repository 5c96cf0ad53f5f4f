"""Host memory that kernels read and write in place: whether it is right, and how fast beside the device's own.

`host_memory(row, dry)`; row(name, value, unit, floor, note).
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable

import torch

from msi.device.cuda_driver import CudaDriver, Driver
from msi.device.fake.streams import FakeStreams

Row = Callable[..., None]

ROW_BYTES = 12416  # of Mixtral-8x22B: 6144 values of two bytes, two weights, two ids, in lines of 128


def host_memory(row: Row, dry: bool = False) -> None:
    driver: Driver = FakeStreams() if dry else CudaDriver()
    driver.enter()
    stream = driver.stream()
    _is_seen_both_ways(row, driver, stream)
    sizes = (1 << 16,) if dry else (1 << 16, 128 * ROW_BYTES // 128 * 128, 1 << 26)
    for kind, map_memory in (("anonymous", _anonymous), ("a memfd", _memfd)):
        for size in sizes:
            _bandwidth(row, driver, stream, kind, map_memory, size)
    if not dry:
        _rows_gathered(row, driver, stream)
    _registering(row, driver, 1 << 20 if dry else 1 << 28)
    driver.close()


def _anonymous(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size))


def _memfd(size: int) -> memoryview:
    fd = os.memfd_create("rows")
    os.ftruncate(fd, size)
    memory = memoryview(mmap.mmap(fd, size))
    os.close(fd)
    return memory


def _is_seen_both_ways(row: Row, driver: Driver, stream: object) -> None:
    memory = _anonymous(1 << 16)
    driver.map_host(memory)
    seen = driver.tensor(memory).view(torch.float32)
    host = memory.cast("f")
    host[7], host[8] = 3.0, 5.0
    driver.launch(stream, lambda: seen.add_(1.0))
    driver.synchronize()
    right = (host[7], host[8], host[9]) == (4.0, 6.0, 1.0)
    row("a kernel sees what the host wrote, and the host what a kernel wrote", right, note=str(seen.device))
    driver.unmap_host(memory)


def _bandwidth(
    row: Row, driver: Driver, stream: object, kind: str, map_memory: Callable[[int], memoryview], size: int
) -> None:
    memory = map_memory(size)
    driver.map_host(memory)
    host, own = driver.tensor(memory), torch.empty(size, dtype=torch.uint8, device=driver.device)
    host, own = host[: size // 16 * 16].view(torch.float32), own[: size // 16 * 16].view(torch.float32)
    ways: dict[str, Callable[[], object]] = {
        "read by a kernel": lambda: torch.add(host, 0.0, out=own),
        "written by a kernel": lambda: torch.add(own, 0.0, out=host),
        "copy_ to the device": lambda: own.copy_(host, non_blocking=True),
        "copy_ from the device": lambda: host.copy_(own, non_blocking=True),
    }
    for name, way in ways.items():
        times = []
        for _ in range(12):
            driver.synchronize()
            started = time.perf_counter()
            driver.launch(stream, way)
            driver.synchronize()
            times.append(time.perf_counter() - started)
        best = statistics.median(times[2:])
        row(
            f"{size / 1e6:.3g} MB of {kind}, {name}", round(best * 1e6, 1), "us",
            note=f"{size / best / 1e9:.1f} GB/s, launch and wait included",
        )  # fmt: skip
    driver.unmap_host(memory)


def _rows_gathered(row: Row, driver: Driver, stream: object) -> None:
    """As rows leave and come: 128 of them, each 12 KB, out of order, several times without a wait between."""
    memory = _anonymous(512 * ROW_BYTES // 4096 * 4096)
    driver.map_host(memory)
    seats = driver.tensor(memory)[: 500 * ROW_BYTES].view(500, ROW_BYTES)[:, :12288].view(torch.bfloat16)
    rows = torch.empty(128, 6144, dtype=torch.bfloat16, device=driver.device)
    order = torch.randperm(500, device=driver.device)[:128]
    ways: dict[str, Callable[[], object]] = {
        "gathered from host memory": lambda: rows.copy_(seats.index_select(0, order)),
        "put into host memory": lambda: seats[:128].copy_(rows),
    }
    for name, way in ways.items():
        for _ in range(3):
            driver.launch(stream, way)
        driver.synchronize()
        started = time.perf_counter()
        for _ in range(50):
            driver.launch(stream, way)
        driver.synchronize()
        took = (time.perf_counter() - started) / 50
        row(f"128 rows of 12 KB {name}", round(took * 1e6, 1), "us", note=f"{128 * 12288 / took / 1e9:.1f} GB/s")
    driver.unmap_host(memory)


def _registering(row: Row, driver: Driver, size: int) -> None:
    memory = _anonymous(size)
    started = time.perf_counter()
    driver.map_host(memory)
    mapped = time.perf_counter()
    driver.unmap_host(memory)
    ended = time.perf_counter()
    row(f"registering {size >> 20} MB that was never touched", round((mapped - started) * 1e3, 2), "ms")
    row(f"registering undone, {size >> 20} MB", round((ended - mapped) * 1e3, 2), "ms")
