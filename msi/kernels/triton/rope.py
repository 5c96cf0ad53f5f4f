"""Norms of heads, rotary embedding, and keys and values on their way into the paged cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels import BLOCK_TOKENS
from msi.kernels.norm import HeadNorm
from msi.kernels.triton.fp8 import to_e4m3


@triton.jit
def _cached(x, cache):
    """As the cache has it."""
    if cache.dtype.element_ty == tl.float8e4nv:
        x = to_e4m3(x.to(tl.float32))
    return x


@triton.jit(do_not_specialize_on_alignment=["slots"])
def rope_write_kernel(
    heads, cache, cosines, sines, slots, weights, token_stride, eps,
    num_q: tl.constexpr, num_kv: tl.constexpr, head_dim: tl.constexpr, half: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_TOKENS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Rotates queries in place and keys into the cache, as far as the table [num_tokens, half] is wide; copies values.

    A slot of -1 writes nothing. Grid: (tokens, blocks of HEADS heads).

    Args:
        weights: [num_q + num_kv, head_dim] of what queries and keys are normed by before (HAS_NORM).
    """
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    is_head = head < num_q + 2 * num_kv
    inside = is_head[:, None] & (i < half)[None, :]
    source = heads + t * token_stride + head[:, None] * head_dim
    a = tl.load(source + i[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half + i[None, :], mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cosines + t * half + i, mask=i < half, other=0.0)[None, :]
    sin = tl.load(sines + t * half + i, mask=i < half, other=0.0)[None, :]
    is_rotated = (head < num_q + num_kv)[:, None]
    r = 2 * half + tl.arange(0, REST)  # what is not rotated
    beyond = is_head[:, None] & (r < head_dim)[None, :]
    if HAS_NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if head_dim > 2 * half:
            rest = tl.load(source + r[None, :], mask=beyond, other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, 1)
        scale = tl.where(is_rotated, tl.rsqrt(squares / head_dim + eps)[:, None], 1.0)
        weight = weights + head[:, None] * head_dim
        is_normed = inside & is_rotated
        a = a * scale * tl.load(weight + i[None, :], mask=is_normed, other=1.0).to(tl.float32)
        b = b * scale * tl.load(weight + half + i[None, :], mask=is_normed, other=1.0).to(tl.float32)
    dtype = heads.dtype.element_ty
    first = tl.where(is_rotated, a * cos - b * sin, a).to(dtype)
    second = tl.where(is_rotated, b * cos + a * sin, b).to(dtype)

    is_query = inside & (head < num_q)[:, None]
    tl.store(source + i[None, :], first, mask=is_query)
    tl.store(source + half + i[None, :], second, mask=is_query)

    slot = tl.load(slots + t + head * 0).to(tl.int64)
    is_value = head >= num_q + num_kv
    kv_head = tl.where(is_value, head - num_q - num_kv, head - num_q)
    part = slot // BLOCK_TOKENS * 2 + is_value.to(tl.int64)  # a block's keys lie before its values
    row = (part * BLOCK_TOKENS + slot % BLOCK_TOKENS) * num_kv + kv_head
    to = cache + row[:, None] * head_dim
    is_kv = is_head & (head >= num_q) & (slot >= 0)
    written = inside & is_kv[:, None]
    tl.store(to + i[None, :], _cached(first, cache), mask=written)
    tl.store(to + half + i[None, :], _cached(second, cache), mask=written)
    if head_dim > 2 * half:
        if HAS_NORM:
            weight_of_rest = tl.load(weight + r[None, :], mask=beyond & is_rotated, other=1.0).to(tl.float32)
            kept = (rest * scale * weight_of_rest).to(dtype)
            tl.store(source + r[None, :], kept, mask=beyond & (head < num_q)[:, None])
        else:
            kept = tl.load(source + r[None, :], mask=beyond & is_kv[:, None], other=0.0)
        tl.store(to + r[None, :], _cached(kept, cache), mask=beyond & is_kv[:, None])


def rope_table(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [num_tokens, len(frequencies)], multiplied by the scale."""
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scale == 1 else (cos * scale, sin * scale)


def rope_and_write(
    heads: Tensor,
    num_q: int,
    table: tuple[Tensor, Tensor],
    layer_cache: Tensor,
    slots: Tensor,
    norm: HeadNorm | None = None,
) -> None:
    """Of heads [num_tokens, num_q + 2 num_kv, head_dim]: queries are rotated in place, keys and values go to the cache
    [num_blocks, 2, BLOCK_TOKENS, num_kv, head_dim]; keys are left as they were.

    Args:
        slots: int32 [num_tokens], block * BLOCK_TOKENS + offset; -1 for none.
        norm: of queries and keys before they are rotated.
    """
    num_tokens, num_heads, head_dim = heads.shape
    if not num_tokens:
        return
    half = table[0].shape[1]
    together = 8 if num_heads > 4 else 4
    rope_write_kernel[(num_tokens, triton.cdiv(num_heads, together))](
        heads, layer_cache, *table, slots, None if norm is None else norm.weights, heads.stride(0),
        0.0 if norm is None else norm.eps, num_q=num_q, num_kv=(num_heads - num_q) // 2,
        head_dim=head_dim, half=half, HEADS=together, HALF=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(max(1, head_dim - 2 * half)), BLOCK_TOKENS=BLOCK_TOKENS,
        HAS_NORM=norm is not None, num_warps=2,
    )  # fmt: skip
