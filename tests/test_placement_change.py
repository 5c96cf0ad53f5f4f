"""From one placement to the next: local ids, and who holds what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.errors import ConfigError
from msi.placement import place_evenly, place_with_replicas
from msi.placement_change import changed, lost_experts, merged, padded, repaired, with_node, without_node
from msi.types import HOLE, Placement

NUM_EXPERTS = 9
experts = st.sets(st.integers(0, NUM_EXPERTS - 1))


@st.composite
def wanted_of(draw, num_nodes):
    held = draw(st.lists(experts, min_size=num_nodes, max_size=num_nodes))
    for expert in range(NUM_EXPERTS):
        if not any(expert in one for one in held):
            held[draw(st.integers(0, num_nodes - 1))].add(expert)
    return held


def held_sets(placement):
    return [set(placement.held_by(node)) for node in range(placement.num_nodes)]


@given(st.integers(1, 4).flatmap(lambda num_nodes: st.lists(wanted_of(num_nodes), min_size=2, max_size=5)))
def test_two_placements_in_a_row_share_local_ids_and_a_third_is_what_was_wanted(course):
    placement = Placement(tuple(tuple(sorted(one)) for one in course[0]), NUM_EXPERTS)
    for wanted in course[1:]:
        after = changed(placement, wanted)
        assert held_sets(after) == wanted
        assert after.version == placement.version + 1
        for before, now in zip(placement.experts, after.experts, strict=True):
            both = merged(before, now)
            assert {one for one in both if one != HOLE} == {*before, *now} - {HOLE}
            assert all(one in (HOLE, both[local]) for held in (before, now) for local, one in enumerate(held))
            assert not now or now[-1] != HOLE, "no node keeps ids that nobody uses at the end"
        placement = after


def test_an_id_that_is_free_is_given_away_one_change_later():
    first = Placement(((0, 1, 2), (3,)), 4)
    second = changed(first, [{0, 2}, {1, 3}])
    assert second.experts == ((0, HOLE, 2), (3, 1))
    third = changed(second, [{0, 2, 3}, {1}])
    assert third.experts == ((0, 3, 2), (HOLE, 1))
    assert changed(third, [{0, 1, 2, 3}, set()]).experts == ((0, 3, 2, 1), ())


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ([{0, 1, 2, 3}], "a placement of 1 nodes cannot follow one of 2"),
        ([{0, 1}, {2}], r"each of the 4 experts is on a node, and no other; look at \[3\]"),
        ([{0, 1, 7}, {2, 3}], r"look at \[7\]"),
    ],
)
def test_a_placement_that_cannot_follow_is_refused_by_what_is_wrong_with_it(wanted, complaint):
    with pytest.raises(ConfigError, match=complaint):
        changed(Placement(((0, 1), (2, 3)), 4), wanted)


@given(st.integers(1, 5), st.integers(0, 1), st.integers(5, 12))
def test_a_node_that_comes_gets_its_share_and_one_that_goes_leaves_nothing_behind(num_nodes, redundancy, num_experts):
    redundancy = min(redundancy, num_nodes - 1)
    before = padded(place_with_replicas(num_experts, num_nodes, redundancy), num_nodes + 1)
    came = changed(before, with_node(before, num_nodes, range(num_nodes)))
    counts = [len(one) for one in held_sets(came)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == num_experts * (1 + redundancy), "none is on fewer nodes than before"
    moved = sum(len(now - had) for now, had in zip(held_sets(came), held_sets(before), strict=True))
    assert moved == counts[num_nodes], "nothing else moves"
    went = changed(came, without_node(came, num_nodes, range(num_nodes + 1)))
    assert went.held_by(num_nodes) == ()
    assert sum(len(one) for one in held_sets(went)) == num_experts * (1 + redundancy)


def test_replicas_that_went_with_a_node_come_back_with_it():
    both = Placement(((0, 1, 2), (0, 1, 2)), 3)
    alone = changed(both, without_node(both, 0, [0, 1]))
    assert with_node(alone, 0, [1], [2, 2, 2]) == [{0, 1, 2}, {0, 1, 2}]
    assert with_node(alone, 0, [1]) == [{2}, {0, 1}]


def test_a_replica_that_fits_nowhere_else_goes_with_its_node():
    both = Placement(((0, 1), (0, 1)), 2)
    assert without_node(both, 0, [0, 1]) == [set(), {0, 1}]


def test_what_died_with_a_node_goes_to_those_that_hold_least_and_what_others_have_stays():
    placement = Placement(((0, 1, 2), (3, 4, 0), (5, 0)), 6)
    assert lost_experts(placement, [0, 2]) == [3, 4]
    assert repaired(placement, [0, 2]) == [{0, 1, 2, 4}, {0}, {5, 0, 3}]
    assert lost_experts(place_evenly(4, 2), [0, 1]) == []
