"""An expert worker is killed under load: no request fails, and every stream is what it would have been.

Real processes, real signals.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from msi import Engine, RequestFailed, SamplingParams
from tests.everyday import thorough
from tests.test_faults import until
from tests.tiny import save_tiny

NUM_TOKENS = 300
FEWER_TOKENS = 150  # where what happens does so at once
KILL_AFTER = 40  # tokens of each stream
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
PROMPTS = [[5 + index] * (4 + 3 * index) for index in range(6)]
ENDS_WITHIN_S = 90

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return path


def local(checkpoint, transport, **options):
    return Engine.local(
        model=checkpoint, attention_workers=2, expert_workers=2, micro_batches=2, threads_per_worker=1,
        transport=transport, **options,
    )  # fmt: skip


class Streams:
    """Greedy streams of one engine, all at once."""

    def __init__(self, engine, num_tokens=NUM_TOKENS):
        self.params = replace(GREEDY, max_tokens=num_tokens)
        self.tokens = [[] for _ in PROMPTS]
        self.reached = asyncio.Event()
        self.ended = asyncio.gather(*(self._run(engine, index) for index in range(len(PROMPTS))))

    async def _run(self, engine, index):
        mine = self.tokens[index]
        async for output in engine.generate(PROMPTS[index], self.params):
            mine += output.token_ids
            if min(map(len, self.tokens)) >= KILL_AFTER:
                self.reached.set()
        return tuple(mine)


async def undisturbed(engine, num_tokens=NUM_TOKENS):
    return await asyncio.wait_for(Streams(engine, num_tokens).ended, ENDS_WITHIN_S)


async def kill(engine, streams, name):
    await asyncio.wait_for(streams.reached.wait(), ENDS_WITHIN_S)
    os.kill(engine.pids[name], signal.SIGKILL)


@pytest.mark.parametrize(
    ("redundancy", "transport"),
    [pytest.param(1, "shm"), pytest.param(0, "tcp"), thorough(1, "tcp"), thorough(0, "shm")],
)  # redundancy 0: rows are held until it is back
async def test_no_stream_fails_or_changes_when_an_expert_worker_is_killed(checkpoint, transport, redundancy):
    async with local(checkpoint, transport, expert_redundancy=redundancy) as engine:
        expected = await undisturbed(engine, FEWER_TOKENS)
        others = {name: pid for name, pid in engine.pids.items() if not name.startswith("expert")}
        for name in ("expert-1", "expert-0"):
            streams = Streams(engine, FEWER_TOKENS)
            await kill(engine, streams, name)
            assert await asyncio.wait_for(streams.ended, ENDS_WITHIN_S) == list(expected)

            async def is_back():
                return all(one.state == "ready" for one in (await engine.stats()).workers)

            await until(is_back)
        assert await undisturbed(engine, FEWER_TOKENS) == expected
        assert {name: pid for name, pid in engine.pids.items() if not name.startswith("expert")} == others


async def test_requests_that_were_held_too_long_end_with_what_is_missing(checkpoint, monkeypatch):
    """Who is held is looked at four times a second: a worker that is started again at once may be back before."""
    monkeypatch.setattr("msi.control.restarts.restart_delay_s", lambda num_failed: 1.0)
    async with local(checkpoint, "shm", hold_timeout_s=0.02) as engine:
        streams = Streams(engine)
        await kill(engine, streams, "expert-1")
        with pytest.raises(
            RequestFailed, match=r"expert-1 was lost: .*; no worker has had 3 of 7 experts .* for 0\.02 s"
        ):
            await asyncio.wait_for(streams.ended, ENDS_WITHIN_S)
