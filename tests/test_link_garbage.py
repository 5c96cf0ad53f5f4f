"""Whatever a peer writes as headers, and whatever word announces them: what is right in full is used, or nothing."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from msi.net.slots import HEADER, MAGIC, Header, Kind, pack_immediate, unpack_immediate
from tests.test_links import HELLO, Pair
from tests.waiting import until

ROWS = Header(MAGIC, Kind.DISPATCH, 0, 0, 1, HELLO.incarnation, HELLO.placement_version, 0, 3, 256, 0.0, 0.0)
ANSWER = Header(MAGIC, Kind.COMBINE, 0, 0, 0, 9, HELLO.placement_version, 0, 1, 128, 0.001, 0.001)
IMMEDIATES = {
    kind: pack_immediate(header.kind, bool(header.more), 0, 0, 0, header.incarnation)
    for kind, header in (("rows", ROWS), ("answer", ANSWER))
}


def mutated(header, immediate):
    """That header and word, with some bytes and bits changed, or nothing like them."""
    right = bytearray(HEADER.size)
    HEADER.pack_into(right, 0, *header)

    def change(places):
        changed = bytearray(right)
        for place, byte in places:
            changed[place] = byte
        return bytes(changed)

    places = st.lists(st.tuples(st.integers(0, HEADER.size - 1), st.integers(0, 255)), max_size=3)
    headers = places.map(change) | st.binary(min_size=HEADER.size, max_size=HEADER.size)
    bits = st.lists(st.integers(0, 31), max_size=2).map(lambda some: immediate ^ sum({1 << bit for bit in some}))
    return st.lists(st.tuples(headers, bits | st.integers(0, 2**32 - 1), st.integers(0, 4)), max_size=12)


@settings(max_examples=60)
@given(mutated(ROWS, IMMEDIATES["rows"]))
def test_rows_are_taken_only_if_header_and_immediate_are_right_in_every_field(garbage):
    async def scenario():
        pair = await Pair().start()
        node, events = pair.nodes[0], pair.recorders[0].events
        endpoint = pair.link.nodes[0].endpoint
        for number, (header, immediate, num_rows) in enumerate(garbage, start=1):
            events.clear()
            dropped = node.counters.dropped.total()
            lane = unpack_immediate(immediate).lane % HELLO.num_lanes  # where it says that they are, if it may
            endpoint.out_headers[lane][: HEADER.size] = header
            endpoint.post(lane, immediate, num_rows=num_rows, note_bytes=0 if num_rows else 1)
            await until(lambda number=number: node.counters.immediates == number)
            assert len(events) + node.counters.dropped.total() - dropped == 1, (events, node.counters.dropped)
            for event in events:
                check_event(event, Header(*HEADER.unpack(header)), unpack_immediate(immediate))
        assert pair.link.nodes[0] is not None, "the connection is gone"
        await pair.stop()

    asyncio.run(scenario())


def check_event(event, said, word):
    """A listener was told what both say."""
    _, lane, seq, num_rows, _ = event
    assert word.incarnation == HELLO.incarnation
    assert (word.lane, word.seq) == (lane, seq & 0xFFF)
    if num_rows == 0:
        assert word.kind == Kind.EMPTY
        return
    right = ROWS._replace(lane=lane, attempt=said.attempt, more=said.more, seq=seq, num_rows=num_rows)
    assert HEADER.pack(*said)[: HEADER.size - 16] == HEADER.pack(*right)[: HEADER.size - 16]
    assert word.kind == Kind.DISPATCH
    assert 0 < num_rows <= HELLO.slot_rows


@settings(max_examples=60)
@given(mutated(ANSWER, IMMEDIATES["answer"]))
def test_an_answer_opens_a_gate_only_if_header_and_immediate_are_right_in_every_field(garbage):
    async def scenario():
        pair = await Pair().start()
        turn = pair.exchange(0, (1, 0))
        await pair.landed(0)
        endpoint, counters = pair.nodes[0]._seats[0].endpoint, pair.link.counters
        for header, immediate, num_rows in garbage:
            before = counters.answers, counters.dropped.total()
            endpoint.out_headers[0][: HEADER.size] = header
            endpoint.post(0, immediate, num_rows=num_rows, note_bytes=0 if num_rows else 1)
            said, word = Header(*HEADER.unpack(header)), unpack_immediate(immediate)
            is_named = (said.magic, said.lane, said.incarnation, said.seq) == (MAGIC, 0, 9, 0)
            is_for_it = (word.lane, word.seq, word.incarnation, word.kind) == (0, 0, 9, said.kind)
            if is_named and is_for_it and said.kind == Kind.ERROR:
                await asyncio.wait([turn], timeout=5)
                assert "expert-0" in str(turn.exception())
                break
            await until(lambda before=before: (counters.answers, counters.dropped.total()) != before)
            if counters.answers:
                assert is_named, said
                assert is_for_it, word
                assert (said.kind, said.num_rows) == (Kind.COMBINE, 1), said
                break
        else:
            assert not turn.done()
            pair.nodes[0].answer(0, [(0, 0, 1)], compute_s=0.0)
        await asyncio.wait([turn], timeout=5)
        assert turn.done()
        turn.exception()
        await pair.stop()

    asyncio.run(scenario())
