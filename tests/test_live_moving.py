"""A drained attention worker's requests move to another one, and no client notices. Real processes."""

from __future__ import annotations

import asyncio

import pytest

from tests.test_attention_loss import ASKED, Answer, ask_all, local, resumptions, told
from tests.test_faults import until
from tests.test_live_workers import ctl

ENDS_WITHIN_S = 120

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


async def test_what_a_drained_worker_runs_moves_and_every_answer_is_what_it_would_have_been(tiny_model):
    async with local(tiny_model) as engine:
        expected: dict[str, Answer] = {}
        await ask_all(engine, expected)
        answers: dict[str, Answer] = {}
        asking = asyncio.create_task(ask_all(engine, answers))

        async def all_have_begun():
            return len(answers) == len(ASKED) and all(one.num_outputs >= 3 for one in answers.values())

        await until(all_have_begun)
        status = await ctl(engine, "drain", "attention-0", "--within", str(ENDS_WITHIN_S))
        assert "attention-0 has left (it was drained)" in status["text"]
        await asyncio.wait_for(asking, ENDS_WITHIN_S)
        assert (await engine.stats()).counters["moves"] == (await ctl(engine, "status"))["requests_moved"] > 0
        assert await resumptions(engine) == 0
        received = [one.status.attention.kv_blocks_received for one in (await engine.stats()).workers
                    if one.status.attention is not None]  # fmt: skip
        assert max(received) > 0
    assert told(answers) == told(expected)
    assert answers["logprobs"].logprobs == pytest.approx(expected["logprobs"].logprobs, abs=1e-3)
