"""A small ping-pong on the fake device: lanes with gates, rows to several nodes and back, in whole numbers.

It is to the fake what the engine is to a GPU, in 200 lines, and can leave out any one of its synchronisations: what a
fake is worth is which of these it catches. `play` says how a run went.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch

from msi.device.compute_thread import Program
from msi.device.fake.device import FakeDevice
from msi.device.fake.wire import BytesCopy, RowsCopy, Wire
from msi.device.fake.world import FakeWorld
from msi.meter import StageMeter

HIDDEN, TOKENS, LAYERS, LANES, ATTENTIONS, NODES = 3, 6, 8, 3, 2, 2
LAST = LAYERS + 1  # the turn that takes in the last answers
MODULUS = 1_000_003
WIDE_OPEN = 1 << 30
HEADER_BYTES = 8
RING = 4  # descriptors; no more batches are out than that less one

AS_DESIGNED = ""
LEFT_OUT = [
    "attention does not wait for its gate",
    "a gate is a flag that is never taken back",
    "a gate opens at the first answer",
    "rows are posted before they are packed",
    "counts are read before they are packed",
    "attention does not flush what landed",
    "an expert does not flush what landed",
    "an expert answers before it is done",
    "all lanes share one outbox",
    "all lanes share one outbox of an expert",
    "all lanes share one header",
    "a descriptor is used again before it was read",
    "what another queue uploads is not waited for",
    "tokens are read before they are there",
    "an immediate overtakes its rows",
    "a failure opens no gates",
]


def attend(rows, layer):
    return (rows * 31 + layer * 7 + 1) % MODULUS


def goes_to(rows, node):
    return (rows[:, 0] + node) % 3 != 0


def compute_expert(rows, layer, node):
    return (rows * (node + 3) + layer * 11 + 5) % MODULUS


def prompt(seat, lane):
    at = torch.arange(TOKENS * HIDDEN).view(TOKENS, HIDDEN)
    return (seat * 97 + lane * 13 + at * 5 + 1) % 101


def right_tokens(seat, lane):
    rows = prompt(seat, lane)
    for layer in range(1, LAST):
        sent = attend(rows, layer)
        rows = sent.clone()
        for node in range(NODES):
            rows += torch.where(goes_to(sent, node)[:, None], compute_expert(sent, layer, node), 0)
        rows %= MODULUS
    return rows


class Side:
    """What both sides have."""

    def __init__(self, world, left_out):
        self.device, self.left_out = FakeDevice(world), left_out
        self.errors, self.header = [], bytearray(HEADER_BYTES)

    def tensor(self, *shape):
        return self.device.zeros(shape, torch.int64)

    def program(self, run):
        return Program(run, self.errors.append, StageMeter(), "ping-pong", 0)

    def does(self, what):
        assert what in LEFT_OUT, what
        return self.left_out != what

    def run_and_signal(self, queue, runs, word, value, in_order):
        if not in_order:
            queue.signal(word, value)
        for run in runs:
            queue.run(self.program(run))
        if in_order:
            queue.signal(word, value)

    def post(self, wire, rows, num_rows, announce):
        header = bytearray(HEADER_BYTES)
        mine = bytearray(HEADER_BYTES) if self.does("all lanes share one header") else self.header
        mine[:] = num_rows.to_bytes(HEADER_BYTES, "little")
        copied = BytesCopy(memoryview(mine), memoryview(header))
        if self.does("an immediate overtakes its rows"):
            wire.post(rows, copied, partial(announce, header))
        else:
            wire.post(None, copied, partial(announce, header))
            wire.post(rows, None, lambda: None)


class Attention(Side):
    def __init__(self, world, seat, left_out):
        super().__init__(world, left_out)
        self.seat, self.nodes = seat, []
        words = self.device.words
        self.uploaded = words.take()
        self.gates, self.packed, self.through = ([words.take() for _ in range(LANES)] for _ in range(3))
        self.residual, self.prompts = self.tensor(LANES, TOKENS, HIDDEN), self.tensor(LANES, TOKENS, HIDDEN)
        self.outbox, self.answers = (self.tensor(NODES, LANES, TOKENS, HIDDEN) for _ in range(2))
        self.sent = self.tensor(LANES, NODES, TOKENS)  # whether a token's row went to a node
        self.counts = [[0] * NODES for _ in range(LANES)]  # host memory, as the next two
        self.early = [[0] * NODES for _ in range(LANES)]
        self.sampled = [torch.zeros(TOKENS, HIDDEN, dtype=torch.int64) for _ in range(LANES)]
        self.tokens = [None] * LANES
        self.turns, self.waiting = [0] * LANES, [set() for _ in range(LANES)]
        self.is_lost = False
        self.wires = [Wire(world) for _ in range(NODES)]

    def start(self, nodes):
        self.nodes = nodes
        upload = self.device.queue("uploads")
        for lane, token in itertools.product(range(LANES), range(TOKENS)):
            row = prompt(self.seat, lane)[token]
            upload.run(self.program(partial(self.prompts[lane, token].copy_, row)))
        upload.signal(self.uploaded, 1)
        for lane in range(LANES):
            self.device.follow(self.packed[lane], partial(self.post_rows, lane))
            self.device.follow(self.through[lane], partial(self.read_tokens, lane))
            self.launch(lane)

    def launch(self, lane):
        """A whole pass ahead: from here on the host opens gates and posts."""
        queue = self.device.queue(f"lane {lane}")
        if self.does("what another queue uploads is not waited for"):
            queue.wait(self.uploaded, 1)
        for turn in range(1, LAST):
            self.wait(queue, lane, turn - 1)
            in_order = self.does("rows are posted before they are packed")
            self.run_and_signal(queue, [partial(self.layer, lane, turn)], self.packed[lane], turn, in_order)
        self.wait(queue, lane, LAYERS)
        in_order = self.does("tokens are read before they are there")
        samples = [partial(self.sample, lane, token) for token in range(TOKENS)]
        self.run_and_signal(queue, [partial(self.take_in, lane, LAST), *samples], self.through[lane], 1, in_order)

    def wait(self, queue, lane, turn):
        is_flag = not self.does("a gate is a flag that is never taken back")
        if self.does("attention does not wait for its gate"):
            queue.wait(self.gates[lane], min(turn, 1) if is_flag else turn)

    # -- programs

    def take_in(self, lane, turn):
        residual = self.residual[lane]
        if turn == 1:
            residual.copy_(self.prompts[lane])
            return
        for node in range(NODES):
            at = self.sent[lane, node].nonzero().flatten()
            residual[at] += self.answers[node, lane, : len(at)]
        residual %= MODULUS

    def layer(self, lane, turn):
        self.take_in(lane, turn)
        rows = attend(self.residual[lane], turn)
        self.residual[lane] = rows
        for node in range(NODES):
            is_sent = goes_to(rows, node)
            self.sent[lane, node] = is_sent
            count = int(is_sent.sum())
            self.outbox[node, self.box(lane), :count] = rows[is_sent]
            self.counts[lane][node] = count

    def sample(self, lane, token):
        self.sampled[lane][token] = self.residual[lane, token]

    # -- host

    def box(self, lane):
        return lane if self.does("all lanes share one outbox") else 0

    def read_tokens(self, lane, _):
        self.tokens[lane] = self.sampled[lane].clone()

    def post_rows(self, lane, turn):
        if self.is_lost:
            return
        is_late = self.does("counts are read before they are packed")
        counts = list(self.counts[lane] if is_late else self.early[lane])
        self.turns[lane], self.waiting[lane] = turn, {node for node in range(NODES) if counts[node]}
        for node, other in enumerate(self.nodes):
            count, rows = counts[node], None
            if count:
                source, target = self.outbox[node, self.box(lane), :count], other.landing[self.seat, lane, :count]
                rows = RowsCopy(source, self.device.memory, target, other.device.memory)
            self.post(self.wires[node], rows, count, partial(other.landed, self.seat, lane, turn))
        if not self.waiting[lane]:
            self.open(lane, turn)

    def answered(self, node, lane, turn, header):
        if self.is_lost:
            return
        assert turn == self.turns[lane], f"an answer to turn {turn} at turn {self.turns[lane]}"
        assert node in self.waiting[lane], f"node {node} owes no answer"
        assert int.from_bytes(header, "little") == self.counts[lane][node], "another number of rows than were sent"
        self.waiting[lane].discard(node)
        if not self.waiting[lane] or not self.does("a gate opens at the first answer"):
            if self.does("attention does not flush what landed"):
                self.device.flush()
            self.open(lane, turn)

    def open(self, lane, turn):
        self.early[lane] = list(self.counts[lane])
        self.device.words.open(self.gates[lane], turn)

    def lose(self):
        """Whatever waits for a node that is lost must run out."""
        self.is_lost = True
        if self.does("a failure opens no gates"):
            for gate in self.gates:
                self.device.words.open(gate, WIDE_OPEN)


class Expert(Side):
    def __init__(self, world, node, left_out):
        super().__init__(world, left_out)
        self.node, self.attentions, self.is_dead = node, [], False
        self.landing, self.outbox = (self.tensor(ATTENTIONS, LANES, TOKENS, HIDDEN) for _ in range(2))
        self.done, self.queue = self.device.words.take(), self.device.queue("experts")
        self.ring, self.tickets, self.finished = [None] * RING, 0, 0
        self.here, self.out = {}, {}
        self.wires = [Wire(world) for _ in range(ATTENTIONS)]

    def start(self, attentions):
        self.attentions = attentions
        self.device.follow(self.done, self.answer)

    def landed(self, seat, lane, turn, header):
        self.here.setdefault((lane, turn), {})[seat] = int.from_bytes(header, "little")
        self.start_next()

    def start_next(self):
        for (lane, turn), counts in sorted(self.here.items()):
            if self.is_dead or len(counts) < ATTENTIONS or self.tickets - self.finished >= RING - 1:
                continue
            del self.here[lane, turn]
            if any(counts.values()):
                self.launch(lane, turn, counts)

    def launch(self, lane, turn, counts):
        if self.does("an expert does not flush what landed"):
            self.device.flush()
        self.tickets += 1
        slot = self.tickets % RING if self.does("a descriptor is used again before it was read") else 0
        self.ring[slot] = (lane, turn, counts)
        self.out[self.tickets] = (lane, turn, counts)
        in_order = self.does("an expert answers before it is done")
        self.run_and_signal(self.queue, [partial(self.compute, slot)], self.done, self.tickets, in_order)

    def compute(self, slot):
        lane, layer, counts = self.ring[slot]
        for seat, count in counts.items():
            answer = self.outbox[seat, self.box(lane), :count]
            answer[:] = compute_expert(self.landing[seat, lane, :count], layer, self.node)

    def box(self, lane):
        return lane if self.does("all lanes share one outbox of an expert") else 0

    def answer(self, ticket):
        self.finished = ticket
        lane, turn, counts = self.out.pop(ticket)
        for seat, count in counts.items():
            if count and not self.is_dead:
                other = self.attentions[seat]
                source, target = self.outbox[seat, self.box(lane), :count], other.answers[self.node, lane, :count]
                rows = RowsCopy(source, self.device.memory, target, other.device.memory)
                self.post(self.wires[seat], rows, count, partial(other.answered, self.node, lane, turn))
        self.start_next()


RIGHT, WRONG, STUCK, DRAINED = "right", "wrong", "stuck", "drained"


async def play(seed, left_out=AS_DESIGNED, dies=False):
    """A run to its end; with `dies` a node is lost in the middle. Protocol errors count as wrong."""
    world = FakeWorld(seed)
    attentions = [Attention(world, seat, left_out) for seat in range(ATTENTIONS)]
    experts = [Expert(world, node, left_out) for node in range(NODES)]
    try:
        for side, others in [(attentions, experts), (experts, attentions)]:
            for one in side:
                one.start(others)
        if dies or left_out == "a failure opens no gates":
            return await lose_a_node(world, attentions, experts)
        await world.quiet()
    except AssertionError:
        return WRONG
    if any(tokens is None for one in attentions for tokens in one.tokens):
        return STUCK
    if any(one.errors for one in (*attentions, *experts)):
        return WRONG
    expected = [(one, lane, right_tokens(one.seat, lane)) for one in attentions for lane in range(LANES)]
    return RIGHT if all(torch.equal(one.tokens[lane], tokens) for one, lane, tokens in expected) else WRONG


async def lose_a_node(world, attentions, experts):
    await world.quiet(max_steps=60 + world.chance.randrange(60))
    experts[0].is_dead = True
    await world.quiet()
    for one in attentions:
        one.lose()
    await world.quiet()
    return DRAINED if all(tokens is not None for one in attentions for tokens in one.tokens) else STUCK
