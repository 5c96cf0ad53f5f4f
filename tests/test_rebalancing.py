"""Experts that are placed anew by load: what is counted, whether it pays, and that noise moves nothing. By values."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi.control.changes import ChangesOfPlacement
from msi.control.counters import BatchTimes, ExpertCounters, LayerRows
from msi.control.expert_load import ExpertLoad
from msi.control.members import NO_STATUS
from msi.control.messages import Placed
from msi.control.operator import Operator
from msi.control.orders import Order
from msi.control.rebalancing import Rebalancing
from msi.errors import ConfigError
from msi.instance.instance import build_plan
from msi.options import InstanceOptions
from msi.placement import Placement, place_evenly, place_with_replicas
from msi.placement_change import ByLayer, Shared, changed
from msi.planner.expert_counts import read_counts
from msi.planner.expert_curve import ExpertCurve, fit_curve
from msi.planner.rebalance import FLOOR_ROWS, Question, decide
from msi.planner.replicas import cost_of_layers
from msi.planner.stage_costs import BatchMean
from msi.settings import Rebalance
from tests.layered import homes_in
from tests.test_membership import PLAN, formed
from tests.test_membership import beat as cluster_beat
from tests.tiny import save_plainly

EVEN = place_evenly(8, 2)
SKEWED = ((40.0, 30.0, 20.0, 10.0, 1.0, 1.0, 1.0, 1.0),)


# -- what batches take -------------------------------------------------------------------------------------------------


def timed(curve, sizes):
    return [BatchMean(rows, hit, curve.batch_s + curve.row_s * rows + curve.read_s * hit, 10.0) for rows, hit in sizes]


SIZES = [(1.0, 1.0), (8.0, 5.0), (40.0, 8.0), (300.0, 8.0)]


def test_the_curve_of_experts_is_found_from_batches_of_several_sizes():
    curve = ExpertCurve(1e-4, 2e-6, 3e-5)
    found = fit_curve(timed(curve, SIZES))
    assert (found.batch_s, found.row_s, found.read_s) == pytest.approx((1e-4, 2e-6, 3e-5))
    assert found.floor_rows == pytest.approx(15.0)


@pytest.mark.parametrize(
    "means",
    [[], timed(ExpertCurve(0, 1e-6, 1e-5), SIZES[:2]), timed(ExpertCurve(0, 1e-6, 1e-5), [(8.0, 5.0)] * 9)],
    ids=["none", "too few", "all alike"],
)
def test_no_curve_is_found_where_nothing_tells_rows_from_experts(means):
    assert fit_curve(means) is None


@given(st.lists(st.tuples(st.floats(1, 500), st.floats(1, 8), st.floats(1e-6, 1e-2)), max_size=20))
def test_no_curve_takes_less_than_nothing(points):
    curve = fit_curve([BatchMean(rows, hit, seconds, 1.0) for rows, hit, seconds in points])
    assert curve is None or (min(curve.batch_s, curve.row_s, curve.read_s) >= 0 and 0 <= curve.floor_rows <= 4096)


# -- what is counted ---------------------------------------------------------------------------------------------------


def beat(load, node, rows, batches, incarnation=0, times=(), *further):
    """`further`: rows of more layers."""
    counted = ExpertCounters(batches=batches, expert_batches_s=batches * 1e-3)
    status = replace(NO_STATUS, experts=counted, batches=times, layer_rows=LayerRows.of([rows, *further]))
    load.hear(f"expert-{node}", incarnation, node, status)


def test_rows_are_those_since_the_window_began_whatever_lives_and_places_experts_had():
    load = ExpertLoad(3)
    beat(load, 0, {0: 1000, 1: 500}, 50)
    assert load.close(1) is None, "what was before is nobody's"
    beat(load, 0, {0: 1040, 1: 520}, 60)
    beat(load, 1, {2: 7}, 3)
    beat(load, 1, {2: 17}, 13)
    assert load.close(100) is None, "too few rows: it goes on"
    beat(load, 0, {0: 1080, 2: 20}, 70)  # expert 1 has gone, 2 has come
    window = load.close(100)
    assert window.rows == ((80.0, 20.0, 30.0),)
    assert (window.waves, window.load) == (20.0, ((4.0, 1.0, 1.5),))
    assert not load.before
    beat(load, 0, {0: 10, 1: 5, 2: 5}, 5, incarnation=1)
    beat(load, 0, {0: 20, 1: 15, 2: 15}, 15, incarnation=1)
    assert load.close(1).load == ((1.0, 1.0, 1.0),)
    assert [*load.before] == [((4.0, 1.0, 1.5),)]


def test_layers_are_counted_each_for_itself_and_a_wave_is_of_one():
    load = ExpertLoad(2)
    beat(load, 0, {0: 0}, 0, 0, (), {1: 0})
    beat(load, 1, {1: 0}, 0, 0, (), {0: 0})
    beat(load, 0, {0: 30}, 20, 0, (BatchTimes(8, 20, 80, 0.02),), {1: 50})
    beat(load, 1, {1: 10}, 20, 0, (), {0: 70})
    assert load.close(81) is None, "80 rows of a layer, in the mean"
    window = load.close(80)
    assert window.rows == ((30.0, 10.0), (70.0, 50.0))
    assert (window.waves, window.load) == (10.0, ((3.0, 1.0), (7.0, 5.0)))
    (mean,) = load.means
    assert (mean.rows, mean.experts) == pytest.approx((4.0, 1 - (np.exp(-3.0) + np.exp(-5.0)) / 2))


def test_counts_of_another_number_of_layers_begin_anew():
    load = ExpertLoad(2)
    beat(load, 0, {0: 0}, 0)
    beat(load, 0, {0: 10}, 10)
    for rows in (0, 10, 20):
        beat(load, 1, {1: rows}, 2 * rows, 0, (), {0: rows})
    assert load.total == [[0.0, 20.0], [20.0, 0.0]], "a layer more than was told at first"
    window = load.close(1)
    assert (window.rows, window.waves) == (((0.0, 20.0), (20.0, 0.0)), 20.0)


def test_times_of_batches_become_rows_and_experts_hit_by_what_a_token_has_there():
    load = ExpertLoad(2)
    beat(load, 0, {0: 0, 1: 0}, 1)
    beat(load, 0, {0: 100, 1: 50}, 11, times=(BatchTimes(16, 10, 100, 0.02),))
    load.close(1)
    (mean,) = load.means
    assert (mean.rows, mean.seconds, mean.num_batches) == pytest.approx((15.0, 2e-3, 10))
    assert mean.experts == pytest.approx(2 - np.exp(-10.0) - np.exp(-5.0))


# -- whether it pays ---------------------------------------------------------------------------------------------------


def question(load=SKEWED, latest=None, placement=EVEN, **given):
    return Question(placement, (0, 1), 0, given.pop("slots", 8), (load,), latest or load, **given)


def test_experts_are_shared_out_by_load_where_the_slowest_worker_gains():
    found = decide(question())
    assert found.gain > 0.3
    assert found.is_worth
    (layer,) = found.chosen.layers
    assert found.num_moved == sum(len(held - {*EVEN.experts[node]}) for node, held in enumerate(layer.experts))
    after = changed(EVEN, found.chosen)
    assert (after.version, after.shares, after.further) == (1, layer.shares, ())


def test_layers_with_loads_of_their_own_are_placed_each_by_its_own_and_gain_what_none_placed_alike_would():
    load = (*SKEWED, SKEWED[0][::-1])
    alike = (tuple(map(sum, zip(*load, strict=True))),)
    assert decide(question(alike)).gain < 0.05
    found = decide(question(load))
    assert found.gain > 0.3
    after = changed(EVEN, found.chosen)
    assert len(after.layers) == 2
    assert found.gain == pytest.approx(
        1 - cost_of_layers(load, FLOOR_ROWS, after) / cost_of_layers(load, FLOOR_ROWS, EVEN)
    )
    assert decide(question(load, placement=after, slots=after.num_held_by(0) + after.num_held_by(1))).num_moved == 0
    same = decide(question(SKEWED * 2))
    assert not changed(EVEN, same.chosen).further, "layers whose loads are alike are placed alike"


def test_what_the_last_window_does_not_bear_out_gains_nothing():
    assert decide(question(latest=((1.0, 40.0, 30.0, 1.0, 20.0, 10.0, 1.0, 1.0),))).gain < 0


def test_a_gain_that_does_not_pay_for_loading_is_not_worth_it():
    busy = question(busy_s=0.5, load_s=0.1, waves=1000.0)
    assert decide(busy).is_worth
    assert not decide(replace(busy, busy_s=1e-3, load_s=10.0)).is_worth


@settings(max_examples=12, deadline=None)
@given(
    num_nodes=st.integers(2, 4), per_node=st.integers(2, 5), redundant=st.integers(0, 3),
    zipf=st.floats(0.0, 1.5), alternates=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_noise_and_popularities_that_alternate_move_experts_a_few_times_at_most(
    num_nodes, per_node, redundant, zipf, alternates, seed
):
    """By the same rule as an instance: whoever has moved stays, since nothing has changed."""
    chance, num_experts = np.random.default_rng(seed), num_nodes * per_node
    placement = place_with_replicas(num_experts, num_nodes, 0, min(redundant, num_experts))
    slots = sum(len(held) for held in placement.experts)
    weights = (np.arange(num_experts) + 1.0) ** -zipf
    orders = [chance.permutation(num_experts) for _ in range(2)]
    load, moved, counts, rest = ExpertLoad(num_experts), [], np.zeros(num_experts, int), 0
    beat(load, 0, dict(enumerate(counts.tolist())), 1)
    for window in range(14):
        popularity = weights[orders[window % 2 if alternates else 0]]
        counts += chance.multinomial(64 * num_experts, popularity / popularity.sum())
        beat(load, 0, dict(enumerate(counts.tolist())), 2 + window)
        closed = load.close(32 * num_experts)
        rest -= 1
        if not load.before or rest >= 0:
            continue
        asked = Question(placement, tuple(range(num_nodes)), 0, slots, tuple(load.before), closed.load)
        found = decide(asked)
        if found.gain > 0.1:
            placement, rest = changed(placement, found.chosen), 1
            moved.append(window)
    assert len(moved) <= 2 + alternates, moved


async def test_a_plan_that_came_too_late_is_made_anew_after_the_next_window_and_one_that_failed_after_ten():
    cluster = formed(replace(PLAN, placement=EVEN, rebalance=Rebalance("auto", 1.0)))
    for route, name in ((b"e0", "expert-0"), (b"e1", "expert-1"), (b"a0", "attention-0")):
        cluster_beat(cluster, route, name, 1.0)
    cluster.tick(1.0)
    changes = ChangesOfPlacement(cluster, lambda instructions: None)
    balance = Rebalancing(cluster.plan.rebalance, cluster, changes, 0.0)
    asked = question(busy_s=1e3)
    windows = iter(range(1, 100))

    def next_questions(count):
        """Whether the next windows lead to questions."""
        found = []
        for window in [next(windows) for _ in range(count)]:
            for node in (0, 1):
                beat(balance._load, node, dict.fromkeys(range(8), 1000 * window), 10 * window)
            found.append(balance.next(10.0 * window) is not None)
        return found

    assert next_questions(4)[-1]
    await balance.look(replace(asked, placement=replace(EVEN, version=7)))  # another is used since
    assert next_questions(1) == [True]
    changing = asyncio.create_task(balance.look(asked))
    while not cluster.placing.is_changing:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    cluster.placed(b"e0", Placed("expert-0", 0, 1, False, "the memory that is free is too little"))
    for has_former in (True, False):
        for one in cluster._members.values():
            one.placement_version, one.has_former = 2, has_former and one.role == "expert"
        changes.look()
    await changing
    assert next_questions(11) == [False] * 10 + [True]


async def test_an_operator_hears_what_layers_hold_and_what_their_experts_had_to_do():
    crossed = changed(EVEN, ByLayer(([{*range(4)}, {*range(4, 8)}], [{*range(4, 8)}, {*range(4)}])))
    cluster = formed(replace(PLAN, placement=crossed, rebalance=Rebalance("auto", 1.0)))
    changes = ChangesOfPlacement(cluster, lambda instructions: None)
    balance = Rebalancing(cluster.plan.rebalance, cluster, changes, 0.0)
    operator = Operator(cluster, changes, balance, lambda instructions: None, "inproc://c", lambda: 1.0)
    before = json.loads((await operator.obey(Order(0, "placement"))).report)
    assert (before["expert_rows"], before["layer_rows"]) == ([0.0] * 8, [])
    beat(balance._load, 0, {0: 0}, 1, 0, (), {5: 0})
    beat(balance._load, 0, {0: 30}, 2, 0, (), {5: 9, 0: 2})
    ordered = await operator.obey(Order(0, "placement"))
    told = json.loads(ordered.report)
    assert told["experts"] == {"expert-0": [*range(8)], "expert-1": [*range(4, 8), *range(4)]}
    first, second = ({"expert-0": one, "expert-1": other} for one, other in SWAPPED)
    assert told["layers"] == [first, second]
    assert told["layer_rows"] == [[30.0, *[0.0] * 7], [2.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0]]
    assert told["expert_rows"] == [32.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0]
    assert ordered.text == "placement 1 (settled): expert-0: 4 of each of 2 layers; expert-1: 4 of each of 2 layers"


SWAPPED = [([*range(4)], [*range(4, 8)]), ([*range(4, 8)], [*range(4)])]


def test_shares_are_kept_by_a_change_that_says_them_or_moves_nothing_and_go_to_first_homes_with_another():
    both = Placement(((0, 1), (0, 2)), 3)
    shared = changed(both, Shared(((0, 1), (0, 2)), ((45, 15), (60,), (60,))))
    assert shared.shares == ((45, 15), (60,), (60,))
    assert changed(shared, [{0, 1}, {0, 2}]).shares == shared.shares
    assert changed(shared, [{0, 1}, {0, 1, 2}]).shares == ((60, 0), (60, 0), (60,))
    assert changed(shared, [{0, 1}, {2}]).shares == ()


# -- at the start ------------------------------------------------------------------------------------------------------


def test_counts_are_read_as_a_list_or_as_msi_ctl_prints_them(tmp_path):
    (tmp_path / "list.json").write_text("[3, 0.5, 0]")
    (tmp_path / "printed.json").write_text('{"version": 1, "expert_rows": [3, 0.5, 0]}')
    assert read_counts(tmp_path / "list.json") == read_counts(tmp_path / "printed.json") == [[3.0, 0.5, 0.0]]
    layers = '{"expert_rows": [3, 1], "layer_rows": [[1, 1], [2, 0]]}'
    (tmp_path / "layers.json").write_text(layers)
    assert read_counts(tmp_path / "layers.json") == [[1.0, 1.0], [2.0, 0.0]]
    for number, text in enumerate(("{", "{}", '["a"]', "[-1]", "[true]", "[NaN]", "3")):
        (tmp_path / f"{number}.json").write_text(text)
        with pytest.raises(ConfigError, match=r"cannot read expert popularity|give a weight or count for each expert"):
            read_counts(tmp_path / f"{number}.json")


def test_replicas_at_the_start_go_to_the_experts_that_are_chosen_most(tmp_path):
    save_plainly(tmp_path / "model")
    counts = tmp_path / "counts.json"
    counts.write_text("[60, 20, 5, 5, 4, 3, 3]")
    asked = {"model": tmp_path / "model", "expert_workers": 3}

    def homes(**given):
        placement = build_plan(InstanceOptions.of(**asked, **given))[0].placement
        return [len(homes_in(placement, expert)) for expert in range(7)], placement.shares

    assert homes() == ([1] * 7, ())
    assert homes(redundant_experts=2)[0] == [1 + (expert in (0, 3)) for expert in range(7)]
    copies, shares = homes(redundant_experts=2, expert_popularity=counts)
    assert copies[0] == 3
    assert sum(copies) <= 9
    assert max(shares[0]) < 40, "its rows are shared out"
    counts.write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"has 2 counts, 2 of them above 0; this model has 7 experts"):
        homes(expert_popularity=counts)
