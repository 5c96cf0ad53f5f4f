"""What the device can do at most, measured: the floors of everything else are worked out from these two."""

from __future__ import annotations

import torch

from tools.gpu.report import Add, Row
from tools.gpu.runner import Place
from tools.gpu.timing import seconds

COPY = "copy in device memory, read + write"
MATMUL = "bf16 matmul"
UNITS = {COPY: ("bytes_per_s", 1e12), MATMUL: ("flop_per_s", 1e12)}  # by row: the ceiling's name, and of which unit


def run(place: Place, add: Add) -> None:
    _copy(place, add, 1 << 16 if place.is_dry else 1 << 30)
    _matmul(place, add, 64 if place.is_dry else 8192)


def _copy(place: Place, add: Add, num_values: int) -> None:
    source = torch.randn(num_values, device=place.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_s = seconds(place, lambda: target.copy_(source))
    add(Row(COPY, 2 * source.nbytes / copy_s / 1e12, "TB/s", note=f"{source.nbytes / 2**30:.0f} GiB"))


def _matmul(place: Place, add: Add, size: int) -> None:
    a, b = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    add(Row(MATMUL, 2 * size**3 / seconds(place, lambda: a @ b) / 1e12, "TF/s", note=f"{size}^3, torch's own"))
