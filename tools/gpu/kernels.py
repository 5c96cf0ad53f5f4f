"""Kernels, plain torch's and Triton's: right against plain torch in float64 on the same numbers, and their times.

Attention and lists by flashinfer and products in float8 by DeepGEMM, too, where they are installed. Floors follow from
what the device was found to do. Compiling takes longer than everything else, so that several processes do it at once;
what is timed runs alone, with what they have left in Triton's cache.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.pool
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from msi.kernels.kernels import Kernels
from msi.kernels.plain import PlainKernels
from msi.kernels.triton import why_unavailable
from tools.gpu.kernel_cases import CASES, ROUNDED, Numbers, Size
from tools.gpu.report import Add, Row
from tools.gpu.runner import Place
from tools.gpu.shapes import MIXTRAL, QWEN3
from tools.gpu.timing import device_seconds

ALLOWED = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # relative error of a result's norm
ALLOWED_ROUNDED = 3e-2  # where one in some may be the next in eight bits, which are a sixteenth apart at most
ALLOWED_TWICE = 8e-2  # where both factors of a product are in eight bits, twice behind one another
MEMORY_BOUND, COMPUTE_BOUND = 0.85, 0.65  # shares of the floor that are asked for
ASKED = (  # that move enough for a launch to count for little
    "paged decode attention", "paged decode attention over float8", "experts", "experts in float8",
)  # fmt: skip
MOST_PROCESSES = 10
CHECKED = (  # small, so that float64 is quick; heads that share and that do not, rows that fill no tile
    (torch.bfloat16, Size(1024, 1536, 6, 2, 16, 4, 128, 67, 301, 32000)),
    (torch.bfloat16, Size(512, 384, 16, 4, 8, 8, 64, 130, 97, 5003)),
    (torch.bfloat16, Size(256, 256, 5, 2, 4, 2, 80, 1, 33, 199)),
    (torch.float16, Size(1024, 1536, 6, 2, 16, 4, 128, 67, 301, 32000)),
)
SMALL = Size(32, 48, 3, 2, 4, 2, 16, 3, 20, 199)
DRY = ((torch.bfloat16, SMALL),)


@dataclass(frozen=True, slots=True)
class Task:
    """One case of one kernels object at one size."""

    kernels: str
    case: str
    device: str
    dtype: torch.dtype
    size: Size


def kernels_here() -> list[str]:
    """Names of what can compute."""
    if why_unavailable() is not None:
        return ["plain torch"]
    from msi.kernels import deepgemm, flashinfer

    names = ["plain torch", "Triton"]
    names += ["flashinfer"] if flashinfer.why_unavailable() is None else []
    return names + (["DeepGEMM"] if deepgemm.why_unavailable() is None else [])


def cases_of(kernels: str) -> list[str]:
    """What differs from Triton's in a library's."""
    if kernels == "flashinfer":
        attended = [case for case in CASES if case.startswith("paged") and "sinks" not in case]
        return [*attended, "drawing tokens"]
    if kernels == "DeepGEMM":
        return [case for case in CASES if "MLP in float8" in case or case.startswith("experts in float8")]
    return list(CASES)


def open_kernels(name: str, device: torch.device) -> Kernels:
    if name == "plain torch":
        return PlainKernels(device)
    if name == "flashinfer":
        from msi.kernels import flashinfer

        return flashinfer.FlashinferKernels(device)
    from msi.kernels import deepgemm
    from msi.kernels.triton.kernels import TritonKernels

    return TritonKernels(device, deepgemm.DeepGemm(device) if name == "DeepGEMM" else None)


# -- right -----------------------------------------------------------------------------------------------------------


def are_right(place: Place, add: Add) -> None:
    """Each operation's largest relative error over all sizes, by dtype."""
    tasks = [
        Task(name, case, place.device, dtype, size)
        for name in kernels_here()
        for case in cases_of(name)
        for dtype, size in (DRY if place.is_dry else CHECKED)
    ]
    left: dict[tuple[str, str, torch.dtype], int] = defaultdict(int)
    worst: dict[tuple[str, str, torch.dtype], float] = defaultdict(float)
    notes: dict[tuple[str, str, torch.dtype], str] = defaultdict(str)
    for task in tasks:
        left[task.kernels, task.case, task.dtype] += 1
    with _processes(place, len(tasks)) as pool:
        for task, error, note in pool.imap_unordered(_checked, tasks):
            key = (task.kernels, task.case, task.dtype)
            worst[key], notes[key] = max(worst[key], error), note or notes[key]
            left[key] -= 1
            if not left[key]:
                allowed = max(ALLOWED[task.dtype], ALLOWED_ROUNDED if task.case in ROUNDED else 0.0)
                allowed = max(allowed, ALLOWED_TWICE if task.kernels == "DeepGEMM" else 0.0)
                wrong = "" if worst[key] <= allowed else f"more than {allowed}: WRONG"
                name = f"{task.kernels}: {task.case}, {str(task.dtype).removeprefix('torch.')}, relative error"
                add(Row(name, worst[key], note=" ".join(filter(None, [wrong, notes[key]]))))


def _checked(task: Task) -> tuple[Task, float, str]:
    try:
        return task, error_of(task), ""
    except Exception as error:
        return task, float("inf"), f"{type(error).__name__}: {str(error)[:160]}"


def error_of(task: Task) -> float:
    """Against plain torch in float64 on the same numbers."""
    device, results = torch.device(task.device), []
    with torch.inference_mode():
        for kernels, used in ((open_kernels(task.kernels, device), task.dtype), (PlainKernels(device), torch.float64)):
            case = CASES[task.case](kernels, task.size, Numbers(device, task.dtype, used))
            case.run()
            results.append(case.result().double())
    found, truth = results
    assert bool(found.isfinite().all()), "something was not written, or is not finite"
    return float((found - truth).norm() / truth.norm())


# -- fast ------------------------------------------------------------------------------------------------------------


def take_times(place: Place, add: Add) -> None:
    """What each operation takes of layers of known models, beside its floor."""
    timed = [
        (Task(name, case, place.device, torch.bfloat16, size), f"{name}: {case}, {label}")
        for label, size, cases in _timed(place)
        for case in cases
        for name in reversed(kernels_here())
        if case in cases_of(name)
    ]
    if not place.is_dry:
        with _processes(place, len(timed)) as pool:
            for _ in pool.imap_unordered(_run_once, [task for task, _ in timed if task.kernels != "plain torch"]):
                pass
    for task, name in timed:
        add(_time(place, name, task))


def _timed(place: Place) -> Iterator[tuple[str, Size, list[str]]]:
    if place.is_dry:
        yield "small", SMALL, list(CASES)
        return
    for num_tokens in (128, 16):
        yield f"Mixtral-8x7B, {num_tokens} rows", Size.of(MIXTRAL, num_tokens, 1024), list(CASES)
        yield f"Qwen3-30B-A3B, {num_tokens} rows", Size.of(QWEN3, num_tokens, 1024), list(CASES)
    yield "Mixtral-8x7B, 2048 rows", Size.of(MIXTRAL, 2048, 64), ["experts"]


def _run_once(task: Task) -> None:
    """So that it is compiled. Whatever goes wrong does so again, where it is told."""
    device = torch.device(task.device)
    with contextlib.suppress(Exception), torch.inference_mode():
        CASES[task.case](open_kernels(task.kernels, device), task.size, Numbers(device, task.dtype, task.dtype)).run()
        torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _time(place: Place, name: str, task: Task) -> Row:
    device = torch.device(place.device)
    try:
        with torch.inference_mode():
            kernels = open_kernels(task.kernels, device)
            case = CASES[task.case](kernels, task.size, Numbers(device, task.dtype, task.dtype))
            took_s, how = device_seconds(place, case.run, case.num_warm)
    except Exception as error:
        return Row(name, "failed", note=f"{type(error).__name__}: {str(error)[:160]}")
    floor = asked = None
    if "bytes_per_s" in place.ceilings and "flop_per_s" in place.ceilings:
        moved, calculated = case.num_bytes / place.ceilings["bytes_per_s"], case.flop / place.ceilings["flop_per_s"]
        floor = max(moved, calculated) * 1e6
        if task.case in ASKED and task.kernels != "plain torch":
            asked = MEMORY_BOUND if moved >= calculated else COMPUTE_BOUND
    return Row(name, took_s * 1e6, "us", floor, asked, note=how)


def _processes(place: Place, num_tasks: int) -> multiprocessing.pool.Pool:
    """Each makes a context of its own on the device, which this process has not touched yet."""
    most = 1 if place.is_dry else min(MOST_PROCESSES, os.cpu_count() or 1)
    return multiprocessing.get_context("fork").Pool(min(most, num_tasks))
