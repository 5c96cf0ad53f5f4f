"""Which experts get replicas, and where: the planner's promises, whatever the load."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.kernels.turns import TURNS
from msi.placement import Placement, place_evenly, place_with_replicas
from msi.planner.replica_state import wave_cost
from msi.planner.replicas import expected_costs, most_gain, plan_layers, plan_replicas
from tests.layered import homes_in


@st.composite
def tasks(draw):
    num_nodes = draw(st.integers(1, 5))
    num_experts = draw(st.integers(num_nodes, 12))
    redundancy = draw(st.integers(0, min(2, num_nodes - 1)))
    load = draw(st.lists(st.floats(0, 300), min_size=num_experts, max_size=num_experts))
    before = place_with_replicas(num_experts, num_nodes, redundancy)
    memory = [len(held) + draw(st.integers(0, 3)) for held in before.experts]
    return load, draw(st.sampled_from([0.0, 4.0, 30.0])), num_nodes, memory, before, redundancy


def check(plan, task):
    load, floor_cost, num_nodes, memory, _, redundancy = task
    placement = plan.placement(1)  # which checks that all are placed, and none twice on a node
    assert (placement.num_nodes, placement.num_experts) == (num_nodes, len(load))
    assert all(len(held) <= room for held, room in zip(placement.experts, memory, strict=True))
    for expert in range(len(load)):
        nodes = homes_in(placement, expert)
        assert len(nodes) >= 1 + redundancy
        assert sum(placement.shares[expert]) == TURNS
    np.testing.assert_allclose(expected_costs(load, floor_cost, placement), plan.costs, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(tasks())
def test_all_experts_are_placed_within_the_memory_and_never_twice_on_a_node(task):
    load, floor_cost, num_nodes, memory, _, redundancy = task
    plan = plan_replicas(load, floor_cost, num_nodes, memory, redundancy=redundancy)
    check(plan, task)
    assert plan.num_moved == 0, "nothing was there"


@settings(max_examples=25, deadline=None)
@given(tasks(), st.integers(0, 4), st.sampled_from([0.0, 1.0, 50.0]))
def test_a_plan_is_no_worse_than_before_moves_few_experts_and_keeps_their_order(task, most_moves, move_cost):
    load, floor_cost, num_nodes, memory, before, redundancy = task
    plan = plan_replicas(
        load, floor_cost, num_nodes, memory, before=before, move_cost=move_cost, most_moves=most_moves,
        redundancy=redundancy,
    )  # fmt: skip
    check(plan, task)
    came = [set(held) - set(was) for held, was in zip(plan.experts, before.experts, strict=True)]
    assert sum(map(len, came)) == plan.num_moved <= most_moves
    was = max(expected_costs(load, floor_cost, before))
    assert plan.cost + move_cost * plan.num_moved <= was * (1 + 1e-9)
    for held, had in zip(plan.experts, before.experts, strict=True):
        stay = [expert for expert in had if expert in held]
        assert list(held[: len(stay)]) == stay
    again = plan_replicas(
        load, floor_cost, num_nodes, memory, before=plan.placement(1), move_cost=move_cost, redundancy=redundancy
    )
    assert again.cost <= plan.cost * (1 + 1e-9)


def test_experts_that_nobody_asks_for_stay_where_they_are():
    before = Placement(experts=((0, 1, 3), (2, 0), (3, 2, 1)), num_experts=4)
    plan = plan_replicas([0.0] * 4, 0.0, 3, [3, 2, 3], before=before, most_moves=0, redundancy=1)
    assert (plan.experts, plan.num_moved) == (before.experts, 0)


def test_experts_that_a_lost_node_held_alone_are_placed_on_those_that_are_there():
    before = place_evenly(8, 4)
    plan = plan_replicas([5.0] * 8, 2.0, 4, [4, 0, 4, 4], before=before, move_cost=5.0)
    assert (plan.experts[1], plan.num_moved) == ((), 2)
    assert sorted(expert for held in plan.experts for expert in held) == [*range(8)]
    with pytest.raises(ValueError, match="8 experts 1 times on as many nodes each need room for 8; 3 nodes have room"):
        plan_replicas([5.0] * 8, 2.0, 4, [2, 0, 2, 3], before=before)


def test_a_hot_expert_is_shared_and_cold_ones_are_not_read_twice():
    load = [96.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    plan = plan_replicas(load, 8.0, 2, [5, 5], before=place_evenly(8, 2))
    assert sorted(plan.shares[0]) == [29, 31]
    assert all(max(shares) == TURNS for shares in plan.shares[1:]), "a cold expert's weights are read by one node"
    assert plan.num_moved == 1


def test_even_replicas_for_failures_alone_are_not_read_while_nothing_fails():
    twice = place_with_replicas(8, 4, 1)
    evenly = expected_costs([4.0] * 8, 8.0, replace(twice, shares=()))
    plan = plan_replicas([4.0] * 8, 8.0, 4, [4] * 4, before=twice, redundancy=1)
    assert plan.num_moved == 0
    assert all(max(shares) == TURNS for shares in plan.shares)
    assert plan.cost < 0.75 * max(evenly)
    assert expected_costs([4.0] * 8, 8.0, twice) == expected_costs([4.0] * 8, 8.0, place_evenly(8, 4))


def test_moving_must_pay():
    load, before = [20.0, 20.0, 10.0, 10.0], place_evenly(4, 2)
    assert plan_replicas(load, 0.0, 2, [2, 2], before=before).cost == 30
    assert plan_replicas(load, 0.0, 2, [2, 2], before=before, move_cost=6.0).experts == before.experts


def test_an_experts_cost_is_its_rows_or_its_weights_with_the_rows_way_and_nothing_where_no_row_comes():
    rows = np.array([0.0, 0.01, 1.0, 8.0, 50.0])
    computing = np.array([0, 8 * 0.00995, 8 * 0.63212, 8, 50])
    np.testing.assert_allclose(wave_cost(rows, 8.0), (computing + 2 * rows) / 3, rtol=1e-3)


def test_each_layer_is_placed_by_its_own_load():
    load = [[90.0, 1, 1, 1], [1.0, 1, 1, 90]]
    plans = plan_layers(load, 0.0, 2, [3, 3], before=place_evenly(4, 2))
    assert [plan.cost for plan in plans] == pytest.approx([46.5] * 2, abs=1.5)


def test_a_layer_that_can_gain_too_little_stays_and_none_gains_more_than_it_can():
    load, before = [[30.0, 20.0, 22.0, 28.0], [30.0, 30.0, 20.0, 20.0]], place_evenly(4, 2)
    assert [most_gain(one, 4.0, before, [2, 2]) for one in load] == pytest.approx([0.0, 1 / 6])
    stays, moves = plan_layers(load, 4.0, 2, [2, 2], before=before, least_gain=0.1)
    assert (stays.experts, stays.num_moved) == (before.experts, 0)
    assert moves.num_moved == 2
    assert [sorted(sum(load[1][expert] for expert in held) for held in moves.experts)] == [[50.0, 50.0]]


def test_a_layer_that_could_gain_little_is_placed_anew_where_its_experts_have_no_room_or_lack_replicas():
    drained = Placement(((0, 1, 2, 3), (4, 5, 6, 7, 0, 1, 2, 3), ()), 8)
    load = [[101.0] * 4 + [100.0] * 4]
    (plan,) = plan_layers(load, 1.0, 3, [6, 6, 0], before=drained, redundancy=0, least_gain=0.05)
    assert sorted({expert for held in plan.experts for expert in held}) == [*range(8)]
    assert [len(held) <= 6 for held in plan.experts] == [True] * 3
    (plan,) = plan_layers([[5.0] * 4], 1.0, 2, [4, 4], before=place_evenly(4, 2), redundancy=1, least_gain=0.5)
    assert [sorted(held) for held in plan.experts] == [[0, 1, 2, 3]] * 2


@settings(max_examples=25, deadline=None)
@given(tasks())
def test_no_plan_gains_more_than_is_said_to_be_possible(task):
    load, floor_cost, num_nodes, memory, before, redundancy = task
    plan = plan_replicas(load, floor_cost, num_nodes, memory, before=before, redundancy=redundancy)
    was = max(expected_costs(load, floor_cost, before))
    assert was - plan.cost <= was * most_gain(load, floor_cost, before, memory) + 1e-6


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"memory": [4]}, "memory is of 1 nodes, 2 are there"),
        ({"load": [float("nan")] * 4}, "not a number of at least 0"),
    ],
)
def test_what_cannot_be_planned_is_said(changed, complaint):
    task = {"load": [1.0] * 4, "floor_cost": 1.0, "nodes": 2, "memory": [4, 4]} | changed
    with pytest.raises(ValueError, match=complaint):
        plan_replicas(**task)
    assert replace(place_evenly(4, 2), version=3).shares == ()
