"""RMSNorm and rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden [..., h] scaled to unit root mean square (in float32), times weight [h]."""
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [num_tokens, 1, head_dim] of rotary embedding; the sine's first half is negated for `apply_rope`.

    Rotate-half convention: angle_i = position / theta^(2 i / head_dim), for both halves.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.to(torch.float32)[:, None] * inv_freq
    cos, sin = angles.cos(), angles.sin()
    cos = torch.cat((cos, cos), dim=-1)[:, None, :]
    sin = torch.cat((-sin, sin), dim=-1)[:, None, :]
    return cos.to(dtype), sin.to(dtype)


def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates heads [num_tokens, num_heads, head_dim] in place."""
    half = heads.shape[-1] // 2
    rotated = heads.roll(half, dims=-1).mul_(sin)
    heads.mul_(cos).add_(rotated)
