"""Links: what is dropped and counted, and what a peer that fails does to a turn."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from dataclasses import replace

import pytest

from msi.control.counters import PeerDelay, peer_delays
from msi.errors import TransportError
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.inproc import InprocTransport
from msi.net.link_hello import PROTOCOL_VERSION, LinkHello
from msi.net.regions import HOST_MEMORY
from msi.net.slots import HEADER, HEADER_BYTES, MAGIC, SEQ_MASK, Header, Kind, pack_immediate, unpack_immediate
from tests.waiting import until
from tools.bench_links import expert_side

HELLO = LinkHello(
    protocol_version=PROTOCOL_VERSION, instance="token", worker_id="attention-0", incarnation=5, node=3, rank=0, size=1,
    placement_version=2, num_lanes=2, slot_rows=4, row_bytes=256, answer_row_bytes=128, next_seqs=(0, 0),
)  # fmt: skip


class Recorder:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.events = []

    def joined(self, seat, node, out_rows):
        self.events.append(("joined", seat, node))

    def left(self, seat):
        self.events.append(("left", seat))

    def told(self, lane):
        return lambda seat, seq, num_rows, more, now: self.events.append((seat, lane, seq, num_rows, more))

    def landed_again(self, seat, lane, seq, num_rows):
        self.events.append((seat, lane, seq, num_rows, "again"))

    def all_landed(self):
        """Nothing is to be done."""


class Gates:
    """The queues of two lanes that compute nothing: what is in `counts` is packed, and gates that open are noted."""

    def __init__(self, num_layers=1):
        self.num_layers = num_layers
        self.counts = memoryview(bytearray(4 * 2 * 2)).cast("i", (2, 2))
        self.opened = {0: [], 1: []}
        self.again = []

    def open(self, lane, turn):
        self.opened[lane].append(turn)

    def pack_again(self, lane, turn):
        self.again.append((lane, turn))

    def pack(self, lane, num_rows):
        for node, count in enumerate(num_rows):
            self.counts[lane, node] = count


class Pair:
    """A dispatching node that is connected to two combining ones."""

    async def start(
        self, hello=HELLO, timeout_s=5.0, clock=time.monotonic, node_clocks=(time.monotonic,) * 2, watch=None, **link
    ):
        self.losses = []
        self.transports = [InprocTransport() for _ in range(3)]
        self.nodes = [
            CombineLink(
                transport, expected=HELLO, worker_id=f"expert-{node}", incarnation=9, num_seats=2, max_skip=100,
                clock=node_clocks[node],
            )
            for node, transport in enumerate(self.transports[1:])
        ]  # fmt: skip
        self.recorders = [Recorder() for _ in self.nodes]
        self.addresses = [
            await node.listen(recorder) for node, recorder in zip(self.nodes, self.recorders, strict=True)
        ]
        self.link = DispatchLink(
            self.transports[0], hello=hello, num_nodes=2, report_loss=lambda *loss: self.losses.append(loss),
            timeout_s=timeout_s, clock=clock, watch=watch, **link,
        )  # fmt: skip
        self.out_rows = [await self.link.connect(node, self.addresses[node]) for node in range(2)]
        for recorder in self.recorders:
            assert recorder.events == [("joined", 0, 3)]
            recorder.events.clear()
        return self

    def begin(self, lane, num_layers=1, more=True):
        """A pass of a lane, nothing of it packed yet; its gates and its first turn."""
        self.gates = Gates(num_layers)
        return self.gates, self.link.begin(lane, self.gates, lambda lane: more)

    def exchange(self, lane, num_rows, more=True, num_layers=1):
        """A pass whose first turn is posted from a thread, as the device does it; a task that ends with the pass."""

        async def exchange():
            gates, turn = self.begin(lane, num_layers, more)
            try:
                gates.pack(lane, num_rows)
                await asyncio.to_thread(self.link.packed, lane, turn)
                await self.link.passed(lane)
                self.link.end(lane)
            except BaseException:
                self.link.give_up(lane)
                raise

        return asyncio.create_task(exchange())

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
    pair.nodes[0].answer(1, [(0, 0, 2)], compute_s=0.001)
    await asyncio.wait_for(turn, 5)
    assert pair.link.turns.times.compute_s == pytest.approx(0.001)
    turn = pair.exchange(1, (0, 1), more=False)
    assert await pair.landed(0) == [(0, 1, 1, 0, False)]
    assert await pair.landed(1) == [(0, 1, 1, 1, False)]
    pair.nodes[1].answer(1, [(0, 1, 1)], compute_s=0.0)
    await asyncio.wait_for(turn, 5)


async def test_peers_are_ranked_by_the_way_to_them_whatever_their_clocks_say():
    now, watched = 100.0, []
    pair = await Pair().start(
        clock=lambda: now, node_clocks=(lambda: now - 70, lambda: now + 1000), watch=lambda *one: watched.append(one)
    )
    turn = pair.exchange(0, (1, 1))
    await pair.landed(0)
    await pair.landed(1)
    now = 100.125
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    await until(lambda: pair.link.counters.answers == 1)
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)
    now = 100.625  # as long under way
    await asyncio.wait_for(turn, 5)
    ranked = (PeerDelay("expert-1", 0.5, 0.5, 0.125, 0.125), PeerDelay("expert-0", 0.0, 0.0, 0.125, 0.125))
    assert peer_delays(pair.link.nodes.exchanges) == ranked
    assert watched == [("expert-0", 0, 100.0, 100.125, 0.125), ("expert-1", 0, 100.0, 100.625, 0.125)]
    await pair.stop()


def test_the_tail_of_delays_is_their_99th_percentile_and_what_a_peer_makes_up_is_left_out():
    exchanges = [(0.003, 0.001)] * 98 + [(0.5, 0.25)] * 2 + [(1.0, float("nan")), (1.0, float("inf")), (1.0, -1.0)]
    assert peer_delays({"a": exchanges, "b": []}) == (PeerDelay("a", 0.002, 0.25, 0.001, 0.25),)


def test_immediates_hold_their_fields():
    for fields in [(3, True, 7, 3, 4095, 4095), (0, False, 0, 0, 0, 0), (2, True, 3, 1, 1234, 77)]:
        assert tuple(unpack_immediate(pack_immediate(*fields))) == fields
    assert HEADER.size <= HEADER_BYTES


async def test_a_peer_goes_on_when_its_sequence_numbers_outgrow_an_immediate():
    num_passes = -(-(SEQ_MASK + 10) // 60)
    assert len(await expert_side(2, 1, 60, num_passes, is_apart=False)) > SEQ_MASK  # each landed and was answered


GARBAGE = [
    ("lane", pack_immediate(Kind.DISPATCH, True, 5, 0, 0, 5)),
    ("incarnation", pack_immediate(Kind.DISPATCH, True, 0, 0, 0, 4)),
    ("stale", pack_immediate(Kind.EMPTY, True, 0, 0, 4095, 5)),
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
    ("rows", {"row_bytes": 128}),
]
GOOD = Header(MAGIC, Kind.DISPATCH, 0, 0, 1, 5, 2, 0, 3, 256, 0.0, 0.0)


@pytest.mark.parametrize(("reason", "immediate"), GARBAGE)
async def test_a_foreign_or_stale_immediate_is_dropped_and_counted(pair, reason, immediate):
    endpoint = pair.link.nodes[0].endpoint
    endpoint.post(0, immediate)
    assert await pair.nothing_landed(0)
    assert pair.nodes[0].counters.dropped == {reason: 1}


@pytest.mark.parametrize(("reason", "changes"), HEADERS)
async def test_a_header_that_does_not_match_its_immediate_is_dropped_and_counted(pair, reason, changes):
    endpoint = pair.link.nodes[0].endpoint
    HEADER.pack_into(endpoint.out_headers[0], 0, *GOOD._replace(**changes))
    endpoint.post(0, pack_immediate(Kind.DISPATCH, True, 0, 0, 0, 5), num_rows=1)
    assert await pair.nothing_landed(0)
    assert pair.nodes[0].counters.dropped == {reason: 1}
    HEADER.pack_into(endpoint.out_headers[0], 0, *GOOD)
    endpoint.post(0, pack_immediate(Kind.DISPATCH, True, 0, 0, 0, 5), num_rows=1)
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
        endpoint.post(0, immediate)
    await asyncio.sleep(0.05)
    assert not turn.done()
    assert pair.link.counters.dropped == {"stale": 2, "incarnation": 1, "header": 1}
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
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
    assert pair.link.nodes.missing == [1]
    with pytest.raises(TransportError, match="expert-1: connection lost"):
        await pair.exchange(1, (1, 1))


async def test_a_peer_that_does_not_answer_is_lost_after_its_time():
    pair = await Pair().start(timeout_s=0.1)
    with pytest.raises(TransportError, match=r"expert-0: no answer for 0\.1 s"):
        await asyncio.wait_for(pair.exchange(0, (1, 0)), 5)
    assert pair.link.nodes.missing == [0]
    await pair.stop()


LOST = r"^expert-1: connection lost"


async def lose_and_return(pair):
    """The second node's connection breaks, and it is there again in a new life."""
    await pair.transports[2].close()
    await until(lambda: pair.link.nodes.missing == [1])
    await pair.come_back(1)


async def test_rows_that_were_packed_for_a_node_that_was_lost_do_not_go_to_its_next_life(pair):
    gates, turn = pair.begin(0)
    await lose_and_return(pair)
    gates.pack(0, (0, 1))
    pair.link.packed(0, turn)
    with pytest.raises(TransportError, match=LOST):
        await asyncio.wait_for(pair.link.passed(0), 5)
    pair.link.give_up(0)
    again = pair.exchange(0, (0, 1))
    ((_, lane, _, num_rows, _),) = await pair.landed(1)
    assert (lane, num_rows) == (0, 1)
    pair.nodes[1].answer(0, [(0, pair.link.next_seq(0) - 1, 1)], compute_s=0.0)
    await asyncio.wait_for(again, 5)
    assert not pair.nodes[1].counters.dropped


async def test_a_pass_that_a_lost_node_had_answered_fails_too_for_its_answer_went_with_its_seat(pair):
    turn = pair.exchange(0, (1, 1))
    await pair.landed(1)
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)
    await until(lambda: pair.link.counters.answers == 1)
    await lose_and_return(pair)
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    with pytest.raises(TransportError, match=LOST):
        await asyncio.wait_for(turn, 5)


async def test_a_pass_that_is_over_counts_whoever_was_lost_since(pair):
    _, turn = pair.begin(0, more=False)
    pair.link.packed(0, turn)
    await asyncio.wait_for(pair.link.passed(0), 5)
    pair.link.end(0)
    _, turn = pair.begin(0, more=False)
    pair.link.packed(0, turn)
    await asyncio.wait_for(pair.link.passed(0), 5)
    await lose_and_return(pair)
    pair.link.end(0)
    pair.link.give_up(0)  # nothing is left to be given up


# -- rows of a node that was lost go elsewhere -------------------------------------------------------------------------


def either(nodes):
    """What is missing where both nodes hold everything."""
    return "all experts" if len(nodes) == 2 else ""


async def replicated(hold_s=5.0, missing=either, **options):
    return await Pair().start(hold_s=hold_s, missing=missing, **options)


async def packs_again(pair, lane, turn, num_rows):
    """The device is asked to, and does."""
    await until(lambda: pair.gates.again)
    assert pair.gates.again == [(lane, turn)]
    pair.gates.again.clear()
    pair.gates.pack(lane, num_rows)
    await asyncio.to_thread(pair.link.packed_again, lane, turn)


async def never_answered(pair):
    """The other node has answered."""
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    await pair.transports[2].close()


async def had_answered(pair):
    """The other node has not."""
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)
    await until(lambda: pair.link.counters.answers == 1)
    await pair.transports[2].close()
    await until(lambda: pair.link.nodes.missing)
    assert not pair.gates.again, "its slots are in use"
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)


async def falls_silent(pair):
    """The other node has answered."""
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)


@pytest.mark.parametrize("how", [never_answered, had_answered, falls_silent])
async def test_a_turn_that_a_lost_node_owed_is_packed_again_for_the_others_in_the_same_pass(how):
    pair = await replicated(timeout_s=0.3 if how is falls_silent else 5.0)
    passing = pair.exchange(0, (1, 1), num_layers=2)
    assert await pair.landed(0) == [(0, 0, 0, 1, True)]
    await pair.landed(1)
    await how(pair)
    await packs_again(pair, 0, 1, (2, 0))
    assert await pair.landed(0) == [(0, 0, 0, 2, "again")]
    assert pair.gates.opened[0] == []
    pair.nodes[0].answer(0, [(0, 0, 2)], compute_s=0.0)
    await until(lambda: pair.gates.opened[0] == [1])
    pair.gates.pack(0, (2, 0))
    pair.link.packed(0, 2)
    assert await pair.landed(0) == [(0, 0, 1, 2, True)], "and the pass goes on"
    pair.nodes[0].answer(0, [(0, 1, 2)], compute_s=0.0)
    await asyncio.wait_for(passing, 5)
    assert pair.link.counters.packed_again == 1
    await pair.stop()


async def test_a_pass_with_no_rows_for_a_lost_node_does_not_notice():
    pair = await replicated()
    passing = pair.exchange(0, (1, 0))
    await pair.landed(1)
    await pair.transports[2].close()
    await until(lambda: pair.link.nodes.missing)
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    await asyncio.wait_for(passing, 5)
    assert not pair.link.counters.packed_again
    await pair.stop()


async def test_what_a_lost_node_had_answered_is_read_before_its_seat_is_wiped_and_given_away():
    pair = await replicated()
    passing = pair.exchange(0, (1, 1), num_layers=2)
    await pair.landed(1)
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    await until(lambda: pair.gates.opened[0] == [1])
    landing, generation = pair.link.landing, pair.link.landing.generation(1)
    await pair.transports[2].close()
    await until(lambda: pair.link.nodes.missing)
    again = asyncio.create_task(pair.come_back(1))
    await asyncio.sleep(0.05)
    assert (landing.generation(1), again.done()) == (generation, False), "the next layer may be reading"
    pair.gates.pack(0, (1, 0))
    pair.link.packed(0, 2)
    await asyncio.wait_for(again, 5)
    assert landing.generation(1) == generation + 1
    pair.nodes[0].answer(0, [(0, 1, 1)], compute_s=0.0)
    await asyncio.wait_for(passing, 5)
    await pair.stop()


async def test_a_pass_is_held_until_what_it_lacks_is_back_and_its_next_life_takes_the_turn_that_it_never_saw():
    pair = await Pair().start(hold_s=5.0)
    passing = pair.exchange(0, (1, 1))
    await pair.landed(0)
    await pair.transports[2].close()
    await until(lambda: pair.link.nodes.missing)
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    await asyncio.sleep(0.05)
    assert not pair.gates.again
    await pair.come_back(1)
    await packs_again(pair, 0, 1, (1, 1))
    assert await pair.landed(1) == [(0, 0, 0, 1, "again")]
    for node in pair.nodes:
        node.answer(0, [(0, 0, 1)], compute_s=0.0)
    await asyncio.wait_for(passing, 5)
    await pair.stop()


async def test_a_pass_that_was_held_too_long_fails_and_says_what_is_missing():
    pair = await Pair().start(hold_s=0.2, timeout_s=0.4)
    passing = pair.exchange(0, (0, 1))
    await pair.landed(1)
    await pair.transports[2].close()
    with pytest.raises(TransportError, match=r"^expert-1: connection lost \(.*\); nodes \[1\] for 0\.2 s$"):
        await asyncio.wait_for(passing, 5)
    with pytest.raises(TransportError, match=r"nodes \[1\] for 0\.2 s$"):
        await asyncio.wait_for(pair.link.nodes.wait_complete(), 5)
    await pair.come_back(1)
    await asyncio.wait_for(pair.link.nodes.wait_complete(), 5)
    await pair.stop()


async def test_a_node_that_is_lost_while_rows_are_packed_for_it_again_is_no_end():
    pair = await Pair().start(hold_s=5.0)
    passing = pair.exchange(0, (0, 1))
    for _ in range(3):
        await pair.transports[2].close()
        await until(lambda: pair.link.nodes.missing)
        await pair.come_back(1)
        await packs_again(pair, 0, 1, (0, 1))
        await pair.landed(1)
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)
    await asyncio.wait_for(passing, 5)
    await pair.stop()


async def test_lanes_go_on_while_a_node_connects_and_from_then_on_jump_by_no_more_than_they_may(pair):
    endpoint = pair.link.nodes[0].endpoint
    for seq in (3000, 3100, 3201):
        endpoint.post(0, pack_immediate(Kind.EMPTY, True, 0, 0, seq, 5))
    await until(lambda: pair.nodes[0].counters.dropped == {"stale": 1})
    assert pair.recorders[0].events == [(0, 0, 3000, 0, True), (0, 0, 3100, 0, True)]


async def test_a_node_that_connects_while_a_lane_goes_too_far_is_tried_again():
    pair = await replicated()
    await pair.transports[2].close()
    await until(lambda: pair.link.nodes.missing)
    connect = pair.transports[0].connect

    async def slowly(*arguments, **options):
        endpoint = await connect(*arguments, **options)
        pair.link.turns.seqs[1] += 2048
        return endpoint

    pair.transports[0].connect = slowly
    with pytest.raises(TransportError, match="took 2048 turns of a lane to connect; it is tried again"):
        await pair.come_back(1)
    assert pair.link.nodes.missing == [1]
    await pair.stop()


@pytest.mark.parametrize(("attempt", "is_taken"), [(0, False), (1, True), (2, True), (255, True)])
async def test_a_sequence_number_is_taken_again_with_a_higher_attempt_alone(pair, attempt, is_taken):
    turn = pair.exchange(0, (1, 0))
    await pair.landed(0)
    endpoint = pair.link.nodes[0].endpoint
    for _ in range(2):
        HEADER.pack_into(endpoint.out_headers[0], 0, *GOOD._replace(attempt=attempt))
        endpoint.post(0, pack_immediate(Kind.DISPATCH, True, 0, attempt & 3, 0, 5), num_rows=1)
    await until(lambda: pair.nodes[0].counters.dropped["stale"] == 2 - is_taken)
    assert pair.recorders[0].events == [(0, 0, 0, 3, "again")] * is_taken
    turn.cancel()


async def test_a_connection_that_takes_no_post_is_a_loss_of_the_worker_and_not_of_an_address(pair):
    pair.link.nodes[1].endpoint.close()  # broken, and nobody has said so yet
    with pytest.raises(TransportError, match=r"^expert-1: connection lost \(the connection is closed\)$"):
        await asyncio.wait_for(pair.exchange(0, (1, 0)), 5)
    assert pair.losses == [(1, "expert-1", "connection lost (the connection is closed)")]
    assert pair.link.nodes.missing == [1]


async def test_the_time_that_a_turn_was_computed_for_is_not_held_against_those_who_answer():
    now = 0.0
    pair = await Pair().start(timeout_s=0.16, clock=lambda: now)
    gates, turn = pair.begin(0)
    passed = asyncio.create_task(pair.link.passed(0))
    now = 0.15
    gates.pack(0, (1, 0))
    pair.link.packed(0, turn)
    now = 0.30
    await asyncio.sleep(0.05)  # looks at it every hundredth of a second
    assert not passed.done()
    now = 0.32
    with pytest.raises(TransportError, match=r"expert-0: no answer for 0\.16 s"):
        await asyncio.wait_for(passed, 5)
    await pair.stop()


async def test_a_link_that_is_closed_is_held_by_no_timer():
    pair = await Pair().start()
    passing = pair.exchange(0, (1, 1))
    await pair.landed(0)  # and is not answered
    passing.cancel()
    await asyncio.wait([passing])
    pair.link.close()
    await pair.stop()
    gone = weakref.ref(pair.link)
    del pair, passing
    gc.collect()
    assert gone() is None


async def test_a_lane_that_gave_up_a_pass_goes_on_at_the_next(pair):
    turn = pair.exchange(0, (1, 0), num_layers=8)
    await pair.landed(0)
    turn.cancel()
    await asyncio.gather(turn, return_exceptions=True)
    await pair.landed(1)
    turn = pair.exchange(0, (1, 1), num_layers=8)
    assert await pair.landed(0) == [(0, 0, 8, 1, True)]
    assert await pair.landed(1) == [(0, 0, 8, 1, True)]
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)  # for the pass that was given up
    assert pair.nodes[0].counters.dropped == {"answer to a peer that is gone": 1}
    turn.cancel()


async def test_passes_that_fail_without_a_post_do_not_run_away_from_what_the_nodes_have_seen(pair):
    for _ in range(100):
        _, turn = pair.begin(0, num_layers=8)
        pair.link.failed(0, turn, ValueError("boom"))
        with pytest.raises(ValueError, match="boom"):
            await asyncio.wait_for(pair.link.passed(0), 5)
        pair.link.give_up(0)
    turn = pair.exchange(0, (1, 1), num_layers=8)
    assert await pair.landed(0) == [(0, 0, 0, 1, True)]
    turn.cancel()


# -- a turn is a row of numbers, and gates open ------------------------------------------------------------------------


async def test_the_last_answer_opens_the_gate_of_its_turn_and_the_last_turn_ends_the_pass(pair):
    asked = []
    gates = Gates(num_layers=3)
    first = pair.link.begin(0, gates, lambda lane: asked.append(lane) or False)
    for turn in range(first, first + 3):
        gates.pack(0, (1, 1))
        pair.link.packed(0, turn)
        ((_, _, seq, _, more),) = await pair.landed(0)
        assert more == (turn < first + 2)
        for node in range(2):
            assert turn not in gates.opened[0]
            pair.nodes[node].answer(0, [(0, seq, 1)], compute_s=0.0)
            await until(lambda count=2 * (turn - first) + node + 1: pair.link.counters.answers == count)
        assert gates.opened[0] == list(range(first, turn + 1))
        assert asked == [0] * (turn >= first + 1), "asked when the last turn is about to be computed, and not before"
    await asyncio.wait_for(pair.link.passed(0), 5)
    pair.link.end(0)
    assert pair.link.begin(0, gates, lambda lane: True) == first + 3, "a turn's number is not used twice"


async def test_a_turn_without_rows_opens_its_gate_by_itself(pair):
    gates, turn = pair.begin(0, num_layers=2)
    pair.link.packed(0, turn)
    await until(lambda: gates.opened[0] == [turn])
    pair.link.packed(0, turn + 1)
    await asyncio.wait_for(pair.link.passed(0), 5)


async def lost(pair, turn):
    await pair.transports[2].close()


async def takes_no_post(pair, turn):
    pair.link.nodes[1].endpoint.close()
    pair.link.packed(0, turn + 1)


async def refused(pair, turn):
    pair.nodes[1].refuse(0, 0, turn - 1, "out of luck")


async def raised(pair, turn):
    await asyncio.to_thread(pair.link.failed, 0, turn + 1, ValueError("boom"))


async def replaced(pair, turn):
    pair.link.drop(1, "replaced")


async def nobody_answers(pair, turn):
    """The time-out does it."""


async def cancelled(pair, turn):
    """The test does it."""


async def cannot_say_whether_more_follows(pair, turn):
    for node in range(2):
        pair.nodes[node].answer(0, [(0, turn - 1, 1)], compute_s=0.0)


FAILURES = [lost, takes_no_post, refused, raised, replaced, nobody_answers, cancelled, cannot_say_whether_more_follows]


@pytest.mark.parametrize("cause", FAILURES, ids=lambda cause: cause.__name__)
async def test_gates_open_on_failure_and_nothing_of_the_pass_is_posted_or_used_any_more(cause):
    pair = await Pair().start(timeout_s=0.2 if cause is nobody_answers else 5.0)

    def may_continue(lane):
        raise KeyError("the scheduler's own fault")

    gates = Gates(num_layers=2 if cause is cannot_say_whether_more_follows else 4)
    first = pair.link.begin(0, gates, may_continue)
    gates.pack(0, (1, 1))
    pair.link.packed(0, first)
    await pair.landed(0)
    await pair.landed(1)
    await cause(pair, first)
    passed = asyncio.create_task(pair.link.passed(0))
    if cause is cancelled:
        await asyncio.sleep(0)
        passed.cancel()
    with pytest.raises((TransportError, ValueError, KeyError, asyncio.CancelledError)):
        await asyncio.wait_for(passed, 5)
    pair.link.give_up(0)
    assert gates.opened[0][-1] == first + gates.num_layers - 1, "all that was launched runs out"
    num_posts = pair.link.counters.posts
    for turn in range(first, first + gates.num_layers):
        pair.link.packed(0, turn)
        pair.link.failed(0, turn, ValueError("late"))
    assert pair.link.counters.posts == num_posts
    await is_served_again(pair)
    await pair.stop()


async def is_served_again(pair):
    """The lane's next pass goes through, and late answers to the one before are none of its own."""
    for node in pair.link.nodes.missing:
        await pair.come_back(node)
    again = pair.exchange(0, (1, 1))
    for node in range(2):
        events = pair.recorders[node].events
        await until(lambda events=events: events and events[-1][2] == pair.link.next_seq(0) - 1)
        seat, lane, seq, num_rows, _ = events[-1]
        late = pack_immediate(Kind.COMBINE, False, 0, 0, seq - 1, pair.link.nodes[node].welcome.incarnation)
        pair.nodes[node]._seats[seat].endpoint.post(lane, late)
        pair.nodes[node].answer(lane, [(seat, seq, num_rows)], compute_s=0.0)
    await asyncio.wait_for(again, 5)
    assert pair.link.counters.dropped["stale"] >= 2


async def test_a_late_answer_of_a_given_up_pass_is_never_used(pair):
    exchange = pair.exchange(0, (1, 1), num_layers=4)
    await pair.landed(0)
    exchange.cancel()
    await asyncio.gather(exchange, return_exceptions=True)
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)  # nothing is in flight
    await until(lambda: pair.link.counters.dropped["stale"] == 1)
    await pair.landed(1)
    gates, turn = pair.begin(0, num_layers=4)
    pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)  # the next pass computes its first layer
    await until(lambda: pair.link.counters.dropped["stale"] == 2)
    gates.pack(0, (1, 1))
    pair.link.packed(0, turn)
    await pair.landed(0)
    for node in range(2):  # the next pass's first turn is away
        pair.nodes[node]._seats[0].endpoint.post(0, pack_immediate(Kind.COMBINE, False, 0, 0, 0, 9))
    await until(lambda: pair.link.counters.dropped["stale"] == 4)
    assert gates.opened[0] == []


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
        ({"protocol_version": 9}, f"protocol_version 9, ours is {PROTOCOL_VERSION}"),
        ({"instance": "other"}, "x belongs to another instance"),
        ({"placement_version": 3}, "placement_version 3, ours is 2"),
        ({"rank": 1, "size": 2}, "x is rank 1 of 2 of its node; only nodes of one rank are built"),
        ({"size": 2}, "x is rank 0 of 2"),
        ({"row_bytes": 128}, "row_bytes 128, ours is 256"),
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
        await transport.connect(address, b"GET / HTTP/1.1", transport.register(1, HELLO.combine_layout, HOST_MEMORY), 0)
    await transport.close()


async def test_rows_are_taken_of_every_placement_that_a_node_uses_and_a_pass_keeps_to_its_own(pair):
    gates, before = pair.begin(0)
    pair.link.placement_version = 3
    gates.pack(0, (1, 0))
    pair.link.packed(0, before)  # of a pass that had begun
    assert await pair.landed(0) == [(0, 0, 0, 1, True)]
    pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
    await asyncio.wait_for(pair.link.passed(0), 5)
    pair.link.end(0)
    early = pair.exchange(0, (1, 0))
    await until(lambda: pair.nodes[0].counters.dropped["header"])
    assert not pair.recorders[0].events, "this node does not use it yet"
    early.cancel()
    for node in pair.nodes:
        node.use_placement(3, 2)
    for lane, seq in ((1, 0), (1, 1)):
        turn = pair.exchange(lane, (1, 0))
        assert await pair.landed(0) == [(0, lane, seq, 1, True)]
        pair.nodes[0].answer(lane, [(0, seq, 1)], compute_s=0.0)
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
