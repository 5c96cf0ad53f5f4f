"""A coordinator that stands by for another: who is followed, that at most one is, and that no request notices."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.control.succession import SILENT_S, UNSEEN_S, Allegiance, Step, Succession, next_term
from msi.simulator.workload import Arrival
from tests.everyday import NUM_SEEDS, mostly_slow
from tests.test_takeover import COSTS, STORMY
from tests.two_coordinators import FIRST, SECOND, Blow, stormed


@given(st.integers(0, 1000), st.integers(0, 1))
def test_terms_rise_and_no_two_coordinators_have_the_same(seen, like):
    term = next_term(seen, like)
    assert term > seen
    assert term % 2 == like
    assert term <= seen + 2


def test_who_stands_by_takes_over_once_the_other_is_silent_and_not_for_its_own_lateness():
    standing = Succession(0.0)
    standing.hears(4, 1.0)
    assert standing.next(1.0 + SILENT_S) is Step.WAIT
    assert standing.next(20.0 + SILENT_S, late_s=19.0) is Step.WAIT
    assert standing.next(20.1 + SILENT_S) is Step.TAKE_OVER
    assert standing.term == 5
    assert standing.next(21.0 + SILENT_S) is Step.WAIT


def test_an_instance_that_was_never_seen_is_waited_for_longer():
    standing = Succession(0.0)
    assert standing.next(UNSEEN_S) is Step.WAIT
    assert standing.next(UNSEEN_S + 0.1) is Step.TAKE_OVER


@pytest.mark.parametrize(
    ("term", "has_followers", "step"),
    [(4, True, Step.CLAIM), (4, False, Step.GIVE_WAY), (6, True, Step.GIVE_WAY)],
    ids=["workers came", "nobody came", "the other took them back"],
)
def test_when_the_other_is_heard_again_the_higher_term_stays_if_anybody_follows_it(term, has_followers, step):
    standing = Succession(0.0)
    standing.hears(4, 0.0)
    standing.next(SILENT_S + 1)
    standing.hears(term, SILENT_S + 2)
    assert standing.next(SILENT_S + 2, has_followers=has_followers) is step


def test_a_worker_goes_to_whoever_answers_first_and_hears_no_other():
    follows = Allegiance(["a", "b"], 0.0)
    assert follows.hears("a", 0.0)
    assert not follows.hears("b", 1.0), "it was not asked"
    assert follows.asked(SILENT_S) == []
    assert follows.asked(SILENT_S + 0.1) == ["b"]
    assert follows.hears("b", SILENT_S + 0.2)
    assert not follows.hears("a", SILENT_S + 0.3)
    assert follows.address == "b"


def test_a_worker_stays_where_it_is_when_its_own_speaks_first_and_goes_where_that_sends_it():
    follows = Allegiance(["a", "b"], 0.0)
    assert follows.hears("a", 0.0)
    follows.asked(SILENT_S + 0.1)
    assert follows.hears("a", SILENT_S + 0.2)
    assert not follows.hears("b", SILENT_S + 0.3)
    follows.sent_on("c", 9.0)
    assert follows.address == "c"
    assert follows.asked(9.0 + SILENT_S + 0.1) == ["a", "b"]
    follows.sent_on("", 20.0)
    assert follows.address == "a"


def test_who_comes_after_a_takeover_asks_all_at_once_and_has_to_wait_for_no_silence():
    follows = Allegiance(["a", "b"], 0.0)
    assert follows.asked(0.5) == ["b"]
    assert follows.hears("b", 0.6)
    assert follows.address == "b"
    assert follows.asked(1.0) == []
    assert not follows.hears("a", 1.1)


def arrivals(chance, until_s):
    return [Arrival(chance.uniform(0, until_s), chance.randrange(1, 40), chance.randrange(1, 300)) for _ in range(16)]


@pytest.mark.parametrize("kind", ["dead", "asleep"])
def test_a_coordinator_that_only_slept_finds_that_it_is_superseded_and_nobody_obeys_it(kind):
    blows = [Blow(1.0, FIRST, kind, 12.0)]
    report, world = stormed(STORMY, COSTS, arrivals(random.Random(1), 20), blows, 1)
    assert not report.failed, report.failed
    assert world.num_taken_over == 1
    assert {worker.life.term for worker in world._workers.values()} == {1}
    assert world._standing_by.coordinator.has_workers


def test_one_that_takes_over_while_only_it_does_not_hear_the_other_gives_way():
    blows = [Blow(1.0, FIRST, "cut", 8.0)]
    report, world = stormed(STORMY, COSTS, arrivals(random.Random(1), 20), blows, 1)
    assert not report.failed, report.failed
    assert world.num_taken_over == 1
    assert world._standing_by.coordinator is None
    assert {worker.life.term for worker in world._workers.values()} == {0}


@pytest.mark.parametrize("seed", mostly_slow(range(NUM_SEEDS)))
def test_whatever_happens_to_two_coordinators_every_request_gets_its_tokens_once(seed):
    """That each is the right one, and comes once, the simulation itself asserts."""
    chance = random.Random(seed)
    blows, at_s = [], 0.0
    for _ in range(5):
        at_s += chance.uniform(0.5, 8)
        address, kind = chance.choice([FIRST, SECOND]), chance.choice(["dead", "asleep", "cut"])
        blows.append(Blow(at_s, address, kind, chance.uniform(0.5, 10)))
    report, world = stormed(STORMY, COSTS, arrivals(chance, at_s), blows, seed)
    assert not report.failed, report.failed
    assert all(len(addresses) == 1 for addresses in world.said.values()), dict(world.said)
