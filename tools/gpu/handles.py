"""Rows in the GPU's own memory, as the engine has them with `--cuda-rows device`: another process writes there by a
descriptor, until other memory lies at the address; and a card would get a dma-buf.

`handles(row, dry)`; row(name, value, unit, floor, note).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import torch

from msi.device.cuda_driver import CudaDriver
from msi.device.cuda_rows import CudaRows
from msi.errors import ConfigError
from msi.net.regions import HOST_MEMORY, Region

Row = Callable[..., None]

SIZE = 4096  # of a seat, which takes a unit of such memory
WITHIN_S = 60.0

CHILD = """
import sys
from tools.gpu.handles import SIZE, open_rows
import torch
x = open_rows().of_peer(int(sys.argv[1]), SIZE, "the parent").tensor()
assert int(x[5]) == 42, int(x[5])
x[6] = 43
torch.cuda.synchronize()
print("seen", flush=True)
sys.stdin.readline()
x[7] = 99  # late: by now this memory is nobody's but ours
torch.cuda.synchronize()
print("late", flush=True)
sys.stdin.readline()
"""


class Nothing:
    """Implements `msi.device.cuda_rows.Launching`: nothing is out but what the calling thread has launched."""

    def adopt(self, memory: memoryview, num_parts: int = 1) -> Region:
        return HOST_MEMORY.adopt(memory)

    def wait_quiet(self) -> bool:
        torch.cuda.synchronize()
        return True

    def lose(self, reason: str) -> None:
        raise AssertionError(reason)


def open_rows() -> CudaRows:
    driver = CudaDriver(0)
    return CudaRows(driver.own_memory(), Nothing(), driver.tensor_at)


def handles(row: Row, dry: bool = False) -> None:
    if dry:
        row("device memory between processes", "not in a dry run")
        return
    rows = open_rows()
    seats = rows.seats(2, SIZE)
    fd = seats.open(0)
    x, copy = seats.rows.tensor(), torch.zeros(16, dtype=torch.uint8, device="cuda")
    x[5] = 42
    copy.copy_(x[:16])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        copy.copy_(x[:16])
    graph.replay()
    torch.cuda.synchronize()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(fd)], pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    os.close(fd)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        said = child.stdout.readline().strip()
        row("another process reads and writes device memory, by a descriptor", said == "seen" and int(x[6]) == 43)
        seats.clear(0)
        torch.cuda.synchronize()
        child.stdin.write("go on\n")
        child.stdin.flush()
        said = child.stdout.readline().strip()
        graph.replay()
        torch.cuda.synchronize()
        is_fenced = said == "late" and not int(x.count_nonzero()) and not int(copy.count_nonzero())
        row("memory taken back at the same address, under a captured graph", is_fenced)
    finally:
        child.kill()
        child.wait(WITHIN_S)
    region = rows.region(SIZE)
    row("what cards write is flushed by the host", region.flush is not None)
    if region.flush is not None:
        region.flush()
    try:
        os.close(region.export())
        row("a card can be given device memory, by a dma-buf", True)
    except ConfigError as error:
        row("a card can be given device memory, by a dma-buf", str(error))
