"""The rules of waves, by values: events in, batches out."""

import math

import pytest

from msi.experts.batches import WaveBatch
from msi.experts.waves import Waves

LAYERS = 4
W = 1.0


def make_waves(num_seats=3, num_lanes=1, min_wait_s=W) -> Waves:
    waves = Waves(num_layers=LAYERS, num_lanes=num_lanes, default_wait_s=W, min_wait_s=min_wait_s)
    for seat in range(num_seats):
        waves.connect(seat, rank=seat)
    return waves


def land(waves, seat, seq, now, rows=2, more=True, lane=0):
    return waves.landed(seat, lane, seq, rows, more, now)


def batch(layer, *rows, lane=0, alone=False):
    return WaveBatch(lane, layer, rows, alone)


def start_together(waves, seats=(0, 1, 2), now=0.0):
    """All seats land at layer 0 and are taken."""
    for seat in seats:
        land(waves, seat, 0, now)
    assert waves.take(now) is not None


def test_an_empty_lane_gathers_until_every_seat_has_landed():
    waves = make_waves()
    land(waves, 0, 0, 0.0)
    land(waves, 1, 0, 0.1)
    assert waves.take(0.1) is None
    land(waves, 2, 0, 0.2)
    assert waves.take(0.2) == batch(0, (0, 0, 2), (1, 0, 2), (2, 0, 2))


def test_an_empty_lane_gathers_no_longer_than_w():
    waves = make_waves()
    land(waves, 1, 0, 0.0)
    assert waves.take(0.5) is None
    assert waves.deadline() == pytest.approx(W)
    assert waves.take(W) == batch(0, (1, 0, 2))


def test_a_batch_is_ready_when_every_member_has_landed():
    waves = make_waves()
    start_together(waves)
    land(waves, 2, 1, 0.1)
    land(waves, 0, 1, 0.2)
    assert waves.take(0.2) is None
    land(waves, 1, 1, 0.3)
    assert waves.take(0.3) == batch(1, (0, 1, 2), (1, 1, 2), (2, 1, 2))


def test_nothing_for_you_is_not_the_same_as_not_yet_here():
    waves = make_waves()
    start_together(waves)
    land(waves, 0, 1, 0.1)
    land(waves, 1, 1, 0.1, rows=0)
    assert waves.take(0.1) is None
    land(waves, 2, 1, 0.2, rows=0)
    assert waves.take(0.2) == batch(1, (0, 1, 2))


def test_a_member_that_moved_past_is_not_waited_for():
    waves = make_waves()
    start_together(waves)
    for seq in (1, 2):
        land(waves, 0, seq, 0.1, rows=0)
    land(waves, 1, 1, 0.2)
    land(waves, 2, 1, 0.2)
    assert waves.take(0.2) == batch(1, (1, 1, 2), (2, 1, 2))


def test_layers_that_nobody_has_rows_for_are_passed_over():
    waves = make_waves()
    start_together(waves)
    for seat in range(3):
        for seq in (1, 2):
            land(waves, seat, seq, 0.1, rows=0)
        land(waves, seat, 3, 0.2)
    assert waves.take(0.2) == batch(3, (0, 3, 2), (1, 3, 2), (2, 3, 2))


def test_a_missing_member_is_evicted_when_its_time_is_up_and_the_device_takes_the_batch():
    waves = make_waves()
    start_together(waves)
    land(waves, 0, 1, 0.0)
    land(waves, 1, 1, 0.0)
    assert waves.take(W) is None  # a seat in good standing is waited for twice as long
    assert waves.deadline() == pytest.approx(2 * W)
    assert waves.take(2 * W) == batch(1, (0, 1, 2), (1, 1, 2))
    assert waves.counters.evictions == 1


def test_waiting_behind_a_busy_device_costs_nobody_its_place():
    waves = make_waves()
    start_together(waves)
    land(waves, 0, 1, 0.0)
    land(waves, 2, 1, 0.0)
    land(waves, 1, 1, 3 * W)  # late, but the device was not free before
    assert waves.take(3 * W) == batch(1, (0, 1, 2), (1, 1, 2), (2, 1, 2))
    assert waves.counters.evictions == 0


def evict_seat_2(waves):
    """Seats 0 and 1 go on to layer 2 without seat 2, which then lands at layer 1."""
    start_together(waves)
    land(waves, 0, 1, 0.0)
    land(waves, 1, 1, 0.0)
    assert waves.take(2 * W) is not None
    land(waves, 2, 1, 2 * W)


def run_layer(waves, seq, now, seats=(0, 1)):
    for seat in seats:
        land(waves, seat, seq, now)
    return waves.take(now)


def test_rows_out_of_step_wait_until_the_wave_comes_round_and_readmit_their_seat():
    waves = make_waves()
    evict_seat_2(waves)
    now = 2 * W
    for seq in (2, 3, 4):
        assert run_layer(waves, seq, now) == batch(seq % LAYERS, (0, seq, 2), (1, seq, 2))
    assert run_layer(waves, 5, now) == batch(1, (0, 5, 2), (1, 5, 2), (2, 1, 2))
    assert waves.counters.readmissions == 1
    assert run_layer(waves, 6, now) is None  # seat 2 is expected again, at its own sequence number
    land(waves, 2, 2, now)
    assert waves.take(now) == batch(2, (0, 6, 2), (1, 6, 2), (2, 2, 2))


def test_a_seat_evicted_again_within_a_pass_is_slow_and_served_alone_until_layer_0():
    waves = make_waves(2)
    start_together(waves, (0, 1))
    now = 0.0
    land(waves, 0, 1, now)
    now += 2 * W
    assert waves.take(now) == batch(1, (0, 1, 2))  # seat 1 evicted
    land(waves, 1, 1, now)
    for seq in (2, 3, 4):
        assert run_layer(waves, seq, now, (0,)) == batch(seq % LAYERS, (0, seq, 2))
    assert run_layer(waves, 5, now, (0,)) == batch(1, (0, 5, 2), (1, 1, 2))  # readmitted
    land(waves, 0, 6, now)
    now += W
    assert waves.take(now) == batch(2, (0, 6, 2))  # evicted again, after W: it was late before
    land(waves, 1, 2, now)
    assert waves.take(now) == batch(2, (1, 2, 2), alone=True)
    land(waves, 1, 3, now)
    assert waves.take(now) is None  # one batch alone per 16 T_f
    assert run_layer(waves, 7, now, (0,)) == batch(3, (0, 7, 2), (1, 3, 2))  # it happens to be at the wave's layer
    land(waves, 1, 4, now)
    assert run_layer(waves, 8, now, (0,)) == batch(0, (0, 8, 2), (1, 4, 2))  # layer 0: a member again
    assert run_layer(waves, 9, now, (0,)) is None


def test_no_rows_wait_longer_than_two_passes():
    waves = make_waves(2)
    start_together(waves, (0, 1))
    land(waves, 0, 1, 0.0)
    assert waves.take(2 * W) == batch(1, (0, 1, 2))
    now = 2 * W
    land(waves, 1, 1, now)
    assert waves.take(now) is None
    land(waves, 0, 2, now)
    assert waves.take(now) == batch(2, (0, 2, 2))
    # the wave stands at layer 3, and nothing of it lands; rank 0 does not give way to rank 1
    assert waves.take(now + 7 * W) is None
    assert waves.deadline() == pytest.approx(now + 2 * LAYERS * W)
    assert waves.take(now + 2 * LAYERS * W) == batch(1, (1, 1, 2), alone=True)


def test_a_seat_that_says_it_is_done_leaves_and_is_not_waited_for():
    waves = make_waves(2)
    start_together(waves, (0, 1))
    for seq in (1, 2):
        assert run_layer(waves, seq, 0.0) is not None
    land(waves, 0, 3, 0.0)
    land(waves, 1, 3, 0.0, more=False)
    assert waves.take(0.0) == batch(3, (0, 3, 2), (1, 3, 2))
    land(waves, 0, 4, 0.0)
    assert waves.take(0.0) == batch(0, (0, 4, 2))
    assert waves.counters.evictions == 0


def test_idle_seats_cost_nothing_and_a_lane_that_empties_gathers_anew():
    waves = make_waves(2)
    start_together(waves, (0, 1))
    for seq in (1, 2):
        run_layer(waves, seq, 0.0)
    land(waves, 0, 3, 0.0, more=False)
    land(waves, 1, 3, 0.0, more=False)
    assert waves.take(0.0) is not None
    assert waves.deadline() == math.inf
    land(waves, 1, 4, 9.0)
    assert waves.take(9.0) is None
    land(waves, 0, 4, 9.5)
    assert waves.take(9.5) == batch(0, (0, 4, 2), (1, 4, 2))


def test_a_seat_that_disconnects_is_not_waited_for():
    waves = make_waves()
    start_together(waves)
    land(waves, 0, 1, 0.0)
    land(waves, 1, 1, 0.0)
    waves.disconnect(2, 0.1)
    assert waves.take(0.1) == batch(1, (0, 1, 2), (1, 1, 2))


def test_a_seat_that_joins_waits_for_layer_0():
    waves = make_waves(2)
    start_together(waves, (0, 1))
    waves.connect(5, rank=5)
    land(waves, 5, 0, 0.0)
    for seq in (1, 2, 3):
        assert run_layer(waves, seq, 0.0) == batch(seq, (0, seq, 2), (1, seq, 2))
    assert run_layer(waves, 4, 0.0) == batch(0, (0, 4, 2), (1, 4, 2), (5, 0, 2))
    assert run_layer(waves, 5, 0.0) is None


def test_two_nodes_that_hold_each_others_seats_both_prefer_the_lowest_rank():
    """Each waits for a seat that is stuck at the other; without an order they would change over for ever."""
    waves = make_waves(2)
    start_together(waves, (0, 1))
    land(waves, 1, 1, 0.0)
    assert waves.take(2 * W) == batch(1, (1, 1, 2))  # seat 0 evicted; the wave is seat 1
    now = 2 * W
    land(waves, 0, 1, now)
    assert waves.take(now + 2 * W) == batch(1, (0, 1, 2))  # seat 1 does not land: rank 0 takes over at once
    land(waves, 1, 2, now + 2 * W)
    assert waves.take(now + 2 * W) is None  # just before the wave, so a member again: seat 0 is waited for
    land(waves, 0, 2, now + 3 * W)
    assert waves.take(now + 3 * W) == batch(2, (0, 2, 2), (1, 2, 2))


def test_rows_of_a_member_ahead_of_the_wave_are_not_stuck_behind_a_member_that_is_missing():
    waves = make_waves(2)
    start_together(waves, (0, 1))
    land(waves, 1, 1, 0.0, rows=0)
    land(waves, 1, 2, 0.0)
    assert waves.take(W) is None
    assert waves.take(2 * W) == batch(2, (1, 2, 2))


def test_lanes_are_never_merged_and_the_one_ready_first_goes_first():
    waves = make_waves(1, num_lanes=2)
    land(waves, 0, 0, 0.0, lane=1)
    land(waves, 0, 0, 0.1, lane=0)
    assert waves.take(0.2) == batch(0, (0, 0, 2), lane=1)
    assert waves.take(0.2) == batch(0, (0, 0, 2), lane=0)
    assert waves.take(0.2) is None


def test_a_pass_given_up_replaces_its_rows():
    waves = make_waves(2)
    start_together(waves, (0, 1))
    land(waves, 0, 1, 0.0)
    land(waves, 0, 4, 0.1, rows=7)  # its worker lost another expert node and began anew
    assert waves.take(0.1) is None
    land(waves, 1, 1, 0.2)
    assert waves.take(0.2) == batch(1, (1, 1, 2))
    for seq in (2, 3):
        land(waves, 1, seq, 0.3)
        assert waves.take(0.3) == batch(seq, (1, seq, 2))
    land(waves, 1, 4, 0.4)
    assert waves.take(0.4) == batch(0, (0, 4, 7), (1, 4, 2))


def test_w_is_the_median_turn_without_the_wait_for_the_late():
    waves = make_waves(3, min_wait_s=0.0)
    assert waves.wait_s == W
    start_together(waves)
    now = 0.0
    for seq in range(1, 20):
        land(waves, 0, seq, now + 0.2)
        land(waves, 1, seq, now + 0.25)
        land(waves, 2, seq, now + 0.45)
        now += 0.5
        assert waves.take(now) is not None
    assert waves.wait_s == pytest.approx(0.25 + 0.05)  # half have landed; the device came 0.05 after the last
