"""Replicas and places of one layer's experts by what they cost: `plan_replicas`. Pure.

A node's time for a wave is the sum over the experts that the wave hits there of max(rows, floor): an expert with few
rows takes as long as its weights take to be read, and one that no row chose takes nothing. To that comes what the rows'
way costs (`wave_cost`). Loads are in rows of a wave, costs in rows too. Knows no weights, workers or time.

The search goes downhill from what is there: the step that lowers the nodes' costs most for the experts it loads, moving
one, swapping two, giving one a replica or taking one away, until none pays. What is found is never worse than what was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msi.kernels.turns import TURNS, in_turns
from msi.placement import LayerExperts, Placement
from msi.planner.replica_state import ReplicaState, norm, wave_cost
from msi.planner.surges import against_surges, cost_in_surges

HEAVIEST = 3  # nodes that a step may relieve
MOST_STEPS = 2000
LEAST_GAIN = 1e-6  # of the mean cost


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """Which nodes hold which experts of a layer, and what of their rows goes where.

    Attributes:
        experts: [num_nodes]; those that stay keep their order, new ones are behind them.
        shares: [num_experts] of rows that choose an expert, how many of `TURNS` go to each of its nodes, by number.
        costs: [num_nodes], expected of a wave.
        num_moved: experts that nodes hold and did not hold before.
    """

    experts: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    num_moved: int

    @property
    def cost(self) -> float:
        """Of the node that the others wait for."""
        return max(self.costs)

    @property
    def layer(self) -> LayerExperts:
        return LayerExperts(self.experts, self.shares)

    def placement(self, version: int) -> Placement:
        """For all layers alike."""
        return Placement(self.experts, len(self.shares), version, self.shares)


def expected_costs(load: Sequence[float], floor_cost: float, placement: Placement) -> tuple[float, ...]:
    """[num_nodes], of a wave under the placement of a layer."""
    state = ReplicaState.of(load, floor_cost, [len(held) for held in placement.experts], placement)
    return tuple(state.costs.tolist())


def plan_replicas(
    load: Sequence[float],
    floor_cost: float,
    nodes: int,
    memory: Sequence[int],
    *,
    before: Placement | None = None,
    move_cost: float = 0.0,
    most_moves: int | None = None,
    redundancy: int = 0,
    surge: float = 0.0,
) -> ReplicaPlan:
    """Places of experts and of as many replicas as pay, so that the node with most to do has the least.

    Args:
        load: [num_experts], rows of a wave that choose each.
        floor_cost: rows that take as long as an expert's weights take to be read.
        nodes: how many there are.
        memory: [nodes], experts that each has room for; never more of them are placed there.
        before: what is there; without it loading costs nothing.
        move_cost: what an expert must save of a wave's cost for a node to load it.
        most_moves: experts that nodes may load at most.
        redundancy: replicas that each expert has at least besides the first, on other nodes.
        surge: rows of a wave that some expert may get more than its load, nobody knows which.

    Raises:
        ValueError: there is not room for every expert and that many replicas, each on a node of its own.
    """
    _check(load, floor_cost, nodes, memory, redundancy)
    state = (
        ReplicaState.of(load, floor_cost, memory, before) if before else ReplicaState.empty(load, floor_cost, memory)
    )
    state.place_missing(1 + redundancy)
    state.even_out()
    state = min(state, state.gathered(), key=lambda one: norm(one.costs))
    search = _Search(state, 1 + redundancy, move_cost, most_moves)
    found = against_surges(search.downhill(), surge, move_cost, search.most_moves)
    _round_shares(found)
    if before is not None:
        stay = ReplicaState.of(load, floor_cost, memory, before)
        if (
            stay.has_all(1 + redundancy)
            and cost_in_surges(stay, surge) <= cost_in_surges(found, surge) + move_cost * found.num_moved
        ):
            found = stay
    return _planned(found, before)


def place_by_popularity(
    chosen: Sequence[Sequence[float]], floor_cost: float, before: Placement, redundancy: int
) -> Placement:
    """Places and shares at the start, when loading costs nothing: as many replicas on each node as `before` has.

    Args:
        chosen: [num_experts], rows of a wave that choose each, in all layers alike or in each; all alike where nothing
            is known.
    """
    memory = [before.num_held_by(node) for node in range(before.num_nodes)]
    plans = plan_layers(chosen, floor_cost, before.num_nodes, memory, before=before, redundancy=redundancy)
    return Placement.of_layers([plan.layer for plan in plans], before.num_experts, before.version)


def plan_layers(
    load: Sequence[Sequence[float]],
    floor_cost: float,
    nodes: int,
    memory: Sequence[int],
    *,
    before: Placement | None = None,
    move_cost: float = 0.0,
    redundancy: int = 0,
    surges: Sequence[float] = (),
    least_gain: float = 0.0,
) -> list[ReplicaPlan]:
    """`plan_replicas` for each layer's load [num_layers, num_experts].

    Args:
        memory: [nodes], experts of each layer that a node has room for. A GPU's bank has as many places in every layer,
            so that what one layer left free would be of no use to another.
        surges: of each layer.
        least_gain: a layer whose cost no plan can lower by more than this share of it stays as it is: looking takes
            long.
    """
    plans = []
    for layer, of_layer in enumerate(load):
        was = None if before is None else before.of_layer(layer)
        if was is not None and least_gain and most_gain(of_layer, floor_cost, was, memory) <= least_gain:
            stay = ReplicaState.of(of_layer, floor_cost, memory, was)
            if stay.has_all(1 + redundancy):
                plans.append(_planned(stay, was))
                continue
        surge = surges[layer] if surges else 0.0
        plans.append(
            plan_replicas(
                of_layer, floor_cost, nodes, memory, before=was, move_cost=move_cost, redundancy=redundancy, surge=surge
            )
        )
    return plans


def most_gain(load: Sequence[float], floor_cost: float, placement: Placement, memory: Sequence[int]) -> float:
    """Of a layer's cost, the share that no plan for nodes with memory saves more than.

    Whatever is placed where, all nodes together have at least each expert's cost on one node alone.
    """
    cost = max(expected_costs(load, floor_cost, placement))
    least = float(wave_cost(np.asarray(load, np.float64), floor_cost).sum()) / sum(room > 0 for room in memory)
    return 1 - least / cost if cost > 0 else 0.0


def cost_of_layers(load: Sequence[Sequence[float]], floor_cost: float, placement: Placement) -> float:
    """Of the node that the others wait for, in each layer by its load, one layer after the other."""
    return sum(
        max(expected_costs(of_layer, floor_cost, placement.of_layer(layer))) for layer, of_layer in enumerate(load)
    )


def _check(load: Sequence[float], floor_cost: float, nodes: int, memory: Sequence[int], redundancy: int) -> None:
    if len(memory) != nodes or min(memory, default=0) < 0:
        raise ValueError(f"memory is of {len(memory)} nodes, {nodes} are there; say how many experts each has room for")
    if not all(0 <= rows < np.inf for rows in (*load, floor_cost)):
        raise ValueError("a load or cost is not a number of at least 0")
    usable = sum(min(room, len(load)) for room in memory)
    wanted, able = len(load) * (1 + redundancy), sum(room > 0 for room in memory)
    if wanted > usable or redundancy >= able:
        raise ValueError(
            f"{len(load)} experts {1 + redundancy} times on as many nodes each need room for {wanted}; {able} nodes "
            f"have room for {usable}"
        )


def _round_shares(state: ReplicaState) -> list[tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """To whole turns, which cost a little more or less; each expert's homes, and their turns."""
    found = []
    for expert in range(len(state.load)):
        homes = np.flatnonzero(state.held[:, expert])
        turns = np.asarray(in_turns(state.rows[homes, expert].tolist()), np.float64)
        if state.load[expert] == 0:
            turns = TURNS * (np.arange(len(homes)) == 0).astype(np.float64)
        state.give(expert, homes, state.load[expert] * turns / TURNS)
        found.append((homes, turns))
    return found


def _planned(state: ReplicaState, before: Placement | None) -> ReplicaPlan:
    """With shares as whole turns, and what those cost."""
    for expert, (homes, turns) in enumerate(_round_shares(state)):
        state.rows[:, expert] = 0.0
        state.rows[homes, expert] = turns  # from here on
    experts = []
    for node, held in enumerate(state.held):
        stay = [expert for expert in (before.held_by(node) if before else ()) if held[expert]]
        experts.append((*stay, *(expert for expert in np.flatnonzero(held).tolist() if expert not in set(stay))))
    shares = tuple(
        tuple(int(turns) for turns in state.rows[state.held[:, expert], expert]) for expert in range(len(state.load))
    )
    return ReplicaPlan(tuple(experts), shares, tuple(state.costs.tolist()), state.num_moved)


@dataclass(frozen=True, slots=True)
class _Step:
    """`expert` comes to `target`, from `node` (-1: as a replica more), and `back` (-1: none) goes from there.

    It goes to `node`; where that is -1, to `aside`, or away as a replica that others make up for.
    """

    expert: int
    node: int
    target: int
    back: int = -1
    aside: int = -1


class _Search:
    """From one state downhill, step by step."""

    def __init__(self, state: ReplicaState, copies: int, move_cost: float, most_moves: int | None) -> None:
        self._state = state
        self._copies = copies
        self._move_cost = move_cost
        self.most_moves = np.inf if most_moves is None else max(most_moves, state.num_moved)

    def downhill(self) -> ReplicaState:
        state, worth = self._state, self._worth(self._state)
        best, least = state, self._total(state)
        for _ in range(MOST_STEPS):
            found = None
            for step in self._steps(state):
                after = self._after(state, step)
                if after.num_moved <= self.most_moves and (now := self._worth(after)) < worth - self._least_gain:
                    found, worth = after, now
                    break
            if found is None:
                break
            state = found
            if (total := self._total(state)) < least:
                best, least = state, total
        return best

    @property
    def _least_gain(self) -> float:
        return LEAST_GAIN * float(self._state.costs.mean())

    def _worth(self, state: ReplicaState) -> float:
        return norm(state.costs) + self._move_cost * state.num_moved

    def _total(self, state: ReplicaState) -> float:
        return float(state.costs.max()) + self._move_cost * state.num_moved

    def _after(self, state: ReplicaState, step: _Step) -> ReplicaState:
        after = state.copy()
        if step.node < 0:
            if step.aside >= 0:
                after.move(step.back, step.target, step.aside)
            elif step.back >= 0:
                after.drop(step.target, step.back)
            after.held[step.target, step.expert] = True
            after.spread(step.expert)
        else:
            after.move(step.expert, step.node, step.target)
            if step.back >= 0:
                after.move(step.back, step.target, step.node)
        if (after.held.sum(axis=0) > 1).any():
            after.even_out(rounds=1)
        return after

    def _steps(self, state: ReplicaState) -> Iterator[_Step]:
        """Those that relieve the heaviest nodes, by what they promise, the best first."""
        for node in np.argsort(-state.costs, kind="stable")[:HEAVIEST]:
            promised = sorted(
                (*self._moves(state, int(node)), *self._replicas(state, int(node))), key=lambda pair: pair[0]
            )
            yield from (step for _, step in promised[:8])

    def _moves(self, state: ReplicaState, node: int) -> list[tuple[float, _Step]]:
        """Each other node's best move or swap with this one: (the larger cost of the two after it, step)."""
        costs, found = state.costs, []
        own = np.flatnonzero(state.held[node] & (state.rows[node] > 0))
        for target in np.flatnonzero((costs < costs[node]) & (state.memory > 0)):
            mine = own[~state.held[target, own]]
            theirs = np.flatnonzero(state.held[target] & ~state.held[node])
            if not len(mine):
                continue
            gone = state.cost[node, mine][:, None]
            come = state.cost[target, theirs][None, :]
            if state.room[target] > 0:  # as well without anything in return
                theirs, come = np.append(theirs, -1), np.append(come, [[0.0]], axis=1)
            if not len(theirs):
                continue
            after = np.maximum(costs[node] - gone + come, costs[target] + gone - come)
            at = np.unravel_index(int(after.argmin()), after.shape)
            step = _Step(int(mine[at[0]]), node, int(target), int(theirs[at[1]]))
            found.append((float(after[at]), step))
        return found

    def _replicas(self, state: ReplicaState, node: int) -> list[tuple[float, _Step]]:
        """The node's heaviest experts as replicas elsewhere, in place of the least useful where there is no room."""
        costs, found = state.costs, []
        own = np.flatnonzero(state.held[node])
        for expert in own[np.argsort(-state.rows[node, own], kind="stable")][:3]:
            for target in np.flatnonzero((costs < costs[node]) & (state.memory > 0) & ~state.held[:, expert]):
                room = (-1, -1) if state.room[target] > 0 else self._room_made(state, int(target))
                if room is not None:
                    half = (costs[node] + costs[target]) / 2
                    least = costs[node] - state.cost[node, expert]
                    found.append((float(max(half, least)), _Step(int(expert), -1, int(target), *room)))
        return found

    def _room_made(self, state: ReplicaState, target: int) -> tuple[int, int] | None:
        """Of a full node, the expert that goes, and whereto (-1: it has replicas enough without)."""
        held = np.flatnonzero(state.held[target])
        spare = held[state.held[:, held].sum(axis=0) > self._copies]
        if len(spare):
            return int(spare[np.argmin(state.rows[target, spare])]), -1
        for expert in held[np.argsort(state.cost[target, held], kind="stable")][:3]:
            free = np.flatnonzero((state.room > 0) & ~state.held[:, expert])
            if len(free):
                return int(expert), int(free[np.argmin(state.costs[free])])
        return None
