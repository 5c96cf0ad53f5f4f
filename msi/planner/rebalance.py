"""Whether experts are to move, and whereto, from what was counted and timed while they served. Pure.

A plan is made from the windows before the last, and has to hold for the last as well, which it has not seen: what a
plan gains by chance it does not gain twice, so noise moves nothing. It is also held against what loading the experts
costs. Numpy is loaded when the first question is asked, in whatever thread that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msi.planner.stage_costs import BatchMean
from msi.types import Placement

FLOOR_ROWS = 8.0  # where nothing was measured that tells
MOVE_SHARE = 0.0007  # of a node's mean cost, that an expert is to save for a node, where loading was not measured
PAYBACK = 10  # windows in which what is moved is to pay for itself


@dataclass(frozen=True, slots=True)
class Question:
    """What is known.

    Attributes:
        placement: that is used.
        nodes: that are there.
        redundancy: replicas that each expert has at least besides the first.
        slots: experts that all nodes together have room for, replicas counted.
        windows: [num_experts] rows of a wave that choose each, of those before the last, the oldest first.
        latest: the same of the last.
        means: batches as nodes timed them.
        waves: of a layer, in a window.
        busy_s: that the node with most to do computes experts in a window.
        load_s: that an expert takes a node to load; 0 where nobody knows.
    """

    placement: Placement
    nodes: tuple[int, ...]
    redundancy: int
    slots: int
    windows: tuple[tuple[float, ...], ...]
    latest: tuple[float, ...]
    means: tuple[BatchMean, ...] = ()
    waves: float = 0.0
    busy_s: float = 0.0
    load_s: float = 0.0

    @property
    def memory(self) -> list[int]:
        """[num_nodes] experts that each has room for: what there is, evenly."""
        least = self.slots // len(self.nodes) + (self.slots % len(self.nodes) > 0)
        return [least if node in self.nodes else 0 for node in range(self.placement.num_nodes)]


@dataclass(frozen=True, slots=True)
class Decision:
    """What was found, whether or not it is done.

    Attributes:
        experts: [num_nodes] that each is to hold.
        shares: as in `Placement`.
        gain: of the time of the node that the others wait for, as a share, in the windows before and in the last.
        num_moved: experts that nodes are to load.
        floor_rows: rows that took as long as an expert's weights take to be read.
        is_worth: whether the gain pays for loading.
    """

    experts: tuple[frozenset[int], ...]
    shares: tuple[tuple[int, ...], ...]
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
    from msi.planner.replicas import expected_costs, plan_replicas

    ours = question
    curve = fit_curve(ours.means)
    floor = FLOOR_ROWS if curve is None else curve.floor_rows
    expected = forecast(ours.windows)
    mean_cost = sum(expected_costs(expected.load, floor, ours.placement)) / len(ours.nodes)
    move_cost = MOVE_SHARE * mean_cost
    if curve is not None and curve.row_s > 0 and ours.load_s and ours.waves:
        move_cost = ours.load_s / (curve.row_s * ours.waves * PAYBACK)
    plan = plan_replicas(
        expected.load, floor, ours.placement.num_nodes, ours.memory, before=ours.placement, move_cost=move_cost,
        redundancy=ours.redundancy, surge=expected.surge,
    )  # fmt: skip
    planned = plan.placement(ours.placement.version + 1)
    gain = min(
        _gain(expected_costs(load, floor, ours.placement), expected_costs(load, floor, planned))
        for load in (expected.load, ours.latest)
    )
    pairs = zip(planned.experts, ours.placement.experts, strict=True)
    most_moved = max(len(set(now) - set(was)) for now, was in pairs)
    return Decision(
        tuple(frozenset(held) for held in planned.experts), planned.shares, gain, plan.num_moved, floor,
        is_worth=gain * ours.busy_s * PAYBACK >= most_moved * ours.load_s,
    )  # fmt: skip


def _gain(before: Sequence[float], after: Sequence[float]) -> float:
    return 1 - max(after) / max(before) if max(before) > 0 else 0.0
