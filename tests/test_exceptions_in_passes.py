"""Whatever raises inside a pass ends the request that causes it, with a sentence; others, lanes and workers go on."""

from __future__ import annotations

import asyncio
import logging

import pytest

from msi import Engine, RequestFailed
from msi.complaints import Complaints
from tests.reference import references, save_tiny
from tests.test_tokens import tokens_of

POISON = 66  # the token that makes a computation raise
NUM_TOKENS = 5


class Panic(BaseException):
    """As libraries in other languages raise it."""


ERRORS = {
    "RuntimeError": RuntimeError("boom\nand more"),
    "StopIteration": StopIteration("boom"),
    "CancelledError": asyncio.CancelledError("boom"),
    "Panic": Panic("boom"),
    "MemoryError": MemoryError("boom"),
    "without a message": ValueError(),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with dense layers and shared experts, prompts without the poison, and their continuations."""
    path = tmp_path_factory.mktemp("qwen2")
    expected = references(save_tiny(path, family="qwen2"), [2, 9, 17, 30], NUM_TOKENS)
    assert not any(POISON in (*one.prompt, *one.tokens) for one in expected)
    return path, expected


def lives(engine):
    return [one.life for one in engine._instance.workers]


def attentions(engine):
    return [life.attention for life in lives(engine) if life.attention is not None]


def local(path, **changes):
    options = {"transport": "inproc", "expert_workers": 2, "micro_batches": 2, "threads_per_worker": 1, "slot_rows": 64}
    return Engine.local(model=path, **{**options, **changes})


async def serves_as_before(engine, expected):
    results = await asyncio.gather(*(tokens_of(engine, one.prompt, max_tokens=NUM_TOKENS) for one in expected))
    assert results == [one.tokens for one in expected]
    for attention in attentions(engine):
        await attention.requests.wait_idle()
        attention.requests.check_integrity()
        assert attention.counters().kv_blocks_lost == 0


PLACES = ["begin", "route_and_pack", "shared_experts", "_enter", "_head"]


@pytest.mark.parametrize(
    ("place", "error"),
    [*((place, "RuntimeError") for place in PLACES), *(("route_and_pack", error) for error in ERRORS)],
)
async def test_the_request_that_makes_a_computation_raise_ends_alone(checkpoint, place, error, caplog):
    path, expected = checkpoint
    async with local(path) as engine:
        (attention,) = attentions(engine)
        forward = attention.half.forward
        compute = getattr(forward, place)

        def poisoned(first, *others):
            batch = first if place == "begin" else first.micro_batch
            if POISON in batch.token_ids:
                raise ERRORS[error]
            return compute(first, *others)

        setattr(forward, place, poisoned)
        bad = [(*one.prompt, POISON) for one in expected[:2]]
        for _ in range(2):
            good = asyncio.gather(*(tokens_of(engine, one.prompt, max_tokens=NUM_TOKENS) for one in expected))
            ends = await asyncio.gather(*(tokens_of(engine, prompt) for prompt in bad), return_exceptions=True)
            assert await good == [one.tokens for one in expected]
            for end in ends:
                assert isinstance(end, RequestFailed), end
                assert str(end).startswith("attention-0: ")
                assert error in str(end) or "ValueError" in str(end)
                assert "\n" not in str(end)
        setattr(forward, place, compute)
        await serves_as_before(engine, expected)
        traces = [one for one in caplog.records if one.exc_info and one.name.startswith("msi")]
        assert 1 <= len(traces) <= 3, "each kind is said once"


@pytest.mark.parametrize("place", ["begin", "route_and_pack", "sample", "expert"])
async def test_what_raises_once_ends_nothing(checkpoint, place):
    path, expected = checkpoint
    async with local(path, attention_workers=1) as engine:
        (attention,) = attentions(engine)
        target = (
            attention.half.forward
            if place != "expert"
            else next(one.experts for one in lives(engine) if one.experts).half
        )
        name = "_run" if place == "expert" else place
        compute, num_calls = getattr(target, name), 0

        def shaky(*arguments):
            nonlocal num_calls
            num_calls += 1
            if num_calls in (7, 8, 31):
                raise RuntimeError("once")
            return compute(*arguments)

        setattr(target, name, shaky)
        results = await asyncio.gather(
            *(tokens_of(engine, one.prompt, max_tokens=NUM_TOKENS) for one in expected * 2), return_exceptions=True
        )
        for one, result in zip(expected * 2, results, strict=True):
            assert result == one.tokens or (isinstance(result, RequestFailed) and "once" in str(result))
        assert sum(isinstance(result, RequestFailed) for result in results) <= 3
        setattr(target, name, compute)
        await serves_as_before(engine, expected)


async def test_an_expert_worker_that_cannot_compute_the_rows_of_one_attention_worker_serves_the_other(checkpoint):
    path, expected = checkpoint
    async with local(path, attention_workers=2) as engine:
        experts = [life.experts for life in lives(engine) if life.experts is not None]
        compute = experts[0].half._run
        bad_seat = next(seat for seat, peer in experts[0]._link.peers.items() if peer == "attention-0")

        def partial(batch):
            if any(seat == bad_seat for seat, _, _ in batch.rows):
                raise ValueError("rows of seat")
            return compute(batch)

        experts[0].half._run = partial
        results = await asyncio.gather(
            *(tokens_of(engine, one.prompt, max_tokens=NUM_TOKENS) for one in expected * 3), return_exceptions=True
        )
        failed = [one for one in results if isinstance(one, RequestFailed)]
        assert 0 < len(failed) < len(results)
        assert {str(one) for one in failed} == {
            "expert worker expert-0 could not compute its experts: ValueError: rows of seat"
        }
        for one, result in zip(expected * 3, results, strict=True):
            assert isinstance(result, RequestFailed) or result == one.tokens
        experts[0].half._run = compute
        await serves_as_before(engine, expected)
        assert [life.assignment.incarnation for life in lives(engine)] == [0] * 4, "nobody was given up"


@pytest.mark.parametrize("place", ["plan", "update"])
async def test_a_scheduler_that_raises_ends_the_requests_of_its_lane(checkpoint, place):
    path, expected = checkpoint
    async with local(path, micro_batches=1) as engine:
        (attention,) = attentions(engine)
        scheduler = attention.requests.scheduler
        compute, num_calls = getattr(scheduler, place), 0

        def shaky(*arguments):
            nonlocal num_calls
            num_calls += 1
            result = compute(*arguments)
            if num_calls == 3:
                raise KeyError("lost")
            return result

        setattr(scheduler, place, shaky)
        results = await asyncio.gather(
            *(tokens_of(engine, one.prompt, max_tokens=NUM_TOKENS) for one in expected), return_exceptions=True
        )
        assert any(isinstance(one, RequestFailed) and "KeyError: 'lost'" in str(one) for one in results)
        await serves_as_before(engine, expected)


async def test_a_trace_that_cannot_be_written_stops_no_computation(checkpoint):
    class FullDisk:
        def span(self, *_):
            raise OSError("no space left")

    path, expected = checkpoint
    async with local(path) as engine:
        for worker in engine._instance.workers:
            worker._host._device.tracer = FullDisk()
        results = await asyncio.gather(*(tokens_of(engine, one.prompt, max_tokens=NUM_TOKENS) for one in expected))
        assert results == [one.tokens for one in expected]


def test_an_exception_that_comes_again_and_again_is_said_once_a_minute(caplog):
    now = 0.0
    complaints = Complaints(logging.getLogger("msi.test"), clock=lambda: now)
    for _ in range(100):
        complaints.say(ValueError("x"), "it failed")
        complaints.say(KeyError("x"), "it failed")
    assert [one.getMessage() for one in caplog.records] == ["it failed"] * 2
    now = 61.0
    complaints.say(ValueError("y"), "it failed")
    assert caplog.records[-1].getMessage() == "it failed (99 more of these since it was said last)"
    assert complaints.count == 201
