"""The scheduler's decisions, by values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.attention.scheduler import Scheduler
from msi.errors import InvalidRequest, Unavailable
from msi.settings import SchedulerLimits
from msi.types import Progress, Request, SamplingExtras, SamplingParams, TokenLogprobs

EOS = 2


def make_scheduler(**changes) -> Scheduler:
    values = {
        "num_lanes": 1,
        "num_blocks": 33,
        "block_tokens": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "eos_token_ids": (EOS,),
    } | changes
    limits = {name: values.pop(name) for name in SchedulerLimits.__dataclass_fields__ if name in values}
    return Scheduler(SchedulerLimits(**limits), **values)


def request(name: str, num_prompt: int, max_tokens: int = 4, **params) -> Request:
    prompt = tuple(range(10, 10 + num_prompt))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, seed=1, **params))


def test_a_prompt_is_computed_and_then_decoded_token_by_token():
    scheduler = make_scheduler()
    scheduler.add(request("a", 3, max_tokens=2))
    batch = scheduler.plan(0)
    assert (batch.token_ids, batch.positions, batch.query_lens, batch.context_lens, batch.logit_rows) == (
        (10, 11, 12), (0, 1, 2), (3,), (3,), (2,),
    )  # fmt: skip
    assert batch.sampling[0].position == 3
    assert scheduler.update(0, [50]) == [Progress("a", (50,))]
    batch = scheduler.plan(0)
    assert (batch.token_ids, batch.positions, batch.query_lens, batch.context_lens) == ((50,), (3,), (1,), (4,))
    assert scheduler.update(0, [51]) == [Progress("a", (51,), "length")]
    assert scheduler.plan(0) is None
    assert scheduler.is_idle
    scheduler.check_integrity()


def test_long_prompts_are_cut_into_chunks_that_mix_with_decode():
    scheduler = make_scheduler()
    scheduler.add(request("short", 2, max_tokens=10))
    scheduler.plan(0)
    scheduler.update(0, [50])
    scheduler.add(request("long", 40, max_tokens=1))
    chunks = []
    for _ in range(3):
        batch = scheduler.plan(0)
        chunks.append((batch.query_lens, batch.logit_rows))
        scheduler.update(0, [60] * len(batch.logit_rows))
    assert chunks == [((1, 15), (0,)), ((1, 15), (0,)), ((1, 10), (0, 10))]
    scheduler.check_integrity()


def test_the_end_of_sequence_ends_it_unless_ignored():
    scheduler = make_scheduler()
    scheduler.add(request("ends", 2))
    scheduler.add(request("goes on", 2, ignore_eos=True))
    scheduler.plan(0)
    assert scheduler.update(0, [EOS, EOS]) == [Progress("ends", (EOS,), "stop"), Progress("goes on", (EOS,))]


def test_admission_waits_for_free_blocks():
    scheduler = make_scheduler(num_blocks=11)  # 10 blocks of 4 tokens
    scheduler.add(request("first", 24, max_tokens=5))
    scheduler.add(request("large", 25, max_tokens=5))
    scheduler.add(request("as large", 25, max_tokens=5))
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    assert scheduler.cancel("first")
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    scheduler.check_integrity()


def test_sequences_go_to_the_lane_with_the_least_predicted_time():
    scheduler = make_scheduler(num_lanes=2, num_blocks=200)
    scheduler.add(request("long", 60))
    for name in "abc":
        scheduler.add(request(name, 4))
    first, second = scheduler.plan(0), scheduler.plan(1)
    assert first.query_lens == (16,)
    assert second.query_lens == (4, 4, 4)


def test_no_more_than_max_num_seqs_run():
    scheduler = make_scheduler(max_num_seqs=2, num_blocks=200)
    for name in "abc":
        scheduler.add(request(name, 2, max_tokens=1))
    assert len(scheduler.plan(0).query_lens) == 2
    scheduler.update(0, [5, 5])
    assert len(scheduler.plan(0).query_lens) == 1


def test_more_sequences_than_a_slot_has_rows_take_turns():
    scheduler = make_scheduler(max_num_batched_tokens=2, num_blocks=200)
    for name in "abc":
        scheduler.add(request(name, 1, max_tokens=3))
    seen = []
    while (batch := scheduler.plan(0)) is not None:
        assert batch.num_tokens <= 2
        seen += [one.request_id for one in scheduler.update(0, [7] * len(batch.logit_rows))]
    assert sorted(seen) == sorted("abc" * 3)
    assert set(seen[:5]) == set("abc")


@pytest.mark.parametrize(
    ("num_prompt", "message"),
    [(0, "empty"), (64, "maximum context length is 64 tokens"), (500, "maximum context length is 64 tokens")],
)
def test_prompts_that_can_never_run_are_refused_with_a_sentence(num_prompt, message):
    scheduler = make_scheduler()
    with pytest.raises(InvalidRequest, match=message):
        scheduler.add(request("a", num_prompt))
    assert scheduler.is_idle


def test_a_prompt_longer_than_the_whole_cache_is_refused():
    with pytest.raises(InvalidRequest, match="whole KV cache holds 16"):
        make_scheduler(num_blocks=5).add(request("a", 20))


def test_the_context_and_the_cache_end_a_sequence():
    scheduler = make_scheduler(num_blocks=3)  # 8 tokens
    scheduler.add(request("a", 6, max_tokens=50))
    tokens = []
    while (batch := scheduler.plan(0)) is not None:
        tokens += scheduler.update(0, [7] * len(batch.logit_rows))
    assert [one.finish_reason for one in tokens] == [None, "length"]


def test_too_many_waiting_requests_are_turned_away():
    scheduler = make_scheduler(max_num_waiting=1, max_num_seqs=1)
    scheduler.add(request("a", 2))
    scheduler.add(request("b", 2))
    with pytest.raises(Unavailable):
        scheduler.add(request("c", 2))


def test_a_request_cancelled_in_flight_gives_its_blocks_back_after_the_pass():
    scheduler = make_scheduler()
    scheduler.add(request("a", 4))
    free = scheduler.num_free_blocks
    scheduler.plan(0)
    assert scheduler.cancel("a")
    assert scheduler.num_free_blocks == free
    assert scheduler.update(0, [5]) == []
    assert scheduler.num_free_blocks == 32
    assert scheduler.is_idle
    assert not scheduler.cancel("a")
    scheduler.check_integrity()


def test_a_lost_expert_worker_fails_what_runs_and_keeps_what_waits():
    scheduler = make_scheduler(num_lanes=2, max_num_seqs=2)
    for name in ("a", "b", "waits"):
        scheduler.add(request(name, 4))
    scheduler.plan(0)
    scheduler.plan(1)
    scheduler.give_up(0)
    assert sorted(scheduler.fail_running()) == ["a", "b"]
    scheduler.give_up(1)
    scheduler.check_integrity()
    assert scheduler.plan(0) is not None or scheduler.plan(1) is not None


def test_lanes_come_and_go_while_sequences_run():
    scheduler = make_scheduler(num_lanes=1)
    for name in "ab":
        scheduler.add(request(name, 3, max_tokens=9))
    scheduler.plan(0)
    scheduler.use_lanes(2)
    scheduler.add(request("c", 3, max_tokens=9))
    assert (scheduler.num_lanes, scheduler.plan(1).query_lens) == (2, (3,)), "who comes goes to the new one"
    scheduler.use_lanes(1)
    scheduler.add(request("d", 3, max_tokens=2))
    scheduler.update(0, [50, 50])
    scheduler.update(1, [60])
    assert scheduler.plan(0).query_lens == (1, 1, 3)
    assert scheduler.plan(1).query_lens == (1,), "who is on the other stays to its end"
    scheduler.check_integrity()


def test_a_lane_says_whether_more_may_follow():
    scheduler = make_scheduler()
    scheduler.add(request("a", 4, max_tokens=2))
    scheduler.plan(0)
    assert scheduler.may_continue(0)
    scheduler.update(0, [5])
    scheduler.plan(0)
    assert not scheduler.may_continue(0)


def finish(scheduler: Scheduler, in_order: list[str] | None = None) -> dict[str, list[int]]:
    """Runs until idle, each token one more than the last of its sequence; the tokens of each request."""
    tokens: dict[str, list[int]] = {}
    for _ in range(1000):
        batches = {lane: batch for lane in range(scheduler.num_lanes) if (batch := scheduler.plan(lane)) is not None}
        for lane, batch in batches.items():
            for one in scheduler.update(lane, [batch.token_ids[row] + 1 for row in batch.logit_rows]):
                tokens.setdefault(one.request_id, []).extend(one.token_ids)
                if one.finish_reason and in_order is not None:
                    in_order.append(one.request_id)
        scheduler.check_integrity()
        if scheduler.is_idle:
            return tokens
    raise AssertionError("it does not end")


def test_a_known_prefix_is_shared_and_not_computed_again():
    scheduler = make_scheduler()
    scheduler.add(request("first", 11, max_tokens=1))
    finish(scheduler)
    scheduler.add(request("second", 13))
    scheduler.add(request("third", 13))
    batch = scheduler.plan(0)
    assert batch.positions[:5] == (8, 9, 10, 11, 12)  # two blocks of four are known
    assert batch.query_lens == (5, 5)
    assert batch.block_tables[0][:2] == batch.block_tables[1][:2]
    assert batch.block_tables[0][2:] != batch.block_tables[1][2:]
    assert scheduler.counters["prefix_hit_tokens"] == 16
    scheduler.check_integrity()


def test_the_last_token_of_a_known_prompt_is_computed_all_the_same():
    scheduler = make_scheduler()
    for _ in range(2):
        scheduler.add(request("a", 8))
        last = scheduler.plan(0)
        scheduler.update(0, [9])
        finish(scheduler)
    assert last.positions == (4, 5, 6, 7)


def test_generated_tokens_are_part_of_a_later_prompt():
    scheduler = make_scheduler()
    scheduler.add(request("a", 6, max_tokens=7))
    tokens = finish(scheduler)["a"]
    conversation = (*range(10, 16), *tokens, 40, 41)
    scheduler.add(Request("b", conversation, SamplingParams(seed=1)))
    assert scheduler.plan(0).positions[0] == 12  # the thirteenth token was sampled, its keys never computed


def test_contents_are_given_up_least_recently_used_first():
    scheduler = make_scheduler(num_blocks=9)
    for name, first in (("a", 100), ("b", 200), ("a again", 100)):
        scheduler.add(Request(name, tuple(range(first, first + 12)), SamplingParams(max_tokens=1, seed=1)))
        finish(scheduler)
    assert scheduler.counters["prefix_hit_tokens"] == 8
    scheduler.add(Request("c", tuple(range(300, 319)), SamplingParams(max_tokens=1, seed=1)))
    finish(scheduler)
    assert scheduler.counters["kv_blocks_evicted"] == 3
    hits = {}
    for name, first in (("a", 100), ("b", 200)):
        before = scheduler.counters["prefix_hit_tokens"]
        scheduler.add(Request(name, tuple(range(first, first + 12)), SamplingParams(max_tokens=1, seed=1)))
        finish(scheduler)
        hits[name] = scheduler.counters["prefix_hit_tokens"] - before
    assert hits["a"] == 8
    assert hits["b"] == 4


def test_without_a_prefix_cache_nothing_is_shared():
    scheduler = make_scheduler(enable_prefix_caching=False)
    for name in "ab":
        scheduler.add(request(name, 12))
        finish(scheduler)
    assert scheduler.counters["prefix_hit_tokens"] == 0


@pytest.mark.parametrize("has_prefix_cache", [False, True])
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_when_blocks_run_out_who_came_last_waits_and_loses_nothing(num_lanes, has_prefix_cache):
    scheduler = make_scheduler(num_blocks=9, num_lanes=num_lanes, enable_prefix_caching=has_prefix_cache)
    prompts = {name: tuple(range(first, first + 4)) for name, first in (("a", 100), ("b", 200), ("c", 300))}
    for name, prompt in prompts.items():
        scheduler.add(Request(name, prompt, SamplingParams(max_tokens=20, seed=1, ignore_eos=True)))
    in_order: list[str] = []
    tokens = finish(scheduler, in_order)
    assert scheduler.counters["preemptions"] > 0
    assert in_order == ["a", "b", "c"]
    for name, prompt in prompts.items():
        assert tokens[name] == list(range(prompt[-1] + 1, prompt[-1] + 21))


def test_a_preempted_request_can_be_cancelled():
    scheduler = make_scheduler(num_blocks=9)
    for name, first in (("a", 100), ("b", 200)):
        params = SamplingParams(max_tokens=24, seed=1, ignore_eos=True)
        scheduler.add(Request(name, tuple(range(first, first + 4)), params))
    while not scheduler.counters["preemptions"]:
        scheduler.update(0, [9] * len(scheduler.plan(0).logit_rows))
    assert scheduler.num_waiting == 1
    assert scheduler.cancel("b")
    assert set(finish(scheduler)) == {"a"}


def assert_nobody_writes_what_another_reads(batch):
    written = set()
    for query_len, context_len, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
        own = set(table[(context_len - query_len) // 4 : -(-context_len // 4)])
        assert not written & own
        assert len(table) >= -(-context_len // 4)
        written |= own
    for query_len, context_len, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
        assert not written & set(table[: (context_len - query_len) // 4])


@settings(max_examples=100, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_whatever_happens_every_request_ends_and_no_block_is_lost(data):
    scheduler = make_scheduler(
        num_lanes=data.draw(st.integers(1, 4)), num_blocks=data.draw(st.integers(17, 40)), max_num_seqs=5
    )
    expected: dict[str, int] = {}
    got: dict[str, int] = {}
    finished, cancelled, failed = set(), set(), set()
    in_flight: dict[int, int] = {}
    steps = 0
    while steps < 400:
        steps += 1
        action = (
            data.draw(
                st.sampled_from(["add", "plan", "plan", "update", "update", "cancel", "fail", "suspect", "fail lane"])
            )
            if steps < 60
            else "go"
        )
        if action == "add":
            name = f"r{len(expected)}"
            one = request(name, data.draw(st.integers(1, 60)), max_tokens=data.draw(st.integers(1, 9)))
            expected[name] = min(one.params.max_tokens, 64 - len(one.prompt_token_ids))
            scheduler.add(one)
        if action == "cancel" and expected:
            name = data.draw(st.sampled_from(sorted(expected)))
            if scheduler.cancel(name):
                cancelled.add(name)
        if action in ("fail", "suspect", "fail lane") and in_flight:
            lane = data.draw(st.sampled_from(sorted(in_flight)))
            if action == "fail":
                most = len(scheduler._lanes[lane].in_flight) - 1
                failed |= set(scheduler.fail(lane, [data.draw(st.integers(0, most))]))
            else:
                del in_flight[lane]
                failed |= set(scheduler.suspect(lane) if action == "suspect" else scheduler.fail_lane(lane))
        if action in ("plan", "go"):
            for lane in range(scheduler.num_lanes):
                if lane not in in_flight and (batch := scheduler.plan(lane)) is not None:
                    assert batch.num_tokens <= 16
                    assert_nobody_writes_what_another_reads(batch)
                    in_flight[lane] = len(batch.logit_rows)
        if action in ("update", "go"):
            for lane in list(in_flight):
                for one in scheduler.update(lane, [9] * in_flight.pop(lane)):
                    got[one.request_id] = got.get(one.request_id, 0) + len(one.token_ids)
                    if one.finish_reason:
                        finished.add(one.request_id)
        scheduler.check_integrity()
        if action == "go" and scheduler.is_idle:
            break
    assert finished | failed == set(expected) - cancelled
    assert not finished & failed
    assert all(got[name] == expected[name] for name in finished)


def test_stop_tokens_and_logprobs_go_with_their_own_sequence():
    scheduler = make_scheduler()
    scheduler.add(request("long", 12, logprobs=0))
    scheduler.add(request("a", 2, stop_token_ids=(7,)))
    scheduler.add(request("b", 2, logprobs=1))
    batch = scheduler.plan(0)
    assert [one.extras for one in batch.sampling] == [SamplingExtras(logprobs=0), None, SamplingExtras(logprobs=1)]
    first, third = TokenLogprobs(7, -0.5), TokenLogprobs(9, -0.1, (9,), (-0.1,))
    assert scheduler.update(0, [7, 7, 9], {0: first, 2: third}) == [
        Progress("long", (7,), None, (first,)),
        Progress("a", (7,), "stop"),
        Progress("b", (9,), None, (third,)),
    ]


def test_a_sequence_that_fails_ends_alone_and_nobody_finds_its_blocks():
    scheduler = make_scheduler(max_num_batched_tokens=40)
    scheduler.add(request("sound", 9))
    assert scheduler.plan(0) is not None
    scheduler.update(0, [50])
    scheduler.add(Request("bad", (*range(10, 19), *range(30, 40)), SamplingParams(max_tokens=4, seed=1)))
    scheduler.add(request("cancelled", 3))
    batch = scheduler.plan(0)
    assert batch.positions[1] == 8, "it shares two blocks"
    assert scheduler.cancel("cancelled")
    assert scheduler.fail(0, [1, 2]) == ["bad"]
    assert [one.request_id for one in scheduler.update(0, [51, 52, 53])] == ["sound"]
    scheduler.check_integrity()
    for name in ("again", "bad again"):
        before = scheduler.counters["prefix_hit_tokens"]
        scheduler.add(Request(name, (*range(10, 19), *range(30, 40)), SamplingParams(max_tokens=1, seed=1)))
        assert scheduler.counters["prefix_hit_tokens"] == before
    assert scheduler.counters["sequences_failed"] == 1
    finish(scheduler)


def test_after_an_exception_each_sequence_is_tried_alone_and_the_one_that_causes_it_ends():
    scheduler = make_scheduler(max_num_batched_tokens=40)
    for name in ("a", "bad", "c"):
        scheduler.add(request(name, 3, max_tokens=2))
    tried = []
    ended: list[str] = []
    for _ in range(20):
        batch = scheduler.plan(0)
        if batch is None:
            break
        names = [one.request.request_id for one, _ in scheduler._lanes[0].in_flight]
        tried.append(names)
        assert scheduler.may_continue(0) or len(tried) > 3
        if "bad" in names:
            ended += scheduler.suspect(0)
        else:
            scheduler.update(0, [9] * len(batch.logit_rows))
        scheduler.check_integrity()
    assert ended == ["bad"]
    assert tried == [["a", "bad", "c"], ["a"], ["bad"], ["c"], ["a", "c"]]
    assert scheduler.is_idle


def test_a_request_that_is_cancelled_while_its_pass_raises_is_gone():
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(request(name, 3))
    scheduler.plan(0)
    scheduler.cancel("a")
    assert scheduler.suspect(0) == []
    assert running_ids(scheduler) == ["b"]
    scheduler.plan(0)
    scheduler.cancel("b")
    assert scheduler.suspect(0) == []
    assert scheduler.is_idle
    scheduler.check_integrity()


def running_ids(scheduler: Scheduler) -> list[str]:
    return [one.request.request_id for lane in scheduler._lanes for one in lane.sequences]


def test_what_is_computed_again_after_a_preemption_is_counted_apart():
    scheduler = make_scheduler(num_blocks=9)
    for name, first in (("a", 100), ("b", 200)):
        params = SamplingParams(max_tokens=24, seed=1, ignore_eos=True)
        scheduler.add(Request(name, tuple(range(first, first + 4)), params))
    finish(scheduler)
    counters = scheduler.counters
    assert counters["preemptions"] > 0
    assert (counters["prompt_tokens"], counters["prefix_hit_tokens"]) == (8, 0)
    assert counters["readmitted_tokens"] > counters["readmission_hit_tokens"] > 0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt_token_ids": (5, 100)}, "prompt"),
        ({"prompt_token_ids": (-1, 5)}, "prompt"),
        ({"prompt_token_ids": (2**70,)}, "prompt"),
        ({"params": SamplingParams(seed=1, logit_bias={100: 1})}, "logit_bias"),
        ({"params": SamplingParams(seed=1, stop_token_ids=(2**31 - 1,))}, "stop_token_ids"),
    ],
)
def test_tokens_that_the_model_does_not_have_never_get_in(changes, param):
    scheduler = make_scheduler(vocab_size=100)
    values = {"request_id": "a", "prompt_token_ids": (5, 99, 0), "params": SamplingParams(seed=1)}
    with pytest.raises(InvalidRequest, match=f"in {param}; ids are integers from 0 to 99") as caught:
        scheduler.add(Request(**{**values, **changes}))
    assert caught.value.param == param
    assert scheduler.is_idle
    scheduler.add(Request(**values))


def test_a_request_that_bans_every_token_is_refused():
    scheduler = make_scheduler(vocab_size=100)
    every = tuple(token for token in range(100) if token != EOS)
    with pytest.raises(InvalidRequest, match="leave no token") as caught:
        scheduler.add(request("a", 3, min_tokens=1, stop_token_ids=every))
    assert caught.value.param == "stop_token_ids"
    scheduler.add(request("b", 3, min_tokens=1, stop_token_ids=every[1:]))
    scheduler.add(request("c", 3, stop_token_ids=every))


def test_a_request_id_that_is_in_use_is_refused_and_the_first_goes_on():
    scheduler = make_scheduler()
    scheduler.add(request("a", 3))
    with pytest.raises(InvalidRequest, match="request id 'a' is in use"):
        scheduler.add(request("a", 3))
    assert len(finish(scheduler)["a"]) == 4


@pytest.mark.parametrize("outside", [-1, 100, 2**70])
def test_an_end_of_sequence_outside_the_vocabulary_bans_nothing_and_ends_nothing(outside):
    scheduler = make_scheduler(vocab_size=100, eos_token_ids=(outside, EOS))
    scheduler.add(request("a", 3, min_tokens=2))
    (sampling,) = scheduler.plan(0).sampling
    assert sampling.extras.changes.banned_token_ids == (EOS,)
    assert scheduler.update(0, [99]) == [Progress("a", (99,))]
