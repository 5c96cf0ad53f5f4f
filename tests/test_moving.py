"""Requests that go on at another attention worker while theirs lives: which, when, and that nobody else notices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as with_these
from hypothesis import strategies as st

from msi.control.move_messages import Released
from msi.control.moving import (
    MOST_MOVES,
    MOVES_AT_ONCE,
    PATIENCE_S,
    RESTS_S,
    Laden,
    Move,
    Running,
    after,
    best_move,
    goes_on_after_s,
)
from msi.control.prediction import Line
from msi.control.request_routing import Router
from msi.planner.stage_costs import ConstantCosts
from msi.settings import AttentionBalance
from msi.simulator.deployment import Fault
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from msi.types import Progress
from tests.everyday import thorough
from tests.test_resumption import ASKED, FAULT, FLOW, NAMES, Storm, request
from tests.test_simulator import SMALL

CAPACITY = 10_000


def running(name="r", load=1.0, num_context=100, num_left=100.0, num_tokens=200):
    return Running(name, load, num_context, num_left, num_tokens)


def laden(name, load, num_free=4, room=CAPACITY, moving=()):
    return Laden(name, load, int(load), num_free, room, tuple(moving))


def step_s(worker_id, load):
    return 0.010 * load * (3 if worker_id == "slow" else 1)


def again_s(num_context):
    return num_context / 1000


def moved_s(source, target, num_context):
    return again_s(num_context)


# -- the decision ----------------------------------------------------------------------------------------------------


def test_a_request_moves_from_where_steps_take_longest_to_where_they_take_least():
    ours = (running("short", num_left=10.0), running("long"), running("wide", num_context=4000))
    found = best_move([laden("a", 6, moving=ours), laden("b", 3), laden("c", 1)], step_s, moved_s, 0.25)
    # a step of 60 ms becomes one of 20 ms; 5 others save 10 ms each, and one loses 10 ms; 2 wait for 100 tokens
    assert found is not None
    assert replace(found, saved_s=0.0) == Move("long", "a", "c", 0.0)
    assert found.saved_s == pytest.approx(100 * (0.040 + 5 * 0.010 - 0.010) - 2 * 0.1)


def test_a_slow_worker_gives_requests_away_though_it_has_no_more_than_others():
    found = best_move([laden("slow", 2, moving=[running()]), laden("b", 2)], step_s, moved_s, 0.25)
    assert found is not None
    assert (found.source, found.target) == ("slow", "b")


@pytest.mark.parametrize(
    "workers",
    [
        [laden("a", 3, moving=[running()]), laden("b", 2)],  # it would only change places
        [laden("a", 5, moving=[running()]), laden("b", 3)],  # 5 steps to 4: by less than the threshold of 0.3
        [laden("a", 9, moving=[running(num_left=1.0)]), laden("b", 4)],  # it ends before that pays
        [laden("a", 9, moving=[running(num_tokens=500)]), laden("b", 1, room=400)],
        [laden("a", 9, moving=[running()]), laden("b", 1, num_free=0)],
        [laden("a", 9), laden("b", 1)],  # none of its may move
        [laden("a", 9, moving=[running()])],
        [],
    ],
)
def test_it_stays_where_moving_gains_too_little_or_cannot_be(workers):
    assert best_move(workers, step_s, moved_s, 0.3) is None


def test_what_has_moved_counts_there_and_does_not_move_back():
    ours, workers = running(load=2.0), [laden("a", 6, moving=[running("other")]), laden("b", 1)]
    workers[0] = replace(workers[0], running=(ours, running("other")))
    assert after(workers, Move("r", "a", "b", 1.0)) == [
        Laden("a", 4.0, 5, 5, CAPACITY + 200, (running("other"),)), Laden("b", 3.0, 2, 3, CAPACITY - 200),
    ]  # fmt: skip


@pytest.mark.parametrize(("num_context", "sent_per_s", "expected_s"), [
    (1000, 0.0, 1.0),  # not known yet
    (1000, 1e5, 992 / 1e5 + 0.008),  # 62 blocks of 16 tokens, and what follows them is computed
    (1000, 500.0, 1.0),  # slower than computing
    (993, 1e5, 992 / 1e5 + 0.001),  # its last token is always computed
    (992, 1e5, 976 / 1e5 + 0.016),
    (16, 1e5, 0.016),  # without a full block
], ids=["not measured", "sent", "slow link", "last token", "full to the end", "short"])  # fmt: skip
def test_going_on_elsewhere_takes_the_less_of_sending_and_computing_again(num_context, sent_per_s, expected_s):
    assert goes_on_after_s(num_context, again_s, sent_per_s) == pytest.approx(expected_s)


@with_these(st.lists(st.floats(0.5, 4.0), min_size=1, max_size=12), st.sampled_from([0.0, 0.25, 1.0]))
def test_moves_come_to_an_end_with_loads_that_are_even(loads, threshold):
    moving = [running(f"r{index}", load, num_left=1e6) for index, load in enumerate(loads)]
    a = Laden("a", sum(loads), len(loads), 100, CAPACITY, tuple(moving))
    workers = [a, Laden("b", 0.0, 0, 100, CAPACITY)]
    for _ in range(len(loads) + 1):
        move = best_move(workers, step_s, moved_s, threshold)
        if move is None:
            break
        assert (move.source, move.target) == ("a", "b")
        workers = after(workers, move)
    assert move is None
    assert all(workers[0].load <= (1 + threshold) * (workers[1].load + one.load) + 1e-9 for one in workers[0].running)


# -- the router ------------------------------------------------------------------------------------------------------


def loaded(count=10, **options):
    """A router that has measured, with requests at "a" alone, and now "b" has come."""
    router = Router(**options)
    for index in range(count):
        assert router.add(request(f"r{index}", max_tokens=1000), b"c", 0.0) is None
    router.route({"a": CAPACITY}, now=0.0)
    for at in range(5):
        router.progress("a", [Progress(f"r{index}", (at,)) for index in range(count)], now=1.0 + at)
        router.due_moves((), 1.0 + at)
    router.route({"a": CAPACITY, "b": CAPACITY}, now=6.0)
    return router


def released(router, one, now=6.0, **changes):
    told = Released("a", 0, one.request.request_id, one.release, len(one.token_ids), one.num_scored)
    return router.released(replace(told, **changes), now)


BOTH = {"a": CAPACITY, "b": CAPACITY}


def test_as_many_move_at_once_as_may_and_each_goes_on_where_it_was_to_with_what_its_client_has():
    router = loaded()
    asked = router.due_moves((), 6.0)
    assert len(asked) == MOVES_AT_ONCE
    assert len({one.release for one in asked}) == MOVES_AT_ONCE
    assert router.due_moves((), 6.1) == []
    first = asked[0]
    assert router.route(BOTH, now=6.2) == []  # not before it is let go
    assert released(router, first) == {}
    ((worker, told),) = router.route(BOTH, now=6.3)
    assert (worker, told.request_id, told.output_token_ids) == ("b", first.request.request_id, (0, 1, 2, 3, 4))
    assert told.num_resumptions == 1
    assert router.counters["moves"] == 1
    assert router.counters["resumptions"] == 0
    assert router.progress("a", [Progress(told.request_id, (7,))], 6.4) == {}  # what a pass in flight had of it
    assert router.progress("b", [Progress(told.request_id, (5,))], 6.5) == {b"c": [Progress(told.request_id, (5,))]}
    for one in asked[1:]:
        released(router, one)
    assert {worker for worker, _ in router.route(BOTH, now=6.6)} == {"b"}
    for one in asked[1:]:
        router.progress("b", [Progress(one.request.request_id, (5,))], 6.7)
    assert router.due_moves((), 6.8) == []  # six and four


def test_what_costs_too_much_to_compute_again_moves_where_its_blocks_can_be_sent():
    def due_moves(sent_per_s):
        router = loaded()
        for one in router._requests.values():
            one.request = request(one.name, (1,) * 517, max_tokens=1000)  # with its answer 32 blocks and 10 tokens
        router._service.meters.prefill = Line()
        for num_tokens in (1, 2000):
            router._service.meters.prefill.add(num_tokens, num_tokens)
        return len(router.due_moves((), 6.0, sent_per_s))

    assert due_moves({}) == 0
    assert due_moves({"a": 1e9}) == 0, "the other one takes none"
    assert due_moves({"a": 0.0, "b": 1e9}) == 0, "not measured where they are"
    assert due_moves({"a": 0.1, "b": 0.0}) == 0, "sending takes as long"
    assert due_moves({"a": 1e9, "b": 0.0}) == MOVES_AT_ONCE


def test_nothing_moves_where_that_is_off():
    router = loaded(balance=AttentionBalance("off"))
    assert router.due_moves((), 6.0) == []
    assert router.due_moves(["a"], 6.0) == []


def test_a_worker_that_does_not_answer_is_asked_again_by_the_same_number():
    router = loaded()
    asked = {one.request.request_id: one.release for one in router.due_moves((), 6.0)}
    again = {one.request.request_id: one.release for one in router.due_moves((), 6.1 + PATIENCE_S)}
    assert again == asked


def test_what_ended_or_was_cancelled_or_is_another_of_that_name_does_not_move():
    router = loaded()
    gone, other, ended, _ = router.due_moves((), 6.0)
    names = [one.request.request_id for one in (gone, other, ended)]
    assert router.cancel(b"c", names[0]) == ("a", names[0])
    assert router.cancel(b"c", names[1]) == ("a", names[1])
    router.add(request(names[1]), b"c", 6.1)
    router.route({"a": CAPACITY}, now=6.2)
    router.progress("a", [Progress(names[2], (9,), "stop")], 6.3)
    for one in (gone, other, ended):
        assert released(router, one) == {}
    assert router.route(BOTH, now=6.4) == []
    assert router.counters["moves"] == 0


def test_where_words_were_lost_it_is_resumed_as_if_its_worker_was():
    router = loaded(max_resumptions=1)
    one = router.due_moves((), 6.0)[0]
    assert released(router, one, num_tokens=6) == {}
    ((_, told),) = router.route(BOTH, now=6.3)
    assert told.output_token_ids == (0, 1, 2, 3, 4)
    assert (router.counters["moves"], router.counters["resumptions"]) == (0, 1)


def test_its_worker_may_die_before_it_says_so_and_the_other_one_after_it_has():
    router = loaded(max_resumptions=1)
    first, second, *_ = router.due_moves((), 6.0)
    released(router, first)
    router.route(BOTH, now=6.1)
    assert router.worker_lost("a", "why", 6.2) == {}
    assert {worker for worker, _ in router.route({"b": CAPACITY}, now=6.3)} == {"b"}
    assert released(router, second) == {}
    ends = router.worker_lost("b", "why", 6.4)[b"c"]
    sentences = {one.request_id: one.failure.message for one in ends}
    assert sentences[second.request.request_id].endswith("it had been resumed 1 time before, and is no more")
    assert first.request.request_id not in sentences  # moves are no losses


def test_a_request_moves_so_often_and_rests_between():
    router, at = loaded(), 6.0
    for _ in range(MOST_MOVES):
        (one,) = (one for one in router._requests.values() if one.request.request_id == "r0")
        one.num_moves += 1
    assert "r0" not in {one.request.request_id for one in router.due_moves((), at)}
    router = loaded()
    for one in router._requests.values():
        one.given_at = at
    assert router.due_moves((), at + RESTS_S / 2) == []


def test_what_runs_on_a_worker_that_leaves_moves_while_others_can_begin_with_it():
    router = loaded(2, max_num_seqs=1)
    router.route({"b": CAPACITY}, now=6.0)
    (first,) = router.due_moves(["a"], 6.0)[:1]
    released(router, first)
    assert [worker for worker, _ in router.route({"b": CAPACITY}, now=6.1)] == ["b"]
    router.progress("b", [Progress(first.request.request_id, (5,))], 6.2)
    assert router.due_moves(["a"], 20.0) == []  # the other one stays until there is a place


# -- storms ----------------------------------------------------------------------------------------------------------


class MovingStorm(Storm):
    """Workers are told to let requests go, and some of what they say comes late, or never."""

    def __init__(self, most):
        super().__init__(most)
        self.told = []  # Released, on their way

    def let_go(self, name, which):
        """Asks for a request at a worker, wherever it is in its life."""
        there = [one for one in self.router._requests.values() if one.worker_id == name]
        if name not in self.workers or not there:
            return
        one = there[which % len(there)]
        one.release = one.release or 1 + len(self.told)
        one.moves_to = "ab"[which % 2]
        sequence = self.workers[name].scheduler.find(one.request.request_id)
        if sequence is None:
            return  # it has been let go, and that is on its way
        num_tokens = len(sequence.tokens) - len(sequence.request.prompt_token_ids)
        self.workers[name].scheduler.cancel(one.request.request_id)
        self.told.append(Released(name, 0, one.request.request_id, one.release, num_tokens, sequence.num_scored))

    def hear(self):
        told, self.told = self.told, []
        for one in told:
            self.tell(self.router.released(one, 0.0))

    def act(self, action, *rest):
        match action:
            case "move":
                self.let_go(*rest)
            case "hear":
                self.hear()
            case "crash":
                self.lose(*rest)  # as by a kill: nobody is suspected, and all are answered
            case _:
                super().act(action, *rest)

    def lose(self, name, has_crashed=False):
        super().lose(name, has_crashed)
        self.told = [one for one in self.told if one.worker_id != name]


MOVE = st.tuples(st.just("move"), NAMES, st.integers(0, 11))
STORMS = st.lists(st.one_of(FLOW, FLOW, MOVE, st.just(("hear",)), ASKED, FAULT), max_size=60)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@with_these(st.lists(ASKED, min_size=1, max_size=6), STORMS)
def test_in_any_storm_of_moves_every_request_ends_once_with_its_own_tokens(asked, actions):
    storm = MovingStorm(100)
    cut_short = storm.live_through([*asked, *actions])
    assert not cut_short or any(action == "cancel" for action, *_ in actions), storm.failed


# -- the whole product -----------------------------------------------------------------------------------------------


class WeighedAttention(ConstantCosts):
    """Steps take a time that grows with their sequences."""

    def attention_s(self, num_tokens, num_context_tokens):
        return 1e-3 + 1e-3 * num_tokens


TWO = replace(SMALL, num_attention=2, num_micro_batches=1, balance=AttentionBalance("auto"))


def duration_s(deployment, arrivals, faults=()):
    """Virtual seconds; that no token is lost, doubled or changed, the simulation itself asserts."""
    report = simulate(deployment, WeighedAttention(0.0, 1e-4, 1e-5), arrivals, faults=faults)
    assert report.num_failed == 0, [one.error for one in report.requests if one.error]
    return report.duration_s


def test_moving_raises_the_throughput_where_a_worker_turns_slow():
    arrivals, faults = [Arrival(0.0, 8, 250)] * 24, [Fault(1.0, "attention-0", "slow", 6.0)]
    stays = duration_s(replace(TWO, balance=AttentionBalance("off")), arrivals, faults)
    assert duration_s(TWO, arrivals, faults) < 0.7 * stays


@pytest.mark.slow
@pytest.mark.parametrize("at_s", [9.5, 10.5, *map(thorough, [10.0, 11.0])])
@pytest.mark.parametrize("worker", ["coordinator", "attention-0", "attention-1"])
def test_a_coordinator_or_a_worker_may_die_amid_moves(worker, at_s):
    """The simulation asserts that every token is the right one, and told once."""
    faults = [Fault(1.0, "attention-0", "slow", 6.0), Fault(at_s, worker, "dead", 0.5)]
    duration_s(TWO, [Arrival(0.0, 8, 250)] * 24, faults)
