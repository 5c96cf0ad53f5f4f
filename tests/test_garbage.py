"""Whatever a connected peer writes into its seat: it is used only if it is what is owed, and nothing else changes."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from msi.errors import BatchRefused
from msi.net.slots import HEADER, HEADER_BYTES, MAGIC, Kind, pack_immediate
from tests.test_links import HELLO, Pair
from tests.waiting import until

ANY_HEADER = st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES)
SMALL = st.sampled_from([0, 1, 2, 4, 5, 255])
TIMES = st.sampled_from([0.0, 1e-3, -1.0, float("nan"), float("inf"), 1e300])


def headers(incarnation, row_bytes):
    """Some are wrong in nearly everything, most in a field or two."""
    fields = st.tuples(
        st.sampled_from([MAGIC, b"HTTP"]), st.sampled_from([*Kind, 9]), SMALL, SMALL, SMALL,
        st.sampled_from([incarnation, incarnation + 4096, 0]), st.sampled_from([2, 3]),
        st.sampled_from([0, 1, 4095, 4096, 4097, 2**63]), st.sampled_from([0, 1, 3, 4, 5, 2**32 - 1]),
        st.sampled_from([row_bytes, 128, 0]), TIMES, TIMES,
    ).map(lambda fields: HEADER.pack(*fields).ljust(HEADER_BYTES, b"\xff"))  # fmt: skip
    return ANY_HEADER | fields


def immediates(incarnation):
    fields = st.tuples(
        st.integers(0, 3), st.booleans(), st.integers(0, 7), st.integers(0, 3),
        st.sampled_from([0, 1, 2, 100, 101, 4095]), st.sampled_from([incarnation, incarnation + 1]),
    ).map(lambda fields: pack_immediate(*fields))  # fmt: skip
    return st.integers(0, 2**32 - 1) | fields


def writes(incarnation, row_bytes):
    one = st.tuples(st.integers(0, 1), immediates(incarnation), headers(incarnation, row_bytes))
    return st.lists(one, min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(writes(HELLO.incarnation, HELLO.row_bytes))
def test_an_expert_worker_takes_what_could_be_a_dispatch_and_counts_the_rest(written):
    async def scenario():
        pair = await Pair().start()
        node, events, endpoint = pair.nodes[0], pair.recorders[0].events, pair.link.nodes[0].endpoint
        for lane, immediate, header in written:
            endpoint.out_headers[lane][:HEADER_BYTES] = header
            endpoint.post(lane, immediate, num_rows=1)
        await until(lambda: node.counters.immediates == len(written))
        assert len(events) + node.counters.dropped.total() == len(written)
        for seat, lane, seq, num_rows, _ in events:
            assert (seat, lane in (0, 1), 0 <= num_rows <= HELLO.slot_rows) == (0, True, True)
            assert 0 <= seq <= 4096 + 100  # the first may be any, as lanes go on while a peer connects
        # the others are served as if nothing had been
        turn = pair.exchange(0, (0, 2))
        await pair.landed(1)
        pair.nodes[1].answer(0, [(0, 0, 2)], compute_s=0.0)
        await asyncio.wait_for(turn, 5)
        await pair.stop()

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(writes(9, HELLO.answer_row_bytes))
def test_a_turn_ends_by_its_answers_and_by_a_refusal_of_who_owes_one_alone(written):
    async def scenario():
        pair = await Pair().start()
        turns, endpoint = pair.link.turns, pair.nodes[0]._seats[0].endpoint
        turn = pair.exchange(0, (2, 1))
        await pair.landed(0)
        await pair.landed(1)
        for lane, immediate, header in written:
            endpoint.out_headers[lane][:HEADER_BYTES] = header
            endpoint.post(lane, immediate, num_rows=1)
        pair.nodes[1].answer(0, [(0, 0, 1)], compute_s=0.0)
        counters = pair.link.counters
        await until(lambda: counters.answers + counters.dropped.total() + turn.done() > len(written))
        if not turn.done() and turns.waiting[0]:
            pair.nodes[0].answer(0, [(0, 0, 2)], compute_s=0.0)
        with contextlib.suppress(BatchRefused):
            await asyncio.wait_for(turn, 5)
        for value in (turns.times.comm_s, turns.times.compute_s):
            assert 0.0 <= value < float("inf")
        await pair.stop()

    asyncio.run(scenario())


async def test_sequence_numbers_go_on_where_their_low_bits_begin_again():
    pair = await Pair().start(replace(HELLO, next_seqs=(4094, 8190)))
    for seq in (4094, 4095, 4096, 4097):
        turn = pair.exchange(0, (1, 0))
        assert await pair.landed(0) == [(0, 0, seq, 1, True)]
        assert await pair.landed(1) == [(0, 0, seq, 0, True)]
        pair.nodes[0].answer(0, [(0, seq, 1)], compute_s=0.0)
        await asyncio.wait_for(turn, 5)
    assert not pair.link.counters.dropped
    await pair.stop()
