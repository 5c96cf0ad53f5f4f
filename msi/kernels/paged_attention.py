"""Attention over a paged KV cache.

The cache of one layer is [num_blocks, BLOCK_TOKENS, 2, num_kv_heads, head_dim], keys before values. A micro-batch's
sequences are put into groups of equal query length and similar context once per pass; each layer then gathers each
group's blocks and calls one fused attention on it. Block 0 is never given to a sequence: it pads block tables.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Sequences that are attended to in one call.

    Attributes:
        rows: [num_seqs * query_len] rows of the micro-batch; None when the group is all of it, in order.
        blocks: [num_seqs * num_blocks] block ids, tables padded with block 0.
        mask: [num_seqs, 1, query_len, num_blocks * BLOCK_TOKENS], 0 where visible and -inf elsewhere.
    """

    num_seqs: int
    query_len: int
    rows: Tensor | None
    blocks: Tensor
    mask: Tensor


def group_sequences(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    sliding_window: int | None,
    dtype: torch.dtype,
) -> list[SequenceGroup]:
    """Sequences of equal query length whose number of blocks rounds up to the same power of two go together."""
    members: dict[tuple[int, int], list[tuple[int, int, Sequence[int]]]] = defaultdict(list)
    row = 0
    for query_len, context_len, table in zip(query_lens, context_lens, block_tables, strict=True):
        first = 0 if sliding_window is None else max(0, context_len - query_len + 1 - sliding_window) // BLOCK_TOKENS
        visible = table[first : -(-context_len // BLOCK_TOKENS)]
        size = 1 << (len(visible) - 1).bit_length()
        members[query_len, size].append((row, context_len - first * BLOCK_TOKENS, visible))
        row += query_len
    groups = []
    for (query_len, _), group in members.items():
        num_blocks = max(len(table) for _, _, table in group)
        blocks = torch.zeros(len(group), num_blocks, dtype=torch.int64)
        for index, (_, _, table) in enumerate(group):
            blocks[index, : len(table)] = torch.tensor(table)
        rows = None
        if len(members) > 1:
            starts = torch.tensor([start for start, _, _ in group])
            rows = (starts[:, None] + torch.arange(query_len)).flatten()
        contexts = torch.tensor([context_len for _, context_len, _ in group])
        mask = _mask(query_len, contexts, num_blocks * BLOCK_TOKENS, sliding_window, dtype)
        groups.append(SequenceGroup(len(group), query_len, rows, blocks.flatten(), mask))
    return groups


def _mask(query_len: int, contexts: Tensor, length: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
    """Query i of a sequence of context c stands at position c - query_len + i and sees what is not after it."""
    at = (contexts[:, None] - query_len + torch.arange(query_len))[:, :, None]
    keys = torch.arange(length)
    hidden = keys > at
    if sliding_window is not None:
        hidden |= keys <= at - sliding_window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None]


def write_kv(layer_cache: Tensor, kv: Tensor, slot_mapping: Tensor) -> None:
    """kv [num_tokens, 2, num_kv_heads, head_dim] goes to cache slots [num_tokens], block * BLOCK_TOKENS + offset."""
    layer_cache.view(-1, *kv.shape[1:]).index_copy_(0, slot_mapping, kv)


def paged_attention(query: Tensor, layer_cache: Tensor, groups: Sequence[SequenceGroup]) -> Tensor:
    """Attention of query [num_tokens, num_heads, head_dim] to its sequences' cache; same shape.

    Scale head_dim^-0.5. Query heads share KV heads in consecutive groups of num_heads / num_kv_heads.
    """
    if len(groups) == 1 and groups[0].rows is None:
        return _attend(query, layer_cache, groups[0])
    result = torch.empty_like(query)
    for group in groups:
        assert group.rows is not None
        result[group.rows] = _attend(query[group.rows], layer_cache, group)
    return result


def _attend(query: Tensor, layer_cache: Tensor, group: SequenceGroup) -> Tensor:
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, num_kv_heads = layer_cache.shape[0], layer_cache.shape[3]
    shared = num_heads // num_kv_heads
    gathered = layer_cache.view(num_blocks, -1).index_select(0, group.blocks)
    kv = gathered.view(group.num_seqs, -1, 2, num_kv_heads, head_dim)
    keys, values = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
    # the query heads that share a KV head become queries of that head
    query = query.view(group.num_seqs, group.query_len, num_kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(group.num_seqs, num_kv_heads, shared * group.query_len, head_dim)
    mask = group.mask
    if group.query_len > 1 and shared > 1:
        mask = mask.repeat(1, 1, shared, 1)
    attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    attended = attended.view(group.num_seqs, num_kv_heads, shared, group.query_len, head_dim).permute(0, 3, 1, 2, 4)
    return attended.reshape(num_tokens, num_heads, head_dim)
