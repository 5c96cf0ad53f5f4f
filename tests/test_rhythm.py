"""How long a worker may be silent: as its signs of life have been coming."""

from __future__ import annotations

from msi.control.rhythm import KNOWN_FROM, LEAST_S, TIMES, WINDOW_S, Rhythm

MOST_S = 3.0


def beaten(gaps, begin=0.0):
    rhythm, now = Rhythm(), begin
    rhythm.beat(now)
    for gap in gaps:
        now += gap
        rhythm.beat(now)
        rhythm.settle(0.0)
    return rhythm, now


def test_signs_that_come_like_a_clock_are_missed_within_a_second():
    rhythm, _ = beaten([0.19] * KNOWN_FROM)
    assert rhythm.patience_s(MOST_S) == LEAST_S


def test_who_is_not_known_yet_and_whose_signs_come_late_have_the_full_time_at_most():
    assert beaten([0.2] * (KNOWN_FROM - 2))[0].patience_s(MOST_S) == MOST_S
    rhythm, _ = beaten([0.2] * KNOWN_FROM + [0.5])
    assert rhythm.patience_s(MOST_S) == TIMES * 0.5
    rhythm, _ = beaten([0.2] * KNOWN_FROM + [2.0])
    assert rhythm.patience_s(MOST_S) == MOST_S


def test_what_whoever_reads_is_late_by_makes_nobody_more_patient():
    rhythm, now = beaten([0.19] * KNOWN_FROM)
    for late_s in (0.6, 0.6, 0.6):  # read together, by one that stood still
        rhythm.beat(now + late_s)
    rhythm.settle(0.45)
    assert rhythm.patience_s(MOST_S) == LEAST_S
    rhythm.beat(now + 1.2)
    rhythm.settle(0.0)
    assert rhythm.patience_s(MOST_S) > LEAST_S


def test_a_pause_is_forgotten_after_two_windows():
    rhythm, now = beaten([0.2] * KNOWN_FROM + [0.6])
    for _ in range(round(2.2 * WINDOW_S / 0.2)):
        assert rhythm.patience_s(MOST_S) >= LEAST_S
        now += 0.2
        rhythm.beat(now)
        rhythm.settle(0.0)
    assert rhythm.patience_s(MOST_S) < TIMES * 0.6
