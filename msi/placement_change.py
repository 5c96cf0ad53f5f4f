"""From one placement to the next while rows are on their way: which local ids experts get, who holds what. Pure.

    v        every row names experts by the local ids of v
    v, v+1   expert nodes hold the experts of both, and take rows of both: no local id means two experts
    v+1      attention workers have nothing of v on its way any more; the nodes drop what v+1 does not have

So an expert that stays keeps its local id, and the id of one that leaves stands for none in v+1: it is a `HOLE`, which
only v+2 may give away.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, replace

from msi.errors import ConfigError
from msi.kernels.turns import first_homes
from msi.types import HOLE, Placement

Held = tuple[int, ...]  # experts by local id
Wanted = Sequence[Set[int]]  # the experts of each node


@dataclass(frozen=True, slots=True)
class Shared:
    """What nodes are to hold, and what of each expert's rows goes to which of them; see `Placement.shares`."""

    experts: Wanted
    shares: tuple[tuple[int, ...], ...]


def changed(placement: Placement, chosen: Wanted | Shared, version: int = 0) -> Placement:
    """The placement after this one in which each node holds what is wanted of it: nobody's local id is another's.

    Args:
        chosen: [num_nodes] experts of each node; without shares, all rows of an expert go to one of its nodes, see
            `msi.kernels.turns.first_homes`.
        version: of the new one; by default the next.

    Raises:
        ConfigError: of other nodes, with an expert that there is not, or without one that there is.
    """
    wanted, shares = (chosen.experts, chosen.shares) if isinstance(chosen, Shared) else (chosen, ())
    if len(wanted) != placement.num_nodes:
        raise ConfigError(
            f"a placement of {len(wanted)} nodes cannot follow one of {placement.num_nodes}; name every node, also "
            f"those that hold nothing"
        )
    named = {expert for experts in wanted for expert in experts}
    if named != set(range(placement.num_experts)):
        odd = sorted(named ^ set(range(placement.num_experts)))
        raise ConfigError(f"each of the {placement.num_experts} experts is on a node, and no other; look at {odd[:8]}")
    nodes = zip(placement.experts, wanted, strict=True)
    held = tuple(_placed(before, set(experts)) for before, experts in nodes)
    if not shares and sum(map(len, wanted)) > placement.num_experts:
        shares = first_homes(held, placement.num_experts)
    return Placement(held, placement.num_experts, version or placement.version + 1, shares)


def _placed(before: Held, wanted: set[int]) -> Held:
    """Those that stay keep their ids; the others get ids that stand for none in `before`."""
    new = sorted(wanted - set(before), reverse=True)
    held = [expert if expert in wanted else HOLE for expert in before]
    for local, expert in enumerate(before):
        if expert == HOLE and new:
            held[local] = new.pop()
    held += reversed(new)
    while held and held[-1] == HOLE:
        held.pop()
    return tuple(held)


def merged(held: Held, also: Held) -> Held:
    """What a node holds that takes rows of two placements. See `changed`."""
    length = max(len(held), len(also))
    pairs = zip(held + (HOLE,) * (length - len(held)), also + (HOLE,) * (length - len(also)), strict=True)
    both = tuple(_one_of(*pair) for pair in pairs)
    known = [expert for expert in both if expert != HOLE]
    assert len(set(known)) == len(known), f"{held} and {also} have an expert by two local ids"
    return both


def _one_of(expert: int, other: int) -> int:
    assert HOLE in (expert, other) or expert == other, f"a local id means experts {expert} and {other}"
    return max(expert, other)


def padded(placement: Placement, num_nodes: int) -> Placement:
    """The same with places for nodes that may come."""
    missing = num_nodes - placement.num_nodes
    assert missing >= 0, f"{placement} has more than {num_nodes} nodes"
    return replace(placement, experts=placement.experts + ((),) * missing)


# -- who holds what ----------------------------------------------------------------------------------------------------


def lost_experts(placement: Placement, nodes: Collection[int]) -> list[int]:
    """Those that none of these nodes holds."""
    there = {expert for node in nodes for expert in placement.held_by(node)}
    return [expert for expert in range(placement.num_experts) if expert not in there]


def scarce_experts(placement: Placement, nodes: Collection[int], copies: Sequence[int]) -> list[int]:
    """Those that are on fewer of these nodes than `copies` says, or than there are."""
    on = [len(set(placement.nodes_of(expert)) & set(nodes)) for expert in range(placement.num_experts)]
    return [expert for expert, wanted in enumerate(copies) if on[expert] < min(wanted, len(nodes))]


def with_node(placement: Placement, node: int, nodes: Collection[int], copies: Sequence[int] = ()) -> list[set[int]]:
    """`node` gets as many experts as the others then have, from those of `nodes` that hold most; nothing else moves.

    An expert that has replicas moves, too: no node gets one that it has, and none is on fewer nodes than before.

    Args:
        copies: of each expert, on how many nodes it is to be: where it is on fewer of `nodes`, `node` gets one more.
    """
    held = _sets(placement)
    held[node] |= {
        expert for expert, wanted in enumerate(copies) if sum(expert in held[one] for one in {*nodes, node}) < wanted
    }
    while True:
        fullest = max((other for other in nodes if other != node), key=lambda other: (len(held[other]), -other))
        movable = held[fullest] - held[node]
        if len(held[fullest]) - len(held[node]) < 2 or not movable:
            return held
        moved = max(movable)
        held[fullest].remove(moved)
        held[node].add(moved)


def spread_evenly(placement: Placement, nodes: Collection[int]) -> list[set[int]]:
    """Each of `nodes` holds as many experts as the others, or one more; as few as possible move."""
    held = _sets(placement)
    while True:
        fullest = max(nodes, key=lambda node: (len(held[node]), -node))
        emptiest = min(nodes, key=lambda node: (len(held[node]), node))
        movable = held[fullest] - held[emptiest]
        if len(held[fullest]) - len(held[emptiest]) < 2 or not movable:
            return held
        moved = max(movable)
        held[fullest].remove(moved)
        held[emptiest].add(moved)


def without_node(placement: Placement, node: int, nodes: Collection[int]) -> list[set[int]]:
    """`node` holds nothing; its experts go to those of `nodes` that hold least.

    One whose replicas are on all others already loses that replica.
    """
    held = _sets(placement)
    gone, held[node] = held[node], set()
    for expert in sorted(gone):
        _give(held, expert, [other for other in nodes if other != node])
    return held


def repaired(placement: Placement, nodes: Collection[int], copies: Sequence[int] = ()) -> list[set[int]]:
    """Experts that are on too few of `nodes`, which live, go to those of them that hold least, and from the others.

    Args:
        copies: of each expert, on how many it is to be; by default one.
    """
    held, copies = _sets(placement), copies or [1] * placement.num_experts
    for expert in scarce_experts(placement, nodes, copies):
        there = [node for node in nodes if expert in held[node]]
        for node, of_node in enumerate(held):
            if node not in there:
                of_node.discard(expert)
        for _ in range(min(copies[expert], len(nodes)) - len(there)):
            _give(held, expert, nodes)
    return held


def _give(held: list[set[int]], expert: int, nodes: Collection[int]) -> None:
    free = [node for node in nodes if expert not in held[node]]
    if free:
        held[min(free, key=lambda node: (len(held[node]), node))].add(expert)


def _sets(placement: Placement) -> list[set[int]]:
    return [set(placement.held_by(node)) for node in range(placement.num_nodes)]
