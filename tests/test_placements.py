"""Placements in which experts have several nodes, and placements that change while requests run."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.attention.expert_links import lacking
from msi.control.client import CoordinatorClient
from msi.errors import ConfigError
from msi.instance.inproc import InprocInstance
from msi.kernels.turns import TURNS, first_homes, homes_of, in_turns
from msi.options import InstanceOptions
from msi.placement import HOLE, LayerExperts, Placement, place_evenly, place_with_replicas
from msi.placement_change import ByLayer, padded
from msi.types import Request, SamplingParams
from tests.layered import homes_in
from tests.reference import references, save_tiny
from tests.waiting import until

NUM_TOKENS = 12
ONCE = Placement(((0, 1, 2), (3, 4), (5, 6)), 7)
TWICE = Placement(((0, 1, 2, 3, 4), (3, 4, 5, 6), (5, 6, 0, 1, 2)), 7, version=1)
MIXED = Placement(((0, 1, 2, 6), (3, 4), (5, 6, 0)), 7, version=1)
FEWER = Placement(((0, 1, 2), (3, 4, 5, 6), (5, 6)), 7, version=2)  # after TWICE: nothing is to be loaded
MOVED = Placement(((3, 4), (0, 5, 6), (1, 2)), 7)


LAYERED = Placement.of_layers([LayerExperts(one.experts, one.shares) for one in (TWICE, MOVED, MIXED)], 7, 1)


def held(placement):
    return [
        [set(held) - {HOLE} for held in layer.experts[:3]]
        for layer in (placement.layers if placement.further else placement.layers * 3)
    ]


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
            return all(held(worker.life.attention.placement) == held(placement) for worker in self.attention)

        await until(is_used, 30)

    async def change_to(self, placement):
        return await asyncio.wait_for(
            self.coordinator.change_placement(
                lambda before, nodes: ByLayer(tuple((*of_layer, set(), set()) for of_layer in held(placement))),
                "a test",
            ),
            30,
        )

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


@given(num_nodes=st.integers(1, 6), per_node=st.integers(1, 5), draw=st.data())
def test_replicas_are_as_many_as_asked_for_spread_and_never_two_on_one_node(num_nodes, per_node, draw):
    num_experts = draw.draw(st.integers(num_nodes, num_nodes * per_node), "experts")
    redundancy = draw.draw(st.integers(0, num_nodes - 1), "redundancy")
    most = num_experts if redundancy + 1 < num_nodes else 0
    num_redundant = draw.draw(st.integers(0, most), "redundant")
    placement = place_with_replicas(num_experts, num_nodes, redundancy, num_redundant)
    counts = sorted(len(homes_in(placement, expert)) for expert in range(num_experts))
    assert counts == [1 + redundancy] * (num_experts - num_redundant) + [2 + redundancy] * num_redundant
    first = place_evenly(num_experts, num_nodes).experts
    assert [held[: len(own)] for held, own in zip(placement.experts, first, strict=True)] == list(first)
    assert all(not lacking(placement, (node,)) for node in range(num_nodes) if redundancy)
    replicas = [len(held) - len(own) for held, own in zip(placement.experts, first, strict=True)]
    assert not redundancy or max(replicas) - min(replicas) <= 2 * num_nodes
    for expert, of_one in enumerate(homes_of(placement.experts, num_experts, shares=placement.shares)):
        used = [home.node for home in of_one if home.share]
        assert used == [node for node, own in enumerate(first) if expert in own], "rows go where they would without"


@given(num_nodes=st.integers(1, 6), num_experts=st.integers(1, 20), draw=st.data())
def test_each_expert_has_one_first_home_and_no_move_of_one_would_even_nodes_out(num_nodes, num_experts, draw):
    homes = [draw.draw(st.sets(st.integers(0, num_nodes - 1), min_size=1)) for _ in range(num_experts)]
    held = [[expert for expert in range(num_experts) if node in homes[expert]] for node in range(num_nodes)]
    given = [0] * num_nodes
    first = first_homes(held, num_experts)
    assert [len(shares) for shares in first] == [len(nodes) for nodes in homes]
    assert all(sorted(shares) == [0] * (len(shares) - 1) + [TURNS] for shares in first)
    used = [sorted(nodes)[shares.index(TURNS)] for nodes, shares in zip(homes, first, strict=True)]
    for node in used:
        given[node] += 1
    assert all(given[node] - given[other] < 2 for node, nodes in zip(used, homes, strict=True) for other in nodes)
    assert first == moved_one_by_one(held, num_experts)


def moved_one_by_one(held, num_experts):
    """The same as it is said: of the moves that even two nodes out most, that of the first expert, to the last home."""
    homes = homes_of(held, num_experts)
    first = [min(of_one, key=lambda home: home.local_id) for of_one in homes]
    while True:
        given = Counter(home.node for home in first)
        gain, expert, _, home = max(
            (given[first[expert].node] - given[home.node], -expert, number, home)
            for expert, of_one in enumerate(homes)
            for number, home in enumerate(of_one)
        )
        if gain < 2:
            return tuple(
                tuple(TURNS * (home == used) for home in of_one) for of_one, used in zip(homes, first, strict=True)
            )
        first[-expert] = home


def test_rows_of_a_lost_node_are_shared_by_all_that_hold_replicas_of_its_experts():
    placement = place_with_replicas(8, 3, 1)

    def rows(missing):
        """By node, in turns."""
        found = [0] * 3
        for of_one in homes_of(placement.experts, 8, missing, placement.shares):
            for home, turns in zip(of_one, in_turns([home.share for home in of_one]), strict=True):
                found[home.node] += turns
        return found

    assert rows(()) == [3 * TURNS, 3 * TURNS, 2 * TURNS]
    assert rows((0,)) == [0, 5 * TURNS, 3 * TURNS]


@pytest.mark.parametrize(
    ("redundancy", "num_redundant", "complaint"),
    [
        (2, 0, "`expert_redundancy` 2 puts each expert on 3 workers, and there are 2; give at most 1"),
        (1, 1, "`redundant_experts` 1 is more than the 0 experts that could be on one worker more"),
        (0, 8, "`redundant_experts` 8 is more than the 7 experts"),
    ],
)
def test_more_replicas_than_there_is_room_for_are_refused(redundancy, num_redundant, complaint):
    with pytest.raises(ConfigError, match=complaint):
        place_with_replicas(7, 2, redundancy, num_redundant)


@pytest.mark.parametrize(
    ("placement", "nodes", "says"),
    [
        (ONCE, (), ""),
        (ONCE, (1,), "no worker has had 2 of 7 experts (3, 4)"),
        (TWICE, (1,), ""),
        (TWICE, (0, 1), "no worker has had 2 of 7 experts (3, 4)"),
        (place_evenly(40, 2), (0,), "no worker has had 20 of 40 experts (0, 1, 2, 3, 4, 5, 6, 7, ...)"),
    ],
)
def test_what_is_missing_is_what_no_other_node_has(placement, nodes, says):
    assert lacking(placement, nodes) == says


@pytest.mark.parametrize("placement", [TWICE, MIXED, LAYERED], ids=["each twice", "some twice", "by layer"])
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
        swapping = asyncio.ensure_future(instance.change_to(TWICE))
        while not swapping.done():
            await instance.check_tokens(expected)
        assert (await swapping).experts == padded(TWICE, 5).experts
        await instance.until_used(TWICE)
        assert [worker.loaded for worker in instance.experts] == [(2 * expert_bytes,) * 2] * 2 + [
            (3 * expert_bytes,) * 2
        ]
        await instance.check_tokens(expected)

        loaded = [worker.loaded for worker in instance.experts]
        await instance.change_to(FEWER)
        await instance.until_used(FEWER)
        await instance.check_tokens(expected)
        read = zip(instance.experts, loaded, strict=True)
        assert all(worker.loaded in ((0, 0), before) for worker, before in read), "all was there"
        assert {worker.life.assignment.incarnation for worker in (*instance.experts, *instance.attention)} == {0}


async def test_layers_are_placed_each_for_itself_while_requests_run_and_load_only_what_is_new(checkpoint):
    path, expected = checkpoint

    def loaded():
        return [worker.life.experts.counters().experts_loaded for worker in instance.experts]

    async with serving(path, ONCE) as instance:
        for placement, num_loaded in ((LAYERED, (2 + 2 + 1, 2 + 3 + 0, 3 + 2 + 1)), (ONCE, (0 + 3 + 0, 2, 2))):
            before = loaded()
            changing = asyncio.ensure_future(instance.change_to(placement))
            while not changing.done():
                await instance.check_tokens(expected)
            assert held(await changing) == held(placement)
            assert [now - was for now, was in zip(loaded(), before, strict=True)] == [*num_loaded]
            await until(lambda: all(worker.life.experts.placed[1] is None for worker in instance.experts), 30)
            await instance.check_tokens(expected)
            rows = [worker.life.experts.half.rows_by_layer() for worker in instance.experts]
            for layer, of_layer in enumerate(held(placement)):
                assert [set(one[layer]) for one in rows] == of_layer, "what is not wanted any more was dropped"


@pytest.mark.slow
async def test_every_expert_may_move_while_requests_run_and_ids_that_are_free_are_given_away(checkpoint):
    path, expected = checkpoint
    async with serving(path, ONCE) as instance:
        for placement in (MOVED, ONCE, TWICE, MOVED):
            changing = asyncio.ensure_future(instance.change_to(placement))
            while not changing.done():
                await instance.check_tokens(expected)
            assert held(await changing) == held(placement)
        await instance.check_tokens(expected)
        assert {worker.life.assignment.incarnation for worker in (*instance.experts, *instance.attention)} == {0}
        assert [worker.life.experts.half._bank.num_rows.shape[1] for worker in instance.experts] == [
            len(ids) for ids in instance.coordinator._cluster.placing.placement.experts[:3]
        ], "what is not wanted any more was dropped"


async def test_the_number_of_micro_batches_changes_while_requests_run(checkpoint):
    path, expected = checkpoint
    async with serving(path, ONCE) as instance:
        for num_lanes in (1, 2):
            running = asyncio.ensure_future(instance.check_tokens(expected))
            await asyncio.sleep(0)
            instance.coordinator._carry_out(instance.coordinator._cluster.use_lanes(num_lanes))
            await running
            await until(lambda n=num_lanes: all(one.life.attention.num_lanes == n for one in instance.attention), 30)
            await instance.check_tokens(expected)


async def test_a_placement_that_a_worker_cannot_load_changes_nothing_and_is_told_to_whoever_asked(checkpoint):
    path, expected = checkpoint
    async with serving(path, ONCE) as instance:
        instance.experts[1]._host._files.model_dir = path / "gone"
        with pytest.raises(ConfigError, match=r"expert-1: .*gone"):
            await instance.change_to(TWICE)
        assert held(instance.attention[0].life.attention.placement) == held(ONCE)
        await instance.check_tokens(expected)
        instance.experts[1]._host._files.model_dir = path
        await instance.change_to(TWICE)
        await instance.check_tokens(expected)
        with pytest.raises(ConfigError, match=r"experts \[5, 6\] would be on no worker that lives; nodes \[0, 1, 2\]"):
            await instance.coordinator.change_placement(
                lambda placement, nodes: ({0, 1, 2}, {3, 4}, set(), {5, 6}, set()), "a test"
            )


async def test_an_older_placement_and_one_of_other_nodes_change_nothing(checkpoint):
    path, expected = checkpoint
    async with serving(path, TWICE) as instance:
        role = instance.attention[0].life.attention
        ours = role.placement
        role.use_placement(replace(ours, version=0))
        assert role.placement == ours == padded(TWICE, 5)
        with pytest.raises(Exception, match="a placement of 7 experts on 1 nodes cannot follow one of 7 on 5"):
            role.use_placement(Placement((tuple(range(7)),), 7, version=9))
        await instance.check_tokens(expected)
