"""CUDA as a device, plainly: torch's own operators, a thread and a stream per lane.

Each queue has a thread, which waits for gates in place of its stream, and after each program for the stream, which
releases the interpreter lock: the event loop never waits, and the streams of other lanes go on. Kernels of our own,
captured graphs and gates on the stream itself come later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from msi.device.compute_thread import ComputeQueue, ComputeThread, ThreadedDevice
from msi.device.regions import HostTensors
from msi.errors import ConfigError
from msi.kernels.kernels import Kernels
from msi.kernels.plain import PlainKernels
from msi.net.regions import Region


def why_unavailable() -> str | None:
    """A sentence where this process cannot use a GPU, else None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to this process"
    return None


class CudaDevice(ThreadedDevice):
    """One GPU.

    Args:
        index: which; CUDA_VISIBLE_DEVICES applies before.
        kernels: makes what it computes with.

    Raises:
        ConfigError: there is no such device here.
    """

    def __init__(self, *, index: int = 0, kernels: Callable[[torch.device], Kernels] = PlainKernels) -> None:
        super().__init__()
        if (reason := why_unavailable()) is not None:
            raise ConfigError(f"`device` cuda cannot work: {reason}; without one, use `device=cpu`")
        if not 0 <= index < torch.cuda.device_count():
            raise ConfigError(f"there is no CUDA device {index}; this process sees {torch.cuda.device_count()}")
        self._device = torch.device("cuda", index)
        self.kernels = kernels(self._device)
        self._threads: dict[str, ComputeThread] = {}
        self._memory = HostTensors()  # rows are copied up and down, as every transport of today writes host memory

    def queue(self, name: str) -> ComputeQueue:
        if name not in self._threads:
            self._threads[name] = ComputeThread(
                f"msi-compute {name}", self.words, self._entered, self._through, fence=self._synchronize
            )
        return self._threads[name].queue()

    def threads(self) -> Iterable[ComputeThread]:
        return list(self._threads.values())

    def _synchronize(self) -> None:
        """Until the stream of this thread is through."""
        torch.cuda.current_stream(self._device).synchronize()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """Work runs on the lane's stream."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(stream):
            yield

    def compute_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted

    def free_memory_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def region(self, num_bytes: int) -> Region:
        return self._memory.region(num_bytes)

    def host_region(self, num_bytes: int) -> Region:
        return self._memory.region(num_bytes)

    def adopt(self, memory: memoryview, num_parts: int = 1) -> Region:
        return self._memory.adopt(memory)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)
