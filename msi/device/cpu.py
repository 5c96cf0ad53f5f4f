"""The CPU as a device: one compute thread with torch's own threads under it, weights packed once."""

from __future__ import annotations

import asyncio
import logging
import math
import mmap
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from msi.meter import StageMeter
from msi.tracing import Tracer

log = logging.getLogger(__name__)
T = TypeVar("T")
_Work = tuple[Callable[[], None], Callable[[Exception], None], StageMeter, str, int]
PACKED_BYTES = 1 << 20  # a call of oneDNN costs 80 us before it computes, one of MKL 14: smaller weights are not packed
PACKING_ROWS = 32  # a hint of how many rows a product will have; the packed layout does not depend on it much


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX512-BF16 or AMX); emulated it is slower than float32."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


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


class CpuDevice:
    """Work runs in order on one thread of its own; the loop thread only hands over and is woken.

    Args:
        num_threads: torch's threads for one operator.

    Attributes:
        tracer: gets a span for every submitted work.
    """

    def __init__(self, *, num_threads: int) -> None:
        self.busy_s = 0.0
        self.tracer: Tracer | None = None
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._packing = _packing()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, args=(num_threads,), name="msi-compute", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T], meter: StageMeter, name: str, lane: int) -> asyncio.Future[T]:
        done: asyncio.Future[T] = self._loop.create_future()

        def resolve() -> None:
            self._loop.call_soon_threadsafe(_resolve, done, work())

        def failed(error: Exception) -> None:
            self._loop.call_soon_threadsafe(_fail, done, error)

        self.enqueue(resolve, failed, meter, name, lane)
        return done

    def enqueue(
        self, work: Callable[[], None], failed: Callable[[Exception], None], meter: StageMeter, name: str, lane: int
    ) -> None:
        self._queue.put((work, failed, meter, name, lane))

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

    async def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._queue.put(None)
            await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _run(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        with torch.inference_mode():
            while (item := self._queue.get()) is not None:
                if not self._is_open:
                    continue
                work, failed, meter, name, lane = item
                started = time.monotonic()
                try:
                    work()
                except Exception as error:
                    failed(error)
                    continue
                ended = time.monotonic()
                self.busy_s += ended - started
                meter.add(ended - started)
                if self.tracer is not None:
                    self.tracer.span(name, lane, started, ended)


def _resolve(done: asyncio.Future[T], result: T) -> None:
    if not done.done():
        done.set_result(result)


def _fail(done: asyncio.Future[T], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
