"""A client that leaves takes its request along, whatever stage that is at."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest
import pytest_asyncio

from tests.edge import gateway
from tests.test_engine import collect, idle

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_model):
    """(engine, url) of an instance that runs one sequence at a time and cuts prompts into small chunks."""
    async with gateway(tiny_model, engine={"max_num_seqs": 1, "slot_rows": 16}) as (engine, url):
        yield engine, url
        await idle(engine)
        for worker in engine._instance.workers:
            if worker.life.attention is not None:
                worker.life.attention.requests.check_integrity()


@contextlib.asynccontextmanager
async def asking(served, **body):
    """A client that waits for an answer; it leaves at the end."""

    async def ask():
        async with aiohttp.ClientSession() as session, session.post(f"{served[1]}/v1/completions", json=body) as answer:
            await answer.read()

    task = asyncio.create_task(ask())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def requests(engine, count):
    """Until the instance has so many."""
    async with asyncio.timeout(60):
        while (await engine.stats()).num_requests != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
async def test_while_it_waits_for_its_turn(served, stream):
    engine, _ = served
    async with asking(served, prompt=[5], **LONG) as running:
        await requests(engine, 1)
        async with asking(served, prompt=[6], stream=stream, **LONG):
            await requests(engine, 2)
        await requests(engine, 1)
        assert not running.done(), "the other goes on"
    await idle(engine)


async def test_while_its_prompt_is_computed(served):
    engine, _ = served
    async with asking(served, prompt=[5] * 500, max_tokens=8, ignore_eos=True):
        await requests(engine, 1)
    await idle(engine)


async def test_all_its_choices(served):
    engine, _ = served
    async with asking(served, prompt=[5], n=5, **LONG):
        await requests(engine, 5)
    await idle(engine)
    assert len((await collect(engine, [5], max_tokens=3, ignore_eos=True))[1]) == 3, "nothing is left behind"
