"""The quick waves decide as the plain ones do, to the bit, whatever lands when."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings

import msi.simulator.instance
from msi.experts.batches import WaveBatch
from msi.experts.waves import Waves
from msi.simulator.clock import run_virtual
from tests import plain_waves
from tests.everyday import mostly_slow, thorough
from tests.test_simulated_pipeline import storms, weather


class Both:
    """Quick and plain waves that are told the same and must answer the same."""

    def __init__(self, **options):
        self.quick, self.plain = Waves(**options), plain_waves.Waves(**options)
        self.num_decisions = 0

    @property
    def landings(self):
        return [
            lambda seat, *rest, lane=lane: self.landed(seat, lane, *rest) for lane in range(len(self.quick.landings))
        ]

    @property
    def counters(self):
        return self.quick.counters

    @property
    def wait_s(self):
        return self.quick.wait_s

    def __getattr__(self, name):
        def ask(*args, **options):
            quick, plain = getattr(self.quick, name)(*args, **options), getattr(self.plain, name)(*args, **options)
            assert quick == plain, f"{name}{args}: {quick}, not {plain}"
            assert self.quick.counters == self.plain.counters
            assert self.quick.wait_s == self.plain.wait_s
            self.num_decisions += 1
            return quick

        return ask


class Seat:
    """An attention node as an expert node sees it: what it sends in each lane, one unanswered at a time."""

    def __init__(self, num_lanes, chance):
        self.seqs = [chance.choice([0, 0, 5])] * num_lanes
        self.is_away = [False] * num_lanes  # its rows are unanswered
        self.next_at = [0.0] * num_lanes
        self.pace_s = chance.choice([1.0, 1.0, 1.0, 10.0])


class Weather:
    """A random life of one expert node.

    Attributes:
        calm: how rarely anything else happens than that everybody lands in step.
        depth: batches that the device may have.
    """

    def __init__(self, seed: int) -> None:
        chance = self.chance = random.Random(seed)
        self.num_layers, self.num_lanes = chance.randint(1, 5), chance.randint(1, 4)
        self.calm = chance.choice([1.0, 0.999, 0.98, 0.8])
        self.empty = chance.choice([0.0, 0.0, 0.1, 0.7])
        self.jitter = chance.choice([0.0, 0.1, 0.9])
        self.both = Both(
            num_layers=self.num_layers, num_lanes=self.num_lanes, default_wait_s=1.0,
            min_wait_s=chance.choice([0.0, 0.0, 0.5]),
        )  # fmt: skip
        self.depth = chance.choice([1, 1, 2])
        self.now = 0.0
        self.free_at = 0.0
        self.seats: dict[int, Seat] = {}
        for seat in chance.sample(range(10), chance.randint(1, 6)):
            self.join(seat)

    def join(self, seat):
        self.seats[seat] = Seat(self.num_lanes, self.chance)
        self.both.connect(seat, rank=seat)

    def step(self):
        """The next that happens: something lands, or the device is free, or a timer ends."""
        chance = self.chance
        if chance.random() > self.calm:
            self.disturb()
        due = [
            (at, seat, lane)
            for seat, one in self.seats.items()
            for lane, at in enumerate(one.next_at)
            if not one.is_away[lane]
        ]
        at, seat, lane = min(due, default=(float("inf"), 0, 0))
        deadline = self.both.deadline()
        device_at = max(self.free_at, max(self.now, deadline))
        if at <= device_at and due:
            self.now = max(self.now, at)
            self.land(seat, lane)
        elif device_at < float("inf"):
            self.now = device_at
        self.serve()

    def land(self, seat, lane):
        chance, one = self.chance, self.seats[seat]
        seq = one.seqs[lane]
        is_last_layer = seq % self.num_layers == self.num_layers - 1
        more = not is_last_layer or chance.random() < 0.8
        num_rows = 0 if chance.random() < self.empty else chance.randint(1, 9)
        one.seqs[lane] = seq + 1
        one.is_away[lane] = num_rows > 0
        one.next_at[lane] = self.now + self.think(one) * (1 if more else chance.choice([1, 30]))
        self.both.landed(seat, lane, seq, num_rows, more, self.now)

    def think(self, one):
        return one.pace_s * (1 + self.jitter * self.chance.uniform(-1, 1)) * self.chance.choice([1, 1, 1 + 1e-10])

    def serve(self):
        is_busy = self.now < self.free_at
        if is_busy and (self.depth == 1 or self.now < self.free_at - 0.5):
            return
        batch: WaveBatch | None = self.both.take(self.now, is_busy)
        if batch is None:
            return
        self.free_at = max(self.free_at, self.now) + 0.5 * (1 + self.jitter * self.chance.uniform(-1, 1))
        for seat, seq, _ in batch.rows:
            one = self.seats[seat]
            if one.seqs[batch.lane] == seq + 1:  # else it has given up what this answers
                one.is_away[batch.lane] = False
                one.next_at[batch.lane] = self.free_at + self.think(one)

    def disturb(self):
        """Somebody stalls, gives up a pass, goes or comes; or the device stands still."""
        chance = self.chance
        what = chance.randrange(5)
        seat = chance.choice([*self.seats, -1])
        lane = chance.randrange(self.num_lanes)
        if what == 0 and seat >= 0:
            self.seats[seat].next_at[lane] += chance.choice([1.0, 2.5, 20.0])
        elif what == 1 and seat >= 0:
            one = self.seats[seat]
            one.seqs[lane] = -(-one.seqs[lane] // self.num_layers) * self.num_layers
            one.is_away[lane], one.next_at[lane] = False, self.now + chance.choice([0.0, 3.0])
        elif what == 2 and seat >= 0:
            del self.seats[seat]
            self.both.disconnect(seat, self.now)
        elif what == 3 and len(self.seats) < 8:
            self.join(chance.choice([seat for seat in range(10) if seat not in self.seats]))
        else:
            self.free_at = max(self.free_at, self.now) + chance.choice([1.0, 5.0])


@pytest.mark.parametrize("first", [*mostly_slow(range(0, 600, 100)), *map(thorough, range(600, 2000, 100))])
def test_whatever_happens_they_decide_the_same(first):
    for seed in range(first, first + 100):
        weather = Weather(seed)
        for _ in range(400):
            weather.step()
        assert weather.both.num_decisions > 400


@settings(max_examples=40, deadline=None)
@given(storms())
def test_in_every_storm_they_decide_the_same(storm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(msi.simulator.instance, "Waves", Both)
        run_virtual(weather(*storm))
