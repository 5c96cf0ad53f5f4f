"""The share of time in which a GPU computes nothing while an instance decodes.

Exactly, by the profiler's record of every kernel, where the instance runs in this process; else by the samples of the
driver's own tool, each of which says in how much of a past interval some kernel ran.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable
from statistics import fmean
from typing import Any

import torch

from msi import Engine, SamplingParams

PROFILED_S = 0.4
TOKENS_BEFORE = 4  # of every sequence: all of them decode
SETTLED = 0.25  # of the record: what is at its start waited for the profiler
MOST_TOKENS = 512


def busy_share(intervals: Iterable[tuple[int, int]], begin: int, end: int) -> float:
    """How much of begin..end is covered by intervals (from, to), which may overlap."""
    covered, at = 0, begin
    for first, last in sorted(intervals):
        first, last = max(first, at), min(last, end)
        if last > first:
            covered += last - first
            at = last
    return covered / (end - begin)


async def profiled_idle(engine: Engine, prompts: list[tuple[int, ...]]) -> float:
    """Of an instance in this process, while all prompts decode. Raises RuntimeError: the profiler saw no kernel."""
    params = SamplingParams(max_tokens=MOST_TOKENS, temperature=0, ignore_eos=True)
    num_left, all_decode = len(prompts), asyncio.Event()

    async def one(prompt: tuple[int, ...]) -> None:
        nonlocal num_left
        num_tokens = 0
        async for output in engine.generate(prompt, params):
            before, num_tokens = num_tokens, num_tokens + len(output.token_ids)
            if before < TOKENS_BEFORE <= num_tokens:
                num_left -= 1
                if not num_left:
                    all_decode.set()

    answers = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
    try:
        async with asyncio.timeout(60):
            await all_decode.wait()
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        profiler.start()
        await asyncio.sleep(PROFILED_S)
        profiler.stop()
    finally:
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
    kernels = _kernels(profiler)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    begin, end = min(first for first, _ in kernels), max(last for _, last in kernels)
    return 1 - busy_share(kernels, begin + int(SETTLED * (end - begin)), end)


def _kernels(profiler: Any) -> list[tuple[int, int]]:
    """When each kernel and each copy began and ended, in ns."""
    cuda = torch._C._autograd.DeviceType.CUDA
    return [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == cuda
    ]


class Utilisation:
    """The share of time in which some kernel ran, as the driver's tool samples it. A context manager."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Utilisation:
        if shutil.which("nvidia-smi") is not None:
            command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=50"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit():
                self._samples.append((time.monotonic(), int(line) / 100))

    def between(self, begin: float, end: float) -> float | None:
        """None where there are no samples of that time."""
        inside = [value for at, value in self._samples if begin + 0.2 <= at <= end]
        return fmean(inside) if inside else None
