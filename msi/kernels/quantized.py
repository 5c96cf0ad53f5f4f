"""Weights in few bits with a scale for each group of 128 along a row, and the plain truth of what they stand for.

Symmetric: 0 is 0. int8 scales a group's largest number to 127; int4 scales it to -8, so that of the sixteen steps none
is lost to the sign. fp8 is float8 e4m3, whose scales are as checkpoints have them: of blocks, rows, or whole matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import NONE, SCALE_BLOCK
from msi.kernels.blocks import to_blocks

GROUP = 128  # values of a row that share a scale


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [n, depth].

    Attributes:
        format: "int8", "int4" or "fp8".
        values: int8 [n, depth], of int4 from -8 to 7; of fp8 float8_e4m3fn.
        scales: float32 [n, groups].
        grain: which of them are one number: none, those of 128 rows from a multiple of it, or those of a row.
    """

    format: str
    values: Tensor
    scales: Tensor
    grain: Literal["group", "block", "row"] = "group"

    @property
    def shape(self) -> tuple[int, int]:
        num_outputs, depth = self.values.shape
        return num_outputs, depth

    @property
    def num_bytes(self) -> int:
        """As packed."""
        bits = 4 if self.format == "int4" else 8
        return self.values.numel() * bits // 8 + self.scales.numel() * 4

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix that it stands for."""
        depth = self.values.shape[1]
        values = self.values.to(torch.float32)
        return values.mul_(self.scales.repeat_interleave(GROUP, dim=1)[:, :depth]).to(dtype)

    def with_rows_below(self, num_rows: int) -> Quantized:
        """And so many of zeros."""
        below = (0, 0, 0, num_rows)
        values = functional.pad(self.values.view(torch.int8), below).view(self.values.dtype)
        return replace(self, values=values, scales=functional.pad(self.scales, below), grain="group")

    def transposed(self) -> Quantized:
        """Of fp8 whose scales are not of rows alone."""
        depth = self.shape[1]
        scales = self.scales[::SCALE_BLOCK].T.repeat_interleave(SCALE_BLOCK, dim=0)[:depth]
        is_one = self.grain == "row" and bool((self.scales == self.scales[0]).all())
        assert self.grain == "block" or is_one, self.grain
        return replace(self, values=self.values.T.contiguous(), scales=scales.contiguous())


def quantize(weight: Tensor, format: str) -> Quantized:
    """Of [n, depth] in any dtype; rounded to the nearest step."""
    num_outputs, depth = weight.shape
    if format == "fp8":
        return replace(in_float8(*to_blocks(weight)), grain="block")
    num_groups = -(-depth // GROUP)
    padded = functional.pad(weight.to(torch.float32), (0, num_groups * GROUP - depth))
    groups = padded.view(num_outputs, num_groups, GROUP)
    if format == "int8":
        scales, least, most = groups.abs().amax(dim=-1) / 127, -127, 127
    else:
        assert format == "int4", format
        largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))[..., 0]
        scales, least, most = largest / -8, -8, 7
    steps = groups / torch.where(scales == 0, 1.0, scales)[..., None]
    values = steps.round_().clamp_(least, most).to(torch.int8).view(num_outputs, -1)
    return Quantized(format, values[:, :depth].contiguous(), scales)


def in_float8(values: Tensor, scales: Tensor) -> Quantized:
    """A matrix of float8_e4m3fn [n, depth], and its scales: one, one for each row, or for each block of 128 x 128."""
    num_outputs, depth = values.shape
    num_groups = -(-depth // GROUP)
    scales = scales.to(torch.float32)
    if scales.numel() == 1 or scales.numel() == num_outputs == len(scales):
        each = scales.reshape(-1, 1).expand(num_outputs, num_groups)
        return Quantized("fp8", values, each.contiguous(), "row")
    return Quantized("fp8", values, scales.repeat_interleave(SCALE_BLOCK, dim=0)[:num_outputs], "block")


def held(weight: Tensor | Quantized, dtype: torch.dtype, format: str) -> Tensor | Quantized:
    """A matrix as a device is given it: in a dtype, or quantised where the format is not "none"; one that is quantised
    already stays as it is then.
    """
    if isinstance(weight, Quantized):
        return weight.dequantized(dtype) if format == NONE else weight
    return weight.to(dtype) if format == NONE else quantize(weight, format)


def joined(parts: Sequence[Tensor | Quantized]) -> Tensor | Quantized:
    """Matrices below each other; where one is quantised and another is not, in the dtype of the latter."""
    packed = [one for one in parts if isinstance(one, Quantized)]
    plain = [one for one in parts if isinstance(one, Tensor)]
    if not packed:
        return torch.cat(plain)
    if plain:
        dtype = plain[0].dtype
        return torch.cat([one.dequantized(dtype) if isinstance(one, Quantized) else one for one in parts])
    first = packed[0]
    values = torch.cat([one.values.view(torch.int8) for one in packed]).view(first.values.dtype)
    grain = first.grain if all(one.grain == first.grain for one in packed) else "group"
    return Quantized(first.format, values, torch.cat([one.scales for one in packed]), grain)


def num_bytes(weight: Tensor | Quantized) -> int:
    return weight.num_bytes if isinstance(weight, Quantized) else weight.numel() * weight.element_size()
