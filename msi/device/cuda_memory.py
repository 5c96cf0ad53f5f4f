"""A GPU's memory by the driver's virtual-memory calls: addresses that stay, and memory that is put there.

What lies there can be handed to other processes of this host by a POSIX descriptor and taken back by putting other
memory at the same addresses, which programs and captured graphs have been told; and to a card by a dma-buf. Knows
addresses and descriptors, no seats and no transports.

Not yet run on hardware.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from msi.errors import ConfigError, EngineError

IN_ORDER_FOR_OWNER = 100  # of CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING: nothing is to be flushed
FLUSHED_BY_HOST = 1  # of CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS
NOT_ORDERED = (
    "what cards write into the memory of {name} comes in no order, and the host cannot flush it; use `cuda_rows=host`"
)
NEEDED = {
    "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": "has no virtual memory of the driver's",
    "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": "gives no descriptors of its memory",
}


class Refused(EngineError):
    """The driver did not do it; nothing else is wrong with the device."""


Piece = tuple[int, int]  # address, bytes


class Mapping:
    """Addresses of ours, and memory that was put there.

    Args:
        let_go: told of the addresses, and of each piece of memory there, once nobody refers to this any more.
    """

    def __init__(self, address: int, num_bytes: int, let_go: Callable[[Piece, list[Piece]], None]) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self._pieces: list[Piece] = []
        weakref.finalize(self, let_go, (address, num_bytes), self._pieces).atexit = False

    def put(self, memory: CudaMemory, handle: Any, at: int, num_bytes: int) -> None:
        """Raises Refused."""
        memory.put(handle, at, num_bytes)
        self._pieces.append((at, num_bytes))


class CudaMemory:
    """Of one GPU. Used from one thread at a time, but for `flush`.

    Args:
        cu: cuda-bindings' `cuda.bindings.driver`.
        index: of the device.
        enter: the calling thread makes calls in the device's context from now on.

    Attributes:
        unit: bytes that all of it comes in multiples of.
        num_flushes: that were done.

    Raises:
        ConfigError: this device or driver has no such memory.
    """

    def __init__(self, cu: Any, index: int, enter: Callable[[], None]) -> None:
        self.name = f"cuda:{index}"
        self.num_flushes = 0
        self._cu = cu
        self._index = index
        self._enter = enter
        enter()
        for attribute, without in NEEDED.items():
            if not self._attribute(attribute):
                raise ConfigError(f"{self.name} {without}; use `cuda_rows=host`")
        on_device = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._by_descriptor = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._wanted = wanted = cu.CUmemAllocationProp()
        wanted.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        wanted.location.type, wanted.location.id = on_device, index
        wanted.requestedHandleTypes = self._by_descriptor
        wanted.allocFlags.gpuDirectRDMACapable = int(self._attribute("GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED") > 0)
        access = cu.CUmemAccessDesc()
        access.location.type, access.location.id = on_device, index
        access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._access = [access]
        smallest = cu.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.unit = int(self._ok("cuMemGetAllocationGranularity", cu.cuMemGetAllocationGranularity(wanted, smallest)))
        self._stream = self._ok("cuStreamCreate", cu.cuStreamCreate(1))  # 1: it waits for no default stream

    def whole(self, num_bytes: int) -> int:
        """Rounded up to what memory comes in."""
        return -(-num_bytes // self.unit) * self.unit

    # -- memory and addresses; all raise Refused -----------------------------------------------------------------------

    def reserve(self, num_bytes: int) -> int:
        """Addresses with nothing there."""
        self._enter()
        return int(self._ok("cuMemAddressReserve", self._cu.cuMemAddressReserve(num_bytes, self.unit, 0, 0)))

    def free(self, address: int, num_bytes: int) -> None:
        """Addresses with nothing there are the driver's again."""
        self._enter()
        self._ok("cuMemAddressFree", self._cu.cuMemAddressFree(address, num_bytes))

    def create(self, num_bytes: int) -> Any:
        """Memory that lies nowhere yet, with anything in it. It goes once it lies nowhere, nobody holds a descriptor of
        it, and this handle was released.
        """
        self._enter()
        return self._ok("cuMemCreate", self._cu.cuMemCreate(num_bytes, self._wanted, 0))

    def of_descriptor(self, fd: int) -> Any:
        """A handle of memory that another process allocated, to be released."""
        self._enter()
        imported = self._cu.cuMemImportFromShareableHandle(fd, self._by_descriptor)
        return self._ok("cuMemImportFromShareableHandle", imported)

    def release(self, handle: Any) -> None:
        self._enter()
        self._ok("cuMemRelease", self._cu.cuMemRelease(handle))

    def put(self, handle: Any, address: int, num_bytes: int) -> None:
        """There, to be read and written by the device."""
        self._enter()
        self._ok("cuMemMap", self._cu.cuMemMap(address, num_bytes, 0, handle, 0))
        try:
            self._ok("cuMemSetAccess", self._cu.cuMemSetAccess(address, num_bytes, self._access, 1))
        except Refused:
            self._cu.cuMemUnmap(address, num_bytes)
            raise

    def take(self, address: int, num_bytes: int) -> None:
        """Nothing lies there. Nothing that is launched reads or writes there any more: the driver may not wait."""
        self._enter()
        self._ok("cuMemUnmap", self._cu.cuMemUnmap(address, num_bytes))

    def zero(self, address: int, num_bytes: int) -> None:
        """Returns when it is."""
        self._enter()
        self._ok("cuMemsetD8Async", self._cu.cuMemsetD8Async(address, 0, num_bytes, self._stream))
        self._ok("cuStreamSynchronize", self._cu.cuStreamSynchronize(self._stream))

    # -- for others; both raise Refused --------------------------------------------------------------------------------

    def descriptor(self, handle: Any) -> int:
        """For another process; closed by the caller."""
        self._enter()
        exported = self._cu.cuMemExportToShareableHandle(handle, self._by_descriptor, 0)
        return int(self._ok("cuMemExportToShareableHandle", exported))

    def dma_buf(self, address: int, num_bytes: int) -> int:
        """For a card: of one piece of memory that was put there; closed by the caller."""
        if not self._attribute("DMA_BUF_SUPPORTED"):
            raise Refused(f"{self.name} gives no dma-buf of its memory")
        self._enter()
        kind = self._cu.CUmemRangeHandleType.CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
        exported = self._cu.cuMemGetHandleForAddressRange(address, num_bytes, kind, 0)
        return int(self._ok("cuMemGetHandleForAddressRange", exported))

    def flushing(self) -> Callable[[], None] | None:
        """What makes visible to the device what cards have written into its memory; None where they write in order.

        Raises:
            ConfigError: nothing does.
        """
        if self._attribute("GPU_DIRECT_RDMA_WRITES_ORDERING") >= IN_ORDER_FOR_OWNER:
            return None
        if not self._attribute("GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS") & FLUSHED_BY_HOST:
            raise ConfigError(NOT_ORDERED.format(name=self.name))
        return self._flush

    def _flush(self) -> None:
        """Raises Refused."""
        cu = self._cu
        self._enter()
        self._ok(
            "cuFlushGPUDirectRDMAWrites",
            cu.cuFlushGPUDirectRDMAWrites(
                cu.CUflushGPUDirectRDMAWritesTarget.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX,
                cu.CUflushGPUDirectRDMAWritesScope.CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER,
            ),
        )
        self.num_flushes += 1

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
        if attribute is None:  # unknown to these bindings
            return 0
        return int(self._ok("cuDeviceGetAttribute", self._cu.cuDeviceGetAttribute(attribute, self._index)))

    def _ok(self, call: str, result: tuple[Any, ...]) -> Any:
        if result[0]:
            _, text = self._cu.cuGetErrorString(result[0])
            raise Refused(f"{self.name} refused {call}: {text.decode() if isinstance(text, bytes) else result[0]}")
        return result[1] if len(result) > 1 else None
