#!/usr/bin/env python3
"""The host path of a turn over RDMA, in microseconds: what Python does between a device and a card, and back.

    tools/bench_host_path.py [--driver direct|ibverbs|pyverbs] [--side attention|expert] [--nodes 1 8 32] [--json]

Of an attention worker, and so many expert nodes:

    posts      from a flag seen (a lane's rows are packed) to all posts done, one to each expert node
    answers    from their answers in the completion queue to the gate of the lane open, on the thread that computes

Of an expert worker, and so many attention nodes:

    landed     from their rows in the completion queue to the batch of all of them launched
    answered   from its flag seen to all answers posted, one to each attention node

The real links, waves, transport and driver, over a libibverbs that does nothing (`tools/verbs_stub.py`): no device, no
card and no wake-up is in these numbers. Headers are written before the clock runs, as cards would. Medians and 99th
percentiles over all turns of all passes, once caches are warm; a low `--quantile` says what they cost where others use
the machine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above
from msi.device.ready import Ready
from msi.experts.server import ExpertServer
from msi.experts.waves import Waves
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.link_hello import LINK_CODEC, LinkWelcome
from msi.net.rdma.drivers import NAMES, load_driver
from msi.net.rdma.endpoint import RdmaEndpoint
from msi.net.rdma.transport import KNOCK, RdmaTransport
from msi.net.regions import HOST_MEMORY
from msi.net.slots import Kind, pack_immediate
from msi.net.transport import Admission
from tools.bench_links import ENDLESS_S, WARM_TURNS, StubCompute, StubGates, hello, write_header
from tools.verbs_stub import run_over_stub, stub_of

ASKED_US = {1: 5, 8: 15, 32: 55}  # medians of both together, of an attention worker
PARTS = {"attention": ("posts", "answers"), "expert": ("landed", "answered")}
Times = list[tuple[float, float]]  # seconds of each turn, in these two parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", choices=NAMES, help="one alone; by default all")
    parser.add_argument("--side", choices=PARTS, help="one alone; by default both")
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 8, 32], help="of the other side, in a turn")
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--quantile", type=float, default=0.5, help="in place of the median")
    parser.add_argument("--json", action="store_true", help="a JSON line for each")
    given = parser.parse_args()
    stub = stub_of(given.driver)
    if stub is None:
        for driver in NAMES if given.driver is None else (given.driver,):
            words = [word for word in sys.argv[1:] if word not in ("--driver", given.driver)]
            run_over_stub(__file__, driver, words)
        return
    stub.stub_complete_sends()
    for side in PARTS if given.side is None else (given.side,):
        measure = {"attention": of_attention, "expert": of_expert}[side]
        for num_nodes in given.nodes:
            times = asyncio.run(measure(given.driver, stub, num_nodes, given.lanes, given.layers, given.passes))
            show(given.driver, side, num_nodes, times[WARM_TURNS:], given.quantile, as_json=given.json)


def show(driver: str, side: str, num_nodes: int, times: Times, quantile: float, *, as_json: bool) -> None:
    found: dict[str, Any] = {"driver": driver, "side": side, "nodes": num_nodes}
    firsts, seconds = zip(*times, strict=True)
    first, second = PARTS[side]
    for name, part in (("", [sum(pair) for pair in times]), (f"{first}_", firsts), (f"{second}_", seconds)):
        in_order = sorted(part)
        found[f"{name}us"], found[f"{name}p99_us"] = (
            round(in_order[int(share * (len(part) - 1))] * 1e6, 2) for share in (quantile, 0.99)
        )
    if as_json:
        print(json.dumps(found), flush=True)
        return
    asked = f", asked for: {ASKED_US[num_nodes]}" if side == "attention" and num_nodes in ASKED_US else ""
    print(
        f"{driver}, {side}, {num_nodes} nodes: {found['us']:.1f} us (p99 {found['p99_us']:.1f}{asked}), "
        f"{first} {found[f'{first}_us']:.1f}, {second} {found[f'{second}_us']:.1f}",
        flush=True,
    )


class Kept(RdmaTransport):
    """Remembers its connections."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.endpoints: list[RdmaEndpoint] = []

    def _endpoint(self, *args: Any, **options: Any) -> RdmaEndpoint:
        self.endpoints.append(super()._endpoint(*args, **options))
        return self.endpoints[-1]


def arriving(stub: ctypes.CDLL, endpoints: Sequence[RdmaEndpoint]) -> Callable[[int], None]:
    """Puts an immediate from each into the completion queue."""
    array = (ctypes.c_uint32 * len(endpoints))(*[one.receives.number for one in endpoints])
    return lambda immediate: stub.stub_complete_each(len(endpoints), array, ctypes.c_uint32(immediate))


async def looking(ready: Ready[None], doing: Awaitable[object]) -> None:
    """Until it is done; this thread is that which computes."""
    task = asyncio.ensure_future(doing)
    while not task.done():
        ready.look()
        await asyncio.sleep(0)
    await task


def look_till_asleep(ready: Ready[None]) -> None:
    while ready.look():
        pass


# -- an attention worker ----------------------------------------------------------------------------------------------


async def of_attention(
    driver: str, stub: ctypes.CDLL, num_nodes: int, num_lanes: int, num_layers: int, num_passes: int
) -> Times:
    experts = RdmaTransport(load_driver(driver))
    said = hello(0, num_lanes)
    seats, numbers = experts.register(num_nodes, said.dispatch_layout, HOST_MEMORY), iter(range(num_nodes))

    def accept(_: bytes) -> Admission:
        seat = next(numbers)
        return Admission(seats, seat, LINK_CODEC.encode(LinkWelcome(f"expert-{seat}", 0, seat)))

    ready = Ready[None]()
    attention = Kept(load_driver(driver), poller=ready)
    link = DispatchLink(attention, hello=said, num_nodes=num_nodes, report_loss=lambda *loss: None, timeout_s=ENDLESS_S)
    address = await experts.listen(accept)
    for node in range(num_nodes):
        await looking(ready, link.connect(node, address))
    try:
        answer = arriving(stub, attention.endpoints)
        return await _turns(link, ready, answer, num_nodes, num_lanes, num_layers, num_passes)
    finally:
        await attention.close()
        await experts.close()
        ready.close()


class Gates(StubGates):
    """Remembers which gate it opened last."""

    opened = (-1, -1)

    def open(self, lane: int, turn: int) -> None:
        self.opened = lane, turn


async def _turns(
    link: DispatchLink, ready: Ready[None], answer: Callable[[int], None], num_nodes: int, num_lanes: int,
    num_layers: int, num_passes: int,
) -> Times:  # fmt: skip
    gates = Gates(num_lanes, num_layers, num_nodes)
    times: Times = []
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
                look_till_asleep(ready)
                times.append((posted - flagged, opened - landed))
        for lane in range(num_lanes):
            await link.passed(lane)
            link.end(lane)
    return times


# -- an expert worker -------------------------------------------------------------------------------------------------


async def of_expert(
    driver: str, stub: ctypes.CDLL, num_nodes: int, num_lanes: int, num_layers: int, num_passes: int
) -> Times:
    ready, compute = Ready[None](), StubCompute()
    experts = Kept(load_driver(driver), poller=ready)
    link = CombineLink(
        experts, expected=hello(0, num_lanes), worker_id="expert-0", incarnation=0, num_seats=num_nodes,
        max_skip=2 * num_layers,
    )  # fmt: skip
    waves = Waves(num_layers=num_layers, num_lanes=num_lanes, min_wait_s=ENDLESS_S)
    server = ExpertServer(link, waves, compute)
    attention = RdmaTransport(load_driver(driver))
    landing = attention.register(num_nodes, link.answer_layout, HOST_MEMORY)
    address = await link.listen(server)
    for node in range(num_nodes):
        said = LINK_CODEC.encode(hello(node, num_lanes))
        await looking(ready, attention.connect(address, said, landing, node))
    arrive = arriving(stub, experts.endpoints)
    try:
        while len(link.peers) < num_nodes or not all(one.control for one in experts.endpoints):
            await asyncio.sleep(0)
        arrive(KNOCK)
        look_till_asleep(ready)
        return _waves(link, ready, arrive, compute, num_nodes, num_lanes, num_layers * num_passes)
    finally:
        server.close()
        await attention.close()
        await experts.close()
        ready.close()


def _waves(
    link: CombineLink, ready: Ready[None], arrive: Callable[[int], None], compute: StubCompute, num_nodes: int,
    num_lanes: int, num_seqs: int,
) -> Times:  # fmt: skip
    times: Times = []
    for seq in range(num_seqs):
        for lane in range(num_lanes):
            for node in range(num_nodes):
                write_header(link.landing, node, Kind.DISPATCH, lane, seq)
            arrive(pack_immediate(Kind.DISPATCH, True, lane, 0, seq, 0))
            landed = perf_counter()
            while not compute.running:
                ready.look()
            launched = perf_counter()
            ((batch, ticket),) = compute.running
            compute.running.clear()
            assert len(batch.rows) == num_nodes, batch
            flagged = perf_counter()
            compute.seen(ticket)
            answered = perf_counter()
            look_till_asleep(ready)
            times.append((launched - landed, answered - flagged))
    assert link.counters.answers == len(times) * num_nodes, link.counters
    return times


if __name__ == "__main__":
    main()
