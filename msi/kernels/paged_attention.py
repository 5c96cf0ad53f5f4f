"""Attention over a paged KV cache.

The cache of one layer is [num_blocks, 2, BLOCK_TOKENS, num_kv_heads, head_dim], a block's keys before its values, in
the dtype that is computed in or in `fp8.E4M3`. A
micro-batch's sequences are put into groups of equal query length and similar context once per pass; each layer then
gathers each group's blocks and calls one fused attention on it. Block 0 is never given to a sequence: it pads block
tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.pass_tensors import PassTensors

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Of the layers that read one plan.

    Attributes:
        sliding_window: tokens that a query sees, its own included; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Sequences that are attended to in one call.

    Attributes:
        rows: [num_seqs * query_len] rows of the micro-batch; None when the group is all of it, in order.
        halves: [2 * num_seqs * num_blocks], where their blocks' keys lie, and then where their values do, in a cache
            seen as [2 * num_blocks, ...]; tables are padded with block 0.
        mask: [num_seqs, 1, query_len, num_blocks * BLOCK_TOKENS], 0 where visible and -inf elsewhere.
    """

    num_seqs: int
    query_len: int
    rows: Tensor | None
    halves: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer reads of a pass.

    Attributes:
        kv_rows: int64 [num_tokens, 2] rows of a layer's cache [rows, num_kv_heads, head_dim] that each token's keys and
            values go to.
    """

    kv_rows: Tensor
    groups: list[SequenceGroup]


def plan_attention(
    host: PassTensors, sliding_window: int | None, dtype: torch.dtype, device: torch.device, is_fixed: bool = False
) -> AttentionPlan:
    """From what the host knows of a pass, for a device.

    Args:
        is_fixed: as `msi.kernels.kernels.Kernels.plan_attention` says: one group, and whole block tables.
    """
    rows = kv_rows(host.slot_mapping).to(device)
    if is_fixed:
        contexts, tables = host.context_lens.numpy(), host.block_tables.numpy()
        num_blocks = np.full_like(contexts, tables.shape[1])
        first = np.zeros_like(contexts)
        group = _group(1, None, contexts, tables, first, num_blocks, sliding_window, dtype, device)
        return AttentionPlan(rows, [group])
    return AttentionPlan(rows, group_sequences(host, sliding_window, dtype, device))


def group_sequences(
    host: PassTensors, sliding_window: int | None, dtype: torch.dtype, device: torch.device
) -> list[SequenceGroup]:
    """Sequences of equal query length whose number of blocks rounds up to the same power of two go together."""
    query_lens, context_lens, tables = (
        tensor.numpy() for tensor in (host.query_lens, host.context_lens, host.block_tables)
    )
    first = np.zeros_like(context_lens)
    if sliding_window is not None:
        first = np.maximum(0, context_lens - query_lens + 1 - sliding_window) // BLOCK_TOKENS
    num_blocks = -(-context_lens // BLOCK_TOKENS) - first
    query_len, fewest, most = int(query_lens[0]), int(num_blocks.min()), int(num_blocks.max())
    if query_len == query_lens.max() == query_lens.min() and (fewest - 1).bit_length() == (most - 1).bit_length():
        return [_group(query_len, None, context_lens, tables, first, num_blocks, sliding_window, dtype, device)]
    kinds = query_lens * np.int64(64) + np.ceil(np.log2(num_blocks)).astype(np.int64)
    starts = np.cumsum(query_lens) - query_lens
    groups = []
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        query_len = int(kind) // 64
        rows = (starts[members, None] + np.arange(query_len)).ravel()
        contexts, visible, since, count = (array[members] for array in (context_lens, tables, first, num_blocks))
        groups.append(
            _group(query_len, torch.from_numpy(rows), contexts, visible, since, count, sliding_window, dtype, device)
        )
    return groups


def _group(
    query_len: int,
    rows: Tensor | None,
    context_lens: Ints,
    tables: Ints,
    first: Ints,
    num_blocks: Ints,
    sliding_window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> SequenceGroup:
    """`first` and `num_blocks` say which blocks of each sequence's table it sees."""
    columns = np.arange(num_blocks.max())
    if first.any():
        tables = np.take_along_axis(tables, np.minimum(first[:, None] + columns, tables.shape[1] - 1), axis=1)
        context_lens = context_lens - first * BLOCK_TOKENS
        tables = np.where(columns < num_blocks[:, None], tables, 0)
    halves = np.empty((2, len(context_lens), len(columns)), np.int64)
    np.multiply(tables[:, : len(columns)], 2, out=halves[0])
    np.add(halves[0], 1, out=halves[1])
    mask = _mask(query_len, context_lens, len(columns) * BLOCK_TOKENS, sliding_window, dtype)
    rows = None if rows is None else rows.to(device)
    return SequenceGroup(
        len(context_lens), query_len, rows, torch.from_numpy(halves.ravel()).to(device), mask.to(device)
    )


def _mask(query_len: int, contexts: Ints, length: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
    """Query i of a sequence of context c stands at position c - query_len + i and sees what is not after it."""
    at = (contexts[:, None] - query_len + np.arange(query_len))[:, None, :, None]
    keys = np.arange(length)
    hidden = keys > at
    if sliding_window is not None:
        hidden |= keys <= at - sliding_window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))


def kv_rows(slot_mapping: Tensor) -> Tensor:
    """Where keys and values of tokens [n] go: int64 [n, 2] rows of a layer's cache [rows, num_kv_heads, head_dim]."""
    slots = slot_mapping.numpy().astype(np.int64)
    rows = np.empty((len(slots), 2), np.int64)
    np.add(slots, slots - slots % BLOCK_TOKENS, out=rows[:, 0])  # a block's values lie between its keys and the next's
    np.add(rows[:, 0], BLOCK_TOKENS, out=rows[:, 1])
    return torch.from_numpy(rows)


def write_kv(layer_cache: Tensor, kv: Tensor, rows: Tensor) -> None:
    """kv [num_tokens, 2, num_kv_heads, head_dim] goes to cache rows [num_tokens, 2] of `kv_rows`."""
    cached = layer_cache.view(-1, *kv.shape[2:])
    if layer_cache.dtype is fp8.E4M3:
        cached, kv = cached.view(torch.uint8), fp8.to_e4m3(kv).view(torch.uint8)
    cached.index_put_((rows,), kv)


def paged_attention(
    query: Tensor, layer_cache: Tensor, groups: Sequence[SequenceGroup], sinks: Tensor | None = None
) -> Tensor:
    """Attention of query [num_tokens, num_heads, head_dim] to its sequences' cache; same shape.

    Scale head_dim^-0.5. Query heads share KV heads in consecutive groups of num_heads / num_kv_heads.

    Args:
        sinks: [num_heads], p_t = exp(s_t) / (exp(sink) + sum of exp(s)).
    """
    if len(groups) == 1 and groups[0].rows is None:
        return _attend(query, layer_cache, groups[0], sinks)
    result = torch.empty_like(query)
    for group in groups:
        assert group.rows is not None
        result[group.rows] = _attend(query[group.rows], layer_cache, group, sinks)
    return result


def _attend(query: Tensor, layer_cache: Tensor, group: SequenceGroup, sinks: Tensor | None) -> Tensor:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = layer_cache.shape[3]
    shared = num_heads // num_kv_heads
    gathered = layer_cache.view(2 * layer_cache.shape[0], -1).index_select(0, group.halves)
    if layer_cache.dtype is fp8.E4M3:
        gathered = fp8.from_e4m3(gathered, query.dtype)
    keys, values = gathered.view(2, group.num_seqs, -1, num_kv_heads, head_dim).transpose(2, 3)
    # the query heads that share a KV head become queries of that head
    query = query.view(group.num_seqs, group.query_len, num_kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(group.num_seqs, num_kv_heads, shared * group.query_len, head_dim)
    mask = group.mask
    if group.query_len > 1 and shared > 1:
        mask = mask.repeat(1, 1, shared, 1)
    if sinks is None:
        attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    else:
        attended = _attend_with_sinks(query, keys, values, mask, sinks.view(num_kv_heads, shared))
    attended = attended.view(group.num_seqs, num_kv_heads, shared, group.query_len, head_dim).permute(0, 3, 1, 2, 4)
    return attended.reshape(num_tokens, num_heads, head_dim)


def _attend_with_sinks(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """A key more, all zeros but for a number that real keys lack: against that, each query holds its head's sink.

    So no mask is as wide as all heads. `sinks`: [num_kv_heads, shared].
    """
    num_seqs, _, num_queries, head_dim = query.shape
    scores = (sinks * head_dim**0.5).repeat_interleave(num_queries // sinks.shape[1], dim=1)
    query = torch.cat([query, scores.to(query.dtype)[None, :, :, None].expand(num_seqs, -1, -1, 1)], dim=-1)
    keys, values = functional.pad(keys, (0, 1, 0, 1)), functional.pad(values, (0, 1, 0, 1))
    keys[..., -1, -1] = 1.0
    attended = functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=functional.pad(mask, (0, 1)), scale=head_dim**-0.5
    )
    return attended[..., :head_dim].contiguous()
