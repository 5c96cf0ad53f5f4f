"""The product of rows with a matrix in float8, which is unpacked on the way to the multiprocessor's registers.

What the experts' products do for rows that chose an expert, this does for all rows of a pass: attention's projections,
dense MLPs, shared experts. Scales are those of 128 numbers of a row, whatever they were in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels.quantized import GROUP, Quantized


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product of up to `rows` rows is cut; `block_k` divides `GROUP`."""

    rows: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


CUTS = (Cut(16, 16, 32, 128, 4, 5), Cut(64, 64, 64, 64, 4, 4), Cut(1 << 30, 128, 64, 64, 8, 3))
EXACT_CUTS = (Cut(1 << 30, 16, 32, 32, 4, 2),)  # of rows in float32


@triton.jit
def product(
    rows, weight, scales, bias, out, num_rows, row_stride,
    NUM_OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [num_rows, NUM_OUTPUTS] = rows @ (weight * scale).T, plus a bias. Programs of the same columns run together.

    Args:
        weight: float8_e4m3fn [NUM_OUTPUTS, DEPTH].
        scales: float32 [ceil(DEPTH / GROUP), NUM_OUTPUTS].
        row_stride: elements from row to row.
        UPCAST: multiplies in float32, for an interpreter that cannot in bfloat16.
    """
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    lines = (program % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program // row_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    from_rows = rows + tl.minimum(lines, num_rows - 1)[:, None].to(tl.int64) * row_stride
    column = tl.minimum(columns, NUM_OUTPUTS - 1)
    from_weight = weight + column[:, None].to(tl.int64) * DEPTH
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        if DEPTH % BLOCK_K == 0:
            left = tl.load(from_rows + depth[None, :])
            right = tl.load(from_weight + depth[None, :])
        else:
            left = tl.load(from_rows + depth[None, :], mask=(depth < DEPTH)[None, :], other=0.0)
            right = tl.load(from_weight + depth[None, :], mask=(depth < DEPTH)[None, :], other=0.0)
        right = right.to(left.dtype)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        scale = tl.load(scales + (k // GROUP) * NUM_OUTPUTS + column)
        sums += tl.dot(left, tl.trans(right), input_precision="ieee") * scale[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + column).to(tl.float32)[None, :]
    to = out + lines[:, None].to(tl.int64) * NUM_OUTPUTS + columns[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=(lines < num_rows)[:, None] & (columns < NUM_OUTPUTS)[None, :])


class Float8Linear:
    """x [rows, depth] -> [rows, n] for a matrix in fp8 [n, depth] and a bias [n]."""

    def __init__(self, matrix: Quantized, bias: Tensor | None, device: torch.device) -> None:
        assert matrix.format == "fp8", matrix.format
        self._num_outputs, self._depth = matrix.shape
        self.weight = matrix.values.contiguous().to(device)
        self._scales = matrix.scales.T.contiguous().to(device)
        self._bias = None if bias is None else bias.to(device)
        self._loaded: set[torch.dtype] = set()

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        out = torch.empty(rows.shape[0], self._num_outputs, dtype=rows.dtype, device=rows.device)
        if not rows.shape[0]:
            return out
        cuts = EXACT_CUTS if rows.dtype is torch.float32 else CUTS
        if rows.dtype not in self._loaded:  # a kernel that is loaded later may wait for what waits for it
            self._loaded.add(rows.dtype)
            for cut in cuts:
                self._launch(rows, out, cut)
        self._launch(rows, out, next(cut for cut in cuts if rows.shape[0] <= cut.rows))
        return out

    def _launch(self, rows: Tensor, out: Tensor, cut: Cut) -> None:
        num_rows = rows.shape[0]
        grid = (triton.cdiv(num_rows, cut.block_m) * triton.cdiv(self._num_outputs, cut.block_n),)
        product[grid](
            rows, self.weight, self._scales, self._bias, out, num_rows, rows.stride(0),
            NUM_OUTPUTS=self._num_outputs, DEPTH=self._depth, GROUP=GROUP, HAS_BIAS=self._bias is not None,
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
            UPCAST=rows.dtype is torch.bfloat16 and rows.device.type == "cpu",
            num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
