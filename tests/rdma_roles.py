"""Both roles of the product over verbs, with a model that needs neither torch nor numpy: links and waves are ours.

An attention process routes rows of whole numbers through layers on two expert nodes of another process; each token is a
sum of what comes back, and the next row follows from it. The same is computed without any of it: tokens must be equal.
Runs in the guest of `tools/rdma_vm.py`; see `tests/rdma_guest.py`.
"""

from __future__ import annotations

import asyncio
import struct
import sys

from msi.experts.server import ExpertServer
from msi.experts.waves import Waves
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.link_hello import PROTOCOL_VERSION, LinkHello

NUM_LANES, NUM_NODES, NUM_LAYERS, NUM_SEQUENCES, NUM_TOKENS = 2, 2, 4, 6, 5  # sequences: of each lane
WIDTH = 32
ROW = struct.Struct(f"<{WIDTH}I")
PRIME, VOCABULARY = 2**31 - 1, 997
HELLO = LinkHello(
    protocol_version=PROTOCOL_VERSION, instance="roles", worker_id="attention-0", incarnation=1, node=0, rank=0, size=1,
    placement_version=0, num_lanes=NUM_LANES, slot_rows=NUM_SEQUENCES, row_bytes=ROW.size, answer_row_bytes=ROW.size,
    next_seqs=(0,) * NUM_LANES,
)  # fmt: skip


# -- the model --------------------------------------------------------------------------------------------------------


def embed(sequence, token):
    return [(token * 31 + sequence * 17 + index * index) % PRIME for index in range(WIDTH)]


def node_of(row):
    return sum(row) % NUM_NODES


def expert(node, row):
    return [(value * (2 * node + 3) + index + 7 * node) % PRIME for index, value in enumerate(row)]


def token_of(row):
    return sum(row) % VOCABULARY


def expected():
    """[lane][sequence][token]"""
    found = []
    for sequence in range(NUM_LANES * NUM_SEQUENCES):
        tokens = [sequence]
        for _ in range(NUM_TOKENS):
            row = embed(sequence, tokens[-1])
            for _ in range(NUM_LAYERS):
                row = expert(node_of(row), row)
            tokens.append(token_of(row))
        found.append(tokens)
    return [found[lane * NUM_SEQUENCES : (lane + 1) * NUM_SEQUENCES] for lane in range(NUM_LANES)]


# -- experts ----------------------------------------------------------------------------------------------------------


class PlainExperts:
    """Implements `msi.experts.server.ExpertCompute`."""

    depth = 1

    def __init__(self, node, link):
        self.node = node
        self.link = link
        self.loop = asyncio.get_running_loop()
        self.out_rows = {}

    def attach(self, seat, out_rows):
        self.out_rows[seat] = out_rows.host()

    def run(self, batch, ticket):
        landing, layout = self.link.landing, self.link.layout
        stride = landing.rows.num_bytes // landing.num_seats
        for seat, _, num_rows in batch.rows:
            for index in range(num_rows):
                at = batch.lane * layout.slot_bytes + index * ROW.size
                row = ROW.unpack_from(landing.rows.host(), seat * stride + at)
                ROW.pack_into(self.out_rows[seat], at, *expert(self.node, row))
        self.loop.call_soon_threadsafe(self.seen, ticket)  # rows may be taken on another thread

    def follow(self, seen):
        self.seen = seen

    def outcome(self):
        return 0.0, None


async def serve(transports):
    """Prints the nodes' addresses, and serves until the input ends."""
    addresses = []
    for node, transport in enumerate(transports):
        link = CombineLink(
            transport, expected=HELLO, worker_id=f"expert-{node}", incarnation=1, num_seats=1, max_skip=100
        )
        waves = Waves(num_layers=NUM_LAYERS, num_lanes=NUM_LANES, min_wait_s=10.0)
        addresses.append(await link.listen(ExpertServer(link, waves, PlainExperts(node, link))))
    print(*addresses, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for transport in transports:
        await transport.close()


# -- attention --------------------------------------------------------------------------------------------------------


class Gates:
    """Implements `msi.net.passes.Gates`: an event for each turn."""

    num_layers = NUM_LAYERS

    def __init__(self):
        self.counts = memoryview(bytearray(4 * NUM_LANES * NUM_NODES)).cast("i", (NUM_LANES, NUM_NODES))
        self.opened = {}
        self.loop = asyncio.get_running_loop()

    def wait(self, lane, turn):
        return self.opened.setdefault((lane, turn), asyncio.Event()).wait()

    def open(self, lane, turn):
        self.loop.call_soon_threadsafe(self.opened.setdefault((lane, turn), asyncio.Event()).set)


async def attend(transport, addresses):
    """[lane][sequence][token], by the experts at these addresses."""
    link = DispatchLink(transport, hello=HELLO, num_nodes=NUM_NODES, report_loss=lambda *loss: None, timeout_s=30.0)
    out_rows = [(await link.connect(node, address)).host() for node, address in enumerate(addresses)]
    gates = Gates()
    return await asyncio.gather(*(run_lane(link, gates, out_rows, lane) for lane in range(NUM_LANES)))


async def run_lane(link, gates, out_rows, lane):
    sequences = [[lane * NUM_SEQUENCES + index] for index in range(NUM_SEQUENCES)]
    for number in range(NUM_TOKENS):
        rows = [embed(lane * NUM_SEQUENCES + index, tokens[-1]) for index, tokens in enumerate(sequences)]
        is_last = number == NUM_TOKENS - 1
        first = link.begin(lane, gates, lambda lane, is_last=is_last: not is_last)
        for turn in range(first, first + NUM_LAYERS):
            await exchange(link, gates, out_rows, lane, turn, rows)
        await link.passed(lane)
        link.end(lane)
        for tokens, row in zip(sequences, rows, strict=True):
            tokens.append(token_of(row))
    return sequences


async def exchange(link, gates, out_rows, lane, turn, rows):
    """One layer: `rows` become what the experts make of them."""
    places = []  # of each row: node, and place among that node's
    for node in range(NUM_NODES):
        gates.counts[lane, node] = 0
    for row in rows:
        node = node_of(row)
        index = gates.counts[lane, node]
        gates.counts[lane, node] += 1
        ROW.pack_into(out_rows[node], lane * link.layout.slot_bytes + index * ROW.size, *row)
        places.append((node, index))
    link.packed(lane, turn)
    await asyncio.wait_for(gates.wait(lane, turn), 30)
    landing = link.landing.rows
    stride = landing.num_bytes // NUM_NODES
    for number, (node, index) in enumerate(places):
        at = node * stride + lane * link.answer_layout.slot_bytes + index * ROW.size
        rows[number] = list(ROW.unpack_from(landing.host(), at))
