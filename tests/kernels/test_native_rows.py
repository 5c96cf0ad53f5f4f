"""What lies between products on a CPU, in calls of its own, against plain torch."""

from __future__ import annotations

import pytest
import torch

from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.cpu import CpuKernels
from msi.kernels.native.rows import DecodePlan, native_rows
from msi.kernels.norm import HeadNorm, Norm, rms_norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.plain import PlainKernels
from msi.kernels.rope import rope_frequencies

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
