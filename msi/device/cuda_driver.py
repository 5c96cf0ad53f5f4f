"""The driver's calls that a device with streams is made of, behind one thin object.

`CudaDriver` is the real one, by cuda-bindings; `msi.device.fake.streams` has one that does the same on a thread of the
CPU, and one that does nothing. Knows no queues, programs or words: streams, addresses, events and host memory that the
device reads and writes in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from msi.device.cuda_memory import CudaMemory
from msi.errors import ConfigError, EngineError

NEEDS_BINDINGS = "cuda-bindings is not installed; `pip install 'msi[cuda]'`"


CAPTURING = range(900, 910)  # errors of a graph that is being captured, which lose no device


class DeviceLost(EngineError):
    """The device takes no more work: what failed stays failed until the process ends."""


class Driver(Protocol):
    """Streams, events and values are the driver's own; addresses are the device's. Calls return at once."""

    @property
    def device(self) -> torch.device: ...

    def enter(self) -> None:
        """The calling thread makes calls from now on."""

    def stream(self) -> Any:
        """Another order of work."""

    def launch(self, stream: Any, work: Callable[[], object], reads: bool = False) -> None:
        """Runs `work`, now, on this thread: what it launches goes onto the stream.

        Args:
            reads: it reads values of the device; all that was on the stream is through.
        """

    def graph_memory(self) -> Any:
        """As `msi.device.device.Graphs` says; so are the next two."""

    def capture(self, memory: Any, work: Callable[[], object]) -> Any: ...

    def replay(self, graph: Any) -> None: ...

    def wait(self, stream: Any, address: int, at_least: int) -> None:
        """What follows starts once the 32 bits at `address` are there, seen as `Words` says."""

    def write(self, stream: Any, address: int, value: int) -> None:
        """Writes 32 bits once all before is through, and what that wrote is visible."""

    def event(self) -> Any:
        """To be recorded as often as one likes."""

    def record(self, stream: Any, event: Any) -> None: ...

    def elapsed_s(self, start: Any, end: Any) -> float:
        """Between two events that are over."""

    def map_host(self, memory: memoryview) -> int:
        """Pins host memory, which the device sees in place from now on; its address there. Waits where it must."""

    def unmap_host(self, memory: memoryview) -> None:
        """Undoes that."""

    def tensor(self, memory: memoryview) -> Tensor:
        """uint8, as work on the device sees host memory that was mapped."""

    def upload(self, tensor: Tensor) -> Tensor:
        """Within what is launched: a copy in the device's memory, there when the stream comes to it. The tensor may be
        written again at once.
        """

    def check(self) -> None:
        """Raises DeviceLost when work that was launched has failed."""

    def finish(self, stream: Any) -> None:
        """Waits for all that was launched on a stream, whose gates are open."""

    def settle(self) -> None:
        """Waits for what this thread launched outside of streams."""

    def free_memory_bytes(self) -> int: ...

    def synchronize(self) -> None:
        """Waits for all that was launched. Behind a closed gate that is for ever."""

    def close(self) -> None:
        """Nothing is called any more. Idempotent."""


def host_address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def prepare() -> None:
    """Before CUDA starts in this process: many streams go on beside gated ones, and no kernel is loaded behind a closed
    gate, which would wait until that opens.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


def why_no_streams(index: int = 0) -> str | None:
    """A sentence where the device's streams cannot wait for words, else None. There is a device."""
    try:
        from cuda.bindings import driver as cu  # an optional dependency
    except ImportError:
        return NEEDS_BINDINGS
    torch.cuda.init()  # type: ignore[no-untyped-call]
    attributes = cu.CUdevice_attribute
    for name in ("CAN_USE_64_BIT_STREAM_MEM_OPS", "CAN_MAP_HOST_MEMORY", "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM"):
        attribute = getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}")
        error, value = cu.cuDeviceGetAttribute(attribute, index)
        if int(error) or not value:
            return f"the device says no to {name.lower()}"
    return None


class CudaDriver:
    """Implements `Driver` for one GPU, in the context that torch uses.

    Raises:
        ConfigError: cuda-bindings is missing.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            from cuda.bindings import driver as cu  # an optional dependency
        except ImportError as error:
            raise ConfigError(NEEDS_BINDINGS) from error
        self.device = torch.device("cuda", index)
        self._cu = cu
        torch.zeros(1, device=self.device)  # the context is there
        self._wait, self._write, self._record = cu.cuStreamWaitValue32, cu.cuStreamWriteValue32, cu.cuEventRecord
        self._handles: dict[torch.cuda.Stream, int] = {}
        self._current: torch.cuda.Stream | None = None
        self._idle = self.stream().cuda_stream  # that nothing is launched on, to be asked whether the device has failed

    def enter(self) -> None:
        torch.cuda.set_device(self.device)

    def stream(self) -> torch.cuda.Stream:
        # torch's own streams come from a pool and may be another queue's; 1: it waits for no default stream
        handle = int(self._ok("cuStreamCreate", self._cu.cuStreamCreate(1)))
        stream: torch.cuda.Stream = torch.cuda.ExternalStream(handle, self.device)  # type: ignore[no-untyped-call]
        self._handles[stream] = handle
        return stream

    def launch(self, stream: torch.cuda.Stream, work: Callable[[], object], reads: bool = False) -> None:
        if stream is not self._current:
            torch.cuda.set_stream(stream)
            self._current = stream
        work()

    def graph_memory(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, memory: Any, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(memory, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()

    def wait(self, stream: torch.cuda.Stream, address: int, at_least: int) -> None:
        (error,) = self._wait(self._handles[stream], address, at_least, 0)  # 0: cyclic greater or equal
        if error:
            self._failed("cuStreamWaitValue32", error)

    def write(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        (error,) = self._write(self._handles[stream], address, value, 0)  # 0: behind a fence for all of the system
        if error:
            self._failed("cuStreamWriteValue32", error)

    def event(self) -> Any:
        return self._ok("cuEventCreate", self._cu.cuEventCreate(0))

    def record(self, stream: torch.cuda.Stream, event: Any) -> None:
        (error,) = self._record(event, self._handles[stream])
        if error:
            self._failed("cuEventRecord", error)

    def elapsed_s(self, start: Any, end: Any) -> float:
        error, milliseconds = self._cu.cuEventElapsedTime(start, end)
        if error == self._cu.CUresult.CUDA_ERROR_NOT_READY:  # the flag behind it was faster
            return 0.0
        return float(self._ok("cuEventElapsedTime", (error, milliseconds))) * 1e-3

    def map_host(self, memory: memoryview) -> int:
        self.enter()
        cu, address = self._cu, host_address(memory)
        flags = cu.CU_MEMHOSTREGISTER_DEVICEMAP | cu.CU_MEMHOSTREGISTER_PORTABLE
        self._ok("cuMemHostRegister", cu.cuMemHostRegister(address, memory.nbytes, flags))
        return int(self._ok("cuMemHostGetDevicePointer", cu.cuMemHostGetDevicePointer(address, 0)))

    def unmap_host(self, memory: memoryview) -> None:
        self.enter()
        self._ok("cuMemHostUnregister", self._cu.cuMemHostUnregister(host_address(memory)))

    def tensor(self, memory: memoryview) -> Tensor:
        return self.tensor_at(host_address(memory), memory.nbytes, memory)

    def own_memory(self) -> CudaMemory:
        """The device's own. Raises ConfigError."""
        return CudaMemory(self._cu, self.device.index, self.enter)

    def tensor_at(self, address: int, num_bytes: int, keep: object) -> Tensor:
        """uint8 [num_bytes] of memory that the device sees there; refers to `keep`."""
        return torch.as_tensor(_Mapped(address, num_bytes, keep), device=self.device)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)  # torch keeps it until the copy is through

    def check(self) -> None:
        results = self._cu.CUresult
        (error,) = self._cu.cuStreamQuery(self._idle)
        if error and error != results.CUDA_ERROR_NOT_READY and error not in CAPTURING:
            self._failed("cuStreamQuery", error)

    def finish(self, stream: torch.cuda.Stream) -> None:
        self.enter()
        stream.synchronize()

    def settle(self) -> None:
        torch.cuda.default_stream(self.device).synchronize()

    def free_memory_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def close(self) -> None: ...

    def _ok(self, call: str, result: tuple[Any, ...]) -> Any:
        if result[0]:
            self._failed(call, result[0])
        return result[1] if len(result) > 1 else None

    def _failed(self, call: str, error: Any) -> None:
        _, text = self._cu.cuGetErrorString(error)
        said = text.decode() if isinstance(text, bytes) else str(error)
        raise DeviceLost(f"the CUDA device {self.device} failed at {call}: {said}")


class _Mapped:
    """Memory as torch takes that of a device: it asks the driver whose it is."""

    def __init__(self, address: int, num_bytes: int, keep: object) -> None:
        self._keep = keep  # stays as long as the tensor does
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 2,
        }  # fmt: skip
