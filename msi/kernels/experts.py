"""Gated MLPs: one for all rows, or many experts with one pair of matrix products for each that has rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import SWIGLU, Activation

Linear = Callable[[Tensor], Tensor]
T = TypeVar("T")


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's middle: silu(gate) * up of gate_up [rows, 2 * h']."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def activate(gate_up: Tensor, activation: Activation) -> Tensor:
    """What `activation` says of gate_up [rows, 2 * h'], gate first."""
    if activation == SWIGLU:
        return silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if activation.limit:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.up_offset)


def gated_mlp(rows: Tensor, gate_up: Linear, down: Linear) -> Tensor:
    """The MLP of a dense layer or a shared expert, [n, h] -> [n, h]; `gate_up` and `down` as in `moe_experts`."""
    return down(silu_and_mul(gate_up(rows)))


def sigmoid_gated(rows: Tensor, gate: Linear, mlp: Linear) -> Tensor:
    """A shared expert's output scaled per row by sigmoid(gate), gate: [n, h] -> [n, 1]."""
    return mlp(rows).mul_(torch.sigmoid(gate(rows)))


def moe_experts(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Sequence[Linear],
    down: Sequence[Linear],
    activation: Activation = SWIGLU,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over each row's experts here, of hidden [rows, h], and how many rows each expert had.

    Args:
        topk_ids: [rows, k], local; -1 for an expert of another node.
        topk_weights: [rows, k] float32.
        gate_up: per local expert, [n, h] -> [n, 2 h'] (gate first).
        down: per local expert, [n, h'] -> [n, h].

    Returns:
        (float32 [rows, h], int64 [local experts]).
    """
    k = topk_ids.shape[-1]
    flat_ids = topk_ids.flatten()
    order = torch.argsort(flat_ids, stable=True)
    counts = torch.bincount(flat_ids + 1, minlength=len(gate_up) + 1)
    num_elsewhere, *num_rows = counts.tolist()
    order = order[num_elsewhere:]
    token_index = torch.div(order, k, rounding_mode="floor")
    rows = hidden.index_select(0, token_index)
    weights = topk_weights.flatten().index_select(0, order)
    outputs = []
    start = 0
    for expert, count in enumerate(num_rows):
        if count:
            outputs.append(down[expert](activate(gate_up[expert](rows[start : start + count]), activation)))
            start += count
    weighted = torch.cat(outputs).to(torch.float32).mul_(weights[:, None])
    combined = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device).index_add_(0, token_index, weighted)
    return combined, counts[1:]


Places = Sequence[Sequence[int | None]]  # [num_layers], an expert's place in another bank's layer; None for none


def at_places(layers: Sequence[Sequence[T]], places: Places, none: T) -> list[list[T]]:
    """What each layer has at its places, in their order; `none` where there is no place."""
    return [
        [none if place is None else layer[place] for place in of_layer]
        for layer, of_layer in zip(layers, places, strict=True)
    ]


def weights_at(weights: Tensor, places: Places) -> Tensor:
    """The same of weights [num_layers, num_experts, ...]; whatever the memory had where there is no place."""
    return _copied(weights, weights.new_empty(len(places), len(places[0]), *weights.shape[2:]), places)


def counts_at(counts: Tensor, places: Places) -> Tensor:
    """The same of counts [num_layers, num_experts]; 0 where there is no place."""
    return _copied(counts, counts.new_zeros(len(places), len(places[0])), places)


def _copied(old: Tensor, new: Tensor, places: Places) -> Tensor:
    for layer, of_layer in enumerate(places):
        for local, place in enumerate(of_layer):
            if place is not None:
                new[layer, local] = old[layer, place]
    return new
