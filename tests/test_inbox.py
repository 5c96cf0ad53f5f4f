"""What a slow reader has not taken yet: kept in little room, in order, and given up before it fills the memory."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.control.client import CoordinatorClient
from msi.control.client_messages import Outputs, Welcome
from msi.control.inbox import KEPT_WHOLE, TRIMMED, Inbox
from msi.control.orders import Order
from msi.errors import Failure, Unavailable
from msi.server.merging import MAX_AHEAD, merged
from msi.types import Output, Progress, Request, SamplingParams, TokenLogprobs

NUM_TOKENS = 100_000
LOGPROBS = (TokenLogprobs(7, -0.5, tuple(range(20)), (-1.5,) * 20),)

updates = st.builds(
    Progress,
    st.sampled_from(["a", "b", "c"]),
    st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple) | st.integers(0, 99).map(lambda token: (token,)),
    st.sampled_from([None, None, "stop", "length"]),
    st.sampled_from([(), (), LOGPROBS]),
    st.integers(0, 5),
    st.sampled_from([None, None, Failure("RequestFailed", "lost")]),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
    st.none(),
)


@given(st.lists(st.one_of(st.lists(updates, max_size=2 * KEPT_WHOLE), st.integers(1, 3 * KEPT_WHOLE)), max_size=12))
def test_what_comes_out_is_what_went_in_whenever_it_is_taken(steps):
    """Lists go in; numbers say how many are taken."""
    inbox, expected, taken = Inbox(), [], []
    for step in steps:
        if isinstance(step, list):
            for update in step:
                inbox.put(update)
            expected += step
        else:
            for _ in range(min(step, len(expected) - len(taken))):
                taken.append(inbox.take())
    while len(taken) < len(expected):
        taken.append(inbox.take())
    assert taken == expected
    assert inbox.take() is None
    assert inbox.held_bytes == 0


def test_a_long_answer_that_nobody_reads_costs_six_bytes_a_token():
    inbox = Inbox()
    for token in range(NUM_TOKENS):
        inbox.put(Progress("a", (token,)))
    assert inbox.held_bytes == 6 * (NUM_TOKENS - KEPT_WHOLE)
    assert [inbox.take().token_ids[0] for _ in range(NUM_TOKENS)] == list(range(NUM_TOKENS))
    assert inbox.held_bytes == 0


def test_what_was_taken_gives_its_room_back_while_more_comes():
    inbox = Inbox()
    for token in range(2 * TRIMMED):
        inbox.put(Progress("a", (token,)))
    before = inbox.held_bytes
    for token in range(10 * TRIMMED):
        inbox.take()
        inbox.put(Progress("a", (token,)))
        assert inbox.held_bytes <= before + 6 * (TRIMMED + KEPT_WHOLE)


@pytest.mark.parametrize("logprobs", [(), LOGPROBS])
def test_beyond_the_bound_an_answer_is_given_up_and_says_so(logprobs):
    inbox = Inbox(max_held_bytes=1 << 20)
    for token in range(300_000):
        inbox.put(Progress("a", (token,), None, logprobs))
        assert inbox.held_bytes <= (1 << 20) + 1024
    for _ in range(KEPT_WHOLE):
        assert inbox.take().failure is None
    failure = inbox.take().failure
    assert failure is not None
    assert "this answer was not read: 1 MiB of it were waiting. Read it as it comes" in str(failure.error())


class Silent:
    """A coordinator that only hears."""

    address = "inproc://"

    def send(self, message):
        pass


async def test_a_request_that_is_not_read_keeps_no_other_waiting_and_is_all_there():
    client = CoordinatorClient(Silent())
    params = SamplingParams(seed=1)
    slow, quick = (client.generate([Request(name, (1,), params)]) for name in ("slow", "quick"))
    first = [asyncio.ensure_future(anext(one)) for one in (slow, quick)]
    await asyncio.sleep(0)
    for number in range(1, 1001):
        reason = "stop" if number == 1000 else None
        client._take(Outputs(number, (Progress("slow", (number,), reason), Progress("quick", (number,), reason))))
    assert [(await one).token_ids for one in first] == [(1,), (1,)]
    assert [update.token_ids[0] async for update in quick] == list(range(2, 1001))
    assert [update.token_ids[0] async for update in slow] == list(range(2, 1001))


@pytest.mark.parametrize("end", ["another welcomes us", "nobody comes"])
async def test_an_operator_does_not_wait_for_the_answer_of_a_coordinator_that_is_gone(end):
    """msi-ctl hung for ever."""
    client = CoordinatorClient(Silent())
    asked = asyncio.ensure_future(client.order(Order(0, "drain", "expert-1")))
    await asyncio.sleep(0)
    if end == "nobody comes":
        client._give_up("the coordinator is gone")
    else:
        client._is_unknown()
        client._welcomed(Welcome("m", 10, 10))
    with pytest.raises(Unavailable, match=r"may have been done|is gone"):
        await asyncio.wait_for(asked, 5)


async def test_of_several_prompts_that_nobody_reads_little_is_made():
    made = 0

    async def outputs():
        nonlocal made
        for _ in range(10_000):
            made += 1
            yield Output("r", "a", (1,))

    async with contextlib.aclosing(merged([outputs() for _ in range(4)], 1)) as together:
        await anext(together)
        for _ in range(100):
            await asyncio.sleep(0)
        assert made <= MAX_AHEAD + 10
        read = 1
        async for _ in together:
            read += 1
            if read == 20_000:
                break
    assert read == 20_000
