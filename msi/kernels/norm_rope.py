"""Norms, of the residual stream and of queries and keys, and rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden [..., h] scaled to unit root mean square (in float32), times weight [h]."""
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def layer_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden [..., h] shifted and scaled to mean 0 and variance 1 (in float32), times weight [h]."""
    return functional.layer_norm(hidden, (hidden.shape[-1],), weight, None, eps)


def norm_heads(qkv: Tensor, weights: Tensor, eps: float) -> None:
    """RMSNorm in place of each query and key head of qkv [n, all heads * head_dim], values last and left alone.

    Args:
        weights: [num_heads + num_kv_heads, head_dim].
    """
    num_normed, head_dim = weights.shape
    heads = qkv.view(qkv.shape[0], -1, head_dim)[:, :num_normed]
    heads.copy_(functional.rms_norm(heads, (head_dim,), None, eps).mul_(weights))


def norm_projections(qkv: Tensor, query: Tensor, key: Tensor, eps: float) -> None:
    """RMSNorm in place of all queries of a row together, and of all its keys; values are last and left alone.

    Args:
        query, key: weights, as wide as all queries and all keys of a row.
    """
    start = 0
    for weight in (query, key):
        part = qkv[:, start : start + weight.shape[0]]
        part.copy_(rms_norm(part, weight, eps))
        start += weight.shape[0]


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
