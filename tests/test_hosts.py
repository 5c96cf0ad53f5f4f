"""An instance across hosts with addresses of their own: the same tokens, whatever the network does to the time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

import pytest

from msi import Engine, SamplingParams
from tests import hosts
from tests.hosts import Hosts
from tests.test_launch import running

REASON = hosts.why_not()
PORT = 5555
LOST_S = 6.0  # in which a silent host is noticed
NUM_TOKENS = 24
NUM_HELD = 400  # which take seconds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.skipif(bool(REASON), reason=REASON)]


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    """Every process of these tests has it, and no machine outside."""
    monkeypatch.setenv("MSI_SECRET", "not for those who are no host of ours")


@contextlib.asynccontextmanager
async def instance(net):
    """Two expert workers and an attention worker on hosts of their own, started before their coordinator."""
    address = f"tcp://{net.addresses['front']}:{PORT}"
    launch = (sys.executable, "-m", "msi_launch", "--coordinator", address, "--threads-per-worker", 1,
              "--peer-timeout", 3)  # fmt: skip  # leaves a slow machine time to say so within 5 s
    async with (
        running(*net.on("experts", *launch, "--role", "expert", "--worker-id", "expert-0")) as first,
        running(*net.on("experts", *launch, "--role", "expert", "--worker-id", "expert-1")) as second,
        running(*net.on("attention", *launch, "--role", "attention")) as attention,
    ):
        await asyncio.sleep(2)
        front = (*launch, "--role", "coordinator", "--expert-workers", 2, "--micro-batches", 2, "--port", 8000)
        async with running(*net.on("front", *front)) as coordinator:
            await coordinator.until_said("HTTP at")
            yield {"expert-0": first, "expert-1": second, "attention-0": attention, "coordinator": coordinator}


@contextlib.asynccontextmanager
async def asked(net, num_requests, num_tokens):
    """A client beside the coordinator."""
    address = f"tcp://{net.addresses['front']}:{PORT}"
    command = (sys.executable, "-m", "tests.hosts", address, num_requests, num_tokens)
    async with running(*net.on("front", "env", f"PYTHONPATH={Path(__file__).parent.parent}", *command)) as child:
        yield child


async def answers(net, num_requests=4, num_tokens=NUM_TOKENS):
    async with asked(net, num_requests, num_tokens) as child:
        assert await child.ended(120) == 0, child.said
        return results(child)


def results(child):
    return json.loads(next(line for line in child.said.splitlines() if line.startswith("[[")))


@pytest.fixture(scope="module")
def expected():
    """What the instance says when it is one process."""

    async def generate():
        async with Engine.local(transport="inproc", expert_workers=2, micro_batches=2) as engine:
            params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
            return [token async for output in engine.generate(hosts.PROMPT, params) for token in output.token_ids]

    return asyncio.run(generate())


async def test_three_hosts_serve_the_tokens_of_one_process_and_come_back_after_a_cable_was_out(expected):
    with Hosts("front", "attention", "experts") as net:
        async with instance(net) as processes:
            for how, tokens, _ in await answers(net):
                assert (how, tokens) == ("done", expected)

            stranger = ("env", "MSI_SECRET=somebody else's, whatever it is", sys.executable, "-m", "tests.hosts")
            address = f"tcp://{net.addresses['front']}:{PORT}"
            async with running(*net.on("attention", *stranger, address, 1, 1)) as child:
                assert await child.ended() != 0
                assert f"the secret differs: the coordinator at {address}" in child.said

            for host in ("experts", "attention"):
                async with asked(net, 2, NUM_HELD) as client:
                    await client.until_said("running")
                    net.set_link(host, "down")
                    await asyncio.sleep(LOST_S)
                    assert client.process.returncode is None, f"requests are held: {client.said}"
                    if host == "attention":
                        await processes["coordinator"].until_said("attention worker attention-0 was lost")
                    net.set_link(host, "up")
                    assert await client.ended(120) == 0, client.said
                    for how, tokens, _ in results(client):
                        assert (how, len(tokens)) == ("done", NUM_HELD)
                        assert tokens[:NUM_TOKENS] == expected
                for how, tokens, _ in await answers(net):
                    assert (how, tokens) == ("done", expected), "the workers were taken back"
            assert all(child.process.returncode is None for child in processes.values())

            processes["attention-0"].process.send_signal(signal.SIGTERM)
            assert await processes["attention-0"].ended() == 0


async def test_a_slow_network_that_loses_packets_changes_time_and_no_token(expected):
    with Hosts("front", "attention", "experts", slow="experts", delay_s=0.005, loss=0.01) as net:
        async with instance(net):
            for how, tokens, _ in await answers(net):
                assert (how, tokens) == ("done", expected)
