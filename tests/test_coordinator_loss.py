"""The coordinator is killed under load, in processes of its own: streams go on behind a gateway that survives it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal

import aiohttp
import pytest

from msi import Engine
from tests.conftest import TEXT
from tests.everyday import only_thorough, thorough
from tests.test_attention_loss import ASKED, Answer, ask_all, signalled_amid, told
from tests.test_faults import until as until_so
from tests.test_launch import free_port, launched
from tests.waiting import until

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

ONE_THREAD = ("--threads-per-worker", 1)


async def stream(session, url, begun, **changes):
    """The text that a stream brings; `begun` gets an item with its first piece. An error ends it with its sentence."""
    body = {"prompt": TEXT, "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True, **changes}
    text, is_whole = "", False
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            return f"{response.status}: {await response.text()}"
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                is_whole = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                return event["error"]["message"]
            text += event["choices"][0]["text"]
            if text and len(text) > 8:
                begun.add(id(response))
    return text if is_whole else f"{text} (cut off)"


@contextlib.asynccontextmanager
async def cluster(model, *options, has_standby=False):
    """A coordinator, workers and a gateway, each a process; the coordinator, its arguments, and the gateway's URL."""
    address, *others = [f"tcp://127.0.0.1:{free_port()}" for _ in range(1 + has_standby)]
    where = ("--coordinator", ",".join([address, *others]))
    common = (model, "--role", "coordinator", "--no-gateway", "--micro-batches", 2, *options)
    coordinating = (*common, "--coordinator", address)
    async with contextlib.AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(launched(*coordinating))
        for other in others:
            await stack.enter_async_context(launched(*common, "--coordinator", other, "--standby", address))
        for role in ("attention", "expert"):
            await stack.enter_async_context(launched(model, "--role", role, *where, *ONE_THREAD, *options))
        gateway = await stack.enter_async_context(launched("--role", "gateway", *where, "--port", 0))
        url = (await gateway.until_said(r"HTTP at (\S+)")).group(1)
        async with aiohttp.ClientSession() as session:

            async def is_ready():
                async with session.get(f"{url}/ready") as response:
                    return response.status == 200

            async with asyncio.timeout(60):
                while not await is_ready():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            yield coordinator, coordinating, url, session


async def test_streams_through_a_gateway_go_on_when_the_coordinator_is_killed_and_started_again(tiny_model):
    prompts = [TEXT, TEXT[:40], TEXT[5:60]]
    async with cluster(tiny_model) as (coordinator, coordinating, url, session):
        begun = set()
        expected = [await stream(session, url, begun, prompt=prompt) for prompt in prompts]
        begun.clear()
        running = [asyncio.create_task(stream(session, url, begun, prompt=prompt)) for prompt in prompts]
        await until(lambda: len(begun) == len(prompts), 60)
        os.kill(coordinator.process.pid, signal.SIGKILL)
        await coordinator.ended()
        meanwhile = asyncio.create_task(stream(session, url, begun, prompt=prompts[0]))
        await asyncio.sleep(1)
        assert not meanwhile.done(), "it waits for a coordinator"
        async with launched(*coordinating) as again:
            answers = await asyncio.wait_for(asyncio.gather(*running, meanwhile), 90)
            assert answers == [*expected, expected[0]]
            assert "Traceback" not in again.said


@pytest.mark.parametrize("number", [signal.SIGSTOP, thorough(signal.SIGKILL)])
async def test_who_stands_by_takes_streams_over_and_a_coordinator_that_only_slept_ends(tiny_model, monkeypatch, number):
    monkeypatch.setenv("MSI_SECRET", "that all of this test's processes have")
    prompts = [TEXT, TEXT[:40], TEXT[5:60]]
    async with cluster(tiny_model, has_standby=True) as (coordinator, _, url, session):
        begun = set()
        expected = [await stream(session, url, begun, prompt=prompt) for prompt in prompts]
        begun.clear()
        running = [asyncio.create_task(stream(session, url, begun, prompt=prompt)) for prompt in prompts]
        await until(lambda: len(begun) == len(prompts), 60)
        os.kill(coordinator.process.pid, number)
        meanwhile = asyncio.create_task(stream(session, url, begun, prompt=prompts[0]))
        assert await asyncio.wait_for(asyncio.gather(*running, meanwhile), 90) == [*expected, expected[0]]
        if number == signal.SIGSTOP:
            os.kill(coordinator.process.pid, signal.SIGCONT)
            assert await coordinator.ended() == 2
            assert "has taken over while this one was silent" in coordinator.said
        assert await asyncio.wait_for(stream(session, url, begun, prompt=prompts[0]), 60) == expected[0]


async def test_when_nobody_takes_its_place_in_time_streams_end_and_new_requests_get_503(tiny_model):
    async with cluster(tiny_model, "--coordinator-grace", 2) as (coordinator, _, url, session):
        begun = set()
        running = asyncio.create_task(stream(session, url, begun))
        await until(lambda: begun, 60)
        os.kill(coordinator.process.pid, signal.SIGKILL)
        assert "has given no sign of life for" in await asyncio.wait_for(running, 60)
        answer = await asyncio.wait_for(stream(session, url, begun), 60)
        assert answer.startswith("503: ")
        assert "has given no sign of life for" in answer


@pytest.mark.parametrize("worker_id", ["attention-0", "expert-1"])
@only_thorough
async def test_when_a_worker_dies_with_the_coordinator_every_answer_is_what_it_would_have_been(tiny_model, worker_id):
    async with Engine.local(
        model=tiny_model, attention_workers=2, expert_workers=2, micro_batches=2, threads_per_worker=1
    ) as engine:
        expected: dict[str, Answer] = {}
        await ask_all(engine, expected)
        answers = await signalled_amid(engine, "coordinator", signal.SIGKILL, ASKED, beside=(worker_id,))
        assert told(answers) == told(expected)

        async def all_are_there():
            workers = (await engine.stats()).workers
            return len(workers) == 4 and all(one.state == "ready" for one in workers)

        await until_so(all_are_there, 60)
        assert engine.status == (True, "ready")


async def test_an_embedded_engine_starts_its_coordinator_again_and_every_answer_is_what_it_would_have_been(tiny_model):
    async with Engine.local(
        model=tiny_model, attention_workers=2, expert_workers=2, micro_batches=2, threads_per_worker=1
    ) as engine:
        expected: dict[str, Answer] = {}
        await ask_all(engine, expected)
        for _ in range(2):
            pid = engine.pids["coordinator"]
            assert told(await signalled_amid(engine, "coordinator", signal.SIGKILL, ASKED)) == told(expected)
            assert engine.pids["coordinator"] != pid
        assert {one.incarnation for one in (await engine.stats()).workers} == {0}, "workers lived on"
