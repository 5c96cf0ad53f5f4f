"""Workers come and go under load: no request fails, and every stream is what it would have been.

Real processes, told by msi-ctl.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import pytest

from tests.everyday import only_thorough
from tests.test_faults import until
from tests.test_lost_experts import Streams, checkpoint, kill, local, undisturbed

__all__ = ["checkpoint"]  # a fixture

COMES_WITHIN_S = 90  # a process that starts, on a busy machine

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


async def ctl(engine, *words):
    """What msi-ctl prints with --json; AssertionError with its sentence where it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "msi_launch.ctl", *words, "--json", "--coordinator", engine.address,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, error = await asyncio.wait_for(process.communicate(), COMES_WITHIN_S)
    assert process.returncode == 0, error.decode()
    return json.loads(out)


async def during_streams(engine, *words):
    """msi-ctl, once streams run; they are awaited, too."""
    streams = Streams(engine)
    await asyncio.wait_for(streams.reached.wait(), COMES_WITHIN_S)
    answer = await ctl(engine, *words)
    return answer, await asyncio.wait_for(streams.ended, COMES_WITHIN_S)


def held(placement):
    assert placement["stage"] == "settled", placement
    return {name: len(experts) for name, experts in placement["experts"].items()}


async def test_workers_come_and_go_by_msi_ctl_and_no_stream_notices(checkpoint):
    async with local(checkpoint, "shm") as engine:
        expected = list(await undisturbed(engine))
        answer, tokens = await during_streams(engine, "add", "--role", "expert")
        assert tokens == expected
        assert "expert-2" in answer["text"]
        assert sorted(held(answer["placement"]).values()) == [2, 2, 3]
        answer, tokens = await during_streams(engine, "remove", "expert-0")
        assert tokens == expected
        assert held(answer["placement"]) == {"expert-1": 4, "expert-2": 3}

        async def has_ended():
            return "expert-0" not in engine.pids

        await until(has_ended, COMES_WITHIN_S)
        answer, tokens = await during_streams(engine, "add", "--role", "attention")
        assert tokens == expected
        answer, tokens = await during_streams(engine, "remove", "attention-0", "--within", "0.1")
        assert tokens == expected
        told = await ctl(engine, "status")
        assert {one["worker_id"] for one in told["workers"] if one["state"] == "ready"} == {
            "expert-1", "expert-2", "attention-1", "attention-2",
        }  # fmt: skip
        assert told["status"] == "ready"
        with pytest.raises(AssertionError, match=r"there is no worker .*expert-9.* that could leave"):
            await ctl(engine, "drain", "expert-9")
        weights = next(checkpoint.glob("*.safetensors"))
        hidden = weights.rename(weights.with_suffix(".hidden"))
        try:
            with pytest.raises(AssertionError, match=r"expert-\d was started and cannot work: .*safetensors"):
                await ctl(engine, "add", "--role", "expert")
        finally:
            hidden.rename(weights)
        assert list(await undisturbed(engine)) == expected


@only_thorough
async def test_experts_that_died_with_their_worker_are_loaded_by_others_and_go_back_when_it_comes(checkpoint):
    async with local(checkpoint, "shm", reload_after_s=0.01) as engine:
        expected = list(await undisturbed(engine))
        streams = Streams(engine)
        await kill(engine, streams, "expert-1")
        assert await asyncio.wait_for(streams.ended, COMES_WITHIN_S) == expected

        async def is_shared_again():
            placement = await ctl(engine, "placement")
            return placement["version"] >= 2 and placement["stage"] == "settled"

        await until(is_shared_again, COMES_WITHIN_S)
        assert sorted(held(await ctl(engine, "placement")).values()) == [3, 4]
        assert list(await undisturbed(engine)) == expected


@only_thorough
async def test_a_worker_that_is_asked_to_end_by_a_signal_leaves_its_experts_to_others_first(checkpoint):
    async with local(checkpoint, "shm") as engine:
        expected = list(await undisturbed(engine))
        streams = Streams(engine)
        await asyncio.wait_for(streams.reached.wait(), COMES_WITHIN_S)
        os.kill(engine.pids["expert-0"], signal.SIGTERM)
        assert await asyncio.wait_for(streams.ended, COMES_WITHIN_S) == expected
