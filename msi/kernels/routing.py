"""The router, and packing rows for expert nodes.

A packed row is `hidden | weights float32 [k] | local ids int32 [k]`: one contiguous run of bytes per token and node.
An id of -1 marks an expert of another node. Hidden rows may be in eight bits (`fp8.pack`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msi.kernels import SigmoidRouting, fp8


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


@dataclass(frozen=True, slots=True)
class RowDtypes:
    """Of hidden rows.

    Attributes:
        computed: in which they are computed.
        sent, answered: in which they travel to the experts, and back: that, or `fp8.E4M3`.
    """

    computed: torch.dtype
    sent: torch.dtype
    answered: torch.dtype

    @staticmethod
    def of(dtype: torch.dtype) -> RowDtypes:
        """All alike."""
        return RowDtypes(dtype, dtype, dtype)


def row_bytes(hidden_size: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of a packed row: whole lines of 128 bytes, so that every row starts on one."""
    return _lines(hidden_bytes(hidden_size, dtype) + 8 * k)


def answer_row_bytes(hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of a row that comes back, which is a hidden row alone."""
    return _lines(hidden_bytes(hidden_size, dtype))


def hidden_bytes(hidden_size: int, dtype: torch.dtype) -> int:
    """Bytes of a hidden row as it travels in a dtype."""
    return fp8.packed_bytes(hidden_size) if dtype is fp8.E4M3 else hidden_size * dtype.itemsize


def hidden_rows(rows: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """The beginnings of uint8 [..., row_bytes]: [..., hidden_size], in eight bits uint8 [..., fp8.packed_bytes]."""
    hidden = rows[..., : hidden_bytes(hidden_size, dtype)]
    return hidden if dtype is fp8.E4M3 else hidden.view(dtype)


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Typed views of memory that holds packed rows; leading dimensions are those of the bytes.

    Attributes:
        unpacked: of rows in eight bits, hidden_size and the dtype that they are computed in.
    """

    hidden: Tensor  # [..., rows, hidden_size], in eight bits uint8 [..., rows, fp8.packed_bytes(hidden_size)]
    topk_weights: Tensor  # [..., rows, k] float32
    topk_ids: Tensor  # [..., rows, k] int32, local, -1 for none
    unpacked: tuple[int, torch.dtype] | None = None

    @staticmethod
    def view(
        rows: Tensor, hidden_size: int, k: int, dtype: torch.dtype, computed: torch.dtype | None = None
    ) -> PackedRows:
        """Views of uint8 [..., rows, row_bytes].

        Args:
            dtype: in which they travel.
            computed: of rows in eight bits that will be read.
        """
        at = hidden_bytes(hidden_size, dtype)
        return PackedRows(
            hidden_rows(rows, hidden_size, dtype),
            rows[..., at : at + 4 * k].view(torch.float32),
            rows[..., at + 4 * k : at + 8 * k].view(torch.int32),
            None if computed is None or dtype is not fp8.E4M3 else (hidden_size, computed),
        )

    @property
    def dtype(self) -> torch.dtype:
        """In which they are computed."""
        return self.hidden.dtype if self.unpacked is None else self.unpacked[1]

    def gather(self, lane: int, seats: Sequence[tuple[int, int]]) -> PackedRows:
        """Of rows [seats, lanes, slot_rows], those of a lane's slots behind one another, and none in eight bits.

        Args:
            seats: (seat, num_rows).
        """
        parts = [
            [field[seat, lane, :num_rows] for seat, num_rows in seats]
            for field in (self.hidden, self.topk_weights, self.topk_ids)
        ]
        hidden, weights, ids = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
        if self.unpacked is not None:
            hidden = fp8.unpack(hidden, *self.unpacked)
        return PackedRows(hidden, weights, ids)

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
    """Writes one node's rows, of hidden rows as they travel, to the start of `into`; returns how many."""
    count = int(local_ids.shape[0])
    if token_index is None:
        into.hidden[:count] = hidden
        into.topk_weights[:count] = topk_weights
    else:
        into.hidden[:count] = hidden.index_select(0, token_index)
        into.topk_weights[:count] = topk_weights.index_select(0, token_index)
    into.topk_ids[:count] = local_ids
    return count
