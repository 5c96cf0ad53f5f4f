"""How long a worker may be silent: as its signs of life have been coming."""

from __future__ import annotations

from dataclasses import replace

import pytest

from msi.control.coordinator import TICK_S
from msi.control.lateness import sleep_late
from msi.control.membership import LEAST_LOOK_S, Cluster
from msi.control.messages import WorkerReady
from msi.control.rhythm import KNOWN_FROM, LEAST_S, TIMES, TIMES_ONCE, WINDOW_S, Rhythm
from tests.test_membership import PLAN, hello

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
    rhythm, _ = beaten([0.2] * KNOWN_FROM + [0.5, 0.2, 0.5])
    assert rhythm.patience_s(MOST_S) == pytest.approx(0.2 + TIMES * 0.3, rel=0.1)
    assert rhythm.patience_s(MOST_S) > 2 * 0.5, "as they have been late, and more"
    rhythm, _ = beaten([0.2] * KNOWN_FROM + [2.0])
    assert rhythm.patience_s(MOST_S) == MOST_S


def test_who_was_late_once_is_missed_within_a_second_all_the_same():
    """A worker that had begun a new life was missed after 1.9 s for a minute: 3.5 times one pause of half a second."""
    for at in (0, KNOWN_FROM, 2 * KNOWN_FROM):
        gaps = [0.2] * (2 * KNOWN_FROM)
        gaps.insert(at, 0.46)
        assert beaten(gaps)[0].patience_s(MOST_S) <= LEAST_S + 1e-9
    rhythm, _ = beaten([0.2] * KNOWN_FROM + [0.6] + [0.2] * KNOWN_FROM)
    assert rhythm.patience_s(MOST_S) == pytest.approx(TIMES_ONCE * 0.6), "and never sooner than it was late already"


def test_what_whoever_reads_is_late_by_makes_nobody_more_patient():
    rhythm, now = beaten([0.19] * KNOWN_FROM)
    for late_s in (0.6, 0.6, 0.6):  # read together, by one that stood still
        rhythm.beat(now + late_s)
    rhythm.settle(0.45)
    assert rhythm.patience_s(MOST_S) == LEAST_S
    rhythm.beat(now + 1.2)
    rhythm.settle(0.0)
    assert rhythm.patience_s(MOST_S) == pytest.approx(TIMES_ONCE * 0.6), "which was its own"


def test_pauses_are_forgotten_after_two_windows():
    rhythm, now = beaten([0.2] * KNOWN_FROM + [0.6, 0.6])
    for beat in range(round(2.2 * WINDOW_S / 0.2)):
        if beat * 0.2 < WINDOW_S:
            assert rhythm.patience_s(MOST_S) > 1.0
        now += 0.2
        rhythm.beat(now)
        rhythm.settle(0.0)
    assert rhythm.patience_s(MOST_S) == LEAST_S


def test_what_a_worker_was_late_by_while_it_loaded_makes_nobody_patient_with_it_afterwards():
    cluster = Cluster(replace(PLAN, is_on_network=True), 0.0)
    given = hello(cluster, b"e0", role="expert")
    member = cluster._members[given.worker_id]
    for at_s in (0.0, 0.9, 1.8):
        member.rhythm.beat(at_s)
        member.rhythm.settle(0.0)
    ready = WorkerReady(given.worker_id, 0, "shm://", 100)
    cluster.ready(b"e0", ready)
    rhythm = member.rhythm
    for beat in range(KNOWN_FROM):
        rhythm.beat(2.0 + 0.19 * beat)
        rhythm.settle(0.0)
    assert rhythm.patience_s(MOST_S) == LEAST_S
    cluster.ready(b"e0", ready)
    assert member.rhythm is rhythm, "it is ready already"


@pytest.mark.parametrize("phase_s", [0.0, 0.1, 0.24])
def test_a_host_that_vanished_is_missed_as_soon_as_its_silence_is_too_long_whenever_time_was_looked_at(phase_s):
    cluster = Cluster(replace(PLAN, is_on_network=True), 0.0)
    given = hello(cluster, b"e0", role="expert")
    cluster.ready(b"e0", WorkerReady(given.worker_id, 0, "shm://", 100))
    member = cluster._members[given.worker_id]
    now, looked_at, last_sign = phase_s, 0.0, 0.0
    while member.is_live:
        assert now < 60.0
        while last_sign + 0.2 <= min(now, 20.0):
            last_sign += 0.2
            member.rhythm.beat(last_sign)
            member.last_seen = last_sign
        looked_at = now
        cluster.tick(now)
        now += cluster.looks_again_in_s(now, TICK_S)
    assert LEAST_S < looked_at - last_sign <= LEAST_S + 2 * LEAST_LOOK_S


@pytest.mark.parametrize(("looks", "known_s"), [(1, 0.07), (5, 0.27)])
async def test_a_loop_that_stood_still_between_two_looks_at_the_clock_knows_it(looks, known_s, monkeypatch):
    now = [0.0]

    async def sleep(delay_s):
        """The loop stands still from 0.02 to 0.32."""
        until = now[0] + max(0.0, delay_s)
        now[0] = max(until, 0.32) if until > 0.02 else until

    monkeypatch.setattr("msi.control.lateness.asyncio.sleep", sleep)
    assert await sleep_late(0.25, lambda: now[0], looks) == pytest.approx(known_s)
