"""Tokens are told behind the launch of the pass after them, once, and before anything else that is said of requests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from msi.attention.lanes import run_lane
from msi.attention.requests import Requests
from msi.control.messages import Assignment, PassDone, RequestsFailed
from msi.control.move_messages import Release, Released
from msi.errors import RequestFailed, TransportError
from msi.placement import place_evenly
from msi.precision import Precision
from msi.settings import LinkShape, SchedulerLimits, Timeouts
from msi.types import Place, Request, Sampled, SamplingParams
from msi.worker.host import ServedShape

ASSIGNMENT = Assignment(
    instance="told",
    worker_id="attention-0",
    role="attention",
    place=Place(0),
    incarnation=1,
    placement=place_evenly(4, 1),
    num_seats=1,
    is_colocated=False,
    memory_share=1.0,
    limits=SchedulerLimits(max_model_len=64, max_num_batched_tokens=16),
    link=LinkShape(1, slot_rows=16),
    timeouts=Timeouts(),
    precision=Precision.of("float32"),
)
SHAPE = ServedShape(num_sparse_layers=1, vocab_size=100, eos_token_ids=(), row_bytes=8, answer_row_bytes=8)


def request(name, max_tokens=3):
    return Request(name, (1, 2), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0))


class Told:
    """What went out of a worker's requests, as short words in the order in which it did."""

    def __init__(self):
        self.words = []
        self.requests = Requests(ASSIGNMENT, SHAPE, 8, self._take, clock=lambda: 0.0)

    def _take(self, message):
        match message:
            case PassDone():
                assert message.number == sum(word.startswith("told") for word in self.words)
                self.words += ["told " + " ".join(f"{one.request_id}:{one.token_ids[0]}" for one in message.progress)]
            case RequestsFailed():
                self.words += ["failed " + " ".join(message.request_ids)]
            case Released():
                self.words += [f"released {message.request_id} after {message.num_tokens}"]

    async def a_pass(self, *tokens):
        """One is through, and nobody has been on the loop since."""
        micro_batch = await self.requests.next(0)
        self.requests.finish(0, micro_batch, Sampled(list(tokens)))


async def test_the_next_pass_is_launched_before_tokens_are_told():
    told = Told()
    tokens = iter(range(10, 20))

    async def run_whole(lane, micro_batch, within_s):
        told.words += ["launched"]
        await asyncio.sleep(0.001)
        return Sampled([next(tokens)])

    async def complete():
        pass

    link = SimpleNamespace(nodes=SimpleNamespace(wait_complete=complete), timeout_s=1.0)
    compute = SimpleNamespace(is_whole=True, run_whole=run_whole)
    tasks = [
        asyncio.create_task(one)
        for one in (run_lane(0, told.requests, compute, link), told.requests.tell_progress())
    ]  # fmt: skip
    told.requests.submit(request("a"))
    async with asyncio.timeout(20):
        await told.requests.wait_idle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert told.words == ["launched", "launched", "told a:10", "launched", "told a:11", "told a:12"]


async def test_what_is_untold_is_work_that_is_left():
    told = Told()
    told.requests.submit(request("a", max_tokens=1))
    await told.a_pass(10)
    assert told.words == []
    assert told.requests.ids == ("a",)
    assert not told.requests.is_idle
    waiting = asyncio.create_task(told.requests.wait_idle())
    await asyncio.sleep(0)
    assert not waiting.done()
    telling = asyncio.create_task(told.requests.tell_progress())
    await asyncio.wait_for(waiting, 20)
    telling.cancel()
    assert told.words == ["told a:10"]
    assert told.requests.ids == ()
    assert told.requests.is_idle


@pytest.mark.parametrize(
    ("happens", "after"),
    [
        (lambda requests: requests.cancel("a"), []),
        (lambda requests: requests.hold_is_over(TransportError("expert-0", "gone")), ["failed a"]),
        (lambda requests: requests.release(Release("a", 0, "", 0.0)), ["released a after 1"]),
        (lambda requests: requests.submit(request("b")), []),
    ],
)
async def test_tokens_are_told_before_what_ends_or_moves_their_request(happens, after):
    told = Told()
    told.requests.submit(request("a"))
    await told.a_pass(10)
    happens(told.requests)
    assert told.words == ["told a:10", *after]


async def test_an_account_has_what_was_told_and_says_so_once():
    told = Told()
    told.requests.submit(request("a"))
    await told.a_pass(10)
    (account,) = told.requests.accounts()
    assert told.words == ["told a:10"]
    assert told.requests.num_reports == 1
    assert account.num_tokens == 0
    assert [one.token_ids for one in account.progress] == [(10,)]


async def test_a_request_that_is_called_like_one_that_has_ended_has_its_own_account():
    told = Told()
    told.requests.submit(request("a", max_tokens=1))
    await told.a_pass(10)
    told.requests.submit(request("a"))
    assert told.words == ["told a:10"]
    (account,) = told.requests.accounts()
    assert (account.num_tokens, account.progress) == (0, ())


async def test_a_pass_that_fails_ends_its_requests_after_what_the_pass_before_brought():
    told = Told()
    told.requests.submit(request("a"))
    await told.a_pass(10)
    micro_batch = await told.requests.next(0)
    told.requests.fail(0, micro_batch, RequestFailed("no"))
    assert told.words == ["told a:10", "failed a"]
