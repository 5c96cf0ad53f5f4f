"""Nobody waits for long because of whom else there is: small requests overtake large ones, and delay none."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msi.attention import admission
from msi.attention.scheduler import Scheduler
from msi.attention.sequence import Sequence, share_budget
from msi.settings import SchedulerLimits
from msi.types import Request, SamplingParams
from tests.everyday import mostly_slow

BLOCK = 4


def make_scheduler(**changes) -> Scheduler:
    values = {
        "num_lanes": 1,
        "num_blocks": 21,  # 80 tokens
        "block_tokens": BLOCK,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_model_len": 80,
        "enable_prefix_caching": False,
    } | changes
    limits = {name: values.pop(name) for name in SchedulerLimits.__dataclass_fields__ if name in values}
    return Scheduler(SchedulerLimits(**limits), **values)


def request(name: str, num_prompt: int, max_tokens: int, first: int = 10) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return Request(name, tuple(range(first, first + num_prompt)), params)


def run_pass(scheduler: Scheduler, lane: int = 0) -> list[str]:
    """Plans and finishes one micro-batch; the requests that ended."""
    batch = scheduler.plan(lane)
    if batch is None:
        return []
    return [one.request_id for one in scheduler.update(lane, [9] * len(batch.logit_rows)) if one.finish_reason]


def running(scheduler: Scheduler) -> set[str]:
    return {one.request.request_id for lane in scheduler._lanes for one in lane.sequences}


def test_a_small_request_does_not_wait_behind_a_large_one_that_waits_for_blocks():
    scheduler = make_scheduler()
    scheduler.add(request("first", 30, max_tokens=30))
    scheduler.add(request("large", 60, max_tokens=3))
    scheduler.add(request("small", 3, max_tokens=2))
    ended = [name for _ in range(6) for name in run_pass(scheduler)]
    assert ended == ["small"]


@pytest.mark.parametrize("patience", [0, 32])
def test_a_large_request_gets_in_as_soon_as_those_before_it_have_ended_however_many_small_ones_come(
    patience, monkeypatch
):
    monkeypatch.setattr(admission, "PATIENCE", patience)
    scheduler = make_scheduler()
    scheduler.add(request("first", 30, max_tokens=20))
    scheduler.add(request("large", 60, max_tokens=3))
    ended: list[str] = []
    num_since = 0
    for step in range(60):
        scheduler.add(request(f"small-{step}", 6, max_tokens=9))
        ended += run_pass(scheduler)
        num_since += "first" in ended
        if num_since > patience // 2:  # a small one takes 14 tokens in 10 passes
            assert "large" in running(scheduler) | set(ended)
    assert "large" in ended
    assert len(ended) > 20, "the small ones got on, too"
    assert scheduler.counters["overtakings"] > 5


@pytest.mark.parametrize("patience", mostly_slow([0, 6]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.slow
def test_whoever_is_first_of_those_that_wait_has_no_room_even_if_none_had_overtaken_it(data, patience, monkeypatch):
    """So everybody is admitted no later than in order of arrival; and where nothing is too large, in that order."""
    monkeypatch.setattr(admission, "PATIENCE", patience)
    has_prefix_cache = data.draw(st.booleans())
    scheduler = make_scheduler(
        num_lanes=data.draw(st.integers(1, 3)), max_num_seqs=data.draw(st.integers(1, 6)),
        enable_prefix_caching=has_prefix_cache,
    )  # fmt: skip
    sizes: dict[str, tuple[int, int]] = {}
    admitted: list[str] = []
    in_flight: dict[int, int] = {}
    for step in range(3000):
        if step < 50 and data.draw(st.booleans()):
            name = f"r{len(sizes)}"
            sizes[name] = (data.draw(st.sampled_from([1, 3, 9, 30, 70])), data.draw(st.integers(1, 9)))
            scheduler.add(request(name, *sizes[name], first=10 + 100 * data.draw(st.integers(0, 2))))
        lanes = range(scheduler.num_lanes) if step >= 50 else [data.draw(st.integers(0, scheduler.num_lanes - 1))]
        for lane in lanes:
            if lane in in_flight:
                scheduler.update(lane, [9] * in_flight.pop(lane))
            elif (batch := scheduler.plan(lane)) is not None:
                in_flight[lane] = len(batch.logit_rows)
        scheduler.check_integrity()
        admitted += sorted(running(scheduler) - set(admitted), key=lambda name: int(name[1:]))
        if scheduler._admission.waiting and not in_flight:
            assert_first_has_no_room(scheduler)
        if step >= 50 and scheduler.is_idle:
            break
    assert scheduler.is_idle, "it does not end"
    if not scheduler.counters["overtakings"] and not scheduler.counters["preemptions"]:
        assert admitted == sorted(admitted, key=lambda name: int(name[1:]))


def assert_first_has_no_room(scheduler: Scheduler) -> None:
    first = scheduler._admission.waiting[0]
    earlier = [one for lane in scheduler._lanes for one in lane.sequences if one.arrival < first.arrival]
    if len(earlier) >= scheduler._admission._max_num_seqs:
        return
    held = {block for one in earlier for block in one.blocks}
    known = set(scheduler._admission._known_blocks(first))
    num_new = -(-len(first.tokens) // BLOCK) - len(known & held)
    if num_new + len(earlier) > scheduler.num_blocks - len(held):
        return
    later = [one for lane in scheduler._lanes for one in lane.sequences if one.arrival > first.arrival]
    assert later, "it could run"
    assert all(one.max_len - one.num_computed <= admission.PATIENCE for one in later), "they should have given way"


# -- the budget of a micro-batch ---------------------------------------------------------------------------------------


def sequence(arrival: int, num_left: int, served_at: int = 0) -> Sequence:
    one = Sequence(request(str(arrival), num_left, 1), arrival, 10_000, list(range(num_left)))
    one.served_at = served_at
    return one


def shares(sequences, budget):
    return {one.arrival: count for one, count in share_budget(sequences, budget)}


@pytest.mark.parametrize(
    ("num_left", "budget", "expected"),
    [
        ([100], 16, {0: 16}),
        ([100, 5], 16, {0: 11, 1: 5}),  # a short prompt does not wait for a long one
        ([100, 9], 16, {0: 16}),  # nor does it take more than half
        ([100, 5, 3, 2], 16, {0: 11, 2: 3, 3: 2}),
        ([1, 1, 100, 4], 16, {0: 1, 1: 1, 2: 10, 3: 4}),
        ([1] * 20, 16, dict.fromkeys(range(16), 1)),
        ([1] * 20 + [50], 16, {**dict.fromkeys(range(8), 1), 20: 8}),
        ([5, 4, 7], 16, {0: 5, 1: 4, 2: 7}),
        ([], 16, {}),
    ],
)
def test_a_micro_batch_is_shared_between_decoding_short_prompts_and_the_first(num_left, budget, expected):
    assert shares([sequence(*one) for one in enumerate(num_left)], budget) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 32))
def test_nobody_in_a_lane_starves_and_no_budget_is_left_while_somebody_waits(num_left, budget):
    sequences = [sequence(*one) for one in enumerate(num_left)]
    total = sum(num_left)
    first_prompt = next((one for one in sequences if one.num_left > 1), None)
    for number in range(1, 1 + 2 * total):
        chosen = share_budget([one for one in sequences if one.num_left], budget)
        if not chosen:
            break
        used = sum(count for _, count in chosen)
        assert used <= budget
        assert len({one.arrival for one, _ in chosen}) == len(chosen)
        assert all(0 < count <= one.num_left for one, count in chosen)
        if used < budget:
            has_prompts = any(one.num_left > 1 for one in sequences)
            chosen_ids = {id(one) for one, _ in chosen}
            left_out = [one for one in sequences if one.num_left and id(one) not in chosen_ids]
            assert not left_out or (has_prompts and all(one.num_left == 1 for one in left_out))
        if budget > 3 and first_prompt is not None and first_prompt.num_left > 1:
            got = {one.arrival: count for one, count in chosen}.get(first_prompt.arrival, 0)
            assert got >= min(first_prompt.num_left, budget // 4), "the first prompt always gets on"
        for one, count in chosen:
            one.num_computed += count
            one.served_at = number
    assert all(one.num_left == 0 for one in sequences)


def test_those_that_decode_take_turns_where_they_are_more_than_the_budget():
    sequences = [sequence(arrival, 1) for arrival in range(10)]
    served: dict[int, list[int]] = {arrival: [] for arrival in range(10)}
    for number in range(1, 31):
        for one, _ in share_budget(sequences, 4):
            one.served_at = number
            served[one.arrival].append(number)
    for numbers in served.values():
        assert all(after - before <= 3 for before, after in pairwise(numbers))
