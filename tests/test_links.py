"""Links: what is dropped and counted, and what a peer that fails does to a turn."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from msi.errors import TransportError
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.inproc import InprocTransport
from msi.net.link_hello import PROTOCOL_VERSION, LinkHello
from msi.net.slots import HEADER, HEADER_BYTES, MAGIC, Header, Kind, pack_immediate, unpack_immediate
from tests.waiting import until

HELLO = LinkHello(
    protocol_version=PROTOCOL_VERSION, instance="token", worker_id="attention-0", incarnation=5, node=3, rank=0, size=1,
    placement_version=2, num_lanes=2, slot_rows=4, row_bytes=16, answer_row_bytes=8, next_seqs=(0, 0),
)  # fmt: skip


class Recorder:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.events = []

    def joined(self, seat, node, outbox):
        self.events.append(("joined", seat, node))

    def left(self, seat):
        self.events.append(("left", seat))

    def landed(self, seat, lane, seq, num_rows, more):
        self.events.append((seat, lane, seq, num_rows, more))


class Pair:
    """A dispatching node that is connected to two combining ones."""

    async def start(self, hello=HELLO, timeout_s=5.0, clock=time.monotonic):
        self.losses = []
        self.transports = [InprocTransport() for _ in range(3)]
        self.nodes = [
            CombineLink(transport, expected=HELLO, worker_id=f"expert-{node}", incarnation=9, num_seats=2, max_skip=100)
            for node, transport in enumerate(self.transports[1:])
        ]
        self.recorders = [Recorder() for _ in self.nodes]
        self.addresses = [
            await node.listen(recorder) for node, recorder in zip(self.nodes, self.recorders, strict=True)
        ]
        self.link = DispatchLink(
            self.transports[0], hello=hello, num_nodes=2, report_loss=lambda *loss: self.losses.append(loss),
            timeout_s=timeout_s, clock=clock,
        )  # fmt: skip
        self.outboxes = [await self.link.connect(node, self.addresses[node]) for node in range(2)]
        for recorder in self.recorders:
            assert recorder.events == [("joined", 0, 3)]
            recorder.events.clear()
        return self

    def exchange(self, lane, num_rows, more=True):
        """A turn, posted from a thread as the device does it; a task that ends when its answers have landed."""

        async def turn():
            turn = self.link.open(lane, more)
            await asyncio.to_thread(turn.post, num_rows)
            await self.link.landed(turn)

        return asyncio.create_task(turn())

    async def landed(self, node, count=1):
        """What landed at a node since the last look, once it is `count` posts."""
        events = self.recorders[node].events
        await until(lambda: len(events) >= count)
        taken = events.copy()
        events.clear()
        return taken

    async def come_back(self, node):
        """A node that was lost is there again, in a new life."""
        transport, recorder = InprocTransport(), Recorder()
        again = CombineLink(
            transport, expected=HELLO, worker_id=f"expert-{node}", incarnation=10, num_seats=2, max_skip=100
        )
        self.transports[1 + node], self.nodes[node], self.recorders[node] = transport, again, recorder
        await self.link.connect(node, await again.listen(recorder))
        assert recorder.events == [("joined", 0, 3)]
        recorder.events.clear()

    async def nothing_landed(self, node):
        await until(lambda: self.nodes[node].counters.immediates > 0)
        return not self.recorders[node].events

    async def stop(self):
        for transport in self.transports:
            await transport.close()


@pytest.fixture
async def pair():
    pair = await Pair().start()
    yield pair
    await pair.stop()


async def test_a_turn_is_one_post_per_node_and_an_answer_from_those_that_had_rows(pair):
    turn = pair.exchange(1, (2, 0))
    assert await pair.landed(0) == [(0, 1, 0, 2, True)]
    assert await pair.landed(1) == [(0, 1, 0, 0, True)]
    await asyncio.sleep(0)
    assert not turn.done()
    pair.nodes[0].answer(0, 1, 0, 2, compute_s=0.001)
    await asyncio.wait_for(turn, 5)
    assert pair.link.compute_meter.median_s == pytest.approx(0.001)
    turn = pair.exchange(1, (0, 1), more=False)
    assert await pair.landed(0) == [(0, 1, 1, 0, False)]
    assert await pair.landed(1) == [(0, 1, 1, 1, False)]
    pair.nodes[1].answer(0, 1, 1, 1, compute_s=0.0)
    await asyncio.wait_for(turn, 5)


def test_immediates_hold_their_fields():
    for fields in [(3, True, 7, 3, 4095, 4095), (0, False, 0, 0, 0, 0), (2, True, 3, 1, 1234, 77)]:
        assert tuple(unpack_immediate(pack_immediate(*fields))) == fields
    assert HEADER.size <= HEADER_BYTES


GARBAGE = [
    ("lane", pack_immediate(Kind.DISPATCH, True, 5, 0, 0, 5)),
    ("incarnation", pack_immediate(Kind.DISPATCH, True, 0, 0, 0, 4)),
    ("stale", pack_immediate(Kind.EMPTY, True, 0, 0, 4095, 5)),
    ("stale", pack_immediate(Kind.EMPTY, True, 0, 0, 200, 5)),
    ("kind", pack_immediate(Kind.COMBINE, True, 0, 0, 0, 5)),
    ("header", pack_immediate(Kind.DISPATCH, True, 0, 0, 0, 5)),
]
HEADERS = [
    ("header", {"magic": b"HTTP"}),
    ("header", {"lane": 1}),
    ("header", {"seq": 4096}),
    ("header", {"incarnation": 4}),
    ("header", {"placement_version": 1}),
    ("rows", {"num_rows": 0}),
    ("rows", {"num_rows": 5}),
    ("rows", {"row_bytes": 32}),
]
GOOD = Header(MAGIC, Kind.DISPATCH, 0, 0, 1, 5, 2, 0, 3, 16, 0, 0)


@pytest.mark.parametrize(("reason", "immediate"), GARBAGE)
async def test_a_foreign_or_stale_immediate_is_dropped_and_counted(pair, reason, immediate):
    endpoint = pair.link._nodes[0].endpoint
    endpoint.post(immediate)
    assert await pair.nothing_landed(0)
    assert pair.nodes[0].counters.dropped == {reason: 1}


@pytest.mark.parametrize(("reason", "changes"), HEADERS)
async def test_a_header_that_does_not_match_its_immediate_is_dropped_and_counted(pair, reason, changes):
    endpoint = pair.link._nodes[0].endpoint
    HEADER.pack_into(endpoint.outbox, 0, *GOOD._replace(**changes))
    endpoint.post(pack_immediate(Kind.DISPATCH, True, 0, 0, 0, 5), 0, HEADER_BYTES)
    assert await pair.nothing_landed(0)
    assert pair.nodes[0].counters.dropped == {reason: 1}
    HEADER.pack_into(endpoint.outbox, 0, *GOOD)
    endpoint.post(pack_immediate(Kind.DISPATCH, True, 0, 0, 0, 5), 0, HEADER_BYTES)
    assert await pair.landed(0) == [(0, 0, 0, 3, True)]


async def test_answers_that_nobody_waits_for_are_dropped_and_counted(pair):
    turn = pair.exchange(0, (1, 0))
    await pair.landed(0)
    endpoint = pair.nodes[0]._seats[0].endpoint
    for immediate in (
        pack_immediate(Kind.COMBINE, False, 0, 0, 7, 9),  # another turn
        pack_immediate(Kind.COMBINE, False, 1, 0, 0, 9),  # a lane that waits for nothing
        pack_immediate(Kind.COMBINE, False, 0, 0, 0, 8),  # another life
        pack_immediate(Kind.COMBINE, False, 0, 0, 0, 9),  # no header
    ):
        endpoint.post(immediate)
    await asyncio.sleep(0.05)
    assert not turn.done()
    assert pair.link.counters.dropped == {"stale": 2, "incarnation": 1, "header": 1}
    pair.nodes[0].answer(0, 0, 0, 1, compute_s=0.0)
    await asyncio.wait_for(turn, 5)


async def test_a_refusal_carries_its_reason_to_the_turn(pair):
    turn = pair.exchange(0, (1, 0))
    await pair.landed(0)
    pair.nodes[0].refuse(0, 0, 0, "out of luck")
    with pytest.raises(TransportError, match="expert-0: out of luck"):
        await asyncio.wait_for(turn, 5)


async def test_a_peer_that_closes_fails_the_turns_that_wait_for_it(pair):
    turn = pair.exchange(0, (1, 1))
    await pair.landed(1)
    await pair.transports[2].close()
    with pytest.raises(TransportError, match="expert-1: connection lost"):
        await asyncio.wait_for(turn, 5)
    assert [(node, worker_id) for node, worker_id, _ in pair.losses] == [(1, "expert-1")]
    assert pair.link.missing_nodes == [1]
    with pytest.raises(TransportError, match="expert-1: connection lost"):
        await pair.exchange(1, (1, 1))


async def test_a_peer_that_does_not_answer_is_lost_after_its_time():
    pair = await Pair().start(timeout_s=0.1)
    with pytest.raises(TransportError, match=r"expert-0: no answer for 0\.1 s"):
        await asyncio.wait_for(pair.exchange(0, (1, 0)), 5)
    assert pair.link.missing_nodes == [0]
    await pair.stop()


LOST = r"^expert-1: connection lost"


async def lose_and_return(pair):
    """The second node's connection breaks, and it is there again in a new life."""
    await pair.transports[2].close()
    await until(lambda: pair.link.missing_nodes == [1])
    await pair.come_back(1)


async def test_rows_that_were_packed_for_a_node_that_was_lost_do_not_go_to_its_next_life(pair):
    turn = pair.link.open(0, True)
    await lose_and_return(pair)
    turn.post((0, 1))
    with pytest.raises(TransportError, match=LOST):
        await asyncio.wait_for(pair.link.landed(turn), 5)
    again = pair.exchange(0, (0, 1))
    assert await pair.landed(1) == [(0, 0, 1, 1, True)]
    pair.nodes[1].answer(0, 0, 1, 1, compute_s=0.0)
    await asyncio.wait_for(again, 5)
    assert not pair.nodes[1].counters.dropped


async def test_a_turn_that_a_lost_node_had_answered_fails_too_for_its_answer_went_with_its_seat(pair):
    turn = pair.exchange(0, (1, 1))
    await pair.landed(1)
    pair.nodes[1].answer(0, 0, 0, 1, compute_s=0.0)
    await until(lambda: pair.link.counters.answers == 1)
    await lose_and_return(pair)
    pair.nodes[0].answer(0, 0, 0, 1, compute_s=0.0)
    with pytest.raises(TransportError, match=LOST):
        await asyncio.wait_for(turn, 5)


async def test_a_turn_that_is_over_is_found_out_when_a_node_was_lost_since(pair):
    turn = pair.link.open(0, False)
    turn.post((0, 0))
    await asyncio.wait_for(pair.link.landed(turn), 5)
    pair.link.check(turn)
    await lose_and_return(pair)
    with pytest.raises(TransportError, match=LOST):
        pair.link.check(turn)


async def test_a_connection_that_takes_no_post_is_a_loss_of_the_worker_and_not_of_an_address(pair):
    pair.link._nodes[1].endpoint.close()  # broken, and nobody has said so yet
    with pytest.raises(TransportError, match=r"^expert-1: connection lost \(the connection is closed\)$"):
        await asyncio.wait_for(pair.exchange(0, (1, 0)), 5)
    assert pair.losses == [(1, "expert-1", "connection lost (the connection is closed)")]
    assert pair.link.missing_nodes == [1]


async def test_the_time_that_a_turn_was_computed_for_is_not_held_against_those_who_answer():
    now = 0.0
    pair = await Pair().start(timeout_s=0.16, clock=lambda: now)
    turn = pair.link.open(0, True)
    landing = asyncio.create_task(pair.link.landed(turn))
    now = 0.15
    turn.post((1, 0))
    now = 0.30
    await asyncio.sleep(0.05)  # looks at it every hundredth of a second
    assert not landing.done()
    now = 0.32
    with pytest.raises(TransportError, match=r"expert-0: no answer for 0\.16 s"):
        await asyncio.wait_for(landing, 5)
    await pair.stop()


async def test_a_lane_that_gave_up_a_pass_goes_on_at_the_next(pair):
    turn = pair.exchange(0, (1, 0))
    await pair.landed(0)
    turn.cancel()
    await asyncio.gather(turn, return_exceptions=True)
    pair.link.skip_to(0, 8)
    await pair.landed(1)
    turn = pair.exchange(0, (1, 1))
    assert await pair.landed(0) == [(0, 0, 8, 1, True)]
    assert await pair.landed(1) == [(0, 0, 8, 1, True)]
    pair.nodes[0].answer(0, 0, 0, 1, compute_s=0.0)  # for the pass that was given up
    assert pair.nodes[0].counters.dropped == {"answer to a peer that is gone": 1}
    turn.cancel()


async def test_a_new_life_of_a_peer_fences_the_old_one_and_an_older_one_is_refused(pair):
    transport = InprocTransport()
    newer = DispatchLink(
        transport, hello=replace(HELLO, incarnation=6), num_nodes=2, report_loss=lambda *loss: None
    )  # fmt: skip
    await newer.connect(0, pair.addresses[0])
    assert pair.recorders[0].events == [("left", 0), ("joined", 0, 3)]
    older = DispatchLink(
        transport, hello=replace(HELLO, incarnation=5), num_nodes=2, report_loss=lambda *loss: None
    )  # fmt: skip
    with pytest.raises(TransportError, match="comes as incarnation 5; 6 was here already"):
        await older.connect(0, pair.addresses[0])
    await transport.close()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"protocol_version": 9}, "protocol_version 9, ours is 1"),
        ({"instance": "other"}, "x belongs to another instance"),
        ({"placement_version": 3}, "placement_version 3, ours is 2"),
        ({"rank": 1, "size": 2}, "x is rank 1 of 2 of its node; only nodes of one rank are built"),
        ({"size": 2}, "x is rank 0 of 2"),
        ({"row_bytes": 32}, "row_bytes 32, ours is 16"),
        ({"slot_rows": 8}, "slot_rows 8, ours is 4"),
    ],
)
async def test_peers_that_do_not_fit_are_refused_with_both_values(pair, changes, complaint):
    transport = InprocTransport()
    stranger = DispatchLink(
        transport, hello=replace(HELLO, worker_id="x", **changes), num_nodes=2, report_loss=lambda *loss: None
    )
    with pytest.raises(TransportError, match=complaint):
        await stranger.connect(0, pair.addresses[0])
    await transport.close()


async def test_when_all_seats_are_taken_the_next_peer_is_told(pair):
    transport = InprocTransport()
    for index in range(2):
        link = DispatchLink(
            transport, hello=replace(HELLO, worker_id=f"x{index}"), num_nodes=2, report_loss=lambda *loss: None
        )
        if index == 0:
            await link.connect(0, pair.addresses[0])
        else:
            with pytest.raises(TransportError, match="all 2 seats of expert-0 are taken"):
                await link.connect(0, pair.addresses[0])
    await transport.close()


async def test_garbage_as_a_hello_is_refused():
    transport = InprocTransport()
    node = CombineLink(transport, expected=HELLO, worker_id="expert-0", incarnation=0, num_seats=1, max_skip=10)
    address = await node.listen(Recorder())
    with pytest.raises(TransportError, match=r"not msgpack|array"):
        await transport.connect(address, b"GET / HTTP/1.1", transport.register(1, 64), 0)
    await transport.close()


async def test_rows_are_taken_of_every_placement_that_a_node_uses_and_a_pass_keeps_to_its_own(pair):
    pair.link.placement_version = 3
    before = pair.exchange(0, (1, 0))  # a pass that had begun
    assert await pair.landed(0) == [(0, 0, 0, 1, True)]
    pair.nodes[0].answer(0, 0, 0, 1, compute_s=0.0)
    await asyncio.wait_for(before, 5)
    pair.link.begin(0)
    early = pair.exchange(0, (1, 0))
    await until(lambda: pair.nodes[0].counters.dropped["header"])
    assert not pair.recorders[0].events, "this node does not use it yet"
    early.cancel()
    for node in pair.nodes:
        node.use_placement(3)
    pair.link.begin(1)
    for lane, seq in ((1, 0), (1, 1)):
        turn = pair.exchange(lane, (1, 0))
        assert await pair.landed(0) == [(0, lane, seq, 1, True)]
        pair.nodes[0].answer(0, lane, seq, 1, compute_s=0.0)
        await asyncio.wait_for(turn, 5)
    for version, is_taken in ((2, True), (3, True), (4, False)):
        link = DispatchLink(
            InprocTransport(), hello=replace(HELLO, worker_id="x", incarnation=version, placement_version=version),
            num_nodes=2, report_loss=lambda *loss: None,
        )  # fmt: skip
        if is_taken:
            await link.connect(0, pair.addresses[0])
        else:
            with pytest.raises(TransportError, match="placement_version 4, ours is 3"):
                await link.connect(0, pair.addresses[0])
        link.drop(0, "enough")
