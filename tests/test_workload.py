"""Requests and expert popularity of a simulation: drawn as stated, and refused with a sentence."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from statistics import mean, median

import pytest

from msi.errors import ConfigError
from msi.placement import Placement, place_evenly
from msi.settings import Rebalance
from msi.simulator.balanced import placed_by_popularity
from msi.simulator.popularity import build_routing
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival, bursts, fixed_lengths, lognormal_lengths, poisson, read_trace
from tests.everyday import only_thorough
from tests.test_simulator import COSTS, SMALL

# -- requests --------------------------------------------------------------------------------------------------------


def test_poisson_arrivals_have_their_rate_and_the_papers_medians():
    arrivals = poisson(20_000, 50.0, lognormal_lengths(), seed=1)
    assert arrivals[-1].arrival_s == pytest.approx(400, rel=0.03)
    assert median(one.input_len for one in arrivals) == pytest.approx(571, rel=0.03)
    assert median(one.output_len for one in arrivals) == pytest.approx(159, rel=0.03)
    assert poisson(10, 50.0, lognormal_lengths(), seed=1) == arrivals[:10]
    assert poisson(10, 50.0, lognormal_lengths(), seed=2) != arrivals[:10]


def test_bursts_come_together():
    arrivals = bursts(5, 2, 1.5, fixed_lengths(3, 4))
    assert arrivals == [Arrival(at, 3, 4) for at in (0.0, 0.0, 1.5, 1.5, 3.0)]


def test_a_trace_is_read_in_order_of_arrival(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"arrival_s": 2, "input_len": 5, "output_len": 6, "more": "is ignored"}\n\n'
        '{"arrival_s": 0.5, "input_len": 7, "output_len": 8}\n'
    )
    assert read_trace(file) == [Arrival(0.5, 7, 8), Arrival(2.0, 5, 6)]


GOOD = '{"arrival_s": 0, "input_len": 1, "output_len": 1}\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (GOOD + '{"arrival_s": 1, "inp', r"line 2: not valid JSON .* is the file cut off\?"),
        (GOOD + "[1, 2]", "line 2: give an object with arrival_s, input_len, output_len"),
        ('{"arrival_s": 1, "input_len": 4}', "line 1: give an object with"),
        ('{"arrival_s": 1, "input_len": -4, "output_len": 1}', "line 1: input_len is -4; give a whole number of at"),
        ('{"arrival_s": 1, "input_len": 4, "output_len": 0}', "line 1: output_len is 0"),
        ('{"arrival_s": 1, "input_len": 4.5, "output_len": 1}', r"line 1: input_len is 4\.5"),
        ('{"arrival_s": -1, "input_len": 4, "output_len": 1}', r"line 1: arrival_s is -1\.0; give seconds of at least"),
        ('{"arrival_s": "now", "input_len": 4, "output_len": 1}', "line 1: arrival_s is 'now'"),
        ('{"arrival_s": NaN, "input_len": 4, "output_len": 1}', "line 1: arrival_s is nan"),
        ("\n", "has no requests"),
        (None, "cannot read the trace"),
    ],
)
def test_a_trace_that_cannot_be_used_is_refused_by_line(tmp_path, text, sentence):
    file = tmp_path / "trace.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_trace(file)


def test_workloads_that_cannot_be_are_refused():
    for build in (
        lambda: poisson(0, 1.0, fixed_lengths(1, 1)),
        lambda: poisson(1, 0.0, fixed_lengths(1, 1)),
        lambda: poisson(1, float("nan"), fixed_lengths(1, 1)),
        lambda: bursts(1, 0, 1.0, fixed_lengths(1, 1)),
        lambda: bursts(1, 1, -1.0, fixed_lengths(1, 1)),
        lambda: bursts(1, 1, 1.0, fixed_lengths(1, -1)),
        lambda: simulate(SMALL, COSTS, []),
    ):
        with pytest.raises(ConfigError, match="give"):
            build()


# -- expert popularity -----------------------------------------------------------------------------------------------

PLACEMENT = place_evenly(8, 3)  # 3, 3 and 2 experts


def routing(popularity, top_k=2, placement=PLACEMENT):
    return build_routing(popularity, placement, top_k, most_tokens=512, seed=7)


def test_as_expected_equal_nodes_get_equal_rows_and_pairs_add_up():
    expected = routing("uniform")
    mark, rows = expected.draw(280, random.Random(1))
    assert rows == (180, 180, 130)  # 1 - C(5,2)/C(8,2) = 18/28 and 1 - C(6,2)/C(8,2) = 13/28
    loads = [expected.load(node, [(mark, 100, 0), (mark, 180, 0)]) for node in range(3)]
    assert sum(pairs for pairs, _ in loads) == pytest.approx(560)
    assert [active for _, active in loads] == [3, 3, 2]
    assert expected.draw(1, random.Random(1))[1] == (1, 1, 1)


@pytest.mark.parametrize("popularity", ["uniform-drawn", "zipf", "zipf:2", (9, 1, 0, 0, 4, 0, 0, 2)])
def test_what_nodes_are_sent_is_what_was_drawn(popularity):
    drawn, chance = routing(popularity), random.Random(3)
    for num_tokens in (1, 7, 512):
        mark, rows = drawn.draw(num_tokens, chance)
        loads = [drawn.load(node, [(mark, num_tokens, 0)]) for node in range(3)]
        assert sum(pairs for pairs, _ in loads) == 2 * num_tokens  # every token has two experts
        assert num_tokens <= sum(rows) <= 2 * num_tokens
        for count, (pairs, active) in zip(rows, loads, strict=True):
            assert count <= min(pairs, num_tokens)  # a token with two experts on a node travels once
            assert bool(count) == bool(active)
            assert active <= 3
    assert drawn.load(0, []) == (0.0, 0)


def test_uniform_draws_are_on_average_as_expected():
    drawn, expected, chance = routing("uniform-drawn"), routing("uniform"), random.Random(4)
    draws = [drawn.draw(100, chance)[1] for _ in range(400)]
    means = [mean(rows[node] for rows in draws) for node in range(3)]
    assert means == pytest.approx(expected.draw(100, chance)[1], rel=0.03)


def test_measured_weights_are_those_of_the_first_choice():
    drawn = routing((6, 0, 0, 3, 0, 0, 1, 0), top_k=1)
    pairs = [drawn.load(node, [(mark, 512, 0) for mark in range(0, 65_536, 512)])[0] for node in range(3)]
    assert [share / sum(pairs) for share in pairs] == pytest.approx([0.6, 0.3, 0.1], abs=0.01)


@pytest.mark.parametrize("popularity", ["uniform", "zipf"])
def test_rows_go_to_replicas_by_their_shares_and_not_to_nodes_that_are_missing(popularity):
    twice = Placement(((0, 1, 2, 3), (4, 5, 6, 7, 0, 1)), 8, 1, ((45, 15), (0, 60), *(((60,),) * 6)))
    routed, chance = routing(popularity, top_k=1, placement=place_evenly(8, 2)), random.Random(5)
    view, alone = routed.view(twice), routed.view(twice, missing=(1,))
    assert (routed.view(twice), routed.view(place_evenly(8, 2))) == (view, 0)
    weights = [1.0 if popularity == "uniform" else 1 / (1 + expert) for expert in range(8)]
    share = (0.25 * weights[0] + weights[1] + sum(weights[4:])) / sum(weights)
    draws = [(routed.draw(512, chance, view)[0], 512, view) for _ in range(300)]
    pairs = [routed.load(node, draws)[0] for node in range(2)]
    assert pairs[1] / sum(pairs) == pytest.approx(share, abs=0.01)
    mark, rows = routed.draw(512, chance, alone)
    kept = routed.load(1, [(mark, 512, alone)])[1]
    assert kept == 4, "what no other node has"
    assert sum(rows) == pytest.approx(512, abs=1)


@dataclass(frozen=True)
class SlowExperts:
    """Whose time is that of their rows."""

    per_batch_s: float = 0.1e-3  # of attention

    def attention_s(self, num_tokens, num_context_tokens):
        return self.per_batch_s

    def pass_s(self, num_logit_rows):
        return 0.0

    def expert_s(self, num_expert_rows, num_active_experts):
        return 0.1e-3 * num_expert_rows

    def comm_s(self, num_bytes):
        return num_bytes * 1e-9


def test_popular_experts_slow_the_instance():
    costs = SlowExperts(1e-3)
    arrivals = [Arrival(0.0, 4, 8)] * 36
    even, skewed = (simulate(SMALL, costs, arrivals, popularity=name) for name in ("uniform", "zipf:2"))
    assert skewed.duration_s > 1.2 * even.duration_s
    busy = {worker.worker_id: worker.busy for worker in skewed.workers}
    assert busy["expert-0"] > 3 * busy["expert-1"]
    placed = placed_by_popularity(replace(SMALL, redundant_experts=2), costs, "zipf:2", seed=0)
    balanced = simulate(placed, costs, arrivals, popularity="zipf:2")
    assert balanced.num_failed == 0
    assert balanced.duration_s < 0.85 * skewed.duration_s


def test_layers_with_popularities_of_their_own_are_each_drawn_and_placed_by_it():
    arrivals = [Arrival(0.0, 4, 8)] * 24
    roomy = replace(SMALL, num_layers=2, redundant_experts=2)
    routed = build_routing("layers:2", roomy.plan.placement, roomy.top_k, most_tokens=512, seed=0, num_layers=2)
    first, second = routed.chosen()
    assert sorted(first) == pytest.approx(sorted(second), abs=0.02)
    assert first != pytest.approx(second, abs=0.1)
    placed = placed_by_popularity(roomy, SlowExperts(), "layers:2", seed=0)
    assert len(placed.placement.layers) == 2
    view, chance = routed.view(placed.placement), random.Random(1)
    for layer in (0, 1):
        draws = [(*routed.draw(512, chance, view, layer)[:1], 512, view) for _ in range(60)]
        pairs = [routed.load(node, draws, layer)[0] for node in range(placed.num_expert)]
        assert max(pairs) < 1.15 * mean(pairs), "each layer's nodes have as much to do as each other"
    before, after = (simulate(one, SlowExperts(), arrivals, popularity="layers:2") for one in (roomy, placed))
    assert (after.num_failed, before.num_failed) == (0, 0)
    assert after.duration_s < 0.9 * before.duration_s


@pytest.mark.parametrize(
    ("popularity", "sentence"),
    [
        (((1.0,) * 8,) * 3, "expert popularity is of 3 layers; give it for one, or for all "),
        ("flat", "expert popularity 'flat' is not one; give uniform, uniform-drawn, zipf, zipf:EXPONENT"),
        ("zipf:-1", "'zipf:-1' is not one"),
        ("zipf:steep", "'zipf:steep' is not one"),
        ((1.0, 2.0), "has 2 weights, 2 of them above 0; give 8 numbers"),
        ((1.0, 0, 0, 0, 0, 0, 0, 0), "at least 2 of them above 0"),
        ((1.0, 1, 1, 1, 1, 1, 1, -1), "numbers of at least 0"),
    ],
)
def test_popularity_that_cannot_be_is_refused_with_a_sentence(popularity, sentence):
    with pytest.raises(ConfigError, match=sentence):
        routing(popularity)


ZIPF = [(expert + 1) ** -1.5 for expert in range(SMALL.num_experts)]
CROSSED = [ZIPF, ZIPF[::-1]] * (SMALL.num_layers // 2)  # in sum over the layers each node has as much to do


@pytest.mark.slow
@pytest.mark.parametrize(
    ("popularity", "num_micro_batches", "missed"),
    [pytest.param("zipf:1.5", 3, 0.3, marks=only_thorough), (CROSSED, 1, 0.6)],
    ids=["layers alike", "layers crossed"],
)
def test_an_instance_that_rebalances_comes_near_to_one_that_was_placed_by_popularity(
    popularity, num_micro_batches, missed
):
    """With more micro-batches in flight what is uneven in one layer is made up for by the others."""

    class WeighedExperts:
        def attention_s(self, num_tokens, num_context_tokens):
            return 5e-3

        def pass_s(self, num_logit_rows):
            return 0.0

        def expert_s(self, num_expert_rows, num_active_experts):
            return 1e-3 * num_expert_rows + 0.5e-3 * num_active_experts

        def comm_s(self, num_bytes):
            return num_bytes * 1e-9

    arrivals = [Arrival(0.0, 4, 160 + 4 * number) for number in range(12)]
    even = replace(SMALL, redundant_experts=2, num_micro_batches=num_micro_batches)
    placed = placed_by_popularity(even, WeighedExperts(), popularity, seed=0)
    assert len(placed.placement.layers) == (1 if popularity == "zipf:1.5" else SMALL.num_layers)
    live = replace(even, rebalance=Rebalance("auto", 1.0, 0.05))
    reports = [simulate(one, WeighedExperts(), arrivals, popularity=popularity) for one in (even, placed, live)]
    assert [one.num_failed for one in reports] == [0, 0, 0]
    stays, from_the_start, moves = (one.duration_s for one in reports)
    assert from_the_start < 0.9 * stays
    assert moves < from_the_start + missed * (stays - from_the_start), (stays, from_the_start, moves)
