"""Expert workers that are late or slow: their rows go to replicas, within bounds; what they answer late is dropped."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from msi.net.hedging import (
    FIRST_ASIDE_S,
    MIN_EXCHANGES,
    MOST_ASIDE_S,
    MOST_AT_ONCE,
    SHARE,
    SLOW_FACTOR,
    TAIL_FACTOR,
    Hedging,
    slow_nodes,
)
from msi.net.late_nodes import SLOW_EVERY_S, SLOW_LOOKS
from tests.test_links import packs_again, replicated
from tests.test_lost_experts import ENDS_WITHIN_S, Streams, checkpoint, local, undisturbed  # noqa: F401
from tests.waiting import until


def test_late_is_what_takes_much_longer_than_exchanges_do_and_never_before_its_time():
    hedging = Hedging(after_s=0.1)
    assert not hedging.is_late(0.09, [])
    assert hedging.is_late(0.1, [])
    slow_network = [0.05] * 99 + [2.0]
    assert not hedging.is_late(0.14, slow_network)
    assert hedging.is_late(0.05 * TAIL_FACTOR + 0.01, slow_network)
    assert not Hedging(after_s=0.0).is_late(100.0, []), "off"


def test_turns_that_are_packed_again_are_a_bounded_share():
    hedging = Hedging(after_s=0.1)
    assert [hedging.may_hedge(0) for _ in range(MOST_AT_ONCE + 1)] == [True] * MOST_AT_ONCE + [False]
    num_turns = round(10 / SHARE)
    assert sum(hedging.may_hedge(num_turns) for _ in range(20)) == 10
    assert sum(hedging.may_hedge(100 * num_turns) for _ in range(100)) == MOST_AT_ONCE, "what was not used is not kept"


def test_whoever_is_late_again_and_again_is_set_aside_for_longer_and_longer():
    hedging, now = Hedging(after_s=0.1), 100.0
    times = []
    for _ in range(10):
        times.append(hedging.set_aside([1], now))
        assert hedging.aside == (1,)
        assert not hedging.take_back(now + times[-1] - 0.01)
        now += times[-1]
        assert hedging.take_back(now)
        assert hedging.aside == ()
    assert times[:4] == [FIRST_ASIDE_S, 2 * FIRST_ASIDE_S, 4 * FIRST_ASIDE_S, 8 * FIRST_ASIDE_S]
    assert times[-1] == MOST_ASIDE_S
    assert hedging.set_aside([1], now + 3 * MOST_ASIDE_S) == FIRST_ASIDE_S, "after a long while it begins anew"
    hedging.forget(1)
    assert hedging.aside == ()
    assert hedging.set_aside([1], now + 4 * MOST_ASIDE_S) == FIRST_ASIDE_S
    assert hedging.num_set_aside == 12


def test_a_slow_node_that_takes_some_seconds_to_be_known_again_is_set_aside_for_longer_too():
    hedging = Hedging(after_s=0.1)
    assert hedging.set_aside([1], 0.0) == FIRST_ASIDE_S
    assert hedging.set_aside([1], FIRST_ASIDE_S + SLOW_LOOKS * SLOW_EVERY_S) == 2 * FIRST_ASIDE_S


def test_slow_is_who_takes_several_times_as_long_as_the_others():
    usual = [0.001] * MIN_EXCHANGES
    slow = [0.001 * SLOW_FACTOR] * MIN_EXCHANGES
    assert slow_nodes({0: usual, 1: slow, 2: usual}) == [1]
    assert slow_nodes({0: usual, 1: usual, 2: usual}) == []
    assert slow_nodes({0: usual, 1: slow[1:]}) == [], "too few to tell"
    assert slow_nodes({1: slow}) == [], "nobody is slow alone"
    assert slow_nodes({0: [0.0] * MIN_EXCHANGES, 1: slow}) == []


async def test_rows_of_a_late_answer_go_to_a_replica_in_the_same_pass_and_the_answer_is_dropped():
    told = []
    pair = await replicated(hedge_after_s=0.03, use_aside=lambda: told.append(pair.link.late.hedging.aside))
    passing = pair.exchange(0, (1, 1), num_layers=2)
    await pair.landed(0)
    await pair.landed(1)
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    await packs_again(pair, 0, 1, (2, 0))
    assert told == [(1,)], "before rows are packed again"
    assert await pair.landed(0) == [(0, 0, 0, 2, "again")]
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)  # at last
    await until(lambda: pair.link.counters.dropped["stale"])
    assert pair.gates.opened[0] == []
    pair.nodes[0].answer(0, [(0, 0, 2)], compute_s=0.0)
    await until(lambda: pair.gates.opened[0] == [1])
    pair.gates.pack(0, (2, 0))
    pair.link.packed(0, 2)
    assert await pair.landed(1) == [(0, 0, 1, 0, True)], "it sees that there is nothing for it"
    pair.nodes[0].answer(0, [(0, 1, 2)], compute_s=0.0)
    await asyncio.wait_for(passing, 5)
    assert not pair.losses
    assert (pair.link.counters.hedges, pair.link.counters.packed_again) == (1, 0)
    await pair.stop()


async def test_an_answer_that_comes_while_its_turn_is_about_to_be_packed_again_cancels_that(monkeypatch):
    pair = await replicated(hedge_after_s=0.03)
    passing = pair.exchange(0, (1, 1))
    await pair.landed(0)
    await pair.landed(1)
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    waiting = pair.link.turns.waiting

    def comes_first(num_turns):
        if not waiting[0] or pair.link.counters.hedges_cancelled:
            return False
        asyncio.get_running_loop().call_soon(waiting.__setitem__, 0, waiting[0])
        waiting[0] = 0  # as the thread that computes leaves it
        return True

    monkeypatch.setattr(pair.link.late.hedging, "may_hedge", comes_first)
    await until(lambda: pair.link.counters.hedges_cancelled)
    assert (pair.link.counters.hedges, pair.gates.again) == (0, [])
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)
    await asyncio.wait_for(passing, 5)
    assert not pair.losses
    await pair.stop()


async def test_whoever_is_set_aside_gets_rows_all_the_same_once_nobody_else_is_left():
    pair = await replicated(hedge_after_s=0.03)
    assert pair.link.late.avoided == ()
    pair.link.late.hedging.set_aside([1], 0.0)
    assert pair.link.late.avoided == (1,)
    pair.link.drop(0, "it was killed")
    assert pair.link.late.avoided == (0,), "not to both of them, of which one would never take them"
    await pair.stop()


@pytest.mark.parametrize("options", [{"hedge_after_s": 0.0}, {"missing": lambda nodes: "experts" if nodes else ""}])
async def test_where_it_is_off_or_nobody_holds_the_same_a_late_answer_is_waited_for(options):
    pair = await replicated(**{"hedge_after_s": 0.01} | options)
    passing = pair.exchange(0, (1, 1))
    await pair.landed(0)
    await pair.landed(1)
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    await asyncio.sleep(0.1)
    assert not pair.gates.again
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)
    await asyncio.wait_for(passing, 5)
    assert pair.link.late.hedging.aside == ()
    await pair.stop()


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_streams_go_on_unchanged_while_an_expert_worker_with_replicas_is_stopped(checkpoint):  # noqa: F811
    async with local(checkpoint, "shm", expert_redundancy=1) as engine:
        expected = await undisturbed(engine)
        streams = Streams(engine)
        await asyncio.wait_for(streams.reached.wait(), ENDS_WITHIN_S)
        os.kill(engine.pids["expert-1"], signal.SIGSTOP)
        had = list(map(len, streams.tokens))
        try:
            await until(lambda: streams.ended.done() or min(map(len, streams.tokens)) >= min(had) + 10, ENDS_WITHIN_S)
        finally:
            os.kill(engine.pids["expert-1"], signal.SIGCONT)
        assert await asyncio.wait_for(streams.ended, ENDS_WITHIN_S) == list(expected)
        for _ in range(10 * ENDS_WITHIN_S):
            if await hedges(engine):  # which are told with heartbeats
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("nothing was packed again")


async def hedges(engine):
    workers = (await engine.stats()).workers
    return sum(one.status.attention.hedges for one in workers if one.status.attention is not None)
