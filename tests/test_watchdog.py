"""Stalls of an event loop are measured, and said with the place where it stood."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

from msi.watchdog import BUCKETS_S, PERIOD_S, SAID_FROM_S, LoopWatch, sentence, stack_of
from tests.waiting import until


def stand_still(seconds):
    time.sleep(seconds)


async def test_a_loop_that_stood_is_said_once_with_the_place_where_it_stood():
    said = []
    watch = LoopWatch("gateway", said.append)
    watch.start()
    try:
        await asyncio.sleep(3 * PERIOD_S)
        stand_still(0.6)
        await until(lambda: watch.counters()["loop_stalls"])
        assert watch.counters()["loop_stall_max_s"] >= 0.5
        stand_still(0.3)
        await until(lambda: watch.counters()["loop_stalls"] == 2)
    finally:
        watch.stop()
    assert len(said) == 1, "the second comes too soon after it"
    assert "gateway: the" in said[0]
    assert "test_watchdog.py" in said[0]
    assert "stand_still" in said[0]


async def test_lag_is_seen_from_another_thread_while_the_loop_stands():
    watch = LoopWatch("worker", lambda line: None)
    assert watch.lag_s == 0.0
    watch.start()
    try:
        looking = asyncio.get_running_loop().run_in_executor(None, lambda: (time.sleep(0.3), watch.lag_s)[1])
        stand_still(0.5)
        assert await looking > 0.2
        await until(lambda: watch.lag_s < 0.1)
    finally:
        watch.stop()
    assert watch.lag_s == 0.0


async def test_counters_are_a_cumulative_histogram():
    watch = LoopWatch("worker")
    for late_s in (0.0, 0.003, 0.03, 0.2, 99.0):
        watch._count(late_s)
    counters = watch.counters()
    counts = [counters[f"loop_stall_le_{bound}"] for bound in (*BUCKETS_S, "inf")]
    assert counts == sorted(counts)
    assert (counters["loop_stall_le_0.001"], counters["loop_stall_le_0.05"], counts[-1]) == (1, 3, 5)
    assert (counters["loop_stalls"], counters["loop_stall_max_s"]) == (2, 99.0)


async def _spent_s(clocks, idle_s):
    before = sum(map(time.clock_gettime, clocks))
    await asyncio.sleep(idle_s)
    return sum(map(time.clock_gettime, clocks)) - before


async def test_an_idle_loop_is_watched_at_no_cost():
    watch = LoopWatch("worker", lambda line: None)
    watch.start()
    try:
        threads = [thread for thread in threading.enumerate() if thread.name == "loop watch"]
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in (threading.current_thread(), *threads)]
        assert len(clocks) == 2
        spent = min([await _spent_s(clocks, 0.5) for _ in range(3)])  # the collector may have something to do
    finally:
        watch.stop()
    assert spent < 0.1


async def test_a_loop_that_runs_nothing_is_not_blamed_on_code():
    found = []
    thread = threading.get_ident()
    asker = threading.Thread(target=lambda: (time.sleep(0.1), found.append(stack_of(sys._current_frames()[thread]))))
    asker.start()
    await asyncio.sleep(0.3)
    asker.join()
    assert "no code of its own" in found[0]
    assert stack_of(None).startswith("nothing")


def test_a_process_that_was_stopped_is_not_blamed_on_its_code():
    assert "the process stood for 6.00 s" in sentence("expert-0", 6.0, 5.99, "a.py:1 f", 0)
    assert "the loop has stood for 6.00 s, at a.py:1 f; 3 other" in sentence(
        "expert-0", 6.0, SAID_FROM_S, "a.py:1 f", 3
    )
