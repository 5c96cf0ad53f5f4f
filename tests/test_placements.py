"""Placements in which experts have several nodes, and placements that change while requests run."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from msi.control.client import CoordinatorClient
from msi.instance.inproc import InprocInstance
from msi.options import InstanceOptions
from msi.types import Placement, Request, SamplingParams
from tests.reference import references, save_tiny
from tests.waiting import until

NUM_TOKENS = 12
ONCE = Placement(((0, 1, 2), (3, 4), (5, 6)), 7)
TWICE = Placement(((0, 1, 2, 3, 4), (3, 4, 5, 6), (5, 6, 0, 1, 2)), 7, version=1)
MIXED = Placement(((0, 1, 2, 6), (3, 4), (5, 6, 0)), 7, version=1)
FEWER = Placement(((0, 1, 2), (3, 4, 5, 6), (5, 6)), 7, version=2)  # after TWICE: nothing is to be loaded
OTHER_IDS = Placement(((3, 4), (0, 1, 2), (5, 6)), 7, version=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    model = save_tiny(path)
    return path, references(model, [1, 15, 16, 17, 64, 129], NUM_TOKENS)


class Serving:
    """An instance inside this process, with a client."""

    def __init__(self, instance, client):
        self.coordinator = instance.coordinator
        self.client = client
        self.experts = [worker for worker in instance.workers if worker.worker_id.startswith("expert")]
        self.attention = [worker for worker in instance.workers if worker.worker_id.startswith("attention")]
        self._num_requests = 0

    async def check_tokens(self, expected):
        assert await asyncio.gather(*(self.tokens(one.prompt) for one in expected)) == [one.tokens for one in expected]

    async def tokens(self, prompt):
        self._num_requests += 1
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, seed=0, ignore_eos=True)
        new = self.client.generate([Request(f"r{self._num_requests}", prompt, params)])
        return tuple([token async for progress in new for token in progress.token_ids])

    async def until_used(self, placement):
        def is_used():
            return all(worker.life.attention.placement == placement for worker in self.attention)

        await until(is_used, 30)

    def rows(self):
        """That each expert worker has received."""
        return [worker.life.experts.counters().rows_landed for worker in self.experts]


@asynccontextmanager
async def serving(path, placement):
    options = InstanceOptions.of(
        model=path, attention_workers=2, expert_workers=3, micro_batches=2, transport="inproc", threads_per_worker=1,
        slot_rows=48,
    )  # fmt: skip
    failures = []
    instance = InprocInstance(options, failures.append, place=lambda num_experts, num_nodes: placement)
    try:
        client = CoordinatorClient(await instance.start())
        await client.start()
        try:
            while not client.status.is_ready:
                await asyncio.wait_for(client.wait_status(client.status), 60)
            yield Serving(instance, client)
        finally:
            await client.close()
    finally:
        await instance.stop()
    assert not failures


@pytest.mark.parametrize("placement", [TWICE, MIXED], ids=["each twice", "some twice"])
async def test_tokens_equal_transformers_when_experts_have_several_nodes(checkpoint, placement):
    path, expected = checkpoint
    async with serving(path, placement) as instance:
        await instance.check_tokens(expected)
        assert all(instance.rows())


async def test_a_placement_is_swapped_while_requests_run_and_loads_only_what_is_new(checkpoint):
    path, expected = checkpoint
    expert_bytes = 3 * 3 * 48 * 32 * 4  # layers, matrices
    async with serving(path, ONCE) as instance:
        await instance.check_tokens(expected)
        instance.coordinator.use_placement(TWICE)
        swapped = asyncio.ensure_future(instance.until_used(TWICE))
        while not swapped.done():
            await instance.check_tokens(expected)
        await swapped
        assert [worker.loaded for worker in instance.experts] == [(2 * expert_bytes,) * 2] * 2 + [
            (3 * expert_bytes,) * 2
        ]
        await instance.check_tokens(expected)

        loaded = [worker.loaded for worker in instance.experts]
        instance.coordinator.use_placement(FEWER)
        await instance.until_used(FEWER)
        await instance.check_tokens(expected)
        assert [worker.loaded for worker in instance.experts] == loaded, "all was there"
        assert {worker.life.assignment.incarnation for worker in (*instance.experts, *instance.attention)} == {0}


@pytest.mark.slow
async def test_a_placement_that_gives_experts_other_local_ids_begins_new_lives_and_serves(checkpoint):
    path, expected = checkpoint
    async with serving(path, ONCE) as instance:
        await instance.check_tokens(expected)
        instance.coordinator.use_placement(OTHER_IDS)
        await instance.until_used(OTHER_IDS)
        while not instance.client.status.is_ready:
            await asyncio.wait_for(instance.client.wait_status(instance.client.status), 60)
        await instance.check_tokens(expected)


async def test_an_older_placement_and_one_of_other_nodes_change_nothing(checkpoint):
    path, expected = checkpoint
    async with serving(path, TWICE) as instance:
        role = instance.attention[0].life.attention
        role.use_placement(replace(TWICE, version=0))
        assert role.placement == TWICE
        with pytest.raises(Exception, match="a placement of 7 experts on 1 nodes cannot follow one of 7 on 3"):
            role.use_placement(Placement((tuple(range(7)),), 7, version=9))
        await instance.check_tokens(expected)
