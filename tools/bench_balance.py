#!/usr/bin/env python3
"""Replicas by popularity beside EPLB's greedy, on the same traces and with the same memory.

    tools/bench_balance.py --json tools/results/balance.json
    tools/bench_balance.py --experts 256 --nodes 32 --redundant 32 --top-k 8 --rows 1024
    tools/bench_balance.py --layers 8 --windows 6 --seeds 2

A trace is a window of waves after another, drawn from expert popularities: Zipf's alone, Zipf's that drift, or with
bursts of single experts; what is told is the mean of several. Before each window both plan by the rows that were
counted in those before, as an instance does; the first plan is free. Ours forecasts the next window from them
(`msi/planner/forecast.py`). EPLB (deepseek-ai/EPLB, without its hierarchy) gives a replica to the expert with most rows
per replica again and again, packs all to nodes of equally many by weight, and takes the rows of an expert to divide
evenly; its rows take turns here by the same rule as ours. It is given windows weighed 0.7 to 0.3, and once more, as
`eplb, ours`, the load that ours forecasts.

With `--layers`, layers have popularities of their own, and what is compared is the time of all layers, one after the
other: placed alike in all layers, by the sum of their rows, or each by its own, as an instance does it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msi.kernels.turns import homes_of, in_turns, wheel_of, whose_turn
from msi.placement import Placement, place_evenly
from msi.planner.forecast import forecast
from msi.planner.replicas import plan_layers, plan_replicas
from msi_launch.command_line import ScriptLine

Floats = NDArray[np.float64]
Held = tuple[tuple[int, ...], ...]  # of each node
TRACES = ("zipf", "drifting", "bursty")
KEPT = 0.7  # of what was counted before, window by window: for EPLB, which forecasts nothing
MOVE_COST = 0.0007  # of a node's mean cost, that an expert must save to be loaded


@dataclass(frozen=True, slots=True)
class Shape:
    """What is served: each wave has `rows` tokens with `top_k` experts each."""

    experts: int
    nodes: int
    redundant: int
    top_k: int
    rows: int
    floor_cost: float
    zipf: float

    @property
    def per_node(self) -> int:
        return (self.experts + self.redundant) // self.nodes


@dataclass(frozen=True, slots=True)
class Found:
    """Means over all waves; `experts_read` by a node, `time` of the slowest in rows, `moved` experts by window."""

    max_over_mean: float
    experts_read: float
    most_experts_read: float
    time: float
    moved: float


def main(argv: Sequence[str]) -> None:
    arguments = _parse(argv)
    shape = Shape(
        arguments.experts, arguments.nodes, arguments.redundant, arguments.top_k, arguments.rows, arguments.floor,
        arguments.zipf,
    )  # fmt: skip
    if arguments.layers:
        print(f"{'trace':9} {'unchanged':>10} {'alike':>10} {'by layer':>10} of the slowest nodes' time, {shape}")
        for trace in TRACES:
            found = np.mean([layers(shape, trace, arguments, seed) for seed in range(arguments.seeds)], axis=0)
            print(f"{trace:9} " + " ".join(f"{time:10.1f}" for time in found))
        return
    results = {
        trace: {name: asdict(mean_of(shape, trace, planner, arguments)) for name, planner in PLANNERS.items()}
        for trace in TRACES
    }
    print(f"{'trace':9} {'plan':10} {'max/mean':>9} {'read':>6} {'most':>6} {'time':>7} {'moved':>6}")
    for trace, by_planner in results.items():
        for name, one in by_planner.items():
            print(
                f"{trace:9} {name:10} {one['max_over_mean']:9.3f} {one['experts_read']:6.2f} "
                f"{one['most_experts_read']:6.2f} {one['time']:7.1f} {one['moved']:6.2f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"shape": asdict(shape), "results": results}, indent=1) + "\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    add = parser.add_argument
    add("--experts", type=int, default=64)
    add("--nodes", type=int, default=8)
    add("--redundant", type=int, default=16, help="replicas that all nodes together have room for; 16")
    add("--top-k", type=int, default=4)
    add("--rows", type=int, default=256, help="tokens of a wave; 256")
    add("--floor", type=float, default=8.0, help="rows that take as long as an expert's weights; 8")
    add("--zipf", type=float, default=1.2)
    add("--windows", type=int, default=20)
    add("--waves", type=int, default=40, help="of a window; 40")
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=5, help="traces of each kind, from --seed on, whose mean is told; 5")
    add("--layers", type=int, default=0, help="that have popularities of their own")
    add("--json", type=Path)
    values: argparse.Namespace = parser.parse_args(argv)
    return values


# -- traces ------------------------------------------------------------------------------------------------------------


def popularities(shape: Shape, trace: str, windows: int, chance: np.random.Generator) -> Iterator[Floats]:
    """Of experts, window by window."""
    weights = (np.arange(shape.experts) + 1.0) ** -shape.zipf
    ranks = chance.permutation(shape.experts)
    for _ in range(windows):
        now = weights[ranks]
        if trace == "bursty":
            now = now.copy()
            now[chance.integers(shape.experts)] += 0.25 * now.sum()
        yield now / now.sum()
        if trace == "drifting":
            for one in chance.integers(shape.experts - 1, size=shape.experts // 8):
                ranks[[one, one + 1]] = ranks[[one + 1, one]]


def wave(shape: Shape, popularity: Floats, chance: np.random.Generator) -> NDArray[np.int64]:
    """topk_ids [rows, top_k]: different experts for each row, one after another by their weight."""
    noisy = np.log(popularity) + chance.gumbel(size=(shape.rows, shape.experts))
    return np.argpartition(-noisy, shape.top_k - 1, axis=1)[:, : shape.top_k]


# -- planners ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """`slots`: experts by node as they lie there, where one may be twice; `nodes` [expert, turn]: who has each turn."""

    placement: Placement | None
    slots: Held
    nodes: NDArray[np.int64]

    @staticmethod
    def of(slots: Held, num_experts: int, placement: Placement | None = None) -> Planned:
        shares = () if placement is None else placement.shares
        homes = homes_of(slots, num_experts, shares=shares)
        wheels = [wheel_of(in_turns([home.share for home in of_one])) for of_one in homes]
        nodes = [[of_one[turn].node for turn in wheel] for of_one, wheel in zip(homes, wheels, strict=True)]
        return Planned(placement, slots, np.array(nodes))


Plan = Callable[[Shape, Sequence[Floats], Planned | None], Planned]  # of the rows of a wave, window by window


def weighed(windows: Sequence[Floats]) -> Floats:
    """The older the less."""
    load = windows[0]
    for window in windows[1:]:
        load = KEPT * load + (1 - KEPT) * window
    return load


def ours(shape: Shape, windows: Sequence[Floats], before: Planned | None) -> Planned:
    expected = forecast(windows)
    was = place_evenly(shape.experts, shape.nodes) if before is None else before.placement
    move_cost = 0.0 if before is None else MOVE_COST * sum(expected.load) / shape.nodes
    plan = plan_replicas(
        expected.load, shape.floor_cost, shape.nodes, [shape.per_node] * shape.nodes, before=was, move_cost=move_cost,
        surge=expected.surge,
    )  # fmt: skip
    return Planned.of(plan.experts, shape.experts, plan.placement(1))


def ours_by_layer(shape: Shape, windows: Sequence[Sequence[Floats]], before: Placement | None) -> Placement:
    """By the rows of a wave of each layer, window by window."""
    expected = [forecast(of_layer) for of_layer in windows]
    was = before or place_evenly(shape.experts, shape.nodes)
    mean_rows = sum(sum(one.load) for one in expected) / len(expected)
    plans = plan_layers(
        [one.load for one in expected], shape.floor_cost, shape.nodes, [shape.per_node] * shape.nodes, before=was,
        move_cost=0.0 if before is None else MOVE_COST * mean_rows / shape.nodes,
        surges=[one.surge for one in expected],
    )  # fmt: skip
    return Placement.of_layers([plan.layer for plan in plans], shape.experts, was.version + 1)


def eplb(shape: Shape, windows: Sequence[Floats], before: Planned | None) -> Planned:
    return eplb_of(shape, weighed(windows))


def eplb_with_ours(shape: Shape, windows: Sequence[Floats], before: Planned | None) -> Planned:
    """With what ours forecasts."""
    return eplb_of(shape, np.asarray(forecast(windows).load, np.float64))


def eplb_of(shape: Shape, load: Floats) -> Planned:
    """EPLB's greedy: replicate, then pack."""
    num_slots = shape.per_node * shape.nodes
    counts = np.ones(shape.experts)
    experts = [*range(shape.experts)]
    for _ in range(num_slots - shape.experts):
        hottest = int(np.argmax(load / counts))
        counts[hottest] += 1
        experts.append(hottest)
    weights = load[experts] / counts[experts]
    packs: list[list[int]] = [[] for _ in range(shape.nodes)]
    heavy = np.zeros(shape.nodes)
    for slot in np.argsort(-weights, kind="stable"):
        free = [node for node in range(shape.nodes) if len(packs[node]) < shape.per_node]
        node = min(free, key=lambda node: heavy[node])
        packs[node].append(experts[slot])
        heavy[node] += weights[slot]
    return Planned.of(tuple(map(tuple, packs)), shape.experts)


def unchanged(shape: Shape, windows: Sequence[Floats], before: Planned | None) -> Planned:
    """Experts one after the other, without replicas."""
    placement = place_evenly(shape.experts, shape.nodes)
    return Planned.of(placement.experts, shape.experts, placement)


PLANNERS: dict[str, Plan] = {"ours": ours, "eplb": eplb, "eplb, ours": eplb_with_ours, "unchanged": unchanged}


# -- measuring ---------------------------------------------------------------------------------------------------------


def mean_of(shape: Shape, trace: str, planner: Plan, arguments: argparse.Namespace) -> Found:
    """Over traces that are drawn anew."""
    found = [
        measure(shape, trace, planner, arguments.windows, arguments.waves, arguments.seed + number)
        for number in range(arguments.seeds)
    ]
    return Found(*np.mean([astuple(one) for one in found], axis=0).tolist())


def measure(shape: Shape, trace: str, planner: Plan, windows: int, waves: int, seed: int) -> Found:
    chance = np.random.default_rng(seed)
    loads: list[Floats] = []
    planned: Planned | None = None
    figures, moved = [], []
    for popularity in popularities(shape, trace, windows + 1, chance):
        if loads:
            before, planned = planned, planner(shape, loads, planned)
            if before is not None:
                moved.append(num_moved(before.slots, planned.slots))
        counts = np.zeros(shape.experts)
        for _ in range(waves):
            topk_ids = wave(shape, popularity, chance)
            counts += np.bincount(topk_ids.ravel(), minlength=shape.experts)
            if planned is not None:
                figures.append(of_wave(shape, planned, topk_ids))
        loads.append(counts / waves)
    of_waves: list[float] = np.mean(figures, axis=0).tolist()
    max_over_mean, read, most_read, time = of_waves
    return Found(max_over_mean, read, most_read, time, float(np.mean(moved)))


def layers(shape: Shape, trace: str, arguments: argparse.Namespace, seed: int) -> tuple[float, float, float]:
    """Time of a pass in rows, at the mean: experts where they are without replicas, placed alike, placed by layer."""
    num_layers, chance = arguments.layers, np.random.default_rng(seed)
    traces = [popularities(shape, trace, arguments.windows + 1, chance) for _ in range(num_layers)]
    loads: list[list[Floats]] = [[] for _ in range(num_layers)]
    alike: Planned | None = None
    placement: Placement | None = None
    by_layer: list[Planned | None] = [None] * num_layers
    first, times = unchanged(shape, [], None), []
    for of_layers in zip(*traces, strict=True):
        if loads[0]:
            alike = ours(shape, [np.mean(one, axis=0) for one in zip(*loads, strict=True)], alike)
            placement = ours_by_layer(shape, loads, placement)
            layers_now = [placement.of_layer(layer) for layer in range(num_layers)]
            by_layer = [Planned.of(one.experts, shape.experts, one) for one in layers_now]
        counts = np.zeros((num_layers, shape.experts))
        for _ in range(arguments.waves):
            spent = np.zeros(3)
            for layer, popularity in enumerate(of_layers):
                topk_ids = wave(shape, popularity, chance)
                counts[layer] += np.bincount(topk_ids.ravel(), minlength=shape.experts)
                spent += [
                    0.0 if planned is None else of_wave(shape, planned, topk_ids)[3]
                    for planned in (first, alike, by_layer[layer])
                ]
            if alike is not None:
                times.append(spent)
        for one, count in zip(loads, counts, strict=True):
            one.append(count / arguments.waves)
    mean: list[float] = np.mean(times, axis=0).tolist()
    return mean[0], mean[1], mean[2]


def num_moved(before: Held, after: Held) -> int:
    return sum(len(set(now) - set(was)) for was, now in zip(before, after, strict=True))


def of_wave(shape: Shape, planned: Planned, topk_ids: NDArray[np.int64]) -> tuple[float, float, float, float]:
    """Largest over mean rows of nodes; experts read by a node, at the mean and by the one with most; time in rows."""
    node_of = whose_turn(topk_ids, np.arange(len(topk_ids)), planned.nodes)
    rows = np.zeros((shape.nodes, shape.experts))
    np.add.at(rows, (node_of.ravel(), topk_ids.ravel()), 1.0)
    by_node, read = rows.sum(axis=1), (rows > 0).sum(axis=1)
    time = np.where(rows > 0, np.maximum(rows, shape.floor_cost), 0.0).sum(axis=1)
    return float(by_node.max() / by_node.mean()), float(read.mean()), float(read.max()), float(time.max())


if __name__ == "__main__":
    main(sys.argv[1:])
