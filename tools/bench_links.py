#!/usr/bin/env python3
"""What links and waves cost the loop thread, alone: nothing is computed, nobody is woken, no bytes move.

    tools/bench_links.py --seats 8 64 --nodes 8 32 --json

Expert side: a wave of so many seats lands, is batched and answered. Attention side: a turn is posted to so many nodes
and their answers land. Endpoints only remember what was posted; headers are written before the clock runs. Times are
of this thread's CPU, medians over all waves or turns of `--passes` passes once caches are warm; a low `--quantile` says
what they cost where others use the machine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from array import array
from collections.abc import Callable, Sequence

from msi.experts.batches import WaveBatch
from msi.experts.server import ExpertServer
from msi.experts.waves import Waves
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.landing import Outbox, PlainLanding
from msi.net.link_hello import LINK_CODEC, PROTOCOL_VERSION, LinkHello, LinkWelcome
from msi.net.regions import HOST_MEMORY, Allocator, Region
from msi.net.slots import HEADER, MAGIC, Kind, SlotLayout, pack_immediate
from msi.net.transport import CONNECT_TIMEOUT_S, Admission, CompletionKind, Endpoint, Handler, Landing, Together
from msi_launch.command_line import ScriptLine

NUM_ROWS = 4
WARM_TURNS = 60
ENDLESS_S = 1e9  # nothing is late here


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument(
        "--seats", type=int, nargs="*", default=[1, 8, 16, 32, 64], help="attention nodes, at an expert"
    )
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 8, 16, 32], help="expert nodes of a turn")
    parser.add_argument("--lanes", type=int, default=3)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--apart", action="store_true", help="what lands is handed over one by one")
    parser.add_argument("--quantile", type=float, default=0.5, help="of all waves or turns")
    parser.add_argument("--json", action="store_true", help="a JSON line for each size, with its parts")
    values: argparse.Namespace = parser.parse_args()
    return values


# -- a network without bytes ----------------------------------------------------------------------------------------


class StubEndpoint:
    def __init__(self, peer: bytes, seat: int, layout: SlotLayout) -> None:
        outbox = Outbox(layout, HOST_MEMORY)
        self.peer = peer
        self.seat = seat
        self.way = "nowhere"
        self.came_at = 0.0
        self.out_headers = outbox.headers
        self.out_rows = outbox.rows
        self.posted = 0

    def post(self, lane: int, immediate: int, num_rows: int = 0, note_bytes: int = 0) -> None:
        self.posted = immediate

    def close(self) -> None:
        pass


class StubTransport:
    """Whoever drives it says what lands."""

    landing: PlainLanding
    accept: Callable[[bytes], Admission]
    handler: Handler
    together: Together

    def __init__(self) -> None:
        self.endpoints: list[StubEndpoint] = []

    def register(self, num_seats: int, layout: SlotLayout, allocator: Allocator) -> PlainLanding:
        self.landing = PlainLanding(num_seats, layout, allocator)
        return self.landing

    async def listen(self, accept: Callable[[bytes], Admission]) -> str:
        self.accept = accept
        return "stub"

    async def connect(
        self, address: str, hello: bytes, landing: Landing, seat: int, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Endpoint:
        welcome = LINK_CODEC.encode(LinkWelcome(f"expert-{seat}", 0, 0))
        self.endpoints.append(StubEndpoint(welcome, seat, landing.layout))
        return self.endpoints[-1]

    def deliver(self, handler: Handler, together: Together | None = None) -> None:
        assert together is not None
        self.handler, self.together = handler, together

    def land(self, endpoints: Sequence[Endpoint], immediate: int, is_apart: bool) -> None:
        """The same at each: what lies there in one call, as shared memory and TCP hand it over, or one by one."""
        if not is_apart:
            self.together([(endpoint, immediate, 0.0) for endpoint in endpoints])
            return
        for endpoint in endpoints:
            self.handler(endpoint, CompletionKind.IMMEDIATE, immediate, "")

    def take(self) -> None:
        pass

    async def close(self) -> None:
        pass


class StubCompute:
    """Keeps what it is to run."""

    depth = 1

    def __init__(self) -> None:
        self.running: list[tuple[WaveBatch, int]] = []
        self.seen: Callable[[int], None]

    def attach(self, seat: int, out_rows: Region) -> None:
        pass

    def run(self, batch: WaveBatch, ticket: int) -> None:
        self.running.append((batch, ticket))

    def follow(self, seen: Callable[[int], None]) -> None:
        self.seen = seen

    def outcome(self) -> tuple[float, None]:
        return 1e-4, None


def hello(index: int, num_lanes: int) -> LinkHello:
    return LinkHello(
        protocol_version=PROTOCOL_VERSION, instance="bench", worker_id=f"attention-{index}", incarnation=0, node=index,
        rank=0, size=1, placement_version=0, num_lanes=num_lanes, slot_rows=NUM_ROWS, row_bytes=128,
        answer_row_bytes=128, next_seqs=(0,) * num_lanes,
    )  # fmt: skip


def write_header(landing: Landing, seat: int, kind: Kind, lane: int, seq: int) -> None:
    more = kind is Kind.DISPATCH
    HEADER.pack_into(landing.headers[seat][lane], 0, MAGIC, kind, lane, 0, more, 0, 0, seq, NUM_ROWS, 128, 1e-6, 1e-6)


Times = list[tuple[float, float]]  # seconds of each wave or turn, in two parts


# -- either side ----------------------------------------------------------------------------------------------------


async def expert_side(num_seats: int, num_lanes: int, num_layers: int, num_passes: int, is_apart: bool) -> Times:
    transport, compute = StubTransport(), StubCompute()
    link = CombineLink(
        transport, expected=hello(0, num_lanes), worker_id="expert-0", incarnation=0, num_seats=num_seats,
        max_skip=2 * num_layers,
    )  # fmt: skip
    waves = Waves(num_layers=num_layers, num_lanes=num_lanes, min_wait_s=ENDLESS_S)
    server = ExpertServer(link, waves, compute)
    await link.listen(server)
    endpoints = []
    for index in range(num_seats):
        payload = LINK_CODEC.encode(hello(index, num_lanes))
        endpoints.append(StubEndpoint(payload, transport.accept(payload).seat, link.answer_layout))
        transport.handler(endpoints[-1], CompletionKind.CONNECTED, 0, "")
    times: Times = []
    for seq in range(num_layers * num_passes):
        for lane in range(num_lanes):
            for endpoint in endpoints:
                write_header(transport.landing, endpoint.seat, Kind.DISPATCH, lane, seq)
            immediate = pack_immediate(Kind.DISPATCH, True, lane, 0, seq, 0)
            started = time.thread_time()
            transport.land(endpoints, immediate, is_apart)
            landed = time.thread_time()
            ((batch, ticket),) = compute.running
            compute.running.clear()
            assert len(batch.rows) == num_seats, batch
            computed = time.thread_time()
            compute.seen(ticket)
            answered = time.thread_time()
            assert endpoints[-1].posted == pack_immediate(Kind.COMBINE, False, lane, 0, seq, 0)
            times.append((landed - started, answered - computed))
    server.close()
    return times


class StubGates:
    """A lane's queue that opens at once."""

    def __init__(self, num_lanes: int, num_layers: int, num_nodes: int) -> None:
        self.num_layers = num_layers
        flat = array("i", [NUM_ROWS] * (num_lanes * num_nodes))
        self.counts = memoryview(flat).cast("B").cast("i", (num_lanes, num_nodes))

    def open(self, lane: int, turn: int) -> None:
        pass

    def pack_again(self, lane: int, turn: int) -> None:
        raise AssertionError("nobody is lost here")


async def attention_side(num_nodes: int, num_lanes: int, num_layers: int, num_passes: int, is_apart: bool) -> Times:
    transport = StubTransport()
    link = DispatchLink(
        transport, hello=hello(0, num_lanes), num_nodes=num_nodes, report_loss=lambda *loss: None, timeout_s=ENDLESS_S
    )
    for node in range(num_nodes):
        await link.connect(node, "stub")
    gates = StubGates(num_lanes, num_layers, num_nodes)
    times: Times = []
    for number in range(num_passes):
        firsts = [link.begin(lane, gates, lambda lane: True) for lane in range(num_lanes)]
        for layer in range(num_layers):
            for lane, first in enumerate(firsts):
                seq = number * num_layers + layer
                for node in range(num_nodes):
                    write_header(transport.landing, node, Kind.COMBINE, lane, seq)
                immediate = pack_immediate(Kind.COMBINE, False, lane, 0, seq, 0)
                started = time.thread_time()
                link.packed(lane, first + layer)
                posted = time.thread_time()
                transport.land(transport.endpoints, immediate, is_apart)
                landed = time.thread_time()
                times.append((posted - started, landed - posted))
        for lane in range(num_lanes):
            await link.passed(lane)
            link.end(lane)
    return times


def _quantiles(times: Times, quantile: float) -> tuple[float, float, float]:
    """Microseconds: of both parts together, and of each."""
    warm = times[WARM_TURNS:]
    at = int(quantile * (len(warm) - 1))
    both, first, second = (sorted(part)[at] * 1e6 for part in zip(*((a + b, a, b) for a, b in warm), strict=True))
    return both, first, second


SIDES = {
    "expert": (expert_side, "seats", "wave", ("landed_us", "answered_us")),
    "attention": (attention_side, "nodes", "turn", ("posted_us", "landed_us")),
}


def main() -> None:
    arguments = parse()
    for name, (side, what, unit, parts) in SIDES.items():
        for size in getattr(arguments, what):
            times = asyncio.run(side(size, arguments.lanes, arguments.layers, arguments.passes, arguments.apart))
            found = dict(zip((f"{unit}_us", *parts), _quantiles(times, arguments.quantile), strict=True))
            if arguments.json:
                rounded = {key: round(value, 2) for key, value in found.items()}
                print(json.dumps({"side": name, what: size, **rounded}), flush=True)
            else:
                each = ", ".join(f"{part.removesuffix('_us')} {found[part]:.1f}" for part in parts)
                print(f"{name}: {found[f'{unit}_us']:6.1f} us per {unit} of {size} {what} ({each})", flush=True)


if __name__ == "__main__":
    main()
