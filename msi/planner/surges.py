"""Replicas against surges: one expert, nobody knows which, gets far more rows than was planned. Pure.

What such an expert gets more falls on the nodes that hold it, by its shares: on one alone where it has no replica with
a share. So room that the plan has left is given to replicas that lower what the slowest node has to do in the mean of
all the experts that it may be; as long as that pays for what they cost at other times.
"""

from __future__ import annotations

import numpy as np

from msi.planner.replica_state import ReplicaState

IDLEST = 3  # nodes that may get a replica
LEAST_GAIN = 1e-3  # of the mean cost of a node, that a replica is to save


def cost_in_surges(state: ReplicaState, surge: float) -> float:
    """Of the node that the others wait for, in the mean over the experts that may get so many rows more."""
    shares = np.divide(state.rows, state.load, out=np.zeros_like(state.rows), where=state.load > 0)
    costs = state.costs[:, None] + surge * shares
    return float(costs.max(axis=0).mean())


def against_surges(state: ReplicaState, surge: float, move_cost: float, most_moves: float) -> ReplicaState:
    """The same with more replicas, and with even shares of some, where that pays."""
    if not surge:
        return state
    state = state.copy()
    least_gain = LEAST_GAIN * float(state.costs.mean())
    cost = cost_in_surges(state, surge)
    while (found := _best(state, surge, move_cost, most_moves)) is not None and found[0] < cost - least_gain:
        cost, expert, node = found
        cost -= move_cost * _is_new(state, expert, node)
        _share_evenly(state, expert, node)
    return state


def _best(state: ReplicaState, surge: float, move_cost: float, most_moves: float) -> tuple[float, int, int] | None:
    """(what it would cost with moving, expert, node for a replica more; -1: those that are there, with even shares)."""
    best, num_moved, by_cost = None, state.num_moved, np.argsort(state.costs, kind="stable")
    for expert in np.flatnonzero(state.load > 0).tolist():
        rows, cost = state.rows[:, expert].copy(), state.cost[:, expert].copy()
        free = by_cost[((state.room > 0) & ~state.held[:, expert])[by_cost]]
        for node in (*free[:IDLEST].tolist(), -1):
            if num_moved + (moves := _is_new(state, expert, node)) > most_moves:
                continue
            _share_evenly(state, expert, node)
            now = cost_in_surges(state, surge) + move_cost * moves
            if best is None or now < best[0]:
                best = now, expert, node
            if node >= 0:
                state.held[node, expert] = False
            state.rows[:, expert], state.cost[:, expert] = rows, cost
    return best


def _is_new(state: ReplicaState, expert: int, node: int) -> bool:
    """Whether a node would have to load it."""
    return node >= 0 and bool(state.was_held.any()) and not state.was_held[node, expert]


def _share_evenly(state: ReplicaState, expert: int, node: int) -> None:
    if node >= 0:
        state.held[node, expert] = True
    homes = np.flatnonzero(state.held[:, expert])
    state.give(expert, homes, np.full(len(homes), state.load[expert] / len(homes)))
