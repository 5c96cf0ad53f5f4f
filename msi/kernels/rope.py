"""Rotary position embedding, with frequencies stretched for contexts longer than a model was first trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """float32 [head_dim / 2]: 1 / theta^(2 i / head_dim) radians per position."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def llama3_frequencies(
    frequencies: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_len: int
) -> Tensor:
    """As Llama 3.1 stretches them: those with less than low_freq_factor turns in the original context are divided by
    `factor`, those with more than high_freq_factor kept, and those between blended.
    """
    turns = original_len * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def yarn_frequencies(
    frequencies: Tensor,
    *,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_len: int,
    truncate: bool,
) -> Tensor:
    """As YaRN stretches them (arXiv 2309.00071): those with more than beta_fast turns in the original context are kept,
    those with less than beta_slow divided by `factor`, and blended linearly by index between.

    Args:
        truncate: whether the ends of the blend are rounded outwards to whole indices.
    """
    num = frequencies.shape[0]

    def index_of(turns: float) -> float:
        return num * math.log(original_len / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num - 1)
    stretched = ((torch.arange(num, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - stretched + stretched / factor)


def rope_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [num_tokens, 1, head_dim] of rotary embedding; the sine's first half is negated for `apply_rope`.

    Rotate-half convention: angle_i = position * frequencies_i, for both halves. With a scale, both are multiplied.
    """
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    cos = torch.cat((cos, cos), dim=-1)[:, None, :]
    sin = torch.cat((-sin, sin), dim=-1)[:, None, :]
    return cos.to(dtype), sin.to(dtype)


def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates heads [num_tokens, num_heads, head_dim] in place, each as far as the table is wide."""
    heads = heads[..., : cos.shape[-1]]
    half = heads.shape[-1] // 2
    rotated = heads.roll(half, dims=-1).mul_(sin)
    heads.mul_(cos).add_(rotated)
