"""Attention by flashinfer, as a module of the same signatures computes it from the page tables that it is given."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys

import pytest
import torch

from msi import ConfigError
from msi.attention import graphs
from msi.attention.pass_inputs import PassInputs
from msi.device.choice import gpu_kernels
from msi.kernels import BLOCK_TOKENS, flashinfer, flashinfer_draw, fp8
from msi.kernels.choosing import choose
from msi.kernels.flashinfer import FlashinferKernels, FlashinferPlan, Trial
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.plain import PlainKernels
from msi.kernels.triton.kernels import TritonKernels
from msi.types import MicroBatch
from tests import fake_flashinfer
from tests.reference import save_tiny
from tests.test_models import PlainDevice, logits_of

CPU = torch.device("cpu")
SMALL = Trial(num_seqs=3, context_len=40, query_len=20, num_prompts=2)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)


def batch(*sequences):
    """Of (queries, context): a pass whose blocks lie in no order."""
    width = max(-(-context // BLOCK_TOKENS) for _, context in sequences)
    blocks = iter((torch.randperm(len(sequences) * width, generator=torch.Generator().manual_seed(1)) + 1).tolist())
    tables = tuple(tuple(next(blocks) for _ in range(-(-context // BLOCK_TOKENS))) for _, context in sequences)
    queries, contexts = zip(*sequences, strict=True)
    positions = tuple(at for count, context in sequences for at in range(context - count, context))
    return MicroBatch((3,) * sum(queries), positions, queries, contexts, tables), 1 + len(sequences) * width


def attended(kernels, shape, sequences, dtype=torch.bfloat16, cache_dtype=None, **more):
    """What all heads of a pass get, of keys and values where the last of a sequence are its queries' own."""
    micro_batch, num_blocks = batch(*sequences)
    on_device, host = PassInputs(lambda block: block).lay_out(micro_batch)
    generator = torch.Generator().manual_seed(0)
    total = shape.num_heads + 2 * shape.num_kv_heads
    heads = torch.randn(micro_batch.num_tokens, total, shape.head_dim, generator=generator).to(dtype)
    cache = torch.randn(num_blocks, 2, BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim, generator=generator).to(dtype)
    cache = fp8.to_e4m3(cache) if cache_dtype is fp8.E4M3 else cache
    plan = kernels.plan_attention(on_device, host, shape, dtype)
    table = kernels.rope_table(on_device.positions, torch.ones(shape.head_dim // 2) / 7, dtype, 1.0)
    kernels.rope_and_write(heads, shape.num_heads, table, cache, plan)
    return plan, kernels.paged_attention(heads[:, : shape.num_heads], cache, plan, **more).float()


SHAPES = [AttentionShape(4, 2, 64), AttentionShape(6, 1, 64, sliding_window=19), AttentionShape(2, 2, 128)]
PASSES = {
    "decoding": [(1, 1), (1, 16), (1, 17), (1, 45)],
    "prompts": [(33, 33), (5, 21)],
    "both": [(1, 40), (20, 36), (1, 16)],
}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("sequences", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cache", [None, fp8.E4M3], ids=["cache", "cache in eight bits"])
def test_it_gives_what_plain_torch_gives(shape, sequences, cache):
    kernels = FlashinferKernels(CPU, trial=SMALL)
    plan, found = attended(kernels, shape, sequences, cache_dtype=cache)
    assert isinstance(plan, FlashinferPlan)
    assert plan.own is None, "Triton's plan is not made"
    _, expected = attended(PlainKernels(CPU), shape, sequences, cache_dtype=cache)
    assert (found - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.usefixtures("library")
def test_a_whole_model_says_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(flashinfer, "HEAD_DIMS", (8, 16))
    save_tiny(tmp_path)
    kernels = FlashinferKernels(CPU, trial=SMALL)
    found = logits_of(tmp_path, range(3, 20), torch.float16, PlainDevice(kernels))
    assert kernels._wrappers
    expected = logits_of(tmp_path, range(3, 20), torch.float32)
    assert (found - expected).norm() <= 5e-2 * expected.norm(), "as far as float16 is by itself"


@pytest.mark.usefixtures("library")
def test_where_it_has_no_kernels_tritons_attend():
    kernels = FlashinferKernels(CPU, trial=SMALL)
    for shape, dtype, more in (
        (AttentionShape(4, 2, 64), torch.float32, {}),
        (AttentionShape(4, 2, 80), torch.float16, {}),
        (AttentionShape(4, 2, 64), torch.float16, {"sinks": torch.randn(4)}),
    ):
        plan, found = attended(kernels, shape, PASSES["decoding"], dtype, **more)
        assert not isinstance(plan, FlashinferPlan) or plan.own is not None
        _, expected = attended(PlainKernels(CPU), shape, PASSES["decoding"], dtype, **more)
        assert (found - expected).norm() <= 2e-3 * expected.norm()
    assert not kernels._wrappers


def fixed(kernels, shape, *contexts, width=4, dtype=torch.bfloat16):
    """A plan of single tokens, as graphs are captured of, and what it gives of some cache."""
    micro_batch, _ = batch(*((1, length) for length in contexts))
    on_device, host = PassInputs(lambda block: block).lay_out(micro_batch, width)
    return kernels.plan_attention(on_device, host, shape, dtype, is_fixed=True)


def numbers_for(shape, num_seqs, dtype=torch.bfloat16, num_blocks=64):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(num_seqs, shape.num_heads, shape.head_dim, generator=generator).to(dtype)
    size = (num_blocks, 2, BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim)
    return query, torch.randn(size, generator=generator).to(dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_was_launched_for_one_pass_attends_to_the_next_ones_once_they_are_planned(shape):
    """As a graph does: it launches nothing anew, so all that differs has to lie in memory that stays."""
    kernels = FlashinferKernels(CPU, trial=SMALL)
    attended(kernels, shape, PASSES["both"])  # a pass piece by piece, which says what the cache is in
    query, cache = numbers_for(shape, 4)
    first = fixed(kernels, shape, 1, 1, 1, 1)
    for contexts in ((1, 16, 17, 45), (64, 1, 1, 1), (33, 34, 2, 60)):
        plan = fixed(kernels, shape, *contexts)
        assert isinstance(plan, flashinfer.FixedPlan)
        assert plan.wrapper is first.wrapper
        assert plan.launched == first.launched
        found = kernels.paged_attention(query, cache, first)
        expected = PlainKernels(CPU).paged_attention(query, cache, fixed(PlainKernels(CPU), shape, *contexts))
        assert (found.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()
    assert fixed(kernels, shape, 1, 1).wrapper is not first.wrapper, "another size of pass"
    assert fixed(kernels, shape, 1, 1, 1, 1, width=8).wrapper is not first.wrapper


@pytest.mark.usefixtures("library")
def test_lanes_plan_in_wrappers_of_their_own(monkeypatch):
    kernels, shape, lane = FlashinferKernels(CPU, trial=SMALL), SHAPES[0], [0]
    monkeypatch.setattr(kernels, "lane", lambda: lane[0])
    attended(kernels, shape, PASSES["both"])
    query, cache = numbers_for(shape, 2)
    plans, found = [], []
    for lane[0], contexts in enumerate(((3, 40), (50, 7))):
        plans.append(fixed(kernels, shape, *contexts))
    for plan, contexts in zip(plans, ((3, 40), (50, 7)), strict=True):
        found.append(kernels.paged_attention(query, cache, plan).float())
        expected = PlainKernels(CPU).paged_attention(query, cache, fixed(PlainKernels(CPU), shape, *contexts)).float()
        assert (found[-1] - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.usefixtures("library")
def test_graphs_have_tritons_attention_where_the_library_has_none_or_nothing_is_known():
    shape, dtype = AttentionShape(4, 2, 64), torch.bfloat16
    of_triton = type(fixed(TritonKernels(CPU), shape, 3, 5))
    kernels = FlashinferKernels(CPU, trial=SMALL)
    assert type(fixed(kernels, shape, 3, 5)) is of_triton, "no pass was launched piece by piece"
    attended(kernels, shape, PASSES["decoding"])
    assert type(fixed(kernels, shape, 3, 5)) is flashinfer.FixedPlan
    attended(kernels, shape, PASSES["decoding"], dtype, sinks=torch.randn(4))
    assert type(fixed(kernels, shape, 3, 5)) is of_triton, "attention sinks"
    slower = FlashinferKernels(CPU, True, SMALL, lambda work: 1.0)
    attended(slower, shape, PASSES["decoding"])
    assert type(fixed(slower, shape, 3, 5)) is of_triton, "it is not faster"


def test_a_pass_that_is_planned_otherwise_than_its_graphs_know_is_not_copied_into_theirs():
    slots = torch.zeros(2, dtype=torch.int32)
    wrapper = object()
    kept = flashinfer.FixedPlan(slots, wrapper, (2, 4))
    assert len(list(graphs._pairs(kept, flashinfer.FixedPlan(slots + 1, wrapper, (2, 4)), "plans"))) == 1
    for other in (
        flashinfer.FixedPlan(slots, object(), (2, 4)),
        flashinfer.FixedPlan(slots, wrapper, (2, 5)),
        flashinfer.FixedPlan(slots, wrapper, (2, 4, 1)),
        fixed(TritonKernels(CPU), SHAPES[0], 3, 5),
    ):
        with pytest.raises(ValueError, match=r"plans|argument"):
            list(graphs._pairs(kept, other, "plans"))


@pytest.mark.usefixtures("library")
def test_a_pass_is_planned_once_for_all_layers_and_a_lanes_memory_is_taken_once():
    kernels, shape = FlashinferKernels(CPU, trial=SMALL), AttentionShape(4, 2, 64)
    attended(kernels, shape, PASSES["decoding"])
    (decoding,) = kernels._wrappers.values()
    plan, _ = attended(kernels, shape, PASSES["decoding"])
    query = torch.randn(4, 4, 64).to(torch.bfloat16)
    for _ in range(3):
        kernels.paged_attention(query, torch.zeros(40, 2, BLOCK_TOKENS, 2, 64, dtype=torch.bfloat16), plan)
    assert decoding.num_plans == 2
    assert list(kernels._wrappers.values()) == [decoding]
    attended(kernels, shape, PASSES["prompts"])
    assert [one.num_plans for one in kernels._wrappers.values()] == [2, 1]


@pytest.mark.usefixtures("library")
def test_what_lanes_will_keep_is_known_once_a_pass_has_run_and_nothing_is_counted_twice(monkeypatch):
    kernels, shape, lane = FlashinferKernels(CPU, trial=SMALL), SHAPES[0], ["start"]
    monkeypatch.setattr(kernels, "lane", lambda: lane[0])
    workspace, wrapper, plans = 128 << 20, 8 << 20, 1 << 20
    assert kernels.kept_bytes(3) == 0, "nobody knows yet whether it attends"
    attended(kernels, shape, PASSES["both"])
    assert kernels.kept_bytes(3) == 3 * (workspace + 2 * wrapper + plans), "of prompts, and of passes that decode"
    attended(kernels, SHAPES[1], PASSES["both"])
    assert kernels.kept_bytes(3) == 3 * (workspace + 4 * wrapper + 2 * plans), "another window has wrappers of its own"
    lane[0] = "lane 0"
    attended(kernels, shape, PASSES["decoding"])
    fixed(kernels, shape, 1, 1)
    lane[0] = "start"
    assert kernels.kept_bytes(3) == 2 * workspace + (3 * 4 - 1) * wrapper + (3 * 2 - 1) * plans
    assert kernels.kept_bytes(1) == 3 * wrapper + plans
    slower = FlashinferKernels(CPU, True, SMALL, lambda work: 1.0)
    attended(slower, shape, PASSES["both"])
    assert slower.kept_bytes(3) == 0, "Triton attends"
    with_sinks = FlashinferKernels(CPU, trial=SMALL)
    attended(with_sinks, shape, PASSES["both"], sinks=torch.randn(4))
    assert with_sinks.kept_bytes(3) == 0


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("first", "second"), [(1.0, 2.0), (2.0, 1.0)])
def test_measured_the_faster_attends(first, second):
    """Triton is timed before flashinfer, for passes that decode before others."""
    times = iter((first, second, first, second))
    kernels = FlashinferKernels(CPU, True, SMALL, lambda work: next(times))
    plan, _ = attended(kernels, AttentionShape(4, 2, 64), PASSES["prompts"])
    assert (plan.own is None) == (second < first)
    plan, _ = attended(kernels, AttentionShape(4, 2, 64), PASSES["decoding"])  # nothing is timed any more
    assert (plan.own is None) == (second < first)


@pytest.mark.usefixtures("library")
def test_measured_what_gives_something_else_never_attends(monkeypatch, caplog):
    monkeypatch.setattr(fake_flashinfer, "attend", lambda query, *_: query.float())
    kernels = FlashinferKernels(CPU, True, SMALL, lambda work: 1.0)
    plan, found = attended(kernels, AttentionShape(4, 2, 64), PASSES["decoding"])
    assert plan.own is not None
    _, expected = attended(PlainKernels(CPU), AttentionShape(4, 2, 64), PASSES["decoding"])
    assert (found - expected).norm() <= 2e-2 * expected.norm()
    assert "flashinfer is left out, as it is" in caplog.text


def test_ways_that_fail_are_left_out_and_the_log_says_what_was_chosen(caplog):
    caplog.set_level(logging.INFO)
    one = torch.ones(3)

    def fails():
        raise RuntimeError("no such kernel")

    spent = {"ours": 3e-6, "theirs": 2e-6, "nan": 0.0, "fails": 0.0}
    ways = {"ours": lambda: one, "theirs": lambda: one * 1.001, "nan": lambda: one * float("nan"), "fails": fails}
    by_work = {id(way): spent[name] for name, way in ways.items()}
    assert choose("it", ways, lambda work: by_work[id(work)], 1e-2) == "theirs"
    assert "it: nan is left out, as it is nan from ours" in caplog.text
    assert "it: fails is left out: RuntimeError: no such kernel" in caplog.text
    assert "it by theirs: ours 3.0 us, theirs 2.0 us" in caplog.text
    assert choose("it", {"ours": ways["ours"]}, lambda work: 1.0, 1e-2) == "ours"


@pytest.mark.usefixtures("library")
def test_who_asks_gets_it_and_who_asks_for_all_gets_it_measured(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flashinfer" or found(name))
    assert type(gpu_kernels("flashinfer")(CPU)) is FlashinferKernels
    assert not gpu_kernels("flashinfer")(CPU)._is_measured
    assert gpu_kernels("auto")(CPU)._is_measured
    assert type(gpu_kernels("auto", has_gates=True)(CPU)) is TritonKernels
    assert type(gpu_kernels("triton")(CPU)) is TritonKernels
    with pytest.raises(ConfigError, match=r"`cuda_kernels` flashinfer cannot work: with `cuda_queues` gates .*=triton"):
        gpu_kernels("flashinfer", has_gates=True)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is not None, reason="it is installed")
def test_where_it_is_missing_one_sentence_says_so_and_nobody_needs_it(caplog):
    with pytest.raises(ConfigError, match=r"flashinfer is not installed; `pip install flashinfer-python` brings it; "):
        gpu_kernels("flashinfer")
    caplog.set_level(logging.INFO)
    assert gpu_kernels("auto") is TritonKernels
    assert "attention is by Triton's kernels alone: flashinfer is not installed; " in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="it is not installed")
@pytest.mark.parametrize("name", ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"])
def test_the_module_that_stands_for_it_has_its_signatures(name):
    library = importlib.import_module("flashinfer")
    for method in ("__init__", "run"):
        theirs = inspect.signature(getattr(getattr(library, name), method)).parameters
        ours = inspect.signature(getattr(getattr(fake_flashinfer, name), method)).parameters
        assert {one: (ours[one].kind, ours[one].default) for one in ours} == {
            one: (theirs[one].kind, theirs[one].default) for one in ours
        }


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="it is not installed")
def test_its_lists_are_asked_for_as_it_has_them():
    library = importlib.import_module("flashinfer")
    theirs, ours = (inspect.signature(one.top_k).parameters for one in (library, fake_flashinfer))
    assert {name: one.default for name, one in ours.items()} == {name: one.default for name, one in theirs.items()}
    assert library.TopKTieBreak.SMALL == flashinfer_draw.TO_THE_LOWER_ID
    assert callable(library.topk.can_implement_filtered_topk)
