"""Loads are forecast by what would have been right so far, and replicas stand ready for surges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.planner.forecast import WINDOWS, forecast
from msi.planner.replica_state import ReplicaState
from msi.planner.replicas import plan_replicas
from msi.planner.surges import against_surges, cost_in_surges
from tests.test_replicas import check, tasks

STEADY = (40.0, 20.0, 10.0, 5.0)


def bursting(num_windows):
    """One expert after another has 100 rows more, for a window."""
    return [tuple(rows + 100.0 * (expert == number % 4) for expert, rows in enumerate(STEADY))
            for number in range(num_windows)]  # fmt: skip


def test_a_load_that_stands_is_forecast_as_it_is_and_nothing_rises_above_it():
    found = forecast([STEADY] * 5)
    assert (found.load, found.surge) == (STEADY, 0.0)


def test_bursts_that_go_as_they_came_leave_the_load_as_it_was_and_are_told():
    found = forecast(bursting(WINDOWS))
    assert found.load == STEADY
    assert 80 <= found.surge <= 100


def test_what_has_changed_for_good_is_believed_at_once():
    chance = np.random.default_rng(3)
    windows = [tuple(chance.permutation(STEADY)) for _ in range(2)]
    walk = [windows[0]] * 3 + [windows[1]] * 3
    assert forecast(walk).load == pytest.approx(windows[1])


def test_few_windows_are_weighed_as_nobody_knows_which_forecast_is_good():
    assert forecast([(10.0, 0.0), (0.0, 10.0)]).load == pytest.approx((7.0, 3.0))
    assert forecast([(10.0, 0.0)]).load == (10.0, 0.0)


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=3, max_size=3), min_size=1, max_size=14))
def test_a_forecast_is_within_what_was_seen(windows):
    found = forecast(windows)
    seen = np.array(windows[-WINDOWS:])
    assert (found.load >= seen.min(axis=0) - 1e-6).all()
    assert (found.load <= seen.max(axis=0) + 1e-6).all()
    assert 0 <= found.surge <= 1e6


def test_room_that_is_left_is_for_experts_that_may_surge():
    load = [10.0] * 8
    calm = plan_replicas(load, 4.0, 4, [4] * 4)
    ready = plan_replicas(load, 4.0, 4, [4] * 4, surge=400.0)  # twenty times what a node has to do
    assert sum(map(len, calm.experts)) == 8, "nothing is read twice for nothing"
    assert sum(map(len, ready.experts)) == 16
    assert {len([*filter(None, shares)]) for shares in ready.shares} == {2}, "each falls on two nodes"


@settings(max_examples=25, deadline=None)
@given(tasks(), st.integers(0, 4), st.floats(0, 300))
def test_a_plan_for_surges_keeps_all_that_a_plan_promises(task, most_moves, surge):
    load, floor_cost, num_nodes, memory, before, redundancy = task
    plan = plan_replicas(
        load, floor_cost, num_nodes, memory, before=before, move_cost=1.0, most_moves=most_moves,
        redundancy=redundancy, surge=surge,
    )  # fmt: skip
    check(plan, task)
    came = [set(held) - set(was) for held, was in zip(plan.experts, before.experts, strict=True)]
    assert sum(map(len, came)) == plan.num_moved <= most_moves


@settings(max_examples=25, deadline=None)
@given(tasks(), st.floats(0, 300))
def test_standing_ready_never_costs_more_in_surges(task, surge):
    load, floor_cost, _, memory, before, _ = task
    state = ReplicaState.of(load, floor_cost, memory, before)
    ready = against_surges(state, surge, 0.0, np.inf)
    assert cost_in_surges(ready, surge) <= cost_in_surges(state, surge) + 1e-9
    np.testing.assert_allclose(ready.rows.sum(axis=0), state.rows.sum(axis=0), atol=1e-6)
    assert not (ready.rows * ~ready.held).any()
