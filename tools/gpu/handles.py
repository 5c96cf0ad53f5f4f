"""Device memory that two processes see: by a POSIX descriptor, and taken back by putting other memory at its address.

`handles(row, dry)`; row(name, value, unit, floor, note).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

Row = Callable[..., None]

SIZE = 1 << 21  # a unit of such memory
WITHIN_S = 60.0

CHILD = """
import sys
from tools.gpu.handles import Shared, check
import torch
torch.zeros(1, device="cuda")
shared = Shared.of_descriptor(int(sys.argv[1]))
x = shared.tensor()
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


def check(result: tuple[Any, ...]) -> Any:
    assert not int(result[0]), str(result[0])
    return result[1] if len(result) > 1 else None


class Shared:
    """A range of device addresses, with memory in it that another process can have, too."""

    def __init__(self) -> None:
        from cuda.bindings import driver as cu

        self.cu = cu
        self.base = int(check(cu.cuMemAddressReserve(SIZE, 0, 0, 0)))
        self.handle: Any = None

    @classmethod
    def of_descriptor(cls, fd: int) -> Shared:
        shared = cls()
        kind = shared.cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        shared._map(check(shared.cu.cuMemImportFromShareableHandle(fd, kind)))
        return shared

    def fresh(self) -> None:
        """Other physical memory at the address."""
        cu = self.cu
        wanted = cu.CUmemAllocationProp()
        wanted.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        wanted.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        wanted.location.id = 0
        wanted.requestedHandleTypes = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        handle = check(cu.cuMemCreate(SIZE, wanted, 0))
        if self.handle is not None:
            check(cu.cuMemUnmap(self.base, SIZE))
            check(cu.cuMemRelease(self.handle))
        self._map(handle)

    def _map(self, handle: Any) -> None:
        cu = self.cu
        check(cu.cuMemMap(self.base, SIZE, 0, handle, 0))
        access = cu.CUmemAccessDesc()
        access.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = 0
        access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        check(cu.cuMemSetAccess(self.base, SIZE, [access], 1))
        self.handle = handle

    def descriptor(self) -> int:
        kind = self.cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return int(check(self.cu.cuMemExportToShareableHandle(self.handle, kind, 0)))

    def tensor(self) -> torch.Tensor:
        """int32."""
        interface = {"shape": (SIZE // 4,), "typestr": "<i4", "data": (self.base, False), "version": 2}
        return torch.as_tensor(type("At", (), {"__cuda_array_interface__": interface})(), device="cuda")


def handles(row: Row, dry: bool = False) -> None:
    if dry:
        row("device memory between processes", "not in a dry run")
        return
    torch.zeros(1, device="cuda")
    shared = Shared()
    shared.fresh()
    x, copy = shared.tensor(), torch.zeros(16, dtype=torch.int32, device="cuda")
    x.zero_()
    x[5] = 42
    copy.copy_(x[:16])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        copy.copy_(x[:16])
    graph.replay()
    torch.cuda.synchronize()
    fd = shared.descriptor()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(fd)], pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        said = child.stdout.readline().strip()
        row("another process reads and writes device memory, by a descriptor", said == "seen" and int(x[6]) == 43)
        shared.fresh()
        shared.tensor().zero_()
        torch.cuda.synchronize()
        child.stdin.write("go on\n")
        child.stdin.flush()
        said = child.stdout.readline().strip()
        graph.replay()
        torch.cuda.synchronize()
        is_fenced = said == "late" and int(shared.tensor()[7]) == 0 and int(copy[5]) == 0 and int(copy[7]) == 0
        row("memory taken back at the same address, under a captured graph", is_fenced)
    finally:
        child.kill()
        child.wait(WITHIN_S)
