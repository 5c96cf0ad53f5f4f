"""Where a layer's experts are, what of their rows goes where, and what that costs, while a plan is looked for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from msi.kernels.turns import homes_of
from msi.placement import Placement

WAY = 2.0  # what the way of a row costs, there and back, in rows computed: nodes are to be even in rows as well
NORM = 12  # of the nodes' costs that the search lowers: near their largest, and it tells two heavy nodes from one
Floats = NDArray[np.float64]


def wave_cost(rows: Floats, floor_cost: float) -> Floats:
    """Expected cost of experts that get so many rows of a wave at the mean, rows coming independently.

    An expert is hit with probability 1 - exp(-rows), and is then computed for its rows, or for `floor_cost` where that
    is more; and rows have their way. In rows: as many as `floor_cost` or more cost themselves.
    """
    computing = np.maximum(rows, floor_cost * -np.expm1(-rows))
    return (computing + WAY * rows) / (1 + WAY)


@dataclass(slots=True)
class ReplicaState:
    """Where experts are, changing. `rows` [nodes, experts] go to nodes that hold them (`held`), `cost` is of those."""

    load: Floats
    floor_cost: float
    memory: NDArray[np.int64]
    was_held: NDArray[np.bool_]
    held: NDArray[np.bool_]
    rows: Floats
    cost: Floats

    @staticmethod
    def empty(load: Sequence[float], floor_cost: float, memory: Sequence[int]) -> ReplicaState:
        shape = (len(memory), len(load))
        nothing = np.zeros(shape, bool)
        return ReplicaState(
            np.asarray(load, np.float64), floor_cost, np.asarray(memory), nothing, nothing.copy(), np.zeros(shape),
            np.zeros(shape),
        )  # fmt: skip

    @staticmethod
    def of(load: Sequence[float], floor_cost: float, memory: Sequence[int], before: Placement) -> ReplicaState:
        """What is there; of nodes with less room than they hold, what has most rows."""
        state = ReplicaState.empty(load, floor_cost, memory)
        for expert, its_homes in enumerate(homes_of(before.experts, len(load), shares=before.shares)):
            for home in its_homes:
                state.held[home.node, expert], state.rows[home.node, expert] = True, home.share
        state.was_held[:] = state.held
        for node, room in enumerate(state.memory):
            of_node = np.where(state.held[node], state.load, -1.0)  # also before what it lacks and nobody asks for
            state.held[node, np.argsort(-of_node, kind="stable")[room:]] = False
        for expert in range(len(load)):
            homes = np.flatnonzero(state.held[:, expert])
            shares = state.rows[homes, expert]
            state.rows[:, expert] = 0.0
            if len(homes):
                even = shares if shares.sum() > 0 else np.ones(len(homes))
                state.rows[homes, expert] = state.load[expert] * even / even.sum()
        state.cost = wave_cost(state.rows, floor_cost)
        return state

    def has_all(self, copies: int) -> bool:
        """Whether there is room for all that was there, and every expert is on so many nodes."""
        return bool((self.held.sum(axis=0) >= copies).all() and (self.held == self.was_held).all())

    def copy(self) -> ReplicaState:
        return replace(self, held=self.held.copy(), rows=self.rows.copy(), cost=self.cost.copy())

    @property
    def costs(self) -> Floats:
        total: Floats = self.cost.sum(axis=1)
        return total

    @property
    def room(self) -> NDArray[np.int64]:
        left: NDArray[np.int64] = self.memory - self.held.sum(axis=1)
        return left

    @property
    def num_moved(self) -> int:
        return int((self.held & ~self.was_held).sum()) if self.was_held.any() else 0

    def give(self, expert: int, homes: NDArray[np.int64], rows: Floats) -> None:
        """These rows of an expert go to these of its homes, and no others."""
        self.rows[:, expert] = 0.0
        self.rows[homes, expert] = rows
        self.cost[:, expert] = wave_cost(self.rows[:, expert], self.floor_cost)

    def spread(self, expert: int) -> None:
        """The rows of an expert go to its homes so that their costs even out; to few, where more would cost more."""
        homes = np.flatnonzero(self.held[:, expert])
        others = self.costs[homes] - self.cost[homes, expert]
        self.give(expert, homes, _spread(float(self.load[expert]), others, self.floor_cost))

    def place_missing(self, copies: int) -> None:
        """Experts with fewer replicas get them, the heaviest first, on the nodes with least to do that have room.

        Nodes that would be left without the room for what must still come are avoided, so that all find a place.
        """
        for number in range(copies):
            lacking = np.flatnonzero(self.held.sum(axis=0) <= number)
            for expert in lacking[np.argsort(-self.load[lacking], kind="stable")]:
                free = self.room * ~self.held[:, expert] > 0
                if not free.any():
                    self._make_room(int(expert), copies)
                    free = self.room * ~self.held[:, expert] > 0
                costs, held, room = self.costs, self.held.sum(axis=1), self.room
                keys = (costs, held, -room) if number == 0 else (-room, costs)
                node = min(np.flatnonzero(free), key=lambda node, keys=keys: [key[node] for key in keys])  # type: ignore
                self.held[node, expert] = True
                if number == 0:
                    self.give(int(expert), np.array([node]), self.load[[expert]])

    def _make_room(self, expert: int, copies: int) -> None:
        """On a node without this expert: a replica more than wanted goes, or an expert moves to where there is room."""
        num_copies, room = self.held.sum(axis=0), self.room
        for node in np.argsort(self.costs, kind="stable"):
            if self.memory[node] and not self.held[node, expert]:
                spare = np.flatnonzero(self.held[node] & (num_copies > copies))
                if len(spare):
                    self.drop(int(node), int(spare[np.argmin(self.rows[node, spare])]))
                    return
        for node in np.argsort(self.costs, kind="stable"):
            if not self.memory[node] or self.held[node, expert]:
                continue
            for target in np.flatnonzero(room > 0):
                movable = np.flatnonzero(self.held[node] & ~self.held[target])
                if len(movable):
                    self.move(int(movable[np.argmin(self.rows[node, movable])]), int(node), int(target))
                    return
        raise ValueError(f"no node can make room for expert {expert}; give nodes more of it")

    def drop(self, node: int, expert: int) -> None:
        """A replica goes; its rows go to the others."""
        self.held[node, expert] = False
        self.spread(expert)

    def move(self, expert: int, node: int, target: int) -> None:
        self.held[node, expert], self.held[target, expert] = False, True
        self.rows[target, expert], self.rows[node, expert] = self.rows[node, expert], 0.0
        self.cost[target, expert], self.cost[node, expert] = self.cost[node, expert], 0.0

    def gathered(self) -> ReplicaState:
        """The same places, with each expert's rows on one of its nodes, then spread where that lowers the largest."""
        state = self.copy()
        state.rows[:], state.cost[:] = 0.0, 0.0
        for expert in np.argsort(-state.load, kind="stable"):
            homes = np.flatnonzero(state.held[:, expert])
            node = homes[np.argmin(state.costs[homes])]
            state.give(int(expert), np.array([node]), state.load[[expert]])
        state.even_out()
        return state

    def even_out(self, rounds: int = 2) -> None:
        """Experts with replicas are spread anew, one after another, where that lowers the largest costs."""
        several = np.flatnonzero(self.held.sum(axis=0) > 1)
        for expert in [*several[np.argsort(-self.load[several], kind="stable")]] * rounds:
            rows, before = self.rows[:, expert].copy(), norm(self.costs)
            self.spread(int(expert))
            if norm(self.costs) > before:
                self.give(int(expert), np.arange(len(rows)), rows)


def _spread(load: float, others: Floats, floor_cost: float) -> Floats:
    """Rows of an expert to each of its homes, whose other experts cost `others`."""
    order = np.argsort(others, kind="stable")
    found, least = np.zeros(len(others)), np.inf
    for number in range(1, len(others) + 1):
        used = order[:number]
        level = (load + others[used].sum()) / number  # Eq: sum of (level - others) over the homes used is the load
        rows = np.zeros(len(others))
        rows[used] = level - others[used]
        if rows.min() < 0:
            break
        worth = norm(others + wave_cost(rows, floor_cost))
        if worth < least * (1 - 1e-12):
            found, least = rows, worth
    return found


def norm(costs: Floats) -> float:
    most = float(costs.max(initial=0.0))
    return most * float(((costs / most) ** NORM).sum()) ** (1 / NORM) if most > 0 else 0.0
