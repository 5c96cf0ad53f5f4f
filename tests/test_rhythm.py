"""How long a worker may be silent: as its signs of life have been coming."""

from __future__ import annotations

from dataclasses import replace

import pytest

from msi.control.lateness import sleep_late
from msi.control.membership import Cluster
from msi.control.messages import WorkerReady
from msi.control.rhythm import KNOWN_FROM, LEAST_S, TIMES, WINDOW_S, Rhythm
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


@pytest.mark.parametrize(("looks", "known_s"), [(1, 0.07), (5, 0.27)])
async def test_a_loop_that_stood_still_between_two_looks_at_the_clock_knows_it(looks, known_s, monkeypatch):
    now = [0.0]

    async def sleep(delay_s):
        """The loop stands still from 0.02 to 0.32."""
        until = now[0] + max(0.0, delay_s)
        now[0] = max(until, 0.32) if until > 0.02 else until

    monkeypatch.setattr("msi.control.lateness.asyncio.sleep", sleep)
    assert await sleep_late(0.25, lambda: now[0], looks) == pytest.approx(known_s)
