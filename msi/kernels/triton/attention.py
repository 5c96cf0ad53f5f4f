"""Attention over a paged KV cache, in the cache's own memory: decoding split over the context, and chunks of prompts.

A cache in e4m3 is read as it is, and unpacked in registers.

One kernel for both. The query heads that share a KV head, of one query or of several, are the rows of a tile: so keys
and values are read once for all of them. What a program works off is an item of the pass's plan (`attention_plan.py`):
some queries of a sequence against part of its context. Parts of one sequence are merged by their log-sum-exps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels import BLOCK_TOKENS
from msi.kernels.triton.attention_plan import ITEM, PagedPlan, Tiles, warps_and_stages

LOG2E = 1.4426950408889634


@triton.jit
def _attend(
    item, kv_head, query, cache, block_tables, sinks, output, partial, partial_lse, query_stride, table_stride, scale,
    window,
    GROUP: tl.constexpr, num_kv: tl.constexpr, head_dim: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """`item` int32: sequence, its first row, queries, position of the first, context from, to, row of `partial` or -1.

    The softmax is computed in powers of two; `scale` has log2(e) in it. A sink is a score that was seen before all
    others, and has no value; of a sequence in parts, whoever merges them has seen it.
    """
    sequence = tl.load(item).to(tl.int64)
    first_row = tl.load(item + 1).to(tl.int64)
    num_queries = tl.load(item + 2)
    position = tl.load(item + 3)
    begin = tl.load(item + 4)
    end = tl.load(item + 5)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    of_query = m // GROUP
    head = kv_head * GROUP + m % GROUP
    is_row = of_query < num_queries
    inside = is_row[:, None] & (d < head_dim)[None, :]
    q = tl.load(
        query + (first_row + of_query[:, None]) * query_stride + head[:, None] * head_dim + d[None, :],
        mask=inside, other=0.0,
    )  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    at = position + of_query
    token_stride: tl.constexpr = num_kv * head_dim
    tables = block_tables + sequence * table_stride
    heads = cache + kv_head * head_dim

    top, total = _begin(sinks, head, is_row, BLOCK_M, HAS_SINKS)
    if IS_SPLIT:
        part = tl.load(item + 6)
        if HAS_SINKS:
            top = tl.where(part < 0, top, float("-inf"))
            total = tl.where(part < 0, total, 0.0)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key_at = start + n
        is_key = key_at < end
        block = tl.load(tables + key_at // BLOCK_TOKENS, mask=is_key, other=0).to(tl.int64)
        token = heads + (block * (2 * BLOCK_TOKENS) + key_at % BLOCK_TOKENS) * token_stride
        keys = tl.load(token[None, :] + d[:, None], mask=is_key[None, :] & (d < head_dim)[:, None], other=0.0)
        values = tl.load(
            token[:, None] + BLOCK_TOKENS * token_stride + d[None, :],
            mask=is_key[:, None] & (d < head_dim)[None, :], other=0.0,
        )  # fmt: skip
        keys = keys.to(q.dtype)  # which a cache in eight bits is not, and one that is widened
        values = values.to(q.dtype)
        scores = tl.dot(q, keys, input_precision="ieee") * scale
        is_seen = is_key[None, :] & (key_at[None, :] <= at[:, None])
        if window > 0:
            is_seen = is_seen & (key_at[None, :] > at[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = new_top

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # of a row that saw nothing
    if IS_SPLIT:
        if part >= 0:
            to = (part.to(tl.int64) * num_kv + kv_head) * BLOCK_M + m
            tl.store(partial + to[:, None] * D + d[None, :], acc, mask=is_row[:, None])
            lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
            tl.store(partial_lse + to, lse, mask=is_row)
        else:
            _store(acc, output, first_row, of_query, head, inside, d, GROUP, num_kv, head_dim)
    else:
        _store(acc, output, first_row, of_query, head, inside, d, GROUP, num_kv, head_dim)


@triton.jit
def _begin(sinks, head, is_row, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr):
    """The largest score so far, in powers of two, and the sum: of nothing, or of the rows' sinks."""
    if HAS_SINKS:
        top = tl.load(sinks + head, mask=is_row, other=0.0) * 1.4426950408889634  # log2(e)
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    return top, total


@triton.jit
def _store(
    acc, output, first_row, of_query, head, inside, d,
    GROUP: tl.constexpr, num_kv: tl.constexpr, head_dim: tl.constexpr,
):  # fmt: skip
    """output [num_tokens, num_kv * GROUP, head_dim]."""
    row = (first_row + of_query) * (num_kv * GROUP) + head
    tl.store(output + row[:, None] * head_dim + d[None, :], acc.to(output.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_tables", "item_starts"]
)  # what differs between passes would be compiled anew
def paged_attention_kernel(
    query, cache, block_tables, items, item_starts, sinks, output, partial, partial_lse,
    query_stride, table_stride, scale, window,
    GROUP: tl.constexpr, num_kv: tl.constexpr, head_dim: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """Grid: (KV heads, programs). Program p works off items [item_starts[p], item_starts[p + 1]); not split, item p."""
    kv_head = tl.program_id(0)
    p = tl.program_id(1)
    if IS_SPLIT:
        for index in range(tl.load(item_starts + p), tl.load(item_starts + p + 1)):
            _attend(
                items + index * ITEM, kv_head, query, cache, block_tables, sinks, output, partial, partial_lse,
                query_stride, table_stride, scale, window,
                GROUP, num_kv, head_dim, BLOCK_TOKENS, BLOCK_M, BLOCK_N, D, IS_SPLIT, HAS_SINKS, UPCAST,
            )  # fmt: skip
    else:
        _attend(
            items + p * ITEM, kv_head, query, cache, block_tables, sinks, output, partial, partial_lse,
            query_stride, table_stride, scale, window,
            GROUP, num_kv, head_dim, BLOCK_TOKENS, BLOCK_M, BLOCK_N, D, IS_SPLIT, HAS_SINKS, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["part_starts"])
def merge_kernel(
    items, part_starts, partial, partial_lse, sinks, output,
    GROUP: tl.constexpr, num_kv: tl.constexpr, head_dim: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
    HAS_SINKS: tl.constexpr, ITEM: tl.constexpr,
):  # fmt: skip
    """A sequence's parts are items [part_starts[s], part_starts[s + 1]); one alone has been written. Grid: (KV heads,
    sequences).
    """
    kv_head = tl.program_id(0)
    s = tl.program_id(1)
    first = tl.load(part_starts + s)
    last = tl.load(part_starts + s + 1)
    if last - first > 1:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, D)
        first_row = tl.load(items + first * ITEM + 1).to(tl.int64)
        num_queries = tl.load(items + first * ITEM + 2)
        is_row = m // GROUP < num_queries
        head = kv_head * GROUP + m % GROUP
        top, total = _begin(sinks, head, is_row, BLOCK_M, HAS_SINKS)
        acc = tl.zeros([BLOCK_M, D], tl.float32)
        for index in range(first, last):
            part = tl.load(items + index * ITEM + 6).to(tl.int64)
            at = (part * num_kv + kv_head) * BLOCK_M + m
            lse = tl.load(partial_lse + at, mask=is_row, other=float("-inf"))
            new_top = tl.where(lse > top, lse, top)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade = tl.exp2(top - base)
            share = tl.exp2(lse - base)
            part_acc = tl.load(partial + at[:, None] * D + d[None, :], mask=is_row[:, None], other=0.0)
            acc = acc * fade[:, None] + part_acc * share[:, None]
            total = total * fade + share
            top = new_top
        inside = is_row[:, None] & (d < head_dim)[None, :]
        acc = acc / tl.where(is_row, total, 1.0)[:, None]
        _store(acc, output, first_row, m // GROUP, head, inside, d, GROUP, num_kv, head_dim)


def paged_attention(query: Tensor, layer_cache: Tensor, plan: PagedPlan, sinks: Tensor | None = None) -> Tensor:
    """Attention of query [num_tokens, num_heads, head_dim] (of any row stride) to its sequences' cache; same shape.

    Args:
        sinks: float32 [num_heads], of each head the score of a key that has no value.
    """
    _, num_heads, head_dim = query.shape
    num_kv = layer_cache.shape[3]
    group = num_heads // num_kv
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    width = triton.next_power_of_2(max(16, head_dim))
    common = {
        "GROUP": group, "num_kv": num_kv, "head_dim": head_dim, "BLOCK_TOKENS": BLOCK_TOKENS, "D": width,
        "HAS_SINKS": sinks is not None, "UPCAST": plan.upcast, "ITEM": ITEM,
    }  # fmt: skip
    scale = head_dim**-0.5 * LOG2E
    window = plan.sliding_window or 0

    def launch(tiles: Tiles, programs: int, items: Tensor, starts: Tensor, partial: Tensor, lse: Tensor) -> None:
        num_warps, num_stages = warps_and_stages(tiles, layer_cache.dtype is not query.dtype)
        paged_attention_kernel[(num_kv, programs)](
            query, layer_cache, plan.block_tables, items, starts, sinks, output, partial, lse, query.stride(0),
            plan.block_tables.stride(0), scale, window, IS_SPLIT=tiles.per_processor > 0, BLOCK_M=tiles.rows,
            BLOCK_N=tiles.keys, num_warps=num_warps, num_stages=num_stages, **common,
        )  # fmt: skip

    if plan.split is not None:
        split, rows = plan.split, plan.split.tiles.rows
        parts = split.num_parts, num_kv, rows
        partial = torch.empty(*parts, width, dtype=torch.float32, device=query.device)
        lse = torch.empty(parts, dtype=torch.float32, device=query.device)
        launch(split.tiles, split.num_programs, split.items, split.item_starts, partial, lse)
        if split.num_parts:
            merge_kernel[(num_kv, split.num_sequences)](
                split.items, split.part_starts, partial, lse, sinks, output, GROUP=group, num_kv=num_kv,
                head_dim=head_dim, BLOCK_M=rows, D=width, HAS_SINKS=sinks is not None, ITEM=ITEM, num_warps=4,
            )  # fmt: skip
    if plan.chunks is not None:
        chunks = plan.chunks  # nothing of theirs is in parts
        launch(chunks.tiles, chunks.num_items, chunks.items, chunks.items, output, output)
    return output
