"""Processes that stand still for a while (SIGSTOP), and servers that are asked to end: who waits is not called dead."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time

import aiohttp
import pytest

from tests.everyday import mostly_thorough, thorough
from tests.test_faults import LONG, SHORT, checkpoint, local, outcome, running_requests, until
from tests.test_launch import free_port, launched

__all__ = ["checkpoint"]  # a fixture

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]


async def stand_still(pid, for_s):
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(for_s)
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(("name", "for_s"), [("coordinator", 2.5), ("coordinator", 6.0), ("attention-1", 1.5),
                                             ("expert-0", 1.5), thorough("coordinator", 4.5)])  # fmt: skip
async def test_streams_go_on_when_a_process_has_stood_still_for_less_than_its_bound(checkpoint, name, for_s):
    """All streams were lost: the coordinator took its own absence for everybody's."""
    async with local(checkpoint) as engine:
        pids = engine.pids
        tasks = await running_requests(engine, 4)
        await stand_still(pids[name], for_s)
        assert await asyncio.gather(*tasks) == [("done", LONG.max_tokens)] * 4
        lives = {worker.worker_id: worker.incarnation for worker in (await engine.stats()).workers}
        assert set(lives.values()) == {0}, lives
        assert engine.pids == pids


async def test_a_whole_instance_that_stood_still_goes_on(checkpoint):
    """As a laptop that was closed: everybody was away, so nobody is lost who comes back."""
    async with local(checkpoint) as engine:
        tasks = await running_requests(engine, 4)
        pids = list(engine.pids.values())
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(8)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert await asyncio.gather(*tasks) == [("done", LONG.max_tokens)] * 4


@contextlib.asynccontextmanager
async def served(checkpoint, *flags):
    port = free_port()
    async with launched(checkpoint, "--port", port, "--threads-per-worker", 1, "--micro-batches", 2, *flags) as child:
        await child.until_said("ready: ")
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield child, session


def pid_of(child, name):
    return int(re.search(rf"{name} (\d+)", child.said).group(1))


class Stream:
    """A completion as server-sent events."""

    def __init__(self, session, max_tokens):
        self.num_chunks = 0
        self.error = ""
        self.is_done = False
        self.status = 0
        self.begun = asyncio.Event()
        self.task = asyncio.create_task(self._read(session, max_tokens))

    async def _read(self, session, max_tokens):
        body = {"prompt": [5] * 8, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        async with session.post("/v1/completions", json=body) as response:
            self.status = response.status
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                self.begun.set()
                if line.strip() == b"data: [DONE]":
                    self.is_done = True
                elif "error" in (values := json.loads(line[6:])):
                    self.error = values["error"]["message"]
                else:
                    self.num_chunks += 1


async def streams(session, count, max_tokens=450):
    begun = [Stream(session, max_tokens) for _ in range(count)]
    for one in begun:
        await asyncio.wait_for(one.begun.wait(), 30)
    return begun


@pytest.mark.parametrize("name", ["coordinator", "msi-launch"])
async def test_an_idle_instance_outlives_an_absence_of_its_coordinator_or_its_launcher(checkpoint, name):
    """The status line's question got no answer in 10 s, and that ended the service."""
    async with served(checkpoint) as (child, session):
        pid = child.process.pid if name == "msi-launch" else pid_of(child, name)
        await stand_still(pid, 12.0)
        await asyncio.sleep(3.0)
        assert child.process.returncode is None
        body = {"prompt": [5] * 8, "max_tokens": 3, "temperature": 0}
        async with session.post("/v1/completions", json=body) as response:
            assert response.status == 200


# -- a server that is asked to end -----------------------------------------------------------------------------------


@pytest.fixture
def hang_ups():
    """Are heard by whom we start, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_ups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_server_that_is_asked_to_end_finishes_what_runs_and_takes_nothing_new(checkpoint, number):
    """Streams were cut without an error or [DONE], and plain requests got no answer at all."""
    async with served(checkpoint) as (child, session):
        running = await streams(session, 4)
        os.killpg(child.process.pid, number)  # as a terminal's Ctrl-C or a service manager does: to everybody
        await child.until_said("ending: no new requests")
        with contextlib.suppress(aiohttp.ClientConnectionError):  # nobody listens any more, or says so
            async with session.post("/v1/completions", json={"prompt": [5], "max_tokens": 1}) as response:
                assert response.status == 503, await response.text()
        await asyncio.gather(*(one.task for one in running))
        assert [(one.is_done, one.error, one.num_chunks > 300) for one in running] == [(True, "", True)] * 4
        assert await child.ended(30) == 0
    assert "Traceback" not in child.said


async def test_what_runs_when_the_time_is_over_ends_with_an_error_that_says_so(checkpoint):
    async with served(checkpoint, "--shutdown-timeout", 0.5, "--max-num-seqs", 2) as (child, session):
        running = await streams(session, 2)
        waiting = asyncio.create_task(session.post("/v1/completions", json={"prompt": [5], "max_tokens": 450}))
        await asyncio.sleep(0.2)
        child.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(one.task for one in running))
        for one in running:
            assert "the server was shut down before this request" in one.error
            assert one.is_done
        response = await waiting
        assert response.status == 503
        assert "the server was shut down" in await response.text()
        assert await child.ended(30) == 0
    assert "Traceback" not in child.said


async def test_a_second_signal_ends_at_once(checkpoint):
    async with served(checkpoint, "--shutdown-timeout", 1000) as (child, session):
        running = await streams(session, 2)
        child.process.send_signal(signal.SIGTERM)
        await child.until_said("ending: no new requests")
        assert child.process.returncode is None
        asked_at = time.monotonic()
        child.process.send_signal(signal.SIGINT)
        assert await child.ended(60) == 0
        assert time.monotonic() - asked_at < 30
        await asyncio.gather(*(one.task for one in running), return_exceptions=True)
        for one in running:
            assert "the server was shut down" in one.error or one.num_chunks > 440
            assert one.is_done


async def test_closing_an_embedded_engine_does_not_wait(checkpoint):
    async with local(checkpoint, attention=1, expert=1) as engine:
        tasks = await running_requests(engine, 1)
        started = time.monotonic()
    assert time.monotonic() - started < 15
    ((message, _),) = await asyncio.gather(*tasks)
    assert "closed" in message


async def test_a_worker_of_a_local_instance_that_is_asked_to_end_finishes_what_runs_and_is_started_again(checkpoint):
    async with local(checkpoint) as engine:
        tasks = await running_requests(engine, 4)
        pid = engine.pids["attention-1"]
        os.kill(pid, signal.SIGTERM)
        assert await asyncio.gather(*tasks) == [("done", LONG.max_tokens)] * 4

        async def is_back():
            workers = (await engine.stats()).workers
            return any(w.worker_id == "attention-1" and w.state == "ready" and w.incarnation > 0 for w in workers)

        await until(is_back)
        assert await outcome(engine, [7, 8, 9], SHORT) == ("done", 4)


# -- an id that is taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worker_id", mostly_thorough(["attention-0", "expert-0"]))
async def test_a_second_start_of_a_live_id_is_refused_and_changes_nothing_for_the_live_one(checkpoint, worker_id):
    """Its farewell was taken for the live one's, and requests of others were lost."""
    async with local(checkpoint) as engine:
        tasks = await running_requests(engine, 4)
        arguments = ("--role", worker_id.partition("-")[0], "--worker-id", worker_id, "--coordinator", engine.address)
        async with launched(checkpoint, *arguments, "--threads-per-worker", 1) as second:
            assert await second.ended(60) == 2
        assert f"worker id {worker_id} is live already" in second.said
        assert await asyncio.gather(*tasks) == [("done", LONG.max_tokens)] * 4
        lives = {worker.worker_id: worker.incarnation for worker in (await engine.stats()).workers}
        assert set(lives.values()) == {0}, lives
