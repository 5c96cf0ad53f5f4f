"""Matrices in MXFP4, as gpt-oss ships its experts, and what they stand for.

Numbers of four bits (sign, two bits of exponent, one of mantissa), of which 32 along a row share a power of two (OCP
Microscaling Formats 1.0).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from msi.kernels import MXFP4_GROUP as GROUP

BYTES = 17 / 32  # of a value
NO_NUMBER = 255  # as a scale
BIAS = 127  # of a scale's exponent
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [n, 32 groups] of blocks uint8 [n, groups, 16], a byte's low half first, and scales uint8 [n, groups]."""
    signed = np.array((*VALUES, *(-value for value in VALUES)), np.float32)
    byte = np.arange(256)
    pairs = np.stack((signed[byte & 15], signed[byte >> 4]), axis=-1).view(np.float64).ravel()  # two floats at once
    values = torch.from_numpy(pairs[blocks.numpy()].view(np.float32)).view(*scales.shape, GROUP)
    powers = torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - BIAS)
    return values.mul_(powers[..., None]).flatten(1)
