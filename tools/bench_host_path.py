#!/usr/bin/env python3
"""The host path of a turn over RDMA, in microseconds: what Python does between a device and a card, and back.

    tools/bench_host_path.py [--driver direct|ibverbs|pyverbs] [--nodes 1 8 32] [--json]

    posts      from a flag seen (a lane's rows are packed) to all posts done, one to each expert node
    answers    from their answers in the completion queue to the gate of the lane open, on the thread that computes

The real link, transport and driver, over a libibverbs that does nothing (`tools/verbs_stub.py`): no device, no card and
no wake-up is in these numbers. Answers' headers are written before the clock runs, as cards would. Medians and 99th
percentiles over all turns of all passes, once caches are warm.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from socket import htonl
from statistics import median, quantiles
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above
from msi.device.ready import Ready
from msi.net.dispatch_link import DispatchLink
from msi.net.link_hello import LINK_CODEC, LinkWelcome
from msi.net.rdma.drivers import NAMES, load_driver
from msi.net.rdma.endpoint import RdmaEndpoint
from msi.net.rdma.transport import RdmaTransport
from msi.net.regions import HOST_MEMORY
from msi.net.slots import Kind, pack_immediate
from msi.net.transport import Admission, Endpoint
from tools.bench_links import ENDLESS_S, WARM_TURNS, StubGates, hello, write_header
from tools.verbs_stub import run_over_stub, stub_of

ASKED_US = {1: 5, 8: 15, 32: 55}  # medians of both together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", choices=NAMES, help="one alone; by default all")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 8, 32], help="expert nodes of a turn")
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="a JSON line for each")
    given = parser.parse_args()
    stub = stub_of(given.driver)
    if stub is None:
        for driver in NAMES if given.driver is None else (given.driver,):
            words = [word for word in sys.argv[1:] if word not in ("--driver", given.driver)]
            run_over_stub(__file__, driver, words)
        return
    stub.stub_complete_sends()
    for num_nodes in given.nodes:
        posts, answers = asyncio.run(measure(given.driver, stub, num_nodes, given.lanes, given.layers, given.passes))
        show(given.driver, num_nodes, posts[WARM_TURNS:], answers[WARM_TURNS:], as_json=given.json)


def show(driver: str, num_nodes: int, posts: list[float], answers: list[float], *, as_json: bool) -> None:
    both = [sum(pair) for pair in zip(posts, answers, strict=True)]
    found: dict[str, Any] = {"driver": driver, "nodes": num_nodes}
    for name, times in (("", both), ("posts_", posts), ("answers_", answers)):
        found[f"{name}us"] = round(median(times) * 1e6, 2)
        found[f"{name}p99_us"] = round(quantiles(times, n=100)[98] * 1e6, 2)
    if as_json:
        print(json.dumps(found), flush=True)
        return
    asked = f", asked for: {ASKED_US[num_nodes]}" if num_nodes in ASKED_US else ""
    print(
        f"{driver}, {num_nodes} nodes: {found['us']:.1f} us (p99 {found['p99_us']:.1f}{asked}), "
        f"posts {found['posts_us']:.1f}, answers {found['answers_us']:.1f}",
        flush=True,
    )


class Dialling(RdmaTransport):
    """Remembers whom it has connected."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.connected: list[Endpoint] = []

    async def connect(self, *args: Any, **options: Any) -> Endpoint:
        self.connected.append(await super().connect(*args, **options))
        return self.connected[-1]


async def measure(
    driver: str, stub: ctypes.CDLL, num_nodes: int, num_lanes: int, num_layers: int, num_passes: int
) -> tuple[list[float], list[float]]:
    """Seconds of each turn: until all is posted, and from all answered to the gate open."""
    experts = RdmaTransport(load_driver(driver))
    said = hello(0, num_lanes)
    seats, numbers = experts.register(num_nodes, said.dispatch_layout, HOST_MEMORY), iter(range(num_nodes))

    def accept(_: bytes) -> Admission:
        seat = next(numbers)
        return Admission(seats, seat, LINK_CODEC.encode(LinkWelcome(f"expert-{seat}", 0, seat)))

    ready = Ready[None]()  # this thread is that which computes
    attention = Dialling(load_driver(driver), poller=ready)
    link = DispatchLink(attention, hello=said, num_nodes=num_nodes, report_loss=lambda *loss: None, timeout_s=ENDLESS_S)
    address = await experts.listen(accept)
    for node in range(num_nodes):
        connecting = asyncio.create_task(link.connect(node, address))
        while not connecting.done():
            ready.look()
            await asyncio.sleep(0)
        await connecting
    try:
        answer = answering(stub, attention.connected)
        return await _turns(link, ready, answer, num_nodes, num_lanes, num_layers, num_passes)
    finally:
        await attention.close()
        await experts.close()
        ready.close()


def answering(stub: ctypes.CDLL, endpoints: list[Endpoint]) -> Callable[[int], None]:
    """Puts an immediate of each into the completion queue."""
    numbers = [one.receives.number for one in endpoints if isinstance(one, RdmaEndpoint)]
    array = (ctypes.c_uint32 * len(numbers))(*numbers)
    return lambda immediate: stub.stub_complete_each(len(numbers), array, ctypes.c_uint32(htonl(immediate)))


class Gates(StubGates):
    """Remembers which gate it opened last."""

    opened = (-1, -1)

    def open(self, lane: int, turn: int) -> None:
        self.opened = lane, turn


async def _turns(
    link: DispatchLink, ready: Ready[None], answer: Callable[[int], None], num_nodes: int, num_lanes: int,
    num_layers: int, num_passes: int,
) -> tuple[list[float], list[float]]:  # fmt: skip
    gates = Gates(num_lanes, num_layers, num_nodes)
    posts, answers = [], []
    for number in range(num_passes):
        firsts = [link.begin(lane, gates, lambda lane: True) for lane in range(num_lanes)]
        for layer in range(num_layers):
            for lane, first in enumerate(firsts):
                seq = number * num_layers + layer
                for node in range(num_nodes):
                    write_header(link.landing, node, Kind.COMBINE, lane, seq)
                immediate = pack_immediate(Kind.COMBINE, False, lane, 0, seq, 0)
                flagged = perf_counter()
                link.packed(lane, first + layer)
                posted = perf_counter()
                answer(immediate)
                landed = perf_counter()
                ready.look()
                opened = perf_counter()
                assert gates.opened == (lane, first + layer), gates.opened
                while ready.look():
                    pass  # before it slept
                posts.append(posted - flagged)
                answers.append(opened - landed)
        for lane in range(num_lanes):
            await link.passed(lane)
            link.end(lane)
    return posts, answers


if __name__ == "__main__":
    main()
