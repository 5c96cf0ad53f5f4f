"""Experts move by load while requests run: tokens are as transformers has them before, during and after.

Real processes.
"""

from __future__ import annotations

import asyncio

import pytest

from msi import Engine, SamplingParams
from tests.reference import references, save_tiny

NUM_TOKENS = 24
WITHIN_S = 120

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


async def test_experts_are_placed_anew_by_load_and_no_request_notices(tmp_path):
    model = save_tiny(tmp_path)
    expected = references(model, [4, 9, 33], NUM_TOKENS)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)

    async def tokens(engine, prompt):
        return tuple([token async for output in engine.generate(list(prompt), greedy) for token in output.token_ids])

    async def check(engine):
        found = await asyncio.gather(*(tokens(engine, one.prompt) for one in expected))
        assert found == [one.tokens for one in expected]

    async def counted(engine, name):
        return (await engine.stats()).counters[name]

    async with (
        asyncio.timeout(WITHIN_S),
        Engine.local(
            model=tmp_path, attention_workers=1, expert_workers=2, micro_batches=2, threads_per_worker=1,
            transport="shm", redundant_experts=1, rebalance="auto", rebalance_interval_s=1.0,
            rebalance_threshold=0.01,
        ) as engine,
    ):  # fmt: skip
        assert await counted(engine, "rebalances") == await counted(engine, "placement_version") == 0
        while not await counted(engine, "rebalances"):
            await check(engine)
        assert await counted(engine, "rebalance_gain") > 0.01
        assert await counted(engine, "placement_version") > 0
        await check(engine)
        assert all(one.state == "ready" and not one.incarnation for one in (await engine.stats()).workers)
