#!/usr/bin/env python3
"""What a post and a completion cost Python, in microseconds, over a libibverbs that does nothing: for each driver.

    tools/bench_verbs.py [--driver direct|ibverbs|pyverbs]

Each driver runs in a process of its own, over `tools/verbs_stub.py`.
`driver` rows are calls of the driver alone; `transport` rows are what a link calls, with the bookkeeping of bounds and
completions. The least and the median of fifteen rounds: machines are noisy, and the row of an empty call says how much
so. No network and no card is in any of these numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above
from msi.net.rdma.drivers import NAMES, load_driver
from msi.net.rdma.endpoint import SIGNAL_EVERY, RdmaEndpoint
from msi.net.rdma.fabric import open_place
from msi.net.rdma.landing import RdmaOutbox, new_landing
from msi.net.rdma.options import RdmaOptions
from msi.net.rdma.verbs import RECEIVES_PER_REFILL, Span
from msi.net.regions import HOST_MEMORY
from msi.net.slots import HEADER_BYTES, SlotLayout
from tools.verbs_stub import run_over_stub, stub_of

LAYOUT = SlotLayout(num_lanes=4, slot_rows=512, row_bytes=8192)
ROUNDS, CALLS, COMPLETIONS = 15, 4000, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", choices=NAMES, help="one alone; by default all")
    given = parser.parse_args()
    stub = stub_of(given.driver)
    if stub is not None:
        measure(given.driver, stub)
        return
    for driver in NAMES if given.driver is None else (given.driver,):
        run_over_stub(__file__, driver, ())


def measure(driver: str, stub: ctypes.CDLL) -> None:
    card = open_place(load_driver(driver), RdmaOptions()).card
    card.start(1024, 4096)
    sends, receives = card.queue_pair(1, 128, HEADER_BYTES), card.queue_pair(1, 1, 0)
    landing = new_landing(card, 1, LAYOUT, HOST_MEMORY)
    endpoint = RdmaEndpoint(
        name="stub", peer=b"", landing=landing, seat=0, outbox=RdmaOutbox(card, LAYOUT, HOST_MEMORY), out_layout=LAYOUT,
        sends=sends, receives=receives, max_bytes=1 << 30, is_ready=True, leave=lambda endpoint: None,
    )  # fmt: skip
    endpoint.aim(Span(1 << 20, 1), Span(1 << 30, 2))
    lane = sends.lane(Span(1 << 20, 7), Span(1 << 21, 7), Span(1 << 20, 9), Span(1 << 21, 9), LAYOUT.row_bytes, 512)

    def post_endpoint() -> None:
        for number in range(SIGNAL_EVERY // 2):
            endpoint.post(1, number, 40 + number)
        endpoint.completed()  # of sixteen work requests

    def word_endpoint() -> None:
        for number in range(SIGNAL_EVERY):
            endpoint.post(1, number)
        endpoint.completed()

    def complete() -> None:
        stub.stub_complete(COMPLETIONS, sends.number)

    card.arm()
    complete()
    assert card.take_event()  # which tells a binding's card where its queue is
    card.poll()
    rows = {
        "an empty call": timed(lambda: None),
        "driver: rows and header, one post": timed(lambda: lane.post(5, 40)),
        "driver: a word": timed(lambda: sends.word(5, False)),
        "transport: rows and header, one post": timed(post_endpoint, SIGNAL_EVERY // 2),
        "transport: a word": timed(word_endpoint, SIGNAL_EVERY),
        "driver: a completion, of 16, read": timed(card.poll, COMPLETIONS, complete),
        "driver: a poll that finds nothing": timed(card.poll),
        "driver: a receive, of 16": timed(card.refill, RECEIVES_PER_REFILL),
    }
    for what, times_us in rows.items():
        found = {"least_us": round(min(times_us), 3), "median_us": round(statistics.median(times_us), 3)}
        print(json.dumps({"driver": driver, "what": what, **found}))


def timed(call: Callable[[], object], per_call: int = 1, before: Callable[[], None] | None = None) -> list[float]:
    """Of one of the `per_call` things that a call does, by round."""
    rounds = []
    for _ in range(ROUNDS):
        spent = 0.0
        if before is None:
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            spent = time.perf_counter() - began
        else:
            for _ in range(CALLS // 4):
                before()
                began = time.perf_counter()
                call()
                spent += time.perf_counter() - began
            spent *= 4
        rounds.append(spent / CALLS / per_call * 1e6)
    return rounds


if __name__ == "__main__":
    main()
