"""Norms, of the residual stream and of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of the residual stream: `rms_norm` or `layer_norm` with a weight [h]."""

    apply: Callable[[Tensor, Tensor, float], Tensor]
    weight: Tensor
    eps: float


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden [..., h] scaled to unit root mean square (in float32), times weight [h]."""
    return functional.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def layer_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden [..., h] shifted and scaled to mean 0 and variance 1 (in float32), times weight [h]."""
    return functional.layer_norm(hidden, (hidden.shape[-1],), weight, None, eps)


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm of each query and key head by itself.

    Attributes:
        weights: [num_heads + num_kv_heads, head_dim].
    """

    weights: Tensor
    eps: float


def norm_heads(heads: Tensor, norm: HeadNorm) -> None:
    """In place, of heads [n, num_heads + 2 num_kv_heads, head_dim]; values are last and left alone."""
    num_normed, head_dim = norm.weights.shape
    normed = heads[:, :num_normed]
    normed.copy_(functional.rms_norm(normed, (head_dim,), None, norm.eps).mul_(norm.weights))


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
