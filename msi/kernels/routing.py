"""The router, and packing rows for expert nodes.

A packed row is `hidden | weights float32 [k] | local ids int32 [k]`: one contiguous run of bytes per token and node.
An id of -1 marks an expert of another node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msi.kernels import SigmoidRouting


def topk_softmax(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """topk_weights float32 and topk_ids int64, both [num_tokens, k], of router logits [num_tokens, num_experts].

    With `renormalise` the weights of a token sum to 1: softmax over the chosen logits alone is the same number.
    """
    logits = logits.to(torch.float32)
    if renormalise:
        chosen, topk_ids = torch.topk(logits, k, dim=-1)
        return torch.softmax(chosen, dim=-1), topk_ids
    return torch.topk(torch.softmax(logits, dim=-1), k, dim=-1)


def topk_sigmoid(
    logits: Tensor, bias: Tensor, k: int, renormalise: bool, routing: SigmoidRouting
) -> tuple[Tensor, Tensor]:
    """topk_weights float32 and topk_ids int64, both [num_tokens, k], of float32 logits [num_tokens, num_experts].

    Experts are chosen by sigmoid + bias [num_experts], among the groups whose two best are the largest together;
    weights are the sigmoids alone, which with `renormalise` sum to 1 before the scale.
    """
    scores = torch.sigmoid(logits)
    choice = scores + bias
    if routing.num_chosen_groups < routing.num_groups:
        groups = choice.view(len(choice), routing.num_groups, -1)
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(routing.num_chosen_groups, dim=-1).indices
        is_out = torch.ones(groups.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, False)
        choice = groups.masked_fill(is_out[..., None], float("-inf")).view_as(choice)
    topk_ids = choice.topk(k, dim=-1).indices
    weights = scores.gather(1, topk_ids)
    if renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routing.scale, topk_ids


def row_bytes(hidden_size: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of a packed row: whole lines of 128 bytes, so that every row starts on one."""
    return _lines(hidden_size * dtype.itemsize + 8 * k)


def answer_row_bytes(hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of a row that comes back, which is a hidden row alone."""
    return _lines(hidden_size * dtype.itemsize)


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Typed views of memory that holds packed rows; leading dimensions are those of the bytes."""

    hidden: Tensor  # [..., rows, hidden_size]
    topk_weights: Tensor  # [..., rows, k] float32
    topk_ids: Tensor  # [..., rows, k] int32, local, -1 for none

    @staticmethod
    def view(rows: Tensor, hidden_size: int, k: int, dtype: torch.dtype) -> PackedRows:
        """Views of uint8 [..., rows, row_bytes]."""
        at = hidden_size * dtype.itemsize
        return PackedRows(
            rows[..., :at].view(dtype),
            rows[..., at : at + 4 * k].view(torch.float32),
            rows[..., at + 4 * k : at + 8 * k].view(torch.int32),
        )

    def gather(self, lane: int, seats: Sequence[tuple[int, int]]) -> PackedRows:
        """Of rows [seats, lanes, slot_rows], those of a lane's slots behind one another; `seats`: (seat, num_rows)."""
        fields = (self.hidden, self.topk_weights, self.topk_ids)
        if len(seats) == 1:
            ((seat, num_rows),) = seats
            return PackedRows(*(field[seat, lane, :num_rows] for field in fields))
        return PackedRows(*(torch.cat([field[seat, lane, :num_rows] for seat, num_rows in seats]) for field in fields))

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(self.hidden.to(device), self.topk_weights.to(device), self.topk_ids.to(device))


def rows_for_node(topk_ids: Tensor, local_ids: Tensor, node: int) -> tuple[Tensor | None, Tensor]:
    """Which tokens have an expert on a node, and their local ids there.

    Args:
        local_ids: int32 [num_nodes, num_experts], -1 where a node lacks the expert.

    Returns:
        (token_index [n] or None for all tokens in order, local ids [n, k] int32).
    """
    local = local_ids[node][topk_ids]
    if len(local_ids) == 1:
        return None, local
    token_index = (local >= 0).any(dim=-1).nonzero().flatten()
    return token_index, local.index_select(0, token_index)


def pack_rows(
    hidden: Tensor, topk_weights: Tensor, local_ids: Tensor, token_index: Tensor | None, into: PackedRows
) -> int:
    """Writes one node's rows to the start of `into`; returns how many."""
    count = int(local_ids.shape[0])
    if token_index is None:
        into.hidden[:count] = hidden
        into.topk_weights[:count] = topk_weights
    else:
        into.hidden[:count] = hidden.index_select(0, token_index)
        into.topk_weights[:count] = topk_weights.index_select(0, token_index)
    into.topk_ids[:count] = local_ids
    return count
