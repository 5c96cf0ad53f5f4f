"""Requests of attention workers that are lost: what others are told to go on with, and what becomes of the answers."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as with_these
from hypothesis import strategies as st

from msi.attention.scheduler import Scheduler
from msi.control.request_routing import WAIT_FOR_WORKERS_S, Router
from msi.errors import InvalidRequest, RequestFailed, Unavailable
from msi.prompt_logprobs import PromptLogprobs
from msi.settings import SchedulerLimits
from msi.types import Progress, Request, SamplingParams

VOCAB = 1000
BLOCK_TOKENS = 4
NUM_BLOCKS = 24


def request(name="r", prompt=(1, 2, 3), **params):
    return Request(name, tuple(prompt), SamplingParams(**{"max_tokens": 10, "seed": 1, **params}))


def scored(first, count):
    return PromptLogprobs(first, 0, *(bytes(4 * count) for _ in range(2)), b"", b"")


def lost(router, worker, now=0.0):
    return router.worker_lost(worker, "it was killed by signal 9", now)


def ends(updates):
    return {one.request_id: one.failure for items in updates.values() for one in items if one.failure}


# -- what the next worker is told ------------------------------------------------------------------------------------


def test_the_next_worker_is_told_what_the_client_has():
    router = Router()
    router.add(request(prompt_logprobs=0), b"c", 0.0)
    router.route({"a": 100})
    router.progress("a", [Progress("r", prompt_logprobs=scored(1, 1)), Progress("r", (7, 8))])
    assert lost(router, "a") == {}
    assert router.progress("a", [Progress("r", (9,))]) == {}, "what comes from it afterwards counts for nothing"
    ((worker, told),) = router.route({"b": 100})
    assert (worker, told.output_token_ids, told.num_scored, told.num_resumptions) == ("b", (7, 8), 1, 1)
    assert router.load("a").num_requests == 0
    assert router.load("b").num_requests == 1
    assert router.progress("b", [Progress("r", (9,), "stop")]) == {b"c": [Progress("r", (9,), "stop")]}
    assert router.load("b") == type(router.load("b"))()


def test_what_was_running_comes_before_what_came_later():
    router = Router()
    for name in ("r", "s"):
        router.add(request(name), b"c", 0.0)
    router.route({"a": 100})
    router.add(request("t"), b"c", 0.0)
    lost(router, "a")
    assert [one.request_id for _, one in router.route({"b": 1000})] == ["r", "s", "t"]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_it_is_resumed_so_often_and_then_ends_with_why(most):
    router = Router(max_resumptions=most)
    router.add(request(), b"c", 0.0)
    for _ in range(most):
        router.route({"a": 100})
        assert lost(router, "a") == {}
    router.route({"a": 100})
    failure = ends(lost(router, "a"))["r"]
    assert failure.kind == "request_failed"
    assert "attention worker a was lost: it was killed by signal 9" in failure.message
    assert (f"resumed {most} time{'s' * (most > 1)} before" in failure.message) == (most > 0)
    assert (len(router), router.counters["resumptions"]) == (0, most)


def test_without_a_worker_it_is_held_from_the_loss_on_and_then_ends_with_what_is_missing():
    router = Router(hold_timeout_s=50.0)
    router.add(request(), b"c", 0.0)
    router.route({"a": 100})
    router.add(request("new"), b"c", 100.0)
    lost(router, "a", 100.0)
    assert set(ends(router.expire(101.0 + WAIT_FOR_WORKERS_S, "waiting for attention worker 1 of 1"))) == {"new"}
    assert router.expire(149.0, "waiting") == {}
    failure = ends(router.expire(151.0, "waiting for attention worker 1 of 1"))["r"]
    assert failure.kind == "unavailable"
    assert "signal 9; no other could go on with it for 50 s: waiting for attention worker 1 of 1" in failure.message


def test_one_that_is_cancelled_or_whose_client_left_while_it_is_held_is_not_resumed():
    router = Router()
    for client in (b"c", b"d"):
        router.add(request(), client, 0.0)
    router.route({"a": 100})
    lost(router, "a")
    assert router.cancel(b"c", "r") is None, "no worker has it"
    assert router.client_lost(b"d") == []
    assert router.route({"b": 100}) == []
    assert len(router) == 0


@pytest.mark.parametrize("given", [{"output_token_ids": (1,)}, {"num_scored": 1}, {"num_resumptions": 1}])
def test_no_client_says_what_only_the_coordinator_knows(given):
    told = Request("r", (1,), SamplingParams(seed=1), **given)
    assert Router().add(told, b"c", 0.0).failure.kind == "invalid_request"


# -- what the next worker does with it -------------------------------------------------------------------------------


def make_scheduler(num_lanes=1, num_blocks=NUM_BLOCKS, **limits):
    given = SchedulerLimits(**{"max_model_len": 64, "max_num_batched_tokens": 16, **limits})
    return Scheduler(given, num_lanes=num_lanes, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, vocab_size=VOCAB)


def resumed(name="r", output=(7, 8), **params):
    asked = request(name, **params)
    return Request(name, asked.prompt_token_ids, asked.params, "", output, num_resumptions=1)


def test_prompt_and_output_are_computed_again_and_the_next_token_is_chosen_as_it_would_have_been():
    scheduler = make_scheduler()
    scheduler.add(resumed(max_tokens=4, frequency_penalty=1.0, min_tokens=3, stop_token_ids=(5,)))
    batch = scheduler.plan(0)
    assert batch.token_ids == (1, 2, 3, 7, 8)
    (sampling,) = batch.sampling
    assert (sampling.position, sampling.seed) == (5, 1)
    assert list(sampling.extras.changes.output_token_ids) == [7, 8], "of the output, not the prompt"
    assert sampling.extras.changes.banned_token_ids == (5,), "two tokens so far"
    assert scheduler.update(0, [9]) == [Progress("r", (9,))], "what was cached has been said"
    scheduler.plan(0)
    assert scheduler.update(0, [10]) == [Progress("r", (10,), "length")]
    assert scheduler.take_admitted() == [], "it was admitted where it began"
    assert scheduler.counters["readmitted_tokens"] == 5


def test_prompts_are_scored_from_where_they_were():
    scheduler = make_scheduler()
    asked = request(prompt=range(1, 9), prompt_logprobs=0)
    scheduler.add(Request("r", asked.prompt_token_ids, asked.params, num_scored=5, num_resumptions=1))
    (rows,) = scheduler.plan(0).prompt_rows
    assert (rows.position, rows.next_token_ids) == (5, (7, 8))


def test_what_ran_elsewhere_waits_for_nobody_who_came_later_and_is_never_refused_for_the_number_of_those():
    scheduler = make_scheduler(max_num_seqs=1, max_num_waiting=1)
    scheduler.add(request("runs"))
    scheduler.plan(0)
    scheduler.add(request("waits"))
    with pytest.raises(Unavailable):
        scheduler.add(request("refused"))
    scheduler.add(resumed("first"))
    scheduler.add(resumed("second"))
    scheduler.update(0, [4])
    order = []
    while not scheduler.is_idle:
        scheduler.plan(0)
        order += [one.request_id for one in scheduler.update(0, [4])]
    assert list(dict.fromkeys(order)) == ["runs", "first", "second", "waits"], "the first is about to end"


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"output": (VOCAB,)}, InvalidRequest, "in output"),
        ({"output": tuple(range(40)), "max_tokens": 50}, RequestFailed, "43 tokens, and the KV cache here holds 40"),
    ],
)
def test_what_cannot_go_on_here_is_said(given, error, sentence):
    with pytest.raises(error, match=sentence):
        make_scheduler(num_blocks=11).add(resumed(**given))


# -- storms ----------------------------------------------------------------------------------------------------------


def next_token(history):
    """Depends on all before it, so that a wrong one shows."""
    return int.from_bytes(hashlib.blake2b(repr(list(history)).encode(), digest_size=4).digest()) % VOCAB


class Worker:
    """A scheduler, and a KV cache of tokens."""

    def __init__(self):
        self.scheduler = make_scheduler(num_lanes=2)
        self.cache = {}
        self.flying = [None, None]

    def plan(self, lane):
        if self.flying[lane] is None and self.scheduler.has_work(lane):
            self.flying[lane] = self.scheduler.plan(lane)

    def land(self, lane):
        batch, self.flying[lane] = self.flying[lane], None
        if batch is None:
            return []
        tokens, row = [], 0
        for query, context, blocks in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
            for position in range(context - query, context):
                self.cache[blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS] = batch.token_ids[row]
                row += 1
            if row - 1 in batch.logit_rows:
                tokens.append(
                    next_token(self.cache[blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS] for at in range(context))
                )
        return self.scheduler.update(lane, tokens)


class Storm:
    """A router, some workers with their lives, and clients that read."""

    def __init__(self, most):
        self.router = Router(max_resumptions=most, hold_timeout_s=1000.0)
        self.workers = {}
        self.asked = {}
        self.answers = {}
        self.ended = Counter()
        self.failed = {}

    def tell(self, updates):
        for items in updates.values():
            for one in items:
                self.answers[one.request_id] += one.token_ids
                self.ended[one.request_id] += one.is_last
                if one.failure:
                    self.failed[one.request_id] = one.failure.message

    def route(self):
        for worker, told in self.router.route(dict.fromkeys(self.workers, 80)):
            self.workers[worker].scheduler.add(told)

    def lose(self, name, has_crashed=False):
        if self.workers.pop(name, None) is not None:
            self.tell(self.router.worker_lost(name, "why", 0.0, has_crashed))

    def ask(self, prompt, max_tokens):
        name = f"r{len(self.asked)}"
        self.asked[name] = request(name, prompt, max_tokens=max_tokens)
        self.answers[name] = ()
        self.tell({b"c": [refusal] if (refusal := self.router.add(self.asked[name], b"c", 0.0)) else []})

    def cancel(self, name):
        given = self.router.cancel(b"c", name)
        if given is not None:
            self.workers[given[0]].scheduler.cancel(given[1])
        self.ended[name] += not self.ended[name]

    def land(self, name, lane, is_lost=False):
        """`is_lost`: what it says does not come, and its life ends."""
        if name in self.workers:
            progress = self.workers[name].land(lane)
            if is_lost and progress:
                self.lose(name)
            else:
                self.tell(self.router.progress(name, progress))

    def pass_all(self):
        for name, worker in list(self.workers.items()):
            for lane in range(2):
                worker.plan(lane)
                self.land(name, lane)

    def hear(self):
        """What workers have said, and what is on its way, comes."""

    def act(self, action, *rest):
        match action:
            case "ask" if len(self.asked) < 12:
                self.ask(*rest)
            case "start":
                self.workers.setdefault(rest[0], Worker())
            case "kill" | "crash":
                self.lose(rest[0], action == "crash")
            case "cancel" if f"r{rest[0]}" in self.asked:
                self.cancel(f"r{rest[0]}")
            case "plan" | "lost pass" if rest[0] in self.workers:
                self.workers[rest[0]].plan(rest[1])
                if action == "lost pass":
                    self.land(*rest, is_lost=True)
            case "pass":
                self.pass_all()

    def live_through(self, actions):
        """These, and then calm weather until all has ended; the requests that have not their whole answer."""
        for action, *rest in [("start", "a"), ("start", "b"), *actions]:
            self.act(action, *rest)
            self.route()
        self.workers.setdefault("z", Worker())
        for _ in range(1000):
            self.hear()
            self.route()
            self.pass_all()
            if not len(self.router):
                break
        cut_short = [name for name in self.asked if not self.check(name)]
        for name in self.asked:
            assert self.ended[name] == 1, f"{name} ended {self.ended[name]} times"
        for worker in self.workers.values():
            assert worker.scheduler.is_idle
            worker.scheduler.check_integrity()
        assert not self.router._trials
        assert all(self.router.load(name).num_requests == 0 for name in self.workers)
        return cut_short

    def check(self, name):
        asked, answer = self.asked[name], self.answers[name]
        history = list(asked.prompt_token_ids)
        for token in answer:
            assert token == next_token(history), f"{name} has {answer}"
            history.append(token)
        return len(answer) == asked.params.max_tokens


NAMES = st.sampled_from("ab")
ASKED = st.tuples(st.just("ask"), st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 12))
FLOW = st.sampled_from([("pass",), ("start", "a"), ("start", "b")])
FAULT = st.one_of(
    st.tuples(st.sampled_from(["kill", "crash"]), NAMES),
    st.tuples(st.just("lost pass"), NAMES, st.integers(0, 1)),
    st.tuples(st.just("plan"), NAMES, st.integers(0, 1)),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
)
STORMS = st.lists(st.one_of(FLOW, FLOW, FLOW, ASKED, FAULT), max_size=60)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@with_these(st.lists(ASKED, min_size=1, max_size=6), STORMS, st.sampled_from([0, 1, 3, 100]))
def test_in_any_storm_every_request_ends_once_with_its_own_tokens(asked, actions, most):
    storm = Storm(most)
    cut_short = storm.live_through([*asked, *actions])
    if most == 100 and not any(action in ("crash", "cancel") for action, *_ in actions):
        assert not cut_short, storm.failed
