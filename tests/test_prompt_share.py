"""Prompts beside sequences that decode: as much of them as these can wait for, measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.attention.prompt_share import FIRST_TOKENS, LEAST_BESIDE, LEAST_TOKENS, PromptShare
from tests.test_scheduler import make_scheduler, request

BUDGET = 512


def settled(base_s, token_s, decoding_s=0.01, *, delay_s=0.05, passes=100, under_way=0):
    """The room that follows where a pass takes `base_s` and `token_s` for each token of a prompt."""
    share = PromptShare(BUDGET, delay_s)
    share.decoded(decoding_s)
    for _ in range(passes):
        room = share.room(under_way)
        share.passed(base_s + token_s * (room + under_way), is_full=True)
    return share.room(under_way)


@pytest.mark.parametrize(
    ("base_s", "token_s", "decoding_s", "at_least", "at_most"),
    [
        (0.001, 1e-6, 0.001, BUDGET, BUDGET),  # a GPU: nobody notices prompts
        (0.010, 2e-4, 0.010, 160, 256),  # 40 ms are left for prompts
        (0.010, 1e-2, 0.010, LEAST_TOKENS, LEAST_TOKENS),  # nothing helps
        (0.300, 2e-3, 0.300, 240, 380),  # passes are slow without prompts, too: three times that long is fair
    ],
)
def test_prompts_have_what_those_that_decode_can_wait_for(base_s, token_s, decoding_s, at_least, at_most):
    assert at_least <= settled(base_s, token_s, decoding_s) <= at_most


def test_what_is_under_way_on_other_lanes_counts():
    alone = settled(0.01, 2e-4)
    assert settled(0.01, 2e-4, under_way=100) <= alone - 60
    assert PromptShare(BUDGET, 0.05).room(10**6) == LEAST_BESIDE


def test_a_pass_that_stood_still_halves_it_at_most_and_it_grows_again():
    share = PromptShare(BUDGET, 0.05)
    share.decoded(0.01)
    share.decoded(30.0)  # the process was stopped
    for _ in range(20):
        share.passed(0.02, is_full=True)
    assert share.room(0) == BUDGET
    share.passed(3.0, is_full=True)
    assert share.room(0) == BUDGET // 2
    share.passed(0.02, is_full=False)
    assert share.room(0) == BUDGET // 2, "a short chunk says nothing of a long one"
    for _ in range(4):
        share.passed(0.02, is_full=True)
    assert share.room(0) == BUDGET


@given(st.lists(st.tuples(st.floats(0, 1e4), st.booleans(), st.booleans())), st.integers(1, 4096))
def test_it_stays_within_its_bounds_whatever_is_measured(passes, most):
    share = PromptShare(most, 0.05)
    for seconds, is_full, has_prompts in passes:
        if has_prompts:
            share.passed(seconds, is_full=is_full)
        else:
            share.decoded(seconds)
        assert min(LEAST_TOKENS, most) <= share.room(0) <= most
        assert min(LEAST_BESIDE, most) <= share.room(10**6) <= most


def tokens_of(micro_batch):
    return list(micro_batch.query_lens)


def decoding(scheduler, lane, number):
    """A request that has its prompt behind it, on a lane."""
    scheduler.add(request(str(number), 1, max_tokens=1000))
    assert tokens_of(scheduler.plan(lane)) == [1]
    scheduler.update(lane, [5])


def shared(num_lanes=1, **limits):
    values = {
        "max_model_len": 4096,
        "max_num_batched_tokens": BUDGET,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        **limits,
    }
    return make_scheduler(num_lanes=num_lanes, num_blocks=4096, prompt_share=PromptShare(BUDGET, 0.05), **values)


def test_a_prompt_alone_has_the_whole_budget_and_beside_others_its_share():
    scheduler = shared()
    scheduler.add(request("0", 1000, max_tokens=1))
    assert tokens_of(scheduler.plan(0)) == [BUDGET]
    scheduler.took(0, 9.0)  # nobody waited
    scheduler.update(0, [])
    assert tokens_of(scheduler.plan(0)) == [1000 - BUDGET]
    scheduler.update(0, [5])
    decoding(scheduler, 0, 1)
    scheduler.add(request("2", 1000, max_tokens=1))
    assert tokens_of(scheduler.plan(0)) == [1, FIRST_TOKENS]
    scheduler.took(0, 9.0)
    scheduler.update(0, [5])
    assert tokens_of(scheduler.plan(0)) == [1, LEAST_TOKENS]


def test_those_that_decode_on_other_lanes_count_and_so_do_prompts_there():
    scheduler = shared(num_lanes=3)
    decoding(scheduler, 0, 0)
    for number in (1, 2):
        scheduler.add(request(str(number), 1000, max_tokens=1))
    assert tokens_of(scheduler.plan(1)) == [FIRST_TOKENS]
    assert tokens_of(scheduler.plan(2)) == [LEAST_BESIDE], "the first has taken all"
    scheduler.update(1, [])
    assert tokens_of(scheduler.plan(1)) == [FIRST_TOKENS - LEAST_BESIDE]
    assert tokens_of(scheduler.plan(0)) == [1]
    scheduler.took(0, 0.2)  # what prompts elsewhere cost says nothing of a pass without any
    scheduler.update(0, [5])
    scheduler.update(1, [])
    scheduler.update(2, [])
    assert tokens_of(scheduler.plan(1)) == [FIRST_TOKENS]


def test_many_prompts_share_it_and_each_gets_to_its_end():
    scheduler = shared()
    decoding(scheduler, 0, 0)
    for number in range(1, 5):
        scheduler.add(request(str(number), 300, max_tokens=1))
    ended = set()
    for _ in range(200):
        micro_batch = scheduler.plan(0)
        assert sum(tokens_of(micro_batch)) <= 1 + FIRST_TOKENS
        scheduler.took(0, 0.06)
        ended |= {one.request_id for one in scheduler.update(0, [5] * len(micro_batch.logit_rows)) if one.is_last}
        if len(ended) == 4:
            return
    raise AssertionError(f"only {ended} came to their end")
