"""cuda-bindings' driver module without a device: virtual-memory calls that are recorded, and hold to their rules.

Device memory is memfds; addresses are of this process, where nothing can be touched until memory was put there and
access was given. Sizes that are no whole units, memory that overlaps, and what was never reserved, mapped or created
fail a test; what a driver would refuse is refused.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from types import SimpleNamespace

UNIT = 2 << 20
NAME = "cuda-memory"
NONE, READ_WRITE = 0, 3
PRIVATE_NOTHING, SHARED = 0x4022, 0x01  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
FIXED = 0x10
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

INVALID, OUT_OF_MEMORY, NOT_SUPPORTED = 1, 2, 801
WORDS = {INVALID: b"invalid argument", OUT_OF_MEMORY: b"out of memory", NOT_SUPPORTED: b"operation not supported"}
ATTRIBUTES = {
    "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 1,
    "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": 1,
    "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED": 1,
    "GPU_DIRECT_RDMA_WRITES_ORDERING": 100,
    "GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS": 1,
    "DMA_BUF_SUPPORTED": 1,
}  # as an H100 says


def names(*values: str) -> SimpleNamespace:
    return SimpleNamespace(**{value: value for value in values})


class RecordedCuda:
    """Args: attributes: what the device says of itself, where it is not an H100.

    Attributes:
        calls: names of all calls but questions, in order.
        refuses: what these calls answer from now on: an error.
    """

    def __init__(self, **attributes: int) -> None:
        self.calls: list[str] = []
        self.refuses: dict[str, int] = {}
        self.num_pending = 0  # clears that no stream was waited for since
        self.attributes = {**ATTRIBUTES, **attributes}
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, tuple[int, int]] = {}  # by address: bytes, which memory
        self.memory: dict[int, int] = {}  # by handle: a descriptor
        self._handles = itertools.count(1)
        self.CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in self.attributes})
        self.CUmemLocationType = names("CU_MEM_LOCATION_TYPE_DEVICE")
        self.CUmemAllocationType = names("CU_MEM_ALLOCATION_TYPE_PINNED")
        self.CUmemAllocationHandleType = names("CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR")
        self.CUmemAllocationGranularity_flags = names("CU_MEM_ALLOC_GRANULARITY_MINIMUM")
        self.CUmemAccess_flags = names("CU_MEM_ACCESS_FLAGS_PROT_READWRITE")
        self.CUmemRangeHandleType = names("CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD")
        self.CUflushGPUDirectRDMAWritesTarget = names("CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX")
        self.CUflushGPUDirectRDMAWritesScope = names("CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER")

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace(), allocFlags=SimpleNamespace())

    @staticmethod
    def CUmemAccessDesc() -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    def _call(self, name: str) -> int:
        self.calls.append(name)
        return self.refuses.get(name, 0)

    # -- questions -----------------------------------------------------------------------------------------------------

    def cuGetErrorString(self, error):
        return 0, WORDS.get(error)

    def cuDeviceGetAttribute(self, attribute, index):
        assert index == 0
        return 0, self.attributes[attribute]

    def cuMemGetAllocationGranularity(self, wanted, smallest):
        assert wanted.location.id == 0
        return 0, UNIT

    def cuStreamCreate(self, flags):
        assert flags == 1, "it would wait for the default stream"
        return 0, "stream"

    # -- addresses, memory ---------------------------------------------------------------------------------------------

    def cuMemAddressReserve(self, size, alignment, address, flags):
        if error := self._call("cuMemAddressReserve"):
            return error, 0
        assert not size % UNIT
        assert (alignment, address, flags) == (UNIT, 0, 0)
        base = libc.mmap(None, size, NONE, PRIVATE_NOTHING, -1, 0)
        self.reserved[base] = size
        return 0, base

    def cuMemAddressFree(self, address, size):
        self._call("cuMemAddressFree")
        assert self.reserved.pop(address) == size
        assert not any(address <= at < address + size for at in self.mapped), "memory lies there"
        libc.munmap(address, size)
        return (0,)

    def cuMemCreate(self, size, wanted, flags):
        if error := self._call("cuMemCreate"):
            return error, 0
        assert not size % UNIT
        assert wanted.requestedHandleTypes == "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR"
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        os.pwrite(fd, b"left by others", 0)  # memory of a GPU is not zeroed
        return 0, self._add(fd)

    def _add(self, fd: int) -> int:
        handle = next(self._handles)
        self.memory[handle] = fd
        return handle

    def cuMemRelease(self, handle):
        self._call("cuMemRelease")
        os.close(self.memory.pop(handle))
        return (0,)

    def cuMemMap(self, address, size, offset, handle, flags):
        if error := self._call("cuMemMap"):
            return (error,)
        assert (offset, flags) == (0, 0)
        assert any(base <= address and address + size <= base + held for base, held in self.reserved.items())
        assert not any(address < at + held and at < address + size for at, (held, _) in self.mapped.items()), "overlaps"
        fd = self.memory[handle]
        if size % UNIT or size > os.fstat(fd).st_size:
            return (INVALID,)
        libc.mmap(address, size, NONE, SHARED | FIXED, fd, 0)
        self.mapped[address] = size, os.dup(fd)
        return (0,)

    def cuMemSetAccess(self, address, size, access, count):
        if error := self._call("cuMemSetAccess"):
            return (error,)
        assert (len(access), count) == (1, 1)
        assert self.mapped[address][0] == size
        libc.mprotect(address, size, READ_WRITE)
        return (0,)

    def cuMemUnmap(self, address, size):
        if error := self._call("cuMemUnmap"):
            return (error,)
        held, fd = self.mapped.pop(address)
        assert held == size, "a part of what was mapped"
        os.close(fd)
        libc.mmap(address, size, NONE, PRIVATE_NOTHING | FIXED, -1, 0)
        return (0,)

    def cuMemsetD8Async(self, address, value, size, stream):
        if error := self._call("cuMemsetD8Async"):
            return (error,)
        assert stream == "stream"
        ctypes.memset(address, value, size)
        self.num_pending += 1
        return (0,)

    def cuStreamSynchronize(self, stream):
        self._call("cuStreamSynchronize")
        self.num_pending = 0
        return (0,)

    # -- for others ----------------------------------------------------------------------------------------------------

    def cuMemExportToShareableHandle(self, handle, kind, flags):
        if error := self._call("cuMemExportToShareableHandle"):
            return error, -1
        assert kind == "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR"
        return 0, os.dup(self.memory[handle])

    def cuMemImportFromShareableHandle(self, fd, kind):
        if error := self._call("cuMemImportFromShareableHandle"):
            return error, 0
        if NAME not in os.readlink(f"/proc/self/fd/{fd}"):
            return INVALID, 0
        return 0, self._add(os.dup(fd))

    def cuMemGetHandleForAddressRange(self, address, size, kind, flags):
        if error := self._call("cuMemGetHandleForAddressRange"):
            return error, -1
        held, fd = self.mapped[address]
        assert (held, kind, flags) == (size, "CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD", 0)
        assert size % mmap.PAGESIZE == 0
        return 0, os.dup(fd)

    def cuFlushGPUDirectRDMAWrites(self, target, scope):
        if error := self._call("cuFlushGPUDirectRDMAWrites"):
            return (error,)
        assert (target, scope) == (
            "CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX", "CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER",
        )  # fmt: skip
        return (0,)
