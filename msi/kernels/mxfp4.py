"""Matrices in MXFP4, as gpt-oss ships its experts, and what they stand for.

Numbers of four bits (sign, two bits of exponent, one of mantissa), of which 32 along a row share a power of two (OCP
Microscaling Formats 1.0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from msi.kernels import MXFP4_GROUP as GROUP

BYTES = 17 / 32  # of a value
NO_NUMBER = 255  # as a scale
BIAS = 127  # of a scale's exponent
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [n, 32 groups] of blocks uint8 [n, groups, 16], a byte's low half first, and scales uint8 [n, groups]."""
    signed = torch.tensor((*VALUES, *(-value for value in VALUES)))
    byte = torch.arange(256)
    pairs = torch.stack((signed[byte & 15], signed[byte >> 4]), dim=-1)
    values = pairs.index_select(0, blocks.flatten().to(torch.int32)).view(*scales.shape, GROUP)
    return torch.ldexp(values, scales.to(torch.int32)[..., None] - BIAS).flatten(1)
