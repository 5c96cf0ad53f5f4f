"""Gates and flags of a real device: how long one takes, of what that is made, and what waits behind a closed one.

`gates(row, dry)` says it, a row at a time: row(name, value, unit, floor, note). With `dry` the parts that need a device
are named, and the others run over the fake streams.
"""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from msi.device.cuda_driver import CudaDriver, Driver
from msi.device.fake.streams import FakeStreams
from tools.gpu.closed_gates import OPENED_AFTER_S, behind_a_closed_gate, calls

Row = Callable[..., None]

STRIDE = 16  # words of 32 bits in 64 bytes
PAGE_BYTES = 1 << 16

# opens gate [1] with what is asked for in [0], some time after: the one that asks may hold its interpreter's lock
OPENER = """
import mmap, os, sys, time
words = memoryview(mmap.mmap(int(sys.argv[1]), 4096)).cast("I")
done, parent = 0, int(sys.argv[3])
while os.getppid() == parent and words[32] == 0:
    asked = words[0]
    if asked != done:
        time.sleep(float(sys.argv[2]))
        done = words[16] = asked
    time.sleep(0.0005)
"""


class Bench:
    """A driver, words on a page that it sees, and who opens gates from outside."""

    def __init__(self, dry: bool) -> None:
        self.driver: Driver = FakeStreams() if dry else CudaDriver()
        self.driver.enter()
        fd = os.memfd_create("gates")
        os.ftruncate(fd, PAGE_BYTES)
        self.memory = memoryview(mmap.mmap(fd, PAGE_BYTES))
        self.words = self.memory.cast("I")
        self.at = self.driver.map_host(self.memory)
        self.stream = self.driver.stream()
        self.opener = subprocess.Popen(
            [sys.executable, "-c", OPENER, str(fd), str(OPENED_AFTER_S), str(os.getpid())],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
        )
        self._fd = fd
        self._asked = 0
        self._free = itertools.count(4)

    def word(self) -> int:
        return next(self._free)

    def address(self, word: int) -> int:
        return self.at + word * 64

    def seen(self, word: int, value: int, within_s: float = 2.0) -> bool:
        words, at, until = self.words, word * STRIDE, time.perf_counter() + within_s
        while words[at] != value:
            if time.perf_counter() > until:
                return False
        return True

    def close_a_gate(self) -> int:
        """Of word 1; it opens some time after. Returns its value."""
        self._asked += 1
        self.words[0] = self._asked
        return self._asked

    def open_all(self) -> None:
        """Whatever a stream still waits for, so that nothing stays behind a gate."""
        for word in range(4, self.word()):
            self.words[word * STRIDE] = 1 << 30
        self.driver.synchronize()

    def close(self) -> None:
        self.words[32] = 1
        self.words[STRIDE] = 1 << 30
        self.open_all()
        self.opener.wait(10)
        self.driver.synchronize()
        self.driver.unmap_host(self.memory)
        os.close(self._fd)


def gates(row: Row, dry: bool = False) -> None:
    """All of them."""
    bench = Bench(dry)
    try:
        _latencies(bench, row, dry)
        _free_beside_gated(bench, row, dry)
        if dry:
            row("what waits behind a closed gate, what a call costs", "not in a dry run")
        else:
            calls(bench, row)
            behind_a_closed_gate(bench, row)
    finally:
        bench.close()


# -- how long ----------------------------------------------------------------------------------------------------------


def _latencies(bench: Bench, row: Row, dry: bool) -> None:
    driver, stream = bench.driver, bench.stream
    count = 50 if dry else 500
    wait, write = _plain(bench, stream)

    def measured(name: str, times: Callable[[], list[float]], note: str = "") -> None:
        """What fails, or never comes, is a row like another."""
        try:
            took = sorted(times())
        except Exception as error:
            row(name, "failed", note=f"{type(error).__name__}: {error}"[:160])
            bench.open_all()
            return
        if not took:
            row(name, "never seen")
            bench.open_all()
            return
        row(f"{name}, p50", round(statistics.median(took) * 1e6, 2), "us", note=note)
        row(f"{name}, p99", round(took[int(len(took) * 0.99)] * 1e6, 2), "us")

    measured("gate opened -> flag seen, 32 bits", lambda: _round_trips(bench, count, wait, write))
    measured("flag alone: launched on an idle stream -> seen", lambda: _flags_alone(bench, count))
    if dry:
        return
    for num in (1, 3, 7, 15):
        measured(f"the same, beside {num} streams at closed gates", partial(_beside_closed, bench, count // 2, num))
    cu = driver._cu  # type: ignore[attr-defined]
    handle = stream.cuda_stream  # type: ignore[union-attr]
    flag = driver.tensor(bench.memory).view(torch.int32)

    def wait64(at: int, value: int) -> None:
        _ok(cu.cuStreamWaitValue64(handle, at, value, 0))

    def write64(at: int, value: int) -> None:
        _ok(cu.cuStreamWriteValue64(handle, at, value, 0))

    def bare(at: int, value: int) -> None:
        _ok(cu.cuStreamWriteValue32(handle, at, value, 1))  # 1: behind no fence

    def kernel(at: int, value: int) -> None:
        index = (at - bench.at) // 4
        driver.launch(stream, lambda: flag[index : index + 1].fill_(value))

    kernel(bench.address(bench.word()), 1)
    driver.synchronize()
    allocated = torch.zeros(1 << 14, dtype=torch.int32, pin_memory=True)
    by_cuda = partial(_round_trips, words=allocated.numpy(), base=allocated.data_ptr())
    measured("the same, a kernel writes the flag", lambda: _round_trips(bench, count, wait, kernel))
    measured("the same, wait and write in one batch call", lambda: _batched(bench, count, cu, handle))
    measured("the same, words by cudaHostAlloc", lambda: by_cuda(bench, count, wait, write))
    measured("the same, 64 bits", lambda: _round_trips(bench, count, wait64, write64))
    measured("the same, a kernel that spins at the gate", lambda: _spinning(bench, 300), "a floor, not a design")
    measured("the same, written without a fence", lambda: _round_trips(bench, count, wait, bare))


def _ok(result: tuple[Any, ...]) -> None:
    if result[0]:
        raise RuntimeError(str(result[0]))


def _beside_closed(bench: Bench, count: int, num: int) -> list[float]:
    gate = bench.word()
    streams = [bench.driver.stream() for _ in range(num)]  # all of them first: the driver may wait for a gate here
    for stream in streams:
        bench.driver.wait(stream, bench.address(gate), 1)
    times = _round_trips(bench, count, *_plain(bench, bench.stream), within_s=0.5)
    bench.words[gate * STRIDE] = 1
    bench.driver.synchronize()
    return times


def _plain(bench: Bench, stream: Any) -> tuple[Callable[[int, int], None], Callable[[int, int], None]]:
    driver = bench.driver

    def wait(at: int, value: int) -> None:
        driver.wait(stream, at, value)

    def write(at: int, value: int) -> None:
        driver.write(stream, at, value)

    return wait, write


def _round_trips(
    bench: Bench,
    count: int,
    wait: Callable[[int, int], None],
    write: Callable[[int, int], None],
    words: Any = None,
    base: int | None = None,
    within_s: float = 5.0,
) -> list[float]:
    """Seconds from the host's opening of a gate to its sight of the flag behind it; none where one was never seen."""
    words, base = bench.words if words is None else words, bench.at if base is None else base
    gate, flag = bench.word(), bench.word()
    times = []
    for n in range(1, count + 1):
        wait(base + gate * 64, n)
        write(base + flag * 64, n)
        time.sleep(3e-5)
        at, until = flag * STRIDE, time.perf_counter() + within_s
        started = time.perf_counter()
        words[gate * STRIDE] = n
        while words[at] != n:
            if time.perf_counter() > until:
                return []
        times.append(time.perf_counter() - started)
    return times


def _flags_alone(bench: Bench, count: int) -> list[float]:
    flag, times = bench.word(), []
    for n in range(1, count + 1):
        started = time.perf_counter()
        bench.driver.write(bench.stream, bench.address(flag), n)
        assert bench.seen(flag, n), "a flag on an idle stream was not seen"
        times.append(time.perf_counter() - started)
    return times


def _batched(bench: Bench, count: int, cu: Any, handle: int) -> list[float]:
    gate, flag = bench.word(), bench.word()
    types = cu.CUstreamBatchMemOpType

    def operation(kind: Any, address: int, value: int) -> Any:
        one = cu.CUstreamBatchMemOpParams()
        one.operation = kind
        part = one.waitValue if kind == types.CU_STREAM_MEM_OP_WAIT_VALUE_32 else one.writeValue
        part.operation, part.address, part.value, part.flags = kind, address, value, 0
        return one

    times = []
    for n in range(1, count + 1):
        both = [
            operation(types.CU_STREAM_MEM_OP_WAIT_VALUE_32, bench.address(gate), n),
            operation(types.CU_STREAM_MEM_OP_WRITE_VALUE_32, bench.address(flag), n),
        ]
        _ok(cu.cuStreamBatchMemOp(handle, 2, both, 0))
        time.sleep(3e-5)
        started = time.perf_counter()
        bench.words[gate * STRIDE] = n
        if not bench.seen(flag, n):
            return []
        times.append(time.perf_counter() - started)
    return times


def _spinning(bench: Bench, count: int) -> list[float]:
    """A kernel that looks at the gate itself and writes the flag: how fast the bus is. It takes an SM."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "spinning.py")
        with open(path, "w") as file:  # Triton reads the source of its kernels
            file.write(SPINNING)
        sys.path.insert(0, folder)
        try:
            import spinning  # type: ignore[import-not-found]
        finally:
            sys.path.remove(folder)
        words = bench.driver.tensor(bench.memory).view(torch.int32)
        gate, flag, times = bench.word(), bench.word(), []
        for n in range(1, count + 1):
            launch = partial(spinning.pass_on, words, gate * STRIDE, flag * STRIDE, n)
            bench.driver.launch(bench.stream, launch)
            time.sleep(1e-4)
            started = time.perf_counter()
            bench.words[gate * STRIDE] = n
            if not bench.seen(flag, n):
                return []
            times.append(time.perf_counter() - started)
        return times[20:]


SPINNING = """
import triton
import triton.language as tl


@triton.jit
def kernel(words, gate, flag, value):
    seen = tl.atomic_add(words + gate, 0, sem="acquire", scope="sys")
    looks = 0
    while (seen < value) & (looks < 2000000):
        seen = tl.atomic_add(words + gate, 0, sem="acquire", scope="sys")
        looks += 1
    tl.atomic_xchg(words + flag, value, sem="release", scope="sys")


def pass_on(words, gate, flag, value):
    kernel[(1,)](words, gate, flag, value, num_warps=1)
"""


# -- beside ------------------------------------------------------------------------------------------------------------


def _free_beside_gated(bench: Bench, row: Row, dry: bool) -> None:
    """Up to how many gated streams one that is free still runs, with kernels that have run before."""
    driver = bench.driver
    x = [torch.zeros(8, device=driver.device) for _ in range(40)]
    streams = [driver.stream() for _ in range(40)]
    for stream, mine in zip(streams, x, strict=True):
        driver.launch(stream, partial(mine.add_, 1))
    driver.synchronize()
    free, last = streams[-1], 0
    for num in (1, 2, 3, 4) if dry else (1, 2, 3, 5, 7, 8, 11, 15, 23, 31):
        gate, flag = bench.word(), bench.word()
        for stream, mine in zip(streams[:num], x, strict=False):
            driver.wait(stream, bench.address(gate), 1)
            driver.launch(stream, partial(mine.add_, 1))
        driver.launch(free, lambda: x[-1].add_(1))
        driver.write(free, bench.address(flag), 1)
        runs = bench.seen(flag, 1, within_s=0.5)
        bench.words[gate * STRIDE] = 1
        driver.synchronize()
        if not runs:
            break
        last = num
    connections, loading = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"), os.environ.get("CUDA_MODULE_LOADING")
    row(
        "a free stream runs beside so many gated ones, kernels warmed", last,
        note=f"CUDA_DEVICE_MAX_CONNECTIONS={connections}, CUDA_MODULE_LOADING={loading}",
    )  # fmt: skip
