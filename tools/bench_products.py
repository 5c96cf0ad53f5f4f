#!/usr/bin/env python3
"""Products of rows with one matrix on one thread of this CPU: the compiled kernels beside oneDNN's and MKL's.

    tools/bench_products.py [--outputs 6144] [--depth 1024] [--rows 1 8 32 128 512]

Weights lie in eight matrices that take turns, so that caches do not hold them at the default size. Times are processor
time of this thread, the best of some, so that other work on the machine hardly counts; a line for each number of rows
has GFLOP/s and, in brackets, the GB/s of weights that were read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from msi.device.cpu import has_bf16_units
from msi.kernels.cpu import CpuKernels
from msi.kernels.native.compiled import native_library
from msi.kernels.quantized import num_bytes, quantize
from msi_launch.command_line import ScriptLine

NUM_MATRICES = 8


def best_s(products: list[Callable[[torch.Tensor], Any]], rows: torch.Tensor, repeat: int) -> float:
    """Of this thread's processor time."""
    times = []
    for _ in range(repeat):
        for product in products:
            started = time.thread_time()
            product(rows)
            times.append(time.thread_time() - started)
    return min(times)


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("--outputs", type=int, default=6144)
    parser.add_argument("--depth", type=int, default=1024)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--repeat", type=int, default=4)
    arguments = parser.parse_args()
    if native_library() is None:
        raise SystemExit("the kernels cannot be compiled here")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights = [torch.randn(arguments.outputs, arguments.depth).to(torch.bfloat16) for _ in range(NUM_MATRICES)]
    kernels = CpuKernels(has_bf16_units=has_bf16_units())
    held: dict[str, list[Any]] = {name: [quantize(one, name) for one in weights] for name in ("int8", "int4", "fp8")}
    held["bfloat16"] = weights
    packed: dict[str, list[Any]] = {name: [kernels.linear(one) for one in of] for name, of in held.items()}
    read = {name: num_bytes(of[0]) for name, of in held.items()}
    with patch("msi.kernels.cpu.native_library", lambda: None):
        packed["torch"] = [kernels.linear(weight) for weight in weights]
        packed["torch float32"] = [kernels.linear(weight.float()) for weight in weights]
    read |= {"torch": read["bfloat16"], "torch float32": 2 * read["bfloat16"]}
    kinds = [(name, torch.bfloat16) for name in ("bfloat16", "int8", "int4", "fp8", "torch")]
    kinds += [(name, torch.float32) for name in ("bfloat16", "int8", "fp8", "torch float32")]
    for num_rows in arguments.rows:
        shown = []
        for name, dtype in kinds:
            rows = torch.randn(num_rows, arguments.depth).to(dtype)
            with torch.inference_mode():
                spent_s = best_s(packed[name], rows, arguments.repeat)
            flops = 2 * num_rows * arguments.outputs * arguments.depth
            rate = f"{flops / spent_s / 1e9:.0f} ({read[name] / spent_s / 1e9:.1f})"
            shown.append(f"{name} with {str(dtype).removeprefix('torch.')} rows {rate}")
        print(f"{num_rows} rows: " + ", ".join(shown), flush=True)


if __name__ == "__main__":
    main()
