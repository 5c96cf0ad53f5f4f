"""What the log says of requests and load, by values."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import partial

import pytest

from msi.control.client_messages import Stats, WorkerStats
from msi.control.counters import AttentionCounters
from msi.control.messages import StageTimes
from msi.control.worker_status import WorkerStatus
from msi.server.calls import observed
from msi.server.request_log import LoadLog, RequestLog
from msi.types import Output


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


async def outputs(clock, *pieces, then=None):
    for piece in pieces:
        clock.now += 0.25
        yield piece
    if then is not None:
        raise then


def output(tokens, reason=None, index=0):
    return Output("x", "", tuple(range(tokens)), reason, 7, index)


async def followed(clock, requests, *pieces, num_choices=1, take=None, then=None):
    stream = observed(outputs(clock, *pieces, then=then), partial(requests.request, "cmpl-1", num_choices))
    seen = []
    try:
        async for one in stream:
            seen.append(one)
            if take is not None and len(seen) == take:
                break
    finally:
        await stream.aclose()
    return seen


async def test_every_request_that_ended_is_one_line(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    requests = RequestLog(clock=clock)
    pieces = [output(1), output(2), output(3, "length")]
    assert await followed(clock, requests, *pieces) == pieces
    assert caplog.messages == [
        "cmpl-1: 7 prompt tokens, 6 generated, first token after 0.250 s, 0.750 s in all: length"
    ]
    assert (requests.num_prompt_tokens, requests.num_tokens, requests.num_ended) == (7, 6, 1)


async def test_prompts_and_choices_are_counted_once_each(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    pieces = [output(1, "stop", index) for index in range(4)]  # two prompts, two choices of each
    await followed(clock, RequestLog(clock=clock), *pieces, num_choices=2)
    assert "cmpl-1: 14 prompt tokens, 4 generated" in caplog.text


async def test_a_client_that_left_is_cancelled_and_an_error_is_said(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    requests = RequestLog(clock=clock)
    await followed(clock, requests, output(1), output(1), take=1)
    await followed(clock, requests, output(1, "stop", 0), output(1), take=1, num_choices=2)
    with pytest.raises(ValueError, match="lost"):
        await followed(clock, requests, output(1), then=ValueError("lost\nwith worker"))
    with pytest.raises(ValueError, match="refused"):
        await followed(clock, requests, then=ValueError("refused"))
    first, second, third, fourth = caplog.messages
    assert first.endswith(": cancelled")
    assert second.endswith(": cancelled")
    assert third.endswith(": failed: lost\nwith worker")  # the log's formatter writes the newline out
    assert fourth == "cmpl-1: 0 prompt tokens, 0 generated, no token, 0.000 s in all: failed: refused"


async def test_a_request_whose_task_is_cancelled_is_cancelled(caplog):
    caplog.set_level(logging.INFO)

    async def endless():
        yield output(1)
        await asyncio.sleep(1000)

    requests = RequestLog()
    stream = observed(endless(), partial(requests.request, "cmpl-1"))
    assert (await anext(stream)).token_ids
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert caplog.messages[0].endswith(": cancelled")


async def test_requests_are_counted_when_they_are_not_told(caplog):
    caplog.set_level(logging.INFO)
    requests = RequestLog(is_told=False)
    await followed(Clock(), requests, output(3, "stop"))
    assert caplog.messages == []
    assert requests.num_tokens == 3


def stats(num_requests, running=0, waiting=0, free=0, blocks=0, **counters):
    attention = AttentionCounters(blocks=blocks, **counters) if blocks else None
    times = StageTimes(*([0.0] * len(StageTimes.__dataclass_fields__)))
    status = WorkerStatus(0, 0, running, waiting, free, times, attention=attention)
    return Stats(1, num_requests, (WorkerStats("attention-0", "attention", 1, "h", 0, "ready", status),))


def test_load_is_a_line_while_something_happens_and_none_when_nothing_did():
    requests = RequestLog()
    load = LoadLog(None, requests)
    assert load.line(stats(0), 10.0) == ""
    requests.num_prompt_tokens, requests.num_tokens = 120, 456
    now = stats(5, running=3, waiting=2, free=75, blocks=100, prompt_tokens=200, prefix_hit_tokens=50)
    assert load.line(now, 10.0) == (
        "12.0 prompt tokens/s, 45.6 generated tokens/s, 5 requests (3 running, 2 waiting), KV cache 25.0 % used, "
        "prefix hits 25 %"
    )
    assert "(3 running, 6 waiting)" in load.line(replace(now, num_waiting=4), 10.0), "some have no worker yet"
    assert load.line(now, 10.0).startswith("0.0 prompt tokens/s"), "requests that wait are news"
    assert load.line(stats(0), 10.0) == ""
    assert LoadLog(None, requests).line(stats(0), 10.0), "a worker that loads has no KV cache yet"
