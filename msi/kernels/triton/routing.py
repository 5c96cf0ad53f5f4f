"""The router's choice, and its rows on their way to the expert nodes: route, count, pack.

No value goes to the host but the counts, which are written into memory that it sees. Among equal logits the lowest id
is chosen, and a NaN before anything else, so that it shows in the row's weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels import SigmoidRouting, fp8
from msi.kernels.triton.fp8 import store_packed

LOWEST = tl.constexpr(-3.0e38)  # of what may still be chosen; what has been is -inf


@triton.jit
def _choosable(x, is_expert):
    """Values to choose by: NaN first, -inf last, what is no expert never."""
    x = tl.where(x == x, tl.maximum(x, LOWEST), float("inf"))
    return tl.where(is_expert, x, float("-inf"))


@triton.jit(do_not_specialize=["num_tokens"])  # or it would be compiled anew for other numbers
def route_softmax_kernel(
    logits, topk_weights, topk_ids, num_tokens, row_stride,
    num_experts: tl.constexpr, k: tl.constexpr, renormalise: tl.constexpr,
    EXPERTS: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The k largest of the softmax of logits [num_tokens, num_experts]. Grid: blocks of tokens."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    alive = t < num_tokens
    e = tl.arange(0, EXPERTS)[None, :]
    j = tl.arange(0, K)[None, :]
    inside = alive[:, None] & (e < num_experts)
    x = tl.load(logits + t[:, None] * row_stride + e, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(alive[:, None], x, 0.0)
    top = tl.max(x, 1)
    total = tl.sum(tl.exp(x - top[:, None]), 1)
    left = _choosable(x, e < num_experts)
    chosen = tl.zeros([BLOCK_T], tl.float32)
    weights = tl.zeros([BLOCK_T, K], tl.float32)
    ids = tl.zeros([BLOCK_T, K], tl.int32)
    for choice in tl.static_range(k):
        best = tl.argmax(left, 1)
        value = tl.exp(tl.max(left, 1) - top)
        chosen += value
        weights = tl.where(j == choice, value[:, None], weights)
        ids = tl.where(j == choice, best[:, None], ids)
        left = tl.where(e == best[:, None], float("-inf"), left)
    if renormalise:
        total = chosen
    at = t[:, None] * k + j
    tl.store(topk_weights + at, weights / total[:, None], mask=alive[:, None] & (j < k))
    tl.store(topk_ids + at, ids.to(tl.int64), mask=alive[:, None] & (j < k))


@triton.jit(do_not_specialize=["num_tokens"])
def route_sigmoid_kernel(
    logits, bias, topk_weights, topk_ids, num_tokens, row_stride, scale,
    num_experts: tl.constexpr, k: tl.constexpr, renormalise: tl.constexpr,
    num_groups: tl.constexpr, num_chosen_groups: tl.constexpr,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """As `msi.kernels.routing.topk_sigmoid` says. Grid: blocks of tokens."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    alive = t < num_tokens
    e = tl.arange(0, EXPERTS)[None, :]
    j = tl.arange(0, K)[None, :]
    inside = alive[:, None] & (e < num_experts)
    x = tl.load(logits + t[:, None] * row_stride + e, mask=inside, other=0.0).to(tl.float32)
    scores = 1.0 / (1.0 + tl.exp(-x))
    left = _choosable(scores + tl.load(bias + e, mask=e < num_experts, other=0.0), e < num_experts)
    if num_chosen_groups < num_groups:
        size: tl.constexpr = num_experts // num_groups
        group_of = e // size
        g = tl.arange(0, GROUPS)[None, :]
        of_group = tl.full([BLOCK_T, GROUPS], float("-inf"), tl.float32)
        for group in tl.static_range(num_groups):
            its = tl.where(group_of == group, left, float("-inf"))
            first = tl.argmax(its, 1)
            two = tl.max(its, 1) + tl.max(tl.where(e == first[:, None], float("-inf"), its), 1)
            of_group = tl.where(g == group, tl.maximum(two, LOWEST)[:, None], of_group)
        is_in = tl.zeros([BLOCK_T, EXPERTS], tl.int32)
        for _ in tl.static_range(num_chosen_groups):
            group = tl.argmax(of_group, 1)[:, None]
            is_in = tl.where(group_of == group, 1, is_in)
            of_group = tl.where(g == group, float("-inf"), of_group)
        left = tl.where(is_in == 1, left, float("-inf"))
    total = tl.zeros([BLOCK_T], tl.float32)
    weights = tl.zeros([BLOCK_T, K], tl.float32)
    ids = tl.zeros([BLOCK_T, K], tl.int32)
    for choice in tl.static_range(k):
        best = tl.argmax(left, 1)
        is_best = e == best[:, None]
        value = tl.sum(tl.where(is_best, scores, 0.0), 1)
        total += value
        weights = tl.where(j == choice, value[:, None], weights)
        ids = tl.where(j == choice, best[:, None], ids)
        left = tl.where(is_best, float("-inf"), left)
    if renormalise:
        weights = weights / (total[:, None] + 1e-20)
    at = t[:, None] * k + j
    tl.store(topk_weights + at, weights * scale, mask=alive[:, None] & (j < k))
    tl.store(topk_ids + at, ids.to(tl.int64), mask=alive[:, None] & (j < k))


@triton.jit(do_not_specialize=["num_tokens"])
def count_kernel(
    topk_ids, local_ids, positions, counts, num_tokens, num_ids,
    k: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """positions [num_nodes, num_tokens]: each token's row among the node's, -1 for none; how many go. Grid: nodes.

    `counts` may be the host's: it reads it once it has seen the stream's signal.
    """
    node = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, K)[None, :]
    count = node.to(tl.int32) * 0
    for start in range(0, num_tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < num_tokens)[:, None] & (j < k)
        ids = tl.load(topk_ids + t[:, None].to(tl.int64) * k + j, mask=inside, other=0)
        local = tl.load(local_ids + node * num_ids + ids, mask=inside, other=-1)
        goes = (tl.max(local, 1) >= 0).to(tl.int32)
        row = count + tl.cumsum(goes, 0) - goes
        tl.store(positions + node * num_tokens + t, tl.where(goes == 1, row, -1), mask=t < num_tokens)
        count += tl.sum(goes, 0)
    tl.store(counts + node, count)


@triton.jit(do_not_specialize=["num_tokens"])
def pack_kernel(
    normed, topk_weights, topk_ids, local_ids, positions, outboxes, num_tokens, num_ids, out_row_stride,
    hidden: tl.constexpr, num_nodes: tl.constexpr, NODES: tl.constexpr, k: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, META_AT: tl.constexpr, SCALES_AT: tl.constexpr,
):  # fmt: skip
    """Rows go straight to where they leave from, `hidden | weights | local ids`.

    META_AT: bytes before the weights. SCALES_AT: hidden rows leave in e4m3, with scales behind so many bytes; else 0.

    Grid: (tokens, groups of NODES nodes, blocks of columns); the first block writes weights and ids. `outboxes` int64
    [num_nodes]: addresses, on lines of 16 bytes.
    """
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(2)
    c = column * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(normed + t * hidden + c, mask=c < hidden, other=0.0)
    if SCALES_AT > 0:
        x = x.to(tl.float32)
    j = tl.arange(0, K)
    for node in range(tl.program_id(1) * NODES, min(num_nodes, tl.program_id(1) * NODES + NODES)):
        row = tl.load(positions + node * num_tokens + t)
        if row >= 0:
            to = tl.load(outboxes + node) + row.to(tl.int64) * out_row_stride
            if SCALES_AT > 0:
                store_packed(to, x, column * BLOCK, hidden, SCALES_AT, BLOCK)
            else:
                out = tl.multiple_of(to.to(tl.pointer_type(normed.dtype.element_ty)), 16)  # else stores of 2 bytes
                tl.store(out + c, x, mask=c < hidden)
            if column == 0:
                meta = to + META_AT
                ids = tl.load(topk_ids + t * k + j, mask=j < k, other=0)
                local = tl.load(local_ids + node * num_ids + ids, mask=j < k, other=-1)
                weights = tl.load(topk_weights + t * k + j, mask=j < k, other=0.0)
                tl.store(meta.to(tl.pointer_type(tl.float32)) + j, weights, mask=j < k)
                tl.store((meta + 4 * k).to(tl.pointer_type(tl.int32)) + j, local, mask=j < k)


def topk_softmax(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """As `msi.kernels.routing.topk_softmax`."""
    num_tokens, num_experts = logits.shape
    weights, ids, grid, sizes = _chosen(logits, k)
    if num_tokens:
        route_softmax_kernel[grid](
            logits, weights, ids, num_tokens, logits.stride(0), num_experts=num_experts, k=k, renormalise=renormalise,
            num_warps=1, **sizes,
        )  # fmt: skip
    return weights, ids


def topk_sigmoid(
    logits: Tensor, bias: Tensor, k: int, renormalise: bool, routing: SigmoidRouting
) -> tuple[Tensor, Tensor]:
    """As `msi.kernels.routing.topk_sigmoid`."""
    num_tokens, num_experts = logits.shape
    weights, ids, grid, sizes = _chosen(logits, k)
    if num_tokens:
        route_sigmoid_kernel[grid](
            logits, bias, weights, ids, num_tokens, logits.stride(0), float(routing.scale), num_experts=num_experts,
            k=k, renormalise=renormalise, num_groups=routing.num_groups, num_chosen_groups=routing.num_chosen_groups,
            GROUPS=triton.next_power_of_2(routing.num_groups), num_warps=1, **sizes,
        )  # fmt: skip
    return weights, ids


def _chosen(logits: Tensor, k: int) -> tuple[Tensor, Tensor, tuple[int], dict[str, int]]:
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_tokens, k, dtype=torch.int64, device=logits.device)
    experts = triton.next_power_of_2(num_experts)
    block = max(1, 128 // experts)
    sizes = {"EXPERTS": experts, "K": triton.next_power_of_2(k), "BLOCK_T": block}
    return weights, ids, (triton.cdiv(num_tokens, block),), sizes


def count(topk_ids: Tensor, local_ids: Tensor, counts: Tensor) -> Tensor:
    """int32 [num_nodes, num_tokens], the row of each token in each node's outbox, -1 for none; fills counts."""
    num_tokens, k = topk_ids.shape
    num_nodes, num_ids = local_ids.shape
    positions = torch.empty(num_nodes, num_tokens, dtype=torch.int32, device=topk_ids.device)
    wide = triton.next_power_of_2(k)
    block = 1024 // min(wide, 16)  # whatever the tokens are: or it would be compiled for each
    count_kernel[(num_nodes,)](
        topk_ids, local_ids, positions, counts, num_tokens, num_ids, k=k, K=wide, BLOCK_T=block, num_warps=4
    )
    return positions


def pack(
    normed: Tensor, topk_weights: Tensor, topk_ids: Tensor, local_ids: Tensor, positions: Tensor, outboxes: Tensor,
    row_bytes: int, is_packed: bool,
) -> None:  # fmt: skip
    """
    Args:
        outboxes: int64 [num_nodes], where each one's rows begin.
        row_bytes: from one to the next.
        is_packed: hidden rows leave in eight bits.
    """
    num_tokens, hidden = normed.shape
    num_nodes, num_ids = local_ids.shape
    if not num_tokens:
        return
    k = topk_ids.shape[1]
    block = min(2048, triton.next_power_of_2(max(fp8.GROUP, hidden)))
    nodes = min(4, num_nodes)
    pack_kernel[(num_tokens, triton.cdiv(num_nodes, nodes), triton.cdiv(hidden, block))](
        normed, topk_weights, topk_ids, local_ids, positions, outboxes, num_tokens, num_ids, row_bytes,
        hidden=hidden, num_nodes=num_nodes, NODES=nodes, k=k, K=triton.next_power_of_2(k), BLOCK=block,
        META_AT=fp8.packed_bytes(hidden) if is_packed else hidden * normed.itemsize,
        SCALES_AT=fp8.scales_at(hidden) if is_packed else 0, num_warps=4,
    )  # fmt: skip
