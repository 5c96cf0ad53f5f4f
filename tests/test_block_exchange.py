"""KV blocks on their way between attention workers: what is there is found as a prefix, and what is not, is not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

import pytest
import torch

from msi.attention.block_exchange import CODEC, PEERS_AT_ONCE, BlockExchange
from msi.attention.kv_cache import BlockBytes
from msi.attention.scheduler import Scheduler
from msi.errors import TransportError
from msi.net.inproc import InprocTransport
from msi.net.shm import ShmTransport
from msi.net.tcp import TcpTransport
from msi.settings import SchedulerLimits
from msi.types import Request, SamplingParams
from tests.waiting import until

BLOCK_TOKENS = 4
PROMPT = tuple(range(100, 150))
TRANSPORTS = {"inproc": InprocTransport, "shm": ShmTransport, "tcp": TcpTransport}

pytestmark = pytest.mark.timeout(60)


class Side:
    """A worker's scheduler and cache, whose blocks say which tokens they are of."""

    def __init__(self, transport, instance="i", num_blocks=40, head_dim=8, **limits):
        given = {"max_model_len": 200, "max_num_batched_tokens": 64} | limits
        self.scheduler = Scheduler(
            SchedulerLimits(**given), num_lanes=1, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS
        )
        self.memory = torch.zeros(3, num_blocks, 2, BLOCK_TOKENS, 1, head_dim)
        self.exchange = BlockExchange(instance, BlockBytes(self.memory), transport, lambda: self.scheduler.exchanged)

    def run(self, name, prompt=PROMPT, num_passes=1, max_tokens=100):
        """Some passes of a request, whose keys and values are its tokens."""
        self.scheduler.add(Request(name, prompt, SamplingParams(max_tokens=max_tokens, seed=0)))
        for _ in range(num_passes):
            self.step()

    def step(self):
        batch = self.scheduler.plan(0)
        at = 0
        for count, blocks in zip(batch.query_lens, batch.block_tables, strict=True):
            for token, position in zip(batch.token_ids[at : at + count], batch.positions[at : at + count], strict=True):
                self.memory[:, blocks[position // BLOCK_TOKENS], :, position % BLOCK_TOKENS] = token
            at += count
        self.scheduler.update(0, [7] * len(batch.logit_rows))

    def of(self, name):
        """What the full blocks of a request say."""
        blocks = [block for block, _ in self.scheduler.exchanged.full(name, 0, 1000)]
        return self.memory[:, blocks]


@contextlib.asynccontextmanager
async def two(kind, here=None, there=None):
    """The two sides, and where the second one takes blocks."""
    transports = [TRANSPORTS[kind](), TRANSPORTS[kind]()]
    sides = [Side(transports[0], **(here or {})), Side(transports[1], **(there or {}))]
    try:
        await sides[0].exchange.listen()
        yield *sides, await sides[1].exchange.listen()
    finally:
        for transport in transports:
            await transport.close()
        for side in sides:
            side.scheduler.check_integrity()


@pytest.mark.parametrize("kind", TRANSPORTS)
async def test_what_is_sent_is_a_prefix_that_the_other_one_knows(kind):
    async with two(kind) as (a, b, address):
        a.run("r")
        await a.exchange.send("r", address, 0.0)
        assert a.exchange.num_sent == b.exchange.num_received == len(PROMPT) // BLOCK_TOKENS
        assert a.exchange.bytes_per_s > 0
        assert a.exchange.sending_s > 0
        b.run("r", num_passes=0)
        assert b.scheduler.counters["prefix_hit_tokens"] == 48
        assert torch.equal(a.of("r"), b.of("r"))
        a.run("s", PROMPT[::-1])  # over a connection of its own, into the same seat
        await a.exchange.send("s", address, 0.0)
        await a.exchange.send("r", address, 0.0)  # what is there stays
        assert b.exchange.num_received == 24
        a.scheduler.cancel("r")
        await a.exchange.send("r", address, 0.0)
        assert a.exchange.num_sent == 36


async def test_one_that_runs_on_meanwhile_is_sent_up_to_its_last_full_block():
    async with two("inproc") as (a, b, address):
        a.exchange._layout = replace(a.exchange._layout, slot_rows=4)
        a.run("r")
        take, passes = b.exchange._take, iter(range(2))

        def take_as_it_runs_on(endpoint, count):
            take(endpoint, count)
            for _ in range(4 * (next(passes, None) is not None)):  # two more blocks while the first eight go
                a.step()

        b.exchange._take = take_as_it_runs_on
        await a.exchange.send("r", address, 0.0)
        assert b.exchange.num_received == len(a.scheduler.exchanged.full("r", 0, 1000)) == 14
        assert a.scheduler.num_running == 1


@pytest.mark.parametrize(
    ("there", "why"),
    [({"head_dim": 16}, "of another kind"), ({"instance": "j"}, "of another kind")],
)
async def test_blocks_of_another_kind_are_refused_and_the_request_moves_without_them(there, why, caplog):
    caplog.set_level(logging.INFO)
    async with two("tcp", there=there) as (a, b, address):
        a.run("r")
        await a.exchange.send("r", address, 0.0)
        assert (a.exchange.num_sent, b.exchange.num_received) == (0, 0)
        assert why in caplog.text


@pytest.mark.parametrize("there", [{"num_blocks": 6}, {"enable_prefix_caching": False}])
async def test_where_there_is_no_room_for_it_nothing_is_kept_and_nothing_breaks(there):
    async with two("inproc", there=there) as (a, b, address):
        a.run("r")
        await a.exchange.send("r", address, 0.0)
        assert a.exchange.num_sent == 12
        assert b.exchange.num_received <= 12
        b.run("other", (1, 2, 3), max_tokens=5)
        assert b.scheduler.num_running == 1


async def test_it_is_not_sent_where_computing_it_again_takes_less():
    async with two("inproc") as (a, b, address):
        a.run("r")
        a.exchange.bytes_per_s = 1.0
        await a.exchange.send("r", address, 0.001)
        assert b.exchange.num_received == 0
        await a.exchange.send("r", address, 1e9)
        assert b.exchange.num_received == 12


@pytest.mark.parametrize("kind", TRANSPORTS)
async def test_one_that_nobody_listens_for_moves_without_its_blocks(kind, caplog):
    caplog.set_level(logging.INFO)
    nobody = {"inproc": "inproc://nobody", "shm": "shm:///nowhere/at/all", "tcp": "tcp://127.0.0.1:1"}[kind]
    async with two(kind) as (a, _, _):
        a.run("r")
        await a.exchange.send("r", nobody, 0.0)
        assert "moves without its KV blocks" in caplog.text


async def test_a_peer_that_sends_other_bytes_than_it_says_is_shut_out(caplog):
    async with two("inproc") as (a, b, address):
        a.run("r")
        post = a.exchange._post

        def damaged(endpoint, blocks):
            endpoint.post = lambda *args, posted=endpoint.post, **more: (
                endpoint.out_rows.host().__setitem__(0, 255), posted(*args, **more)
            )  # fmt: skip
            post(endpoint, blocks)

        a.exchange._post = damaged
        await a.exchange.send("r", address, 0.0)
        assert (a.exchange.num_sent, b.exchange.num_received) == (0, 0)
        assert "other bytes than were sent" in caplog.text
        a.exchange._post = post
        await a.exchange.send("r", address, 0.0)
        assert b.exchange.num_received == 12


async def test_no_more_peers_than_there_are_seats_for_and_a_seat_is_free_once_its_peer_has_gone():
    async with two("inproc") as (a, b, address):
        connect = a.exchange._transport.connect
        hello, landing = CODEC.encode(a.exchange._hello), a.exchange._landing
        peers = [await connect(address, hello, landing, seat) for seat in range(PEERS_AT_ONCE)]
        with pytest.raises(TransportError, match="others send KV blocks already"):
            await connect(address, hello, landing, PEERS_AT_ONCE)
        for peer in peers:
            peer.close()
        await until(lambda: len(b.exchange._free_seats) == PEERS_AT_ONCE, 10)
        a.run("r")
        await a.exchange.send("r", address, 0.0)
        assert b.exchange.num_received == 12


async def test_a_receiver_that_ends_meanwhile_leaves_nobody_waiting():
    async with two("tcp") as (a, b, address):
        a.run("r")
        b.exchange._take = lambda endpoint, count: asyncio.get_running_loop().create_task(b.exchange._transport.close())
        await asyncio.wait_for(a.exchange.send("r", address, 0.0), 30)
