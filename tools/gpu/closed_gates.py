"""What calls of the driver cost the host, and which of them wait for a closed gate of somebody else's stream.

A call that waits stops whoever would open the gate, if that is the same thread.
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tools.gpu.gates import Bench, Row

OPENED_AFTER_S = 0.25  # by another process, so that a call that waits for a gate is seen and ends


def calls(bench: Bench, row: Row) -> None:
    driver, stream = bench.driver, bench.stream
    word = bench.address(bench.word())
    event, x = driver.event(), torch.zeros(8, device=driver.device)
    other = driver.stream()

    def change() -> None:
        driver.launch(other, lambda: None)
        driver.launch(stream, lambda: None)

    timed: dict[str, Callable[[], object]] = {
        "a wait that is there": lambda: driver.wait(stream, word, 0),
        "a write": lambda: driver.write(stream, word, 1),
        "an event's record": lambda: driver.record(stream, event),
        "add_ on 8 values": lambda: driver.launch(stream, lambda: x.add_(1)),
        "a change of torch's stream, twice": change,
    }
    for name, call in timed.items():
        times = []
        for _ in range(300):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
            if len(times) % 50 == 0:
                driver.synchronize()
        row(f"host time of {name}", round(statistics.median(times) * 1e6, 2), "us")


def behind_a_closed_gate(bench: Bench, row: Row) -> None:
    """Whether a call returns while some stream's gate is closed, or waits for it."""
    driver = bench.driver
    cu = driver._cu  # type: ignore[attr-defined]
    device, gated, other = driver.device, driver.stream(), driver.stream()
    x, y = torch.zeros(1 << 20, device=device), torch.zeros(1 << 20, device=device)
    pinned, pageable = torch.zeros(1 << 20, pin_memory=True), torch.zeros(1 << 20)
    x.add_(1), y.add_(1), y.copy_(pinned)
    torch.cuda.synchronize()
    some = memoryview(mmap.mmap(-1, 1 << 21))
    keep: dict[str, Any] = {}

    def on_other(work: Callable[[], object]) -> Callable[[], object]:
        return partial(driver.launch, other, work)

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=other):
            y.add_(1)
        keep["graph"] = graph

    calls: dict[str, Callable[[], object]] = {
        "a kernel that has run before": on_other(lambda: y.add_(1)),
        "a kernel that has never run": on_other(lambda: torch.nn.functional.hardswish(y)),
        "another that has never run": on_other(lambda: torch.nn.functional.softshrink(y)),
        "a stream's synchronize, of another stream": other.synchronize,
        "an item() of another stream": on_other(lambda: y[:1].item()),
        "pinned memory up, non_blocking": on_other(lambda: y.copy_(pinned, non_blocking=True)),
        "pinned memory down, non_blocking": on_other(lambda: pinned.copy_(y, non_blocking=True)),
        "4 KB of pageable memory up": on_other(lambda: y[:1024].copy_(pageable[:1024])),
        "4 MB of pageable memory up": on_other(lambda: y.copy_(pageable)),
        "4 MB down to pageable memory": on_other(lambda: pageable.copy_(y)),
        "torch.empty that fits its pool": on_other(lambda: torch.empty(1 << 18, device=device)),
        "torch.empty that needs cudaMalloc": on_other(lambda: keep.update(big=torch.empty(1 << 28, device=device))),
        "torch.empty of pinned memory": lambda: keep.update(host=torch.empty(1 << 24, pin_memory=True)),
        "cuMemAlloc": lambda: keep.update(alloc=cu.cuMemAlloc(1 << 26)[1]),
        "cuMemFree": lambda: cu.cuMemFree(keep["alloc"]),
        "cuMemHostRegister": lambda: driver.map_host(some),
        "cuMemHostUnregister": lambda: driver.unmap_host(some),
        "a new stream": lambda: keep.update(stream=driver.stream()),
        "a new event": lambda: keep.update(event=driver.event()),
        "cudaMemGetInfo": lambda: torch.cuda.mem_get_info(device),
        "a stream's query": lambda: gated.query(),
        "capturing a graph": capture,
        "replaying a graph": on_other(lambda: keep["graph"].replay()),
        "torch.cuda.empty_cache": torch.cuda.empty_cache,
    }
    for name, call in calls.items():
        value = bench.close_a_gate()
        driver.wait(gated, bench.address(1), value)
        driver.launch(gated, lambda: x.add_(1))
        started = time.perf_counter()
        try:
            call()
            took = time.perf_counter() - started
            waits = took > 0.8 * OPENED_AFTER_S
            row(f"behind a closed gate, {name}", "WAITS" if waits else "returns", note=f"{took * 1e6:.0f} us")
        except Exception as error:
            row(f"behind a closed gate, {name}", "failed", note=f"{type(error).__name__}: {error}"[:120])
        assert bench.seen(1, value), "the gate was not opened"
        torch.cuda.synchronize()
