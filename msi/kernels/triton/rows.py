"""Rows of the residual stream: norms, with what is added before them, and the middle of a gated MLP.

One row a program, whole in registers; sums in float32, and of several nodes' answers in the order of the nodes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels import fp8
from msi.kernels.triton.fp8 import unpack


@triton.jit
def _normed(x, inside, weight, c, eps, hidden: tl.constexpr, is_layer_norm: tl.constexpr):
    """x float32 [BLOCK], 0 outside."""
    if is_layer_norm:
        x = tl.where(inside, x - tl.sum(x, 0) / hidden, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + eps)
    return x * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def norm_kernel(
    rows, weight, out, eps, row_stride, hidden: tl.constexpr, is_layer_norm: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: rows."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < hidden
    x = tl.load(rows + t * row_stride + c, mask=inside, other=0.0).to(tl.float32)
    x = _normed(x, inside, weight, c, eps, hidden, is_layer_norm)
    tl.store(out + t * hidden + c, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_kernel(
    residual, added, weight, out, eps, added_stride,
    hidden: tl.constexpr, is_layer_norm: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < hidden
    dtype = residual.dtype.element_ty
    x = tl.load(residual + t * hidden + c, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(added + t * added_stride + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(residual + t * hidden + c, x.to(dtype), mask=inside)
    x = _normed(x.to(dtype).to(tl.float32), inside, weight, c, eps, hidden, is_layer_norm)
    tl.store(out + t * hidden + c, x.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_norm_kernel(
    residual, answers, positions, weight, out, eps, num_tokens, num_nodes, node_stride, row_stride,
    hidden: tl.constexpr, is_layer_norm: tl.constexpr, BLOCK: tl.constexpr, SCALES_AT: tl.constexpr,
):  # fmt: skip
    """Of answers [num_nodes, rows, hidden] those rows that positions [num_nodes, num_tokens] name. Grid: tokens.

    SCALES_AT: answers are in e4m3, uint8 with scales behind so many bytes; else 0.
    """
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < hidden
    dtype = residual.dtype.element_ty
    x = tl.load(residual + t * hidden + c, mask=inside, other=0.0).to(tl.float32)
    its_position = positions + t
    its_answers = answers
    for _ in range(num_nodes):
        row = tl.load(its_position).to(tl.int64)
        if row >= 0:
            if SCALES_AT > 0:
                x += unpack(its_answers + row * row_stride, c, inside, SCALES_AT)
            else:
                x += tl.load(its_answers + row * row_stride + c, mask=inside, other=0.0).to(tl.float32)
        its_position += num_tokens
        its_answers += node_stride
    tl.store(residual + t * hidden + c, x.to(dtype), mask=inside)
    x = _normed(x.to(dtype).to(tl.float32), inside, weight, c, eps, hidden, is_layer_norm)
    tl.store(out + t * hidden + c, x.to(dtype), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, out, inner: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows, blocks of columns)."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < inner
    gate = tl.load(gate_up + t * 2 * inner + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * 2 * inner + inner + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * inner + c, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def norm(rows: Tensor, weight: Tensor, eps: float, is_layer_norm: bool) -> Tensor:
    """Of rows [n, h] of any row stride."""
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if len(rows):
        norm_kernel[(len(rows),)](rows, weight, out, eps, rows.stride(0), **_sizes(rows, is_layer_norm))
    return out


def add_norm(residual: Tensor, added: Tensor, weight: Tensor, eps: float, is_layer_norm: bool) -> Tensor:
    """Adds [n, h] to the residual stream [n, h] in place, and norms it."""
    out = torch.empty_like(residual)
    if len(residual):
        sizes = _sizes(residual, is_layer_norm)
        add_norm_kernel[(len(residual),)](residual, added, weight, out, eps, added.stride(0), **sizes)
    return out


def combine_norm(
    residual: Tensor, answers: Tensor, positions: Tensor, weight: Tensor, eps: float, is_layer_norm: bool
) -> Tensor:
    """Adds to the residual stream [n, h] in place the rows of answers [nodes, rows, h], and norms it.

    Args:
        answers: in eight bits as `fp8.pack` has them.
        positions: [num_nodes, n], each token's row of each node's answers, -1 for none; other rows may hold anything.
    """
    out = torch.empty_like(residual)
    if len(residual):
        combine_norm_kernel[(len(residual),)](
            residual, answers, positions, weight, out, eps, len(residual), len(positions), answers.stride(0),
            answers.stride(1), SCALES_AT=fp8.scales_at(residual.shape[1]) if fp8.is_packed(answers) else 0,
            **_sizes(residual, is_layer_norm),
        )  # fmt: skip
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [rows, 2 h']."""
    num_rows, width = gate_up.shape
    inner = width // 2
    out = torch.empty(num_rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        block = min(1024, triton.next_power_of_2(inner))
        silu_mul_kernel[(num_rows, triton.cdiv(inner, block))](gate_up, out, inner=inner, BLOCK=block, num_warps=4)
    return out


def _sizes(rows: Tensor, is_layer_norm: bool) -> dict[str, int | bool]:
    hidden = rows.shape[-1]
    block = triton.next_power_of_2(hidden)
    return {
        "hidden": hidden, "is_layer_norm": is_layer_norm, "BLOCK": block, "num_warps": min(16, max(1, block // 512)),
    }  # fmt: skip
