"""The CPU as a device: one compute thread with torch's own threads under it."""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from msi.device.compute_thread import ComputeQueue, ComputeThread, ThreadedDevice
from msi.device.regions import HostTensors
from msi.kernels.cpu import CpuKernels
from msi.net.regions import Region
from msi.net.transport import Poller

log = logging.getLogger(__name__)


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); emulated it is slower than float32."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def free_host_memory_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        log.debug("no /proc/meminfo: half of the memory counts as free")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class CpuDevice(ThreadedDevice):
    """One thread for all queues.

    Args:
        num_threads: torch's threads for one operator.
        poll_s: how long the thread looks for something to do before it sleeps.
    """

    def __init__(self, *, num_threads: int, poll_s: float = 0.0) -> None:
        super().__init__()
        self._num_threads = num_threads
        self.kernels = CpuKernels(has_bf16_units=has_bf16_units())
        self._memory = HostTensors()
        self._thread = ComputeThread("msi-compute", self.words, self._entered, self._through, poll_s=poll_s)

    def queue(self, name: str) -> ComputeQueue:
        return self._thread.queue()

    def threads(self) -> Iterable[ComputeThread]:
        return [self._thread]

    @property
    def poller(self) -> Poller:
        return self._thread.ready

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            yield

    def free_memory_bytes(self) -> int:
        return free_host_memory_bytes()

    def region(self, num_bytes: int) -> Region:
        return self._memory.region(num_bytes)

    def host_region(self, num_bytes: int) -> Region:
        return self._memory.region(num_bytes)

    def adopt(self, memory: memoryview, num_parts: int = 1) -> Region:
        return self._memory.adopt(memory)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor

    def compute_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted if wanted is torch.float32 or has_bf16_units() else torch.float32

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # torch.zeros would touch every page
        return torch.frombuffer(memory, dtype=dtype).view(shape)
