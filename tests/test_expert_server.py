"""How many batches an expert node's device has at a time, and which."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from msi.experts.server import ExpertServer
from msi.experts.waves import Waves

LAYERS = 4


class Answers:
    """A link that notes what it is to answer."""

    def __init__(self):
        self.answers = []
        self.refusals = []
        self.lock = threading.Lock()

    def take(self):
        pass

    def answer(self, lane, answers, compute_s):
        self.answers += [(lane, *one) for one in answers]

    def refuse(self, seat, lane, seq, reason):
        self.refusals.append((lane, seat, seq))


class Compute:
    """Keeps what it is to run until told that it is through."""

    def __init__(self, depth):
        self.depth = depth
        self.out = []

    def attach(self, seat, out_rows):
        pass

    def run(self, batch, ticket):
        self.out.append((batch, ticket))

    def follow(self, seen):
        self.seen = seen

    def outcome(self):
        return 0.001, self.error

    @property
    def lanes(self):
        return [batch.lane for batch, _ in self.out]

    @property
    def batches(self):
        return [(batch.lane, batch.layer, batch.rows, batch.is_alone) for batch, _ in self.out]

    def finish(self, error=None):
        _, ticket = self.out.pop(0)
        self.error = error
        self.seen(ticket)


class Node:
    """An expert node of two seats with a device of some depth, at a time that the test says."""

    def __init__(self, depth, num_lanes=4):
        self.now = 0.0
        self.link, self.compute = Answers(), Compute(depth)
        self.waves = Waves(num_layers=LAYERS, num_lanes=num_lanes, default_wait_s=1.0, min_wait_s=1.0)
        self.server = ExpertServer(self.link, self.waves, self.compute, clock=lambda: self.now)
        for seat in (0, 1):
            self.server.joined(seat, seat, None)

    def land(self, lane, seats=(0, 1), seq=0):
        for seat in seats:
            if self.server.told(lane)(seat, seq, 2, True, self.now):
                self.server.all_landed()


@pytest.mark.parametrize(("depth", "lanes"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])])
async def test_as_many_batches_are_out_as_the_device_is_deep(depth, lanes):
    node = Node(depth)
    for lane in range(4):
        node.land(lane)
    assert node.compute.lanes == lanes
    node.compute.finish()
    assert node.compute.lanes == [*lanes[1:], depth]
    assert node.link.answers == [(0, 0, 0, 2), (0, 1, 0, 2)]


async def test_the_second_place_is_never_given_by_time():
    node = Node(2)
    node.land(0)
    node.land(1, seats=(0,))
    node.now = 5.0  # long after the wave of lane 1 has waited enough
    node.land(2, seats=(0,))  # makes it look
    assert node.compute.lanes == [0]
    node.land(3)
    assert node.compute.lanes == [0, 3]
    node.compute.finish()
    assert node.compute.lanes == [3]  # still busy, so nobody is evicted or left behind
    node.compute.finish()
    assert node.compute.lanes == [1]  # a free device takes what time has closed
    assert node.waves.counters.starts == 3


async def test_who_lands_while_the_device_is_busy_keeps_its_place():
    node = Node(2)
    for lane in (0, 1):
        node.land(lane)
        node.compute.finish()
    node.land(0, seq=1)
    node.land(1, seats=(0,), seq=1)
    node.now = 5.0
    node.land(1, seats=(1,), seq=1)
    assert node.compute.lanes == [0, 1]
    assert node.waves.counters.evictions == 0
    assert [len(batch.rows) for batch, _ in node.compute.out] == [2, 2]


async def test_a_batch_that_fails_runs_again_seat_by_seat_whatever_is_out_beside_it():
    node = Node(2)
    node.land(0)
    node.land(1)
    node.compute.finish(ValueError("rows of seat 1"))
    assert [(batch.lane, batch.rows) for batch, _ in node.compute.out] == [
        (1, ((0, 0, 2), (1, 0, 2))), (0, ((0, 0, 2),)),
    ]  # fmt: skip
    node.compute.finish()
    node.compute.finish()
    node.compute.finish(ValueError("rows of seat 1"))
    assert node.link.answers == [(1, 0, 0, 2), (1, 1, 0, 2), (0, 0, 0, 2)]
    assert node.link.refusals == [(0, 1, 0)]


async def test_a_server_that_is_closed_starts_nothing():
    node = Node(2)
    node.land(0)
    node.server.close()
    node.land(1)
    node.compute.finish()
    await asyncio.sleep(0)
    assert node.compute.lanes == []


async def test_rows_that_land_again_run_next_and_alone_and_the_wave_takes_no_notice():
    node = Node(1)
    node.land(0)
    node.compute.finish()
    node.land(1)  # on the device
    node.land(2)  # ready
    node.land(0, seats=(1,), seq=1)
    assert node.server.landed_again(0, 0, 0, 3)
    node.server.all_landed()
    node.compute.finish()
    assert node.compute.batches == [(0, 0, ((0, 0, 3),), True)]
    node.compute.finish()
    assert node.compute.lanes == [2]
    node.land(0, seats=(0,), seq=1)
    node.compute.finish()
    assert node.compute.batches == [(0, 1, ((0, 1, 2), (1, 1, 2)), False)]
    assert (0, 0, 0, 3) in node.link.answers
    assert node.waves.counters.evictions == 0


async def test_a_batch_that_cannot_be_launched_is_refused_to_each_of_its_seats_and_others_go_on():
    node = Node(1)
    run, calls = node.compute.run, []

    def fails_once(batch, ticket):
        calls.append(ticket)
        if len(calls) == 1:
            raise ValueError("no memory")
        run(batch, ticket)

    node.compute.run = fails_once
    node.land(0)
    assert node.link.refusals == [(0, 0, 0), (0, 1, 0)]
    node.land(1)
    assert node.compute.lanes == [1]


async def test_what_cannot_be_taken_as_it_lands_is_refused():
    node = Node(1)
    node.server.not_taken(1, 2, 7, ValueError("what is this"))
    assert node.link.refusals == [(2, 1, 7)]


async def test_a_server_that_is_closed_is_held_by_no_timer_of_a_wave_that_waited():
    node = Node(1)
    node.land(0, seats=(0,))
    node.now = 0.2
    node.server.left(1)  # an earlier deadline than before, or none
    node.land(1, seats=(0,))
    await asyncio.sleep(0)  # timers are set on the loop
    node.server.close()
    gone = weakref.ref(node.server)
    del node
    gc.collect()
    assert gone() is None
