"""From one placement to the next: local ids, and who holds what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.errors import ConfigError
from msi.placement import HOLE, LayerExperts, Placement, place_evenly, place_with_replicas
from msi.placement_change import (
    ByLayer,
    Shared,
    changed,
    check_layers,
    copies_of,
    is_as,
    lost_experts,
    merged,
    num_to_load,
    padded,
    repaired,
    scarce_experts,
    spread_evenly,
    with_node,
    without_node,
)
from tests.layered import homes_in

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


# -- layers that differ ------------------------------------------------------------------------------------------------


@st.composite
def chosen_of(draw, num_nodes, num_layers):
    """Of all layers alike, or of each."""
    layers = tuple(draw(wanted_of(num_nodes)) for _ in range(num_layers))
    return draw(st.sampled_from([layers[0], ByLayer(layers)]))


@given(st.integers(1, 3).flatmap(lambda num_nodes: st.lists(chosen_of(num_nodes, 3), min_size=2, max_size=4)))
def test_two_placements_in_a_row_share_local_ids_in_each_layer_whether_layers_are_alike_or_not(course):
    placement = changed(spread_over(course[0]), course[0])
    for chosen in course[1:]:
        after = changed(placement, chosen)
        assert is_as(after, chosen)
        wanted = chosen.layers if isinstance(chosen, ByLayer) else (chosen,) * 3
        for layer in range(3):
            assert held_sets(after.of_layer(layer)) == wanted[layer], "which also checks that all are held"
            before = placement.of_layer(layer)
            for were, now in zip(before.experts, after.of_layer(layer).experts, strict=True):
                both = merged(were, now)
                assert all(one in (HOLE, both[local]) for held in (were, now) for local, one in enumerate(held))
        assert (len(after.layers) == 1) == (len(set(after.layers)) == 1), "layers that are alike are kept once"
        assert not lost_experts(after, range(after.num_nodes))
        placement = after


def spread_over(chosen):
    num_nodes = len(chosen.layers[0] if isinstance(chosen, ByLayer) else chosen)
    return place_evenly(NUM_EXPERTS, num_nodes)


FIRST_HALF, SECOND_HALF = {0, 1}, {2, 3}
CROSSED = changed(place_evenly(4, 2), ByLayer(([FIRST_HALF, SECOND_HALF], [SECOND_HALF, FIRST_HALF])))


def test_what_is_missing_in_any_layer_is_missing_and_what_is_held_in_any_is_held():
    assert CROSSED.further == (LayerExperts(((HOLE, HOLE, 2, 3), (HOLE, HOLE, 0, 1))),)
    assert lost_experts(CROSSED, [0]) == lost_experts(CROSSED, [1]) == [0, 1, 2, 3]
    assert lost_experts(CROSSED, [0, 1]) == []
    assert CROSSED.held_by(0) == (0, 1, 2, 3)
    assert (CROSSED.num_held_by(0), CROSSED.num_used_nodes, homes_in(CROSSED, 0)) == (2, 2, (0, 1))
    twice = changed(CROSSED, ByLayer(([{0, 1, 2, 3}, {2, 3}], [{2, 3, 0}, {0, 1, 3}])))
    assert copies_of(twice) == [1, 1, 1, 2]
    assert scarce_experts(twice, [0, 1], [2] * 4) == [0, 1, 2]
    assert lost_experts(twice, [0]) == [1]


@pytest.mark.parametrize(
    ("choose", "wanted"),
    [
        (lambda placement: repaired(placement, [1]), [[set(), {0, 1, 2, 3}]] * 2),
        (lambda placement: without_node(placement, 0, [1]), [[set(), {0, 1, 2, 3}]] * 2),
        (lambda placement: spread_evenly(placement, [0, 1]), [[{0, 1}, {2, 3}], [{2, 3}, {0, 1}]]),
    ],
)
def test_what_is_done_for_a_placement_is_done_for_each_of_its_layers(choose, wanted):
    assert [list(map(set, layer)) for layer in choose(CROSSED).layers] == wanted


def test_a_node_that_comes_gets_its_share_of_each_layer():
    three = padded(CROSSED, 3)
    after = changed(three, with_node(three, 2, [0, 1, 2]))
    assert [held_sets(after.of_layer(layer)) for layer in (0, 1)] == [
        [{0}, {2, 3}, {1}], [{2}, {0, 1}, {3}],
    ]  # fmt: skip


def test_only_experts_of_layers_that_are_new_are_to_be_loaded():
    assert num_to_load([(0, 1)], [(0, 1)], 3) == num_to_load((), [(0, 1)], 3) == 0
    assert num_to_load([(0, 1)], (), 3) == 6
    assert num_to_load([(0, HOLE, 2), (1,), (1, 0)], [(0, 1)], 3) == 1
    assert num_to_load([(0, 1)], [(0, 1), (), (1, HOLE)], 3) == 3


def test_shares_are_of_each_layer_and_another_number_of_layers_cannot_follow():
    both = [{0, 1}, {0, 1}]
    shared = changed(
        place_evenly(2, 2), ByLayer((Shared(both, ((45, 15), (0, 60))), Shared(both, ((0, 60), (30, 30)))))
    )
    assert [layer.shares for layer in shared.layers] == [((45, 15), (0, 60)), ((0, 60), (30, 30))]
    assert changed(shared, both).layers == shared.layers, "what stays where it is keeps its shares"
    more = changed(shared, ByLayer((both, [{0, 1}, {0}])))
    assert [layer.shares for layer in more.layers] == [((45, 15), (0, 60)), ((0, 60), (60,))]
    with pytest.raises(ConfigError, match="a placement of 3 layers cannot follow one of 2; name every layer, or one"):
        changed(shared, ByLayer((both,) * 3))
    check_layers(shared, 2)
    check_layers(place_evenly(2, 2), 3)
    with pytest.raises(ConfigError, match="a placement of 2 layers is not for this model, which has 3 with experts"):
        check_layers(shared, 3)
