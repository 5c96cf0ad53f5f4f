"""Processes started one by one, over TCP: connections that break, drains, and a coordinator that is started anew."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import threading

import pytest

from msi import Engine
from msi.instance.instance import create_coordinator, create_worker, listen
from msi.net.tcp import TcpTransport
from msi.options import InstanceOptions
from tests import waiting
from tests.everyday import mostly_thorough
from tests.test_faults import LONG, SHORT, checkpoint, outcome, running_requests, until
from tests.test_launch import free_port, launched

__all__ = ["checkpoint"]  # a fixture

ENDS_WITHIN_S = 5.0  # what the design promises for a loss
RETURNS_WITHIN_S = 60.0

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


def reset(sock):
    """Breaks a connection as a middlebox would: the peer gets a reset, and neither end said goodbye."""
    nobody = (ctypes.c_char * 16)()  # AF_UNSPEC: the kernel disconnects
    assert ctypes.CDLL(None).connect(sock.fileno(), nobody, 16) == 0


@contextlib.asynccontextmanager
async def inside(checkpoint):
    """An instance over TCP whose processes are tasks of this one; time alone loses nobody, however slow the machine."""
    options = InstanceOptions.of(
        model=checkpoint, expert_workers=2, micro_batches=2, transport="tcp", threads_per_worker=1, peer_timeout_s=120
    )
    coordinator = create_coordinator(options, listen("tcp://127.0.0.1:*"))
    workers = {
        worker_id: create_worker(options, coordinator.address, worker_id.partition("-")[0], worker_id)
        for worker_id in ("expert-0", "expert-1", "attention-0")
    }
    tasks = [asyncio.ensure_future(one.run()) for one in (coordinator, *workers.values())]
    try:
        async with Engine.connect(coordinator.address) as engine:
            await engine.wait_ready(60)
            yield engine, workers
    finally:
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def expert_lives(workers):
    """How often each expert worker began a life after its first."""
    return [workers[name].life.assignment.incarnation for name in ("expert-0", "expert-1")]


async def succeeds(engine):
    return await outcome(engine, [7, 8, 9], SHORT) == ("done", 4)


async def test_what_runs_waits_for_the_peer_of_a_reset_connection_which_is_taken_back_in_a_new_life(checkpoint):
    async with inside(checkpoint) as (engine, workers):
        tasks = await running_requests(engine, 3)
        (transport,) = workers["attention-0"].life.transports
        assert isinstance(transport, TcpTransport)
        reset(next(iter(transport._endpoints))._sock)
        assert await asyncio.gather(*tasks) == [("done", 450)] * 3
        await until(lambda: succeeds(engine), RETURNS_WITHIN_S)
        incarnations = {one.worker_id: one.incarnation for one in (await engine.stats()).workers}
        assert sorted(incarnations.values()) == [0, 0, 1], incarnations
        assert incarnations["attention-0"] == 0


@pytest.mark.parametrize("work", ["route_and_pack", "sample"])
async def test_a_connection_that_breaks_and_is_back_while_the_device_is_busy_costs_no_token(checkpoint, work):
    """Rows for a life that is over went to the next one, which did not answer; tokens were sampled without answers."""
    async with inside(checkpoint) as (engine, workers):
        attention = workers["attention-0"].life.attention
        compute, is_held, may_go_on = getattr(attention.half.forward, work), threading.Event(), threading.Event()

        def held(*arguments):
            is_held.set()
            may_go_on.wait()
            return compute(*arguments)

        tasks = await running_requests(engine, 3)
        setattr(attention.half.forward, work, held)
        try:
            assert await asyncio.to_thread(is_held.wait, RETURNS_WITHIN_S)
            reset(next(iter(workers["attention-0"].life.transports[0]._endpoints))._sock)
            link = attention.links.link  # a seat whose answers are read by the work that is held is not given away yet
            await waiting.until(
                lambda: sum(expert_lives(workers)) and (link.nodes.is_leaving or len(link.nodes.connected) == 2),
                RETURNS_WITHIN_S,
            )
        finally:
            may_go_on.set()
        assert await asyncio.gather(*tasks) == [("done", 450)] * 3
        await until(lambda: succeeds(engine), RETURNS_WITHIN_S)
        assert sum(expert_lives(workers)) == 1


@pytest.mark.parametrize("number", mostly_thorough([signal.SIGKILL, signal.SIGSTOP]))
async def test_what_runs_waits_for_a_lost_expert_worker_over_tcp_which_is_taken_back(checkpoint, number):
    engine = Engine.local(model=checkpoint, expert_workers=2, micro_batches=2, threads_per_worker=1, transport="tcp")
    async with engine:
        tasks = await running_requests(engine, 3)
        pid = engine.pids["expert-1"]
        os.kill(pid, number)

        async def is_noticed():
            return not engine.status[0] or engine.pids["expert-1"] != pid  # which takes no time at all

        await until(is_noticed, RETURNS_WITHIN_S)
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
        assert await asyncio.wait_for(asyncio.gather(*tasks), RETURNS_WITHIN_S) == [("done", 450)] * 3
        await until(lambda: succeeds(engine), RETURNS_WITHIN_S)
        if number == signal.SIGSTOP:
            assert engine.pids["expert-1"] == pid


@contextlib.asynccontextmanager
async def cluster(checkpoint):
    """A coordinator's command line, its address, and workers that were started already, all over TCP."""
    address = f"tcp://127.0.0.1:{free_port()}"
    common = (checkpoint, "--coordinator", address, "--threads-per-worker", 1, "--transport", "tcp")
    async with (
        launched(*common, "--role", "expert") as expert,
        launched(*common, "--role", "attention") as attention,
    ):
        yield (*common, "--role", "coordinator", "--no-gateway", "--micro-batches", 2), address, expert, attention


async def test_a_coordinator_that_is_started_anew_takes_its_workers_back(checkpoint):
    async with cluster(checkpoint) as (command, address, expert, attention):
        async with launched(*command) as first, Engine.connect(address) as engine:
            await engine.wait_ready(90)
            tasks = await running_requests(engine, 2)
            first.process.kill()
            await first.ended()
            async with launched(*command):
                ends = await asyncio.wait_for(asyncio.gather(*tasks), RETURNS_WITHIN_S)
                assert ends == [("done", LONG.max_tokens)] * 2, "what ran goes on"
                await until(lambda: succeeds(engine), RETURNS_WITHIN_S)
        assert expert.process.returncode is None
        assert attention.process.returncode is None


async def test_a_drained_attention_worker_finishes_what_runs_and_new_requests_are_refused_by_a_sentence(checkpoint):
    async with (
        cluster(checkpoint) as (command, address, _, attention),
        launched(*command),
        Engine.connect(address) as engine,
    ):
        await engine.wait_ready(90)
        tasks = await running_requests(engine, 2)
        attention.process.send_signal(signal.SIGTERM)
        assert await asyncio.gather(*tasks) == [("done", LONG.max_tokens)] * 2
        assert await attention.ended() == 0
        message, num_tokens = await outcome(engine, [7, 8, 9], SHORT)
        assert num_tokens == 0
        assert "no worker could take it" in message
        assert "attention worker 1 of 1 (it was drained)" in message
