"""The CPU as a device: one compute thread with torch's own threads under it, weights packed once."""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from msi.device.compute_thread import ComputeQueue, ComputeThread, ThreadedDevice

log = logging.getLogger(__name__)
PACKED_BYTES = 1 << 20  # a call of oneDNN costs 80 us before it computes, one of MKL 14: smaller weights are not packed
PACKING_ROWS = 32  # a hint of how many rows a product will have; the packed layout does not depend on it much


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


def _packing() -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """oneDNN's packed linear as torch's own CPU compiler calls it (private names, so checked by use)."""
    try:
        pack, apply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        weight, rows = torch.eye(16), torch.ones(2, 16)
        with torch.inference_mode():
            if torch.equal(apply(rows, pack(weight, 2), None, "none", [], ""), rows):
                return pack, apply
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("weights are not packed: this torch has no oneDNN linear (%s)", error)
    return None


class CpuDevice(ThreadedDevice):
    """One thread for all queues.

    Args:
        num_threads: torch's threads for one operator.
    """

    def __init__(self, *, num_threads: int) -> None:
        super().__init__()
        self._num_threads = num_threads
        self._packing = _packing()
        self._thread = ComputeThread("msi-compute", self.words, self._entered, self._through)
        self._queue = self._thread.queue()

    def queue(self, name: str) -> ComputeQueue:
        return self._thread.queue()

    def threads(self) -> Iterable[ComputeThread]:
        return [self._thread]

    def _queue_of(self, lane: int) -> ComputeQueue:
        return self._queue

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            yield

    def free_memory_bytes(self) -> int:
        return free_host_memory_bytes()

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor

    def compute_dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted if wanted is torch.float32 or has_bf16_units() else torch.float32

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # torch.zeros would touch every page
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        is_small = weight.numel() * weight.element_size() < PACKED_BYTES
        if self._packing is None or weight.dtype is torch.float16 or is_small:
            kept = weight.contiguous()
            return lambda rows: functional.linear(rows, kept, bias)
        pack, apply = self._packing
        with torch.inference_mode():
            packed = pack(weight, PACKING_ROWS)
        return lambda rows: apply(rows, packed, bias, "none", [], "")
