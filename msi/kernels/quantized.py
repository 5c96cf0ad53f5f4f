"""Weights as whole numbers with a scale for each group of 128 along a row, and the plain truth of what they stand for.

Symmetric: 0 is 0. int8 scales a group's largest number to 127; int4 scales it to -8, so that of the sixteen steps none
is lost to the sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import NONE

GROUP = 128  # values of a row that share a scale


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [n, depth].

    Attributes:
        format: "int8" or "int4".
        values: int8 [n, depth], of int4 from -8 to 7.
        scales: float32 [n, groups].
    """

    format: str
    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        num_outputs, depth = self.values.shape
        return num_outputs, depth

    @property
    def num_bytes(self) -> int:
        """As packed."""
        bits = 8 if self.format == "int8" else 4
        return self.values.numel() * bits // 8 + self.scales.numel() * 4

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix that it stands for."""
        depth = self.values.shape[1]
        return (self.values * self.scales.repeat_interleave(GROUP, dim=1)[:, :depth]).to(dtype)


def quantize(weight: Tensor, format: str) -> Quantized:
    """Of [n, depth] in any dtype; rounded to the nearest step."""
    num_outputs, depth = weight.shape
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


def held(weight: Tensor, dtype: torch.dtype, format: str) -> Tensor | Quantized:
    """A matrix as a device is given it: in a dtype, or quantised where the format is not "none"."""
    return weight.to(dtype) if format == NONE else quantize(weight, format)


def num_bytes(weight: Tensor | Quantized) -> int:
    return weight.num_bytes if isinstance(weight, Quantized) else weight.numel() * weight.element_size()
