"""Whether experts are to move, and whereto, from what was counted and timed while they served. Pure.

Each layer is planned by its own load; where those are alike, so are the layers, since moves cost.

A plan is made from the windows before the last, and has to hold for the last as well, which it has not seen: what a
plan gains by chance it does not gain twice, so noise moves nothing. It is also held against what loading the experts
costs. Numpy is loaded when the first question is asked, in whatever thread that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msi.placement import Placement, at_layer
from msi.placement_change import ByLayer, Shared
from msi.planner.stage_costs import BatchMean

FLOOR_ROWS = 8.0  # where nothing was measured that tells
MOVE_SHARE = 0.0007  # of a node's mean cost, that an expert is to save for a node, where loading was not measured
PAYBACK = 10  # windows in which what is moved is to pay for itself


Load = tuple[tuple[float, ...], ...]  # by layer and expert


@dataclass(frozen=True, slots=True)
class Question:
    """What is known.

    Attributes:
        placement: that is used.
        nodes: that are there.
        redundancy: replicas that each expert has at least besides the first.
        slots: experts of a layer that all nodes together have room for, replicas counted.
        windows: [num_layers][num_experts] rows of a wave that choose each, of those before the last, the oldest first.
        latest: the same of the last.
        means: batches as nodes timed them.
        waves: of each layer, in a window.
        busy_s: that the node with most to do computes experts in a window.
        load_s: that an expert of one layer takes a node to load; 0 where nobody knows.
        least_gain: what gains less is not done.
    """

    placement: Placement
    nodes: tuple[int, ...]
    redundancy: int
    slots: int
    windows: tuple[Load, ...]
    latest: Load
    means: tuple[BatchMean, ...] = ()
    waves: float = 0.0
    busy_s: float = 0.0
    load_s: float = 0.0
    least_gain: float = 0.0

    @property
    def memory(self) -> list[int]:
        """[num_nodes] experts of a layer that each has room for: what there is, evenly."""
        least = self.slots // len(self.nodes) + (self.slots % len(self.nodes) > 0)
        return [least if node in self.nodes else 0 for node in range(self.placement.num_nodes)]


@dataclass(frozen=True, slots=True)
class Decision:
    """What was found, whether or not it is done.

    Attributes:
        chosen: what nodes are to hold of each layer.
        gain: of the time of the node that the others wait for, layer by layer, as a share of all layers', in the
            windows before and in the last.
        num_moved: experts of layers that nodes are to load.
        floor_rows: rows that took as long as an expert's weights take to be read.
        is_worth: whether the gain pays for loading.
    """

    chosen: ByLayer
    gain: float
    num_moved: int
    floor_rows: float
    is_worth: bool


def decide(question: Question) -> Decision:
    """The best placement that is found. Takes seconds for hundreds of experts: not for an event loop.

    Raises:
        ValueError: there is not room for every expert as often as is wanted.
    """
    from msi.planner.expert_curve import fit_curve
    from msi.planner.forecast import forecast
    from msi.planner.replicas import cost_of_layers, plan_layers

    ours, before = question, question.placement
    curve = fit_curve(ours.means)
    floor = FLOOR_ROWS if curve is None else curve.floor_rows
    layers = range(len(ours.latest))
    expected = [forecast([window[layer] for window in ours.windows]) for layer in layers]
    load = [one.load for one in expected]
    move_cost = MOVE_SHARE * _mean_cost(load, floor, before) / len(ours.nodes)
    if curve is not None and curve.row_s > 0 and ours.load_s and ours.waves:
        move_cost = ours.load_s / (curve.row_s * ours.waves * PAYBACK)
    plans = plan_layers(
        load, floor, before.num_nodes, ours.memory, before=before, move_cost=move_cost, redundancy=ours.redundancy,
        surges=[one.surge for one in expected], least_gain=ours.least_gain / 2,
    )  # fmt: skip
    planned = Placement.of_layers([plan.layer for plan in plans], before.num_experts, before.version + 1)
    gain = min(
        _gain(cost_of_layers(rows, floor, before), cost_of_layers(rows, floor, planned)) for rows in (load, ours.latest)
    )
    num_new = [
        sum(
            len(set(plan.experts[node]) - set(at_layer(before.layers, layer).experts[node]))
            for layer, plan in enumerate(plans)
        )
        for node in range(before.num_nodes)
    ]
    return Decision(
        ByLayer(tuple(Shared(tuple(map(frozenset, plan.experts)), plan.shares) for plan in plans)),
        gain, sum(plan.num_moved for plan in plans), floor,
        is_worth=gain * ours.busy_s * PAYBACK >= max(num_new) * ours.load_s,
    )  # fmt: skip


def _mean_cost(load: Sequence[Sequence[float]], floor: float, placement: Placement) -> float:
    """Of all nodes together, in the mean of the layers."""
    from msi.planner.replicas import expected_costs

    costs = [sum(expected_costs(rows, floor, placement.of_layer(layer))) for layer, rows in enumerate(load)]
    return sum(costs) / len(costs)


def _gain(before: float, after: float) -> float:
    return 1 - after / before if before > 0 else 0.0
