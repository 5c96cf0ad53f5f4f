"""Tokens of every family equal transformers' on the fake device, in whatever order queues, cards and hosts go on."""

from __future__ import annotations

import pytest

from msi import ConfigError, Engine, SamplingParams
from msi.device.fake.world import FakeWorld
from tests.everyday import mostly_slow, thorough
from tests.fake_engine import fake_engine
from tests.reference import references, save_tiny
from tests.test_tokens import FAMILIES, NUM_TOKENS, check_equal

ALL = ["mixtral", *FAMILIES]
PROMPTS = ([3], list(range(5, 22)), list(range(2, 60)))


@pytest.fixture(scope="module", params=mostly_slow(ALL))
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    model = save_tiny(path, family=request.param)
    return path, references(model, [1, 17, 64], NUM_TOKENS)


@pytest.mark.parametrize(
    ("layout", "micro_batches", "seed"),
    [
        ((2, 2), 2, 0),
        thorough((1, 1), 1, 1),
        pytest.param((1, 3), 3, 2, marks=pytest.mark.slow),
        thorough((3, 2), 2, 3),
    ],
    ids=str,
)
async def test_tokens_of_every_family_equal_transformers(checkpoint, layout, micro_batches, seed):
    path, expected = checkpoint
    async with fake_engine(
        FakeWorld(seed),
        model=path,
        attention_workers=layout[0],
        expert_workers=layout[1],
        micro_batches=micro_batches,
        slot_rows=48,
    ) as engine:
        await check_equal(engine, expected, seed)


async def test_tokens_equal_transformers_colocated(checkpoint):
    path, expected = checkpoint
    async with fake_engine(FakeWorld(0), model=path, colocated=True) as engine:
        await check_equal(engine, expected, 0)


async def test_rows_and_cache_in_eight_bits_give_the_same_tokens_apart_and_together(tmp_path):
    told = {"rows_dtype": "fp8", "answers_dtype": "fp8", "kv_cache_dtype": "fp8", "slot_rows": 48}
    save_tiny(tmp_path)
    params, said = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True), []
    for seed, layout in enumerate(({"colocated": True}, {"attention_workers": 2, "micro_batches": 2})):
        async with fake_engine(FakeWorld(seed), model=tmp_path, **layout, **told) as engine:
            said.append(
                [[t async for one in engine.generate(prompt, params) for t in one.token_ids] for prompt in PROMPTS]
            )
    assert said[0] == said[1]


def test_no_command_or_option_opens_it():
    with pytest.raises(ConfigError, match="supported: cpu, cuda, cuda:N"):
        Engine.local(device="fake")
