"""The process that serves HTTP, from the outside: it may die, and it ends what runs with a sentence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from pathlib import Path

import aiohttp
import pytest

from tests.conftest import TEXT
from tests.test_launch import launched
from tests.waiting import until

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]


def children(pid):
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def family(pid):
    """All that it started, and what those did: who is forked is a child of the process that forks."""
    found = children(pid)
    for one in found:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += children(one)
    return found


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child_of(launcher, role):
    """The process id of the one with that role among all that the launcher started."""
    words = f"\0--role\0{role}\0".encode()
    (found,) = [one for one in family(launcher) if words in Path(f"/proc/{one}/cmdline").read_bytes()]
    return found


async def ready(child):
    return (await child.until_said(r"ready: \S+ at (http://\S+)/v1")).group(1)


async def test_a_gateway_that_dies_comes_back_at_its_port_and_nothing_else_ends(tiny_model):
    body = {"prompt": TEXT, "max_tokens": 8, "temperature": 0}
    async with (
        launched(tiny_model, "--port", 0, "--threads-per-worker", 1) as child,
        aiohttp.ClientSession() as session,
    ):
        url = await ready(child)
        async with session.post(f"{url}/v1/completions", json=body) as response:
            text = (await response.json())["choices"][0]["text"]
        said_at = r"processes: .*\bgateway {}\b"
        for _ in range(2):
            gateway = child_of(child.process.pid, "gateway")
            await child.until_said(said_at.format(gateway))
            said_at = r"the gateway serves again \(pid {}\)"
            preparers = children(gateway)
            os.kill(gateway, signal.SIGKILL)
            await until(lambda pid=gateway: not lives(pid))
            async with aiohttp.ClientSession() as anew, anew.post(f"{url}/v1/completions", json=body) as response:
                assert (await response.json())["choices"][0]["text"] == text
            assert len(preparers) == 2
            await until(lambda pids=preparers: not any(map(lives, pids)))
        async with session.get(f"{url}/metrics") as response:
            assert 'msi_loop_stalls_total{process="gateway"}' in await response.text()
        assert len(re.findall(r"the gateway .* was killed by signal 9; starting it again", child.said)) == 2
        assert "was lost" not in child.said
        child.process.send_signal(signal.SIGTERM)
        assert await child.ended() == 0


@pytest.mark.parametrize("signals", [1, 2])
async def test_streams_that_run_at_the_end_get_their_time_and_an_error_with_done(tiny_model, signals):
    """With a second signal they get none."""
    long = {"prompt": TEXT, "max_tokens": 480, "ignore_eos": True, "n": 64}
    arguments = (tiny_model, "--port", 0, "--threads-per-worker", 1, "--shutdown-timeout", 0.5 if signals == 1 else 600)
    async with launched(*arguments) as child, aiohttp.ClientSession() as session:
        url = await ready(child)
        stream = await session.post(f"{url}/v1/completions", json={**long, "stream": True})
        await stream.content.readline()
        plain = asyncio.ensure_future(session.post(f"{url}/v1/completions", json=long))
        await asyncio.sleep(0.3)
        child.process.send_signal(signal.SIGTERM)
        if signals == 2:
            await child.until_said("ending:")
            child.process.send_signal(signal.SIGTERM)
        events = [line[6:] for line in (await stream.read()).split(b"\n\n") if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]"
        assert json.loads(events[-2])["error"]["type"] == "server_error"
        response = await plain
        assert response.status == 503
        assert (await response.json())["error"]["message"]
        assert await child.ended() == 0
        assert "Traceback" not in child.said
        assert child.said.count("msi-launch: ending") == 1, "the display does not say it again"
        assert "asked to end" not in child.said, "nor does the coordinator"


async def test_a_coordinator_that_is_killed_costs_no_stream_and_no_other_process(tiny_model):
    """Its gateway died with it, and msi-launch then."""
    body = {"prompt": TEXT, "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}

    async def text_of(stream):
        events = [line[6:] for line in (await stream.read()).splitlines() if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]", events[-1]
        return "".join(json.loads(one)["choices"][0]["text"] for one in events[:-1])

    async with (
        launched(tiny_model, "--port", 0, "--threads-per-worker", 1) as child,
        aiohttp.ClientSession() as session,
    ):
        url = await ready(child)
        expected = await text_of(await session.post(f"{url}/v1/completions", json=body))
        for _ in range(2):
            coordinator = child_of(child.process.pid, "coordinator")
            others = {one for one in family(child.process.pid) if one != coordinator}
            streams = [await session.post(f"{url}/v1/completions", json=body) for _ in range(4)]
            os.kill(coordinator, signal.SIGKILL)
            assert [await text_of(one) for one in streams] == [expected] * 4
            assert others < set(family(child.process.pid))
        assert child.said.count("it is started again") == 2
        child.process.send_signal(signal.SIGTERM)
        assert await child.ended() == 0
        assert "Traceback" not in child.said


@pytest.mark.parametrize("name", ["coordinator", "launcher"])
async def test_streams_end_with_an_error_and_done_when_there_will_be_no_coordinator(tiny_model, name):
    """They were cut: the gateway was killed with its parent."""
    long = {"prompt": TEXT, "max_tokens": 480, "ignore_eos": True, "n": 8, "stream": True}
    arguments = (tiny_model, "--port", 0, "--threads-per-worker", 1, "--coordinator-grace", 0.5)
    async with launched(*arguments) as child, aiohttp.ClientSession() as session:
        url = await ready(child)
        coordinator = child_of(child.process.pid, "coordinator")
        stream = await session.post(f"{url}/v1/completions", json=long)
        first = await stream.content.readline()
        assert stream.status == 200, first
        pids = family(child.process.pid)
        os.kill(child.process.pid if name == "launcher" else coordinator, signal.SIGKILL)
        events = [line[6:] for line in (await stream.read()).splitlines() if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]"
        assert re.search(r"the coordinator (\(pid \d+\) )?is gone", json.loads(events[-2])["error"]["message"])
        await until(lambda: not any(map(lives, pids)), 30)
        if name == "coordinator":
            assert await child.ended() == 2


async def test_a_gateway_alone_serves_an_instance_that_runs_elsewhere(tiny_model):
    async with (
        launched(tiny_model, "--port", 0, "--threads-per-worker", 1) as child,
        aiohttp.ClientSession() as session,
    ):
        url = await ready(child)
        (address,) = re.findall(r"coordinator at (\S+)", child.said)
        async with launched("--role", "gateway", "--coordinator", address, "--port", 0) as other:
            second = (await other.until_said(r"HTTP at (\S+)")).group(1)
            assert second != url
            async with session.get(f"{second}/v1/models") as response:
                assert response.status == 200
            other.process.send_signal(signal.SIGTERM)
            assert await other.ended() == 0
