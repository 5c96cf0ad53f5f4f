#!/usr/bin/env python3
"""What looking for what is awaited brings, beside sleeping for it, and what it takes from who computes.

    tools/bench_polling.py [--beside 0 1 2] [--work-us 0 100]

Two processes answer each other by the bells that a worker's compute thread waits at, so many times; each works for
`--work-us` before it answers. Beside them so many threads compute products without a break. Asleep, looking as
`--poll-us` has it, and looking whatever it takes (`always`: without asking whether a core is free, and however often it
is in vain), in turns. A JSON line for each: median and 99th percentile of a round in microseconds, and products per
second of the threads beside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before numpy comes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above
from msi.device.polling import Bell
from msi.net.looking import Cores, Vain

WAYS = ("asleep", "looking", "always")
SIDE = 192  # of the matrices that are multiplied beside


class Turn(NamedTuple):
    rounds_us: list[float]
    products_per_s: float


class Always(Cores):
    """For a comparison: a core is taken, whoever wants it."""

    def one_is_free(self) -> bool:
        return True


class Eager(Vain):
    """Looks, however often it was in vain."""

    def may_look(self) -> bool:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=int, nargs="+", default=[0, 1, 2], help="threads that compute")
    parser.add_argument("--work-us", type=float, nargs="+", default=[0.0, 100.0], help="of who is asked, each time")
    parser.add_argument("--poll-us", type=float, default=200.0)
    parser.add_argument("--rounds", type=int, default=2000, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    for work_us in given.work_us:
        for beside in given.beside:
            turns: dict[str, list[Turn]] = {way: [] for way in WAYS}
            for _ in range(given.turns):
                for way in WAYS:
                    turns[way].append(measure(way, given.poll_us * 1e-6, beside, work_us * 1e-6, given.rounds))
            for way, of_way in turns.items():
                print(json.dumps({"way": way, "beside": beside, "work_us": work_us, **figures(of_way)}), flush=True)


def figures(turns: list[Turn]) -> dict[str, float]:
    """Medians of the turns."""
    return {
        "median_us": round(median(median(turn.rounds_us) for turn in turns), 1),
        "p99_us": round(median(quantiles(turn.rounds_us, n=100)[98] for turn in turns), 1),
        "products_per_s": round(median(turn.products_per_s for turn in turns)),
    }


def bell_of(way: str, poll_s: float) -> Bell:
    bell = Bell(0.0 if way == "asleep" else poll_s)
    if way == "always":
        bell._cores, bell._vain = Always(), Eager()
    return bell


def measure(way: str, poll_s: float, beside: int, work_s: float, rounds: int) -> Turn:
    ours, theirs = bell_of(way, poll_s), bell_of(way, poll_s)
    answering = os.fork()  # before any thread
    if not answering:
        for _ in range(rounds):
            theirs.wait()
            work(work_s)
            os.eventfd_write(ours.fd, 1)
        os._exit(0)
    counts, is_over = [0] * beside, threading.Event()
    threads = [threading.Thread(target=multiply, args=(counts, number, is_over)) for number in range(beside)]
    for thread in threads:
        thread.start()
    times = []
    began = time.monotonic()
    for _ in range(rounds):
        work(work_s)
        started = time.monotonic()
        os.eventfd_write(theirs.fd, 1)
        ours.wait()
        times.append((time.monotonic() - started) * 1e6)
    took_s = time.monotonic() - began
    is_over.set()
    for thread in threads:
        thread.join()
    os.waitpid(answering, 0)
    ours.close()
    theirs.close()
    return Turn(times[rounds // 10 :], sum(counts) / took_s)


def work(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def multiply(counts: list[int], number: int, is_over: threading.Event) -> None:
    matrix = np.full((SIDE, SIDE), 1e-3, np.float32)
    into = np.empty_like(matrix)
    while not is_over.is_set():
        np.matmul(matrix, matrix, out=into)
        counts[number] += 1


if __name__ == "__main__":
    main()
