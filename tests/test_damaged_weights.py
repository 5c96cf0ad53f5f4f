"""Weights that hold NaN or infinities: requests that meet them end with an error that says so, and no others."""

from __future__ import annotations

import asyncio
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from msi import Engine, RequestFailed, SamplingParams
from tests.everyday import mostly_slow
from tests.reference import load_reference, references, save_tiny
from tests.test_tokens import tokens_of

DAMAGED = 77
NUM_TOKENS = 6
LAYOUTS = {
    "colocated": {"colocated": True},
    "disaggregated": {"transport": "inproc", "expert_workers": 2, "micro_batches": 2},
}


def damage(path, name, index, value):
    tensors = load_file(path / "model.safetensors")
    tensors[name][index] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", params=mostly_slow([math.nan, math.inf]), ids=str)
def checkpoint(request, tmp_path_factory):
    """One whose embedding of one token is damaged, prompts without it, and their continuations."""
    path = tmp_path_factory.mktemp("damaged")
    save_tiny(path)
    damage(path, "model.embed_tokens.weight", (DAMAGED, 3), request.param)
    expected = references(load_reference(path), [3, 17, 40, 64], NUM_TOKENS)
    assert not any(DAMAGED in (*one.prompt, *one.tokens) for one in expected)
    return path, expected


async def failure_of(engine, prompt, **params):
    with pytest.raises(RequestFailed, match="not finite") as caught:
        await tokens_of(engine, prompt, **params)
    return str(caught.value)


def schedulers(engine):
    return [one.life.attention.requests.scheduler for one in engine._instance.workers if one.life.attention is not None]


@pytest.mark.parametrize("temperature", mostly_slow([0, 0.8]))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
async def test_a_damaged_embedding_ends_the_requests_that_have_its_token_and_no_others(checkpoint, layout, temperature):
    path, expected = checkpoint
    options = {**LAYOUTS[layout], "num_gpu_blocks_override": 40, "slot_rows": 48, "threads_per_worker": 1}
    async with Engine.local(model=path, **options) as engine:
        for _ in range(2):
            bad = [(*one.prompt[:at], DAMAGED, *one.prompt[at:]) for one in expected for at in (0, len(one.prompt))]
            good = asyncio.gather(*(tokens_of(engine, one.prompt, 0.02, max_tokens=NUM_TOKENS) for one in expected))
            said = await asyncio.gather(*(failure_of(engine, prompt, temperature=temperature) for prompt in bad))
            assert await good == [one.tokens for one in expected]
            assert all(f"the weights of token {DAMAGED} are damaged" in sentence for sentence in said)
            assert all("attention-0" in sentence for sentence in said)
        if layout == "disaggregated":
            (scheduler,) = schedulers(engine)
            scheduler.check_integrity()
            before = scheduler.counters["prefix_hit_tokens"]
            await failure_of(engine, (DAMAGED, *expected[-1].prompt))
            assert scheduler.counters["prefix_hit_tokens"] == before, "its blocks are in the cache"


async def test_a_damaged_expert_ends_the_requests_that_are_sent_to_it(tmp_path):
    save_tiny(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    damage(tmp_path, name, (5, 5), math.nan)
    with torch.inference_mode():
        model, prompts = load_reference(tmp_path), [(3 + n, 4, 5) for n in range(24)]
        is_met = [not model(torch.tensor([prompt])).logits.isfinite().all() for prompt in prompts]
    assert 0 < sum(is_met) < len(prompts)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    async with Engine.local(model=tmp_path, transport="inproc", expert_workers=2, threads_per_worker=1) as engine:

        async def first_token(prompt):
            return [output.token_ids async for output in engine.generate(prompt, params)]

        ends = await asyncio.gather(*(first_token(prompt) for prompt in prompts), return_exceptions=True)
        for end, met in zip(ends, is_met, strict=True):
            assert isinstance(end, RequestFailed) == met, end
            assert not met or "not finite" in str(end)


@pytest.mark.parametrize(("family", "value"), [("mixtral", math.nan), ("dbrx", math.inf)])
async def test_what_lies_in_blocks_of_others_before_changes_no_token(tmp_path, family, value):
    expected = references(save_tiny(tmp_path, family=family), [1, 15, 16, 17, 33], 5)
    options = {"transport": "inproc", "threads_per_worker": 1, "slot_rows": 24, "num_gpu_blocks_override": 40}
    async with Engine.local(model=tmp_path, **options) as engine:
        (attention,) = [one.life.attention for one in engine._instance.workers if one.life.attention is not None]
        attention.half.kv_cache.fill(value)
        results = await asyncio.gather(*(tokens_of(engine, one.prompt, max_tokens=5) for one in expected))
        assert results == [one.tokens for one in expected]
