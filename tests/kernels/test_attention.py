"""Paged attention, rope and norms of a GPU, on memory that is poison but where something was written."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from msi.attention import graphs
from msi.attention.pass_inputs import PassInputs
from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.norm import HeadNorm, layer_norm, rms_norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.plain import PlainKernels
from msi.kernels.rope import rope_frequencies
from msi.kernels.triton import attention_plan, rows
from msi.kernels.triton.kernels import TritonKernels
from msi.types import MicroBatch
from tests.everyday import mostly_slow
from tests.kernels.device import DEVICE, EXACT, TOLERANCES
from tests.test_kernels import inputs_of

NAN = float("nan")
PLAIN, TRITON = PlainKernels(DEVICE), TritonKernels(DEVICE)


def on_device(inputs):
    """`PassTensors` in the device's memory."""
    return type(inputs)(*(getattr(inputs, name).to(DEVICE) for name in inputs.__slots__))


def blocks_of(context_lens):
    """Block tables of sequences, in an order that says nothing."""
    counts = [-(-length // BLOCK_TOKENS) for length in context_lens]
    order = iter((torch.randperm(sum(counts)) + 1).tolist())
    return [[next(order) for _ in range(count)] for count in counts]


def attend_exactly(query, kv, query_len, window, sinks=None):
    """float64 of query [query_len, heads, d] and kv [2, context, kv heads, d]."""
    context, shared = kv.shape[1], query.shape[1] // kv.shape[2]
    keys, values = kv.double().repeat_interleave(shared, dim=2)
    at = torch.arange(context - query_len, context)[:, None]
    seen = torch.arange(context)[None, :] <= at
    if window is not None:
        seen &= torch.arange(context)[None, :] > at - window
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, query_len, 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :context], values)


def check_attention(
    dtype,
    query_lens,
    context_lens,
    num_heads,
    num_kv,
    head_dim,
    window=None,
    is_fixed=False,
    has_sinks=False,
    cached=None,
):
    torch.manual_seed(0)
    sinks = torch.randn(num_heads) * 3 if has_sinks else None
    tables = blocks_of(context_lens)
    cached = cached or dtype
    cache = torch.full((sum(map(len, tables)) + 1, 2, BLOCK_TOKENS, num_kv, head_dim), NAN).to(cached)
    kept = []
    for table, length in zip(tables, context_lens, strict=True):
        kv = torch.randn(2, length, num_kv, head_dim).to(cached)
        for at in range(length):
            cache[table[at // BLOCK_TOKENS], :, at % BLOCK_TOKENS] = kv[:, at]
        kept.append(kv)
    heads = torch.full((sum(query_lens), num_heads + 2 * num_kv, head_dim), NAN, dtype=dtype)
    heads[:, :num_heads] = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
    host = inputs_of(query_lens, context_lens, tables)
    shape = AttentionShape(num_heads, num_kv, head_dim, window)
    plan = TRITON.plan_attention(on_device(host), host, shape, dtype, is_fixed)
    on_gpu = None if sinks is None else sinks.to(DEVICE)
    result = TRITON.paged_attention(heads.to(DEVICE)[:, :num_heads], cache.to(DEVICE), plan, on_gpu).cpu()
    row = 0
    for query_len, kv in zip(query_lens, kept, strict=True):
        query = heads[row : row + query_len, :num_heads]
        expected = attend_exactly(query, kv, query_len, window, sinks)
        error = (result[row : row + query_len].double() - expected).norm() / expected.norm()
        assert error < TOLERANCES[dtype], (query_len, kv.shape[1], float(error))
        row += query_len


LENGTHS = {
    "one token": ([1], [1]),
    "decoding": ([1] * 6, [1, 16, 17, 300, 777, 64]),
    "one long context": ([1], [1500]),
    "chunks": ([20, 150, 33], [20, 150, 133]),
    "mixed": ([1, 1, 5, 1, 70], [3, 400, 33, 90, 275]),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 7, 100])
def test_attention_equals_float64_over_each_sequence_alone(lengths, window):
    check_attention(torch.float32, *lengths, 6, 2, 16, window)


@pytest.mark.parametrize("kind", mostly_slow(reversed(LENGTHS), keep=3))
@pytest.mark.parametrize("window", mostly_slow([20, None]))
def test_a_sink_takes_its_share_once_however_a_context_is_cut(kind, window):
    lengths = LENGTHS[kind]
    check_attention(torch.float32, *lengths, 6, 2, 16, window, has_sinks=True)
    if max(lengths[0]) == 1:
        check_attention(torch.float32, *lengths, 6, 2, 16, window, is_fixed=True, has_sinks=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sinks_of_the_published_shape_of_heads(dtype):
    check_attention(dtype, [1, 30, 1, 3], [530, 41, 16, 20], 16, 2, 64, window=128, has_sinks=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_attention_to_a_cache_in_eight_bits(window, dtype):
    check_attention(dtype, *LENGTHS["mixed"], 6, 2, 16, window, cached=fp8.E4M3)


@pytest.mark.parametrize("window", [None, 7])
def test_attention_by_a_plan_whose_shapes_follow_from_the_number_of_sequences(window):
    check_attention(torch.float32, [1] * 6, [1, 16, 17, 300, 777, 64], 6, 2, 16, window, is_fixed=True)


def test_plans_of_fixed_shapes_differ_in_values_alone():
    def refilled(context_lens):
        positions, tables = tuple(length - 1 for length in context_lens), tuple(map(tuple, blocks_of([5008] * 3)))
        batch = MicroBatch((5,) * 3, positions, (1,) * 3, tuple(context_lens), tables)
        _, host = PassInputs(lambda tensor: tensor).lay_out(batch, 512)
        plan = TRITON.plan_attention(on_device(host), host, AttentionShape(6, 2, 16), torch.float32, True)
        return [one.shape for one, _ in graphs._pairs(plan, plan, "plan")], plan

    shapes, kept = refilled([1, 1, 1])
    for context_lens in ([900, 4, 70], [16, 17, 5000], [33, 33, 33]):
        other_shapes, other = refilled(context_lens)
        assert other_shapes == shapes
        assert len(list(graphs._pairs(kept, other, "plan"))) == len(shapes)


@pytest.mark.parametrize(
    ("num_heads", "num_kv", "head_dim"),
    mostly_slow(
        [
            (6, 1, 80),
            (4, 4, 96),
            (8, 1, 64),
            (16, 2, 128),
            (5, 5, 8),
            (2, 1, 256),
            (12, 4, 40),
            (32, 1, 16),
            (3, 1, 32),
        ],
        keep=2,
    ),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_of_every_shape_of_heads(num_heads, num_kv, head_dim, dtype):
    check_attention(dtype, [1, 30, 1, 3], [130, 41, 16, 20], num_heads, num_kv, head_dim)
    check_attention(dtype, [1, 9], [130, 41], num_heads, num_kv, head_dim, window=20)


@pytest.mark.parametrize("seed", range(20))
def test_every_query_sees_its_context_once_whatever_the_lengths(seed):
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    query_lens = [1 if integer(0, 3) else integer(1, 90) for _ in range(integer(1, 40))]
    context_lens = [length + integer(0, 900) * integer(0, 2) for length in query_lens]
    shape = AttentionShape(6, 2, 16, [None, 1, 50][seed % 3])
    host = inputs_of(query_lens, context_lens, blocks_of(context_lens))
    split, chunks = attention_plan.split_tiles(shape, 2), attention_plan.chunk_tiles(shape, 2)
    plan = attention_plan.plan_attention(
        host, host, shape, num_processors=1 + seed, upload=torch.from_numpy, split=split, chunks=chunks
    )
    items = []
    if plan.split is not None:
        items += plan.split.items.view(-1, attention_plan.ITEM).tolist()
        starts, parts = plan.split.item_starts.tolist(), plan.split.part_starts.tolist()
        assert starts == sorted(starts)
        assert (starts[0], starts[-1]) == (0, len(items))
        assert len(starts) == plan.split.num_programs + 1
        assert (parts[0], parts[-1]) == (0, len(items))
        for first, last in pairwise(parts):
            assert len({item[0] for item in items[first:last]}) == 1
            rows_of_parts = [item[6] for item in items[first:last]]
            assert rows_of_parts == ([-1] if last - first == 1 else list(range(first, last)))
        loads = [sum(-(-(item[5] - item[4]) // split.keys) for item in items[one:two]) for one, two in pairwise(starts)]
        assert max(loads) <= max(256 // split.keys, -(-sum(loads) // plan.split.num_programs)), "shares are even"
        assert max([item[6] for item in items]) < plan.split.num_parts
    if plan.chunks is not None:
        items += plan.chunks.items.view(-1, attention_plan.ITEM).tolist()
    row = 0
    for sequence, (query_len, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        for at in range(context - query_len, context):
            first = 0 if shape.sliding_window is None else max(0, at + 1 - shape.sliding_window)
            mine = [item for item in items if item[1] <= row < item[1] + item[2]]
            assert all(item[0] == sequence and item[3] + row - item[1] == at for item in mine)
            seen = sorted((max(item[4], first), min(item[5], at + 1)) for item in mine if item[4] <= at)
            assert (seen[0][0], seen[-1][1]) == (first, at + 1)
            assert all(one[1] == two[0] for one, two in pairwise(seen) if two[0] > first)
            row += 1


@pytest.mark.parametrize("cached", [torch.float32, fp8.E4M3], ids=["as computed", "in eight bits"])
@pytest.mark.parametrize("rotated", [16, 8], ids=["all", "half"])
@pytest.mark.parametrize("has_norm", [False, True], ids=["as they are", "normed"])
def test_rope_and_cache_are_the_plain_ones_and_a_slot_of_none_writes_nothing(rotated, has_norm, cached):
    torch.manual_seed(1)
    num_q, num_kv, head_dim = 6, 2, 16
    query_lens, context_lens = [1, 5, 1], [40, 5, 1]
    host = inputs_of(query_lens, context_lens, blocks_of(context_lens))
    inputs = on_device(host)
    shape = AttentionShape(num_q, num_kv, head_dim)
    heads = torch.randn(7, num_q + 2 * num_kv, head_dim, device=DEVICE)
    norm = HeadNorm(torch.randn(num_q + num_kv, head_dim, device=DEVICE), 1e-5) if has_norm else None
    heads[2, 9, 1], heads[4, 9, 3] = 1e4, NAN  # of values, which are not rotated
    results = []
    for kernels in (PLAIN, TRITON):
        ours = heads.clone()
        cache = torch.full((9, 2, BLOCK_TOKENS, num_kv, head_dim), 72.0, device=DEVICE).to(cached)
        frequencies = rope_frequencies(rotated, 1e4).to(DEVICE)
        table = kernels.rope_table(inputs.positions, frequencies, torch.float32, 1.25)
        plan = kernels.plan_attention(inputs, host, shape, torch.float32)
        if kernels is TRITON:
            plan.slots[3] = -1
        kernels.rope_and_write(ours, num_q, table, cache, plan, norm)
        results.append((ours[:, :num_q], cache.float()))
    (plain, plain_cache), (fast, fast_cache) = results
    slot = int(host.block_tables[1, 0])
    plain_cache[slot, :, 2] = 72.0
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast_cache, plain_cache, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert fast_cache.isnan().sum() == 1
    assert fast_cache.nan_to_num().max() == (1e4 if cached is torch.float32 else 448.0)


@pytest.mark.parametrize("rotated", [16, 10], ids=["all", "part"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_normed_and_rotated_heads_are_those_of_float64(dtype, rotated):
    """Keys from the cache; every byte that is nobody's is poison."""
    torch.manual_seed(4)
    num_q, num_kv, head_dim, num_tokens = 5, 1, 16, 9
    host = inputs_of([num_tokens], [num_tokens], [[2]])
    given = torch.randn(num_tokens, num_q + 2 * num_kv, head_dim).to(dtype)
    norm = HeadNorm(torch.randn(num_q + num_kv, head_dim).to(dtype), 1e-5)
    strided = torch.full((num_tokens, 9, head_dim), NAN, dtype=dtype)
    strided[:, :7] = given
    heads, cache = strided.to(DEVICE)[:, :7], torch.full((4, 2, BLOCK_TOKENS, 1, head_dim), NAN, dtype=dtype).to(DEVICE)
    plan = TRITON.plan_attention(on_device(host), host, AttentionShape(num_q, num_kv, head_dim), dtype)
    frequencies = rope_frequencies(rotated, 1e4)
    table = TRITON.rope_table(on_device(host).positions, frequencies.to(DEVICE), dtype, 1.0)
    TRITON.rope_and_write(heads, num_q, table, cache, plan, HeadNorm(norm.weights.to(DEVICE), norm.eps))
    exact = given[:, :6].double()
    exact *= norm.weights.double() / (exact.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    angles = (torch.arange(num_tokens)[:, None] * frequencies)[:, None].double()
    a, b = exact[..., : rotated // 2].clone(), exact[..., rotated // 2 : rotated].clone()
    exact[..., : rotated // 2] = a * angles.cos() - b * angles.sin()
    exact[..., rotated // 2 : rotated] = b * angles.cos() + a * angles.sin()
    found = torch.cat([heads[:, :num_q], cache[2, 0, :num_tokens]], dim=1).cpu().double()
    assert (found - exact).norm() / exact.norm() < TOLERANCES[dtype]
    assert torch.equal(cache[2, 1, :num_tokens, 0].cpu(), given[:, 6]), "values are left alone"
    assert cache[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_norms_are_those_of_float64(norm, num_rows, dtype):
    torch.manual_seed(2)
    hidden = 48
    residual, added = (torch.randn(num_rows, hidden).to(dtype).to(DEVICE) for _ in range(2))
    weight = torch.randn(hidden).to(dtype).to(DEVICE)
    is_layer_norm = norm is layer_norm

    def close(result, exact):
        torch.testing.assert_close(result.double(), exact, rtol=2 * TOLERANCES[dtype], atol=2 * TOLERANCES[dtype])

    strided = torch.cat([residual, residual * NAN], dim=-1)[:, :hidden]
    close(rows.norm(strided, weight, 1e-5, is_layer_norm), norm(residual.double(), weight.double(), 1e-5))
    exact = residual.double() + added.double()
    result = rows.add_norm(residual, added, weight, 1e-5, is_layer_norm)
    close(residual, exact)
    close(result, norm(exact, weight.double(), 1e-5))


def test_silu_and_mul_is_its_definition():
    torch.manual_seed(3)
    for num_rows in (0, 1, 4):
        gate_up = torch.randn(num_rows, 2 * 40, device=DEVICE)
        gate, up = gate_up.double().chunk(2, dim=-1)
        result = rows.silu_and_mul(gate_up)
        torch.testing.assert_close(result.double(), gate * torch.sigmoid(gate) * up, rtol=EXACT, atol=EXACT)
