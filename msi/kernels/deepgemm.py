"""Products with matrices in float8 by DeepGEMM, a library that users may have installed; all else by Triton's kernels.

It multiplies e4m3 by e4m3, on GPUs of compute capability 9.0: rows are rounded, too, with a scale for each 128 values,
where Triton's kernels widen the matrices alone. So its results are further from what the matrices stand for, and who
wants them as near as can be asks for Triton's. It takes matrices with a scale for each 128 x 128, whose sides are
multiples of 128, and rows in bfloat16; Triton's kernels multiply all others.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msi.kernels import SCALE_BLOCK
from msi.kernels.choosing import choose, device_seconds
from msi.kernels.kernels import Linear
from msi.kernels.quantized import Quantized
from msi.kernels.triton.linear import Float8Linear
from msi.kernels.triton.rounded import Matrices, Rounded, rounded

CAPABILITY = (9, 0)  # later ones want scales that are powers of two, which checkpoints' are not
MOST_APART = 8e-2  # of two results, one of rows that were rounded: see the page of these kernels
MULTIPLE_OUTPUTS = 64  # of a matrix by itself
SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
NAME = "DeepGEMM"


def why_unavailable() -> str | None:
    """A sentence where it is not installed, else None."""
    if importlib.util.find_spec("deep_gemm") is None:
        return "DeepGEMM is not installed; `pip install sgl-deep-gemm` brings it"
    return None


def why_not_on(device: torch.device) -> str | None:
    """The same where it has no kernels for a GPU."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) != CAPABILITY:
        return f"its kernels are for GPUs of compute capability 9.0, and this one's is {found[0]}.{found[1]}"
    return None


class DeepGemm:
    """Implements `msi.kernels.triton.rounded.Library`.

    Args:
        is_measured: it multiplies where it gives nearly what Triton's kernels give, and is faster, which is found out
            for each shape before the first pass; else wherever it can.
        seconds: that something takes on the device.
    """

    def __init__(
        self,
        device: torch.device,
        is_measured: bool = False,
        seconds: Callable[[Callable[[], object]], float] | None = None,
    ) -> None:
        self._library: Any = importlib.import_module("deep_gemm")
        self.is_measured = is_measured
        self.tile_rows = int(self._library.get_mk_alignment_for_contiguous_layout())
        self._seconds = seconds or partial(device_seconds, device)
        self._is_taken: dict[object, tuple[bool, ...]] = {}  # of each size, by shape

    def dense(self, rows: Rounded, matrix: Matrices, out: Tensor) -> None:
        self._library.fp8_gemm_nt(rows, matrix, out)

    def grouped(self, rows: Rounded, matrices: Matrices, out: Tensor, matrix_of: Tensor) -> None:
        self._library.m_grouped_fp8_gemm_nt_contiguous(rows, matrices, out, matrix_of)

    def is_better(self, what: str, own: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> bool:
        """Whether it is to be taken for this; it is run once at least, so whatever it compiles is there by then."""
        if not self.is_measured:
            theirs()
            return True
        return choose(what, {"Triton": own, NAME: theirs}, self._seconds, MOST_APART) == NAME

    def linear(self, matrix: Quantized, bias: Tensor | None, own: Float8Linear) -> Linear:
        scales = block_scales(matrix)
        if scales is None:
            return own
        return DeepGemmLinear(self, (own.weight, scales.to(own.weight.device)), bias, own)

    def taken(self, matrices: Matrices, own: Linear, theirs: Linear) -> tuple[bool, ...]:
        """Of each of SIZES, whether it is to be taken for so many rows; found out once for matrices of a shape."""
        shape = tuple(matrices[0].shape)
        if shape not in self._is_taken:
            device = matrices[0].device
            generator = torch.Generator(device).manual_seed(0)
            rows = torch.randn(SIZES[-1], shape[1], generator=generator, device=device).to(torch.bfloat16)
            self._is_taken[shape] = tuple(
                self.is_better(
                    f"{size} rows by a matrix in float8, {shape[0]} x {shape[1]}",
                    partial(own, rows[:size]),
                    partial(theirs, rows[:size]),
                )
                for size in SIZES
            )
        return self._is_taken[shape]


class DeepGemmLinear:
    """x [rows, depth] -> [rows, n]; rows are counted up to one of SIZES, so that nothing is compiled for another."""

    def __init__(self, library: DeepGemm, matrices: Matrices, bias: Tensor | None, own: Linear) -> None:
        self._library, self._matrices, self._own = library, matrices, own
        self._bias = None if bias is None else bias.to(matrices[0].device)

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.dtype is not torch.bfloat16 or not 0 < len(rows) <= SIZES[-1]:
            return self._own(rows)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        taken = self._library.taken(self._matrices, self._own, self._product)
        index = next(index for index, size in enumerate(SIZES) if size >= len(rows))
        return self._product(rows) if taken[index] else self._own(rows)

    def _product(self, rows: Tensor) -> Tensor:
        size = next(size for size in SIZES if size >= len(rows))
        out = torch.empty(size, len(self._matrices[0]), dtype=rows.dtype, device=rows.device)
        self._library.dense(rounded(rows, size), self._matrices, out)
        found = out[: len(rows)]
        return found if self._bias is None else found.add_(self._bias)


def block_scales(matrix: Quantized) -> Tensor | None:
    """[outputs / 128, depth / 128], where they are the same throughout 128 x 128 values and the sides fit."""
    num_outputs, depth = matrix.shape
    if depth % SCALE_BLOCK or num_outputs % MULTIPLE_OUTPUTS:
        return None
    scales = matrix.scales[::SCALE_BLOCK]
    is_so = torch.equal(scales.repeat_interleave(SCALE_BLOCK, dim=0)[:num_outputs], matrix.scales)
    return scales.contiguous() if is_so else None
