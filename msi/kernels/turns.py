"""Whose turn it is among an expert's replicas: the arithmetic alone, on arrays of any library.

Torch computes it beside the rows, numpy in the simulator and in benchmarks; this file loads neither.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

TURNS = 60  # shares are in sixtieths: halves, thirds, quarters, fifths and sixths are exact


@dataclass(frozen=True, slots=True)
class Home:
    """A replica of an expert; `share`: of `TURNS` rows that choose the expert, by weight."""

    node: int
    local_id: int
    share: int


def homes_of(
    experts: Sequence[Sequence[int]],
    num_experts: int,
    missing: Collection[int] = (),
    shares: Sequence[Sequence[int]] = (),
) -> list[list[Home]]:
    """The replicas of each expert, by node.

    Args:
        experts: of each node, in the order of their local ids; -1 where one stands for none.
        missing: nodes whose experts are left to others, but for those that no other has.
        shares: of each expert's homes; () for even ones.
    """
    homes: list[list[Home]] = [[] for _ in range(num_experts)]
    for node, held in enumerate(experts):
        for local_id, expert in enumerate(held):
            if expert < 0:
                continue
            share = shares[expert][len(homes[expert])] if shares else 1
            homes[expert].append(Home(node, local_id, share))
    return [[home for home in of_one if home.node not in missing] or of_one for of_one in homes]


def first_homes(experts: Sequence[Sequence[int]], num_experts: int) -> tuple[tuple[int, ...], ...]:
    """Shares by which all rows of an expert go to one of its homes, and nodes get those of about as many experts.

    Each expert's weights are then read on one node for a wave, in place of on each that holds it. The first home is
    that with the lowest local id, as experts stand before replicas of others, and another where that evens nodes out.
    """
    homes = homes_of(experts, num_experts)
    first = [min(range(len(of_one)), key=lambda home: of_one[home].local_id) for of_one in homes]
    num_given = Counter(of_one[home].node for of_one, home in zip(homes, first, strict=True))
    movable: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # (expert, -home) by nodes: from, to

    def offer(expert: int) -> None:
        source = homes[expert][first[expert]].node
        for home, other in enumerate(homes[expert]):
            if other.node != source:
                heapq.heappush(movable[source, other.node], (expert, -home))

    for expert in range(num_experts):
        offer(expert)
    while True:
        best: tuple[int, int, int] | None = None
        for (source, target), heap in movable.items():
            less = num_given[target] - num_given[source]
            if less > (-2 if best is None else best[0]):
                continue
            while heap and homes[heap[0][0]][first[heap[0][0]]].node != source:
                heapq.heappop(heap)  # it is elsewhere by now
            if heap:
                best = min(best or (0, 0, 0), (less, *heap[0]))
        if best is None:
            return tuple(
                tuple(TURNS * (home == first[expert]) for home in range(len(of_one)))
                for expert, of_one in enumerate(homes)
            )
        _, expert, home = best
        num_given[homes[expert][first[expert]].node] -= 1
        num_given[homes[expert][-home].node] += 1
        first[expert] = -home
        offer(expert)


def wheel_of(shares: Sequence[int]) -> list[int]:
    """Which replica has each of `TURNS` turns: each gets its share, and they alternate as evenly as they can.

    Args:
        shares: of each replica, `TURNS` together.
    """
    assert sum(shares) == TURNS, shares
    wheel, given = [], [0] * len(shares)
    for turn in range(1, TURNS + 1):
        due = [turn * share - TURNS * has for share, has in zip(shares, given, strict=True)]
        replica = due.index(max(due))
        given[replica] += 1
        wheel.append(replica)
    return wheel


def in_turns(weights: Sequence[float]) -> list[int]:
    """Shares of `TURNS` by weights of at least 0, the largest remainders rounded up; even ones where all are 0."""
    total = sum(weights)
    exact = [TURNS * weight / total if total > 0 else TURNS / len(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (shares[index] - exact[index], index))
    for index in by_remainder[: TURNS - sum(shares)]:
        shares[index] += 1
    return shares


def whose_turn(topk_ids: Any, rows: Any, wheels: Any) -> Any:
    """The replica [num_tokens, k] of each expert of each row, counted among the expert's.

    A row has the same turn at all its experts, so those that share their nodes send it to one of them, once. Turns
    differ between neighbouring rows and between choices of experts: whichever is many, the rows spread by the shares.

    Args:
        topk_ids: int64 [num_tokens, k].
        rows: int64 [num_tokens], the number of each row in its micro-batch.
        wheels: integers [num_experts, TURNS]; see `wheel_of`.
    """
    turns = (rows + topk_ids.sum(-1)) % TURNS
    return wheels[topk_ids, turns[:, None]]
