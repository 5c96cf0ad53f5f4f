"""What lies between products on a CPU, in calls of its own, against plain torch."""

from __future__ import annotations

import pytest
import torch

from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.cpu import CpuKernels
from msi.kernels.kernels import Outboxes
from msi.kernels.native.rows import DecodePlan, native_rows, scatter
from msi.kernels.norm import HeadNorm, Norm, rms_norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.plain import PlainKernels, scatter_answers
from msi.kernels.rope import rope_frequencies
from msi.kernels.routing import PackedRows, row_bytes

pytestmark = pytest.mark.skipif(native_rows() is None, reason="the native products cannot be compiled here")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kernels():
    """The CPU's, as they are once a matrix was packed, and the plain ones."""
    own = CpuKernels()
    own.linear(values(16, 16, dtype=torch.bfloat16))
    return own, PlainKernels(torch.device("cpu"))


def close(found, wanted):
    bound = TOLERANCE[found.dtype] * wanted.float().abs().max().clamp(min=1.0)
    return found.dtype is wanted.dtype and bool((found.float() - wanted.float()).abs().max() <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 40])
def test_norms_are_those_of_plain_torch(num_rows, dtype):
    norm = Norm(rms_norm, values(80, dtype=dtype), 1e-5)
    found, wanted = [], []
    for results, one in zip((found, wanted), kernels(), strict=True):
        hidden = values(num_rows, 80, dtype=dtype, seed=1)
        results.append(one.norm(hidden, norm))
        results.append(one.add_norm(hidden, values(num_rows, 80, dtype=dtype, seed=2), norm))
        results.append(hidden)
    for ours, theirs in zip(found, wanted, strict=True):
        assert close(ours, theirs)
    own, _ = kernels()
    answers = values(2, num_rows, 96, dtype=dtype, seed=3)[..., :80]
    hidden = values(num_rows, 80, dtype=dtype, seed=1)
    expected = rms_norm(hidden + answers[1], norm.weight, norm.eps)
    assert close(own.combine_norm(hidden, answers, [(1, None, num_rows)], norm), expected)


def a_pass(query_lens, context_lens):
    blocks = iter(range(1, 1000))
    tables = [[next(blocks) for _ in range(-(-context // BLOCK_TOKENS))] for context in context_lens]
    width = max(map(len, tables))
    positions = [
        at for query, context in zip(query_lens, context_lens, strict=True) for at in range(context - query, context)
    ]
    sequence_of = [index for index, query in enumerate(query_lens) for _ in range(query)]
    slots = [
        tables[of][at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
        for of, at in zip(sequence_of, positions, strict=True)
    ]
    rows = [
        positions, positions, query_lens, context_lens, [0], slots, sequence_of, [],
        [table + [0] * (width - len(table)) for table in tables],
    ]  # fmt: skip
    return PassTensors(*(torch.tensor(row, dtype=torch.int32) for row in rows))


@pytest.mark.parametrize("is_e4m3", [False, True], ids=["as computed", "in e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["no sinks", "sinks and norms"])
@pytest.mark.parametrize(("query_lens", "context_lens"), [((1, 1, 1), (1, 16, 75)), ((3, 1), (18, 40))])
def test_attention_of_a_layer_is_that_of_plain_torch(query_lens, context_lens, window, dtype, has_sinks, is_e4m3):
    sinks = values(6, seed=7) * 3 if has_sinks else None
    norm = HeadNorm(values(8, 32, dtype=dtype, seed=8), 1e-5) if has_sinks else None
    num_q, num_kv, head_dim = 6, 2, 32
    inputs = a_pass(query_lens, context_lens)
    shape = AttentionShape(num_q, num_kv, head_dim, window)
    num_tokens, found = len(inputs.slot_mapping), []
    for one in kernels():
        cache = values(40, 2, BLOCK_TOKENS, num_kv, head_dim, dtype=dtype, seed=5)
        cache = fp8.to_e4m3(cache) if is_e4m3 else cache
        heads = values(num_tokens, num_q + 2 * num_kv, head_dim, dtype=dtype, seed=6)
        plan = one.plan_attention(inputs, inputs, shape, dtype)
        assert isinstance(plan, DecodePlan) == (isinstance(one, CpuKernels) and max(query_lens) == 1)
        rope = one.rope_table(inputs.positions, rope_frequencies(head_dim, 1e4), dtype, 1.0)
        one.rope_and_write(heads, num_q, rope, cache, plan, norm)
        found.append((heads[:, : num_q + num_kv], cache, one.paged_attention(heads[:, :num_q], cache, plan, sinks)))
    for ours, theirs in zip(*found, strict=True):
        if ours.dtype is fp8.E4M3:  # what was rotated lies near the middle of two numbers here and there
            apart = (ours.float() - theirs.float()).abs() > TOLERANCE[dtype]
            assert apart.sum() <= 0.02 * num_tokens * 2 * num_kv * head_dim
        else:
            assert close(ours, theirs)


def test_every_number_goes_into_a_cache_in_e4m3_and_comes_back_as_plain_torch_has_it():
    own, plain = kernels()
    numbers = torch.cat([
        fp8.EVERY_NUMBER, fp8.EVERY_NUMBER * 1.0625, fp8.EVERY_NUMBER * 0.96875, values(256) * 1e-3, values(256) * 500,
        torch.tensor([449.0, -1e9, torch.inf, -torch.inf, torch.nan, 2**-10, 3 * 2**-10, 0.0, -0.0, *[1.0] * 247]),
    ]).view(48, 1, 32)  # fmt: skip
    heads, inputs = torch.cat([numbers] * 3, dim=1), a_pass((1,) * 48, (1,) * 48)
    found = []
    for one in (own, plain):
        cache = torch.zeros(50, 2, BLOCK_TOKENS, 1, 32, dtype=fp8.E4M3)
        rope = one.rope_table(torch.zeros_like(inputs.positions), rope_frequencies(32, 1e4), torch.float32, 1.0)
        plan = one.plan_attention(inputs, inputs, AttentionShape(1, 1, 32), torch.float32)
        one.rope_and_write(heads.clone(), 1, rope, cache, plan)
        found.append((cache.view(torch.uint8), one.paged_attention(torch.ones(48, 1, 32), cache, plan)))
    assert torch.equal(found[0][0], found[1][0])
    written = found[0][0].view(fp8.E4M3)[1:49, 1, 0].float()
    assert torch.equal(written.nan_to_num(1000.0), fp8.to_e4m3(numbers).float().nan_to_num(1000.0))
    for _, attended in found:
        finite = written.isfinite().all(dim=-1)[:, 0]
        assert torch.equal(attended[finite], written[finite]), "a context of one token is its values"
        assert attended[~finite].isnan().any(dim=-1).all()


def test_what_stands_beside_a_sequence_does_not_change_its_attention():
    own, _ = kernels()
    cache = values(400, 2, BLOCK_TOKENS, 2, 32, seed=5)
    query = values(40, 4, 32, seed=6)
    everything = a_pass((1,) * 40, tuple(range(100, 140)))
    alone = PassTensors(
        *(tensor[-1:] if tensor is not everything.begun_blocks else tensor for tensor in vars_of(everything))
    )
    shape = AttentionShape(4, 2, 32)
    plans = [own.plan_attention(one, one, shape, torch.float32) for one in (everything, alone)]
    together = own.paged_attention(query, cache, plans[0])
    assert torch.equal(own.paged_attention(query[-1:], cache, plans[1])[0], together[-1])


def vars_of(inputs):
    return [getattr(inputs, name) for name in PassTensors.__slots__]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (128, 8), (4, 4)])
def test_experts_are_chosen_as_by_plain_torch(num_experts, k, renormalise, dtype):
    own, plain = kernels()
    logits = values(33, num_experts + 5, dtype=dtype)[:, :num_experts]
    weights, ids = own.topk_softmax(logits, k, renormalise)
    wanted, their_ids = plain.topk_softmax(logits, k, renormalise)
    assert torch.equal(logits.gather(1, ids), logits.gather(1, their_ids))  # equal ones may be another's
    assert ids.sort(dim=1).values.diff(dim=1).min() > 0
    assert close(weights, wanted)


@pytest.mark.parametrize(
    ("logits", "ids", "weights"),
    [
        ([2.0, 1.0, 2.0, 2.0], [0, 2], [0.5, 0.5]),
        ([1.0, -float("inf"), -float("inf")], [0, 1], [1.0, 0.0]),
        ([1.0, float("nan"), 3.0, float("inf")], [1, 3], [float("nan")] * 2),
        ([float("nan")] * 4, [0, 1], [float("nan")] * 2),
    ],
    ids=["equal ones", "impossible ones", "one that is no number", "no numbers"],
)
def test_the_lower_id_comes_first_and_what_is_no_number_stays_none(logits, ids, weights):
    own, _ = kernels()
    chosen = own.topk_softmax(torch.tensor([logits, [1.0] * len(logits)]), 2, True)
    assert chosen[1].tolist() == [ids, [0, 1]]
    assert torch.equal(chosen[0].nan_to_num(7.0), torch.tensor([weights, [0.5, 0.5]]).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_rows_are_packed_as_by_plain_torch(num_nodes, dtype):
    num_rows, width, k, num_experts = 5, 48, 2, 8
    normed, weights = values(num_rows, width, dtype=dtype), values(num_rows, k).abs()
    ids = torch.randint(0, num_experts, (num_rows, k), generator=torch.Generator().manual_seed(0))
    local_ids = torch.full((num_nodes, num_experts), -1, dtype=torch.int32)
    for expert in range(num_experts):
        local_ids[expert % num_nodes, expert] = expert // num_nodes
    found = []
    for one in kernels():
        memory = torch.full((num_nodes, 7, row_bytes(width, k, dtype)), 9, dtype=torch.uint8)
        rows = [PackedRows.view(of_node, width, k, dtype) for of_node in memory]
        outboxes = Outboxes(rows, torch.zeros(num_nodes, dtype=torch.int32))
        one.pack(normed, weights, ids, local_ids, outboxes)
        counts = outboxes.counts.tolist()
        found.append((counts, [of_node[:count].tolist() for of_node, count in zip(memory, counts, strict=True)]))
    assert found[0] == found[1]
    assert num_nodes > 1 or found[0][0] == [num_rows]


def test_rows_that_do_not_fit_are_not_written():
    own, _ = kernels()
    memory = torch.full((3, row_bytes(16, 1, torch.float32)), 9, dtype=torch.uint8)
    outboxes = Outboxes([PackedRows.view(memory[:2], 16, 1, torch.float32)], torch.zeros(1, dtype=torch.int32))
    with pytest.raises(RuntimeError):
        own.pack(values(3, 16), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64),
                 torch.zeros(1, 4, dtype=torch.int32), outboxes)  # fmt: skip
    assert (memory[2] == 9).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_answers_are_rounded_to_where_they_leave(dtype):
    combined = values(6, 32)
    combined[2, 3], combined[4, 5] = float("nan"), float("inf")
    answers = {seat: torch.zeros(2, 4, 48, dtype=dtype)[..., :32] for seat in (3, 5)}
    wanted = {seat: torch.zeros(2, 4, 32, dtype=dtype) for seat in (3, 5)}
    scatter_answers(combined, 1, [(5, 4), (3, 2)], wanted)
    if scatter(native_rows(), combined, 1, [(5, 4), (3, 2)], answers):
        assert all(torch.equal(answers[seat].nan_to_num(), wanted[seat].nan_to_num()) for seat in (3, 5))
    else:
        assert dtype is torch.float16
