"""From one placement to the next while rows are on their way: which local ids experts get, who holds what. Pure.

    v        every row names experts by the local ids of v
    v, v+1   expert nodes hold the experts of both, and take rows of both: no local id means two experts
    v+1      attention workers have nothing of v on its way any more; the nodes drop what v+1 does not have

So an expert that stays keeps its local id, and the id of one that leaves stands for none in v+1: it is a `HOLE`, which
only v+2 may give away. Each layer has local ids of its own; what is said of one here is done for each.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass
from typing import Concatenate, ParamSpec

from msi.errors import ConfigError
from msi.kernels.turns import first_homes
from msi.placement import HOLE, LayerExperts, Placement, at_layer

Held = tuple[int, ...]  # experts by local id
Wanted = Sequence[Set[int]]  # the experts of each node


@dataclass(frozen=True, slots=True)
class Shared:
    """What nodes are to hold, and what of each expert's rows goes to which of them; see `Placement.shares`."""

    experts: Wanted
    shares: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ByLayer:
    """What nodes are to hold of each layer."""

    layers: tuple[Wanted | Shared, ...]


Chosen = Wanted | Shared | ByLayer  # of all layers alike, or of each


def changed(placement: Placement, chosen: Chosen, version: int = 0) -> Placement:
    """The placement after this one in which each node holds what is wanted of it: nobody's local id is another's.

    Args:
        chosen: [num_nodes] experts of each node; without shares, all rows of an expert go to one of its nodes, see
            `msi.kernels.turns.first_homes`.
        version: of the new one; by default the next.

    Raises:
        ConfigError: of other nodes or layers, with an expert that there is not, or without one that there is.
    """
    of_layers = _of_layers(chosen)
    num_layers = max(len(of_layers), len(placement.layers))
    if num_layers > 1 and {len(of_layers), len(placement.layers)} - {1, num_layers}:
        raise ConfigError(
            f"a placement of {len(of_layers)} layers cannot follow one of {len(placement.layers)}; name every layer, "
            "or one for all"
        )
    layers = [
        _layer_changed(at_layer(placement.layers, layer), at_layer(of_layers, layer), placement.num_experts)
        for layer in range(num_layers)
    ]
    return Placement.of_layers(layers, placement.num_experts, version or placement.version + 1)


def _of_layers(chosen: Chosen) -> Sequence[Wanted | Shared]:
    return chosen.layers if isinstance(chosen, ByLayer) else [chosen]


def _wanted(chosen: Wanted | Shared) -> Wanted:
    return chosen.experts if isinstance(chosen, Shared) else chosen


def _layer_changed(before: LayerExperts, chosen: Wanted | Shared, num_experts: int) -> LayerExperts:
    wanted, shares = _wanted(chosen), chosen.shares if isinstance(chosen, Shared) else ()
    if len(wanted) != len(before.experts):
        raise ConfigError(
            f"a placement of {len(wanted)} nodes cannot follow one of {len(before.experts)}; name every node, also "
            f"those that hold nothing"
        )
    named = {expert for experts in wanted for expert in experts}
    if named != set(range(num_experts)):
        odd = sorted(named ^ set(range(num_experts)))
        raise ConfigError(f"each of the {num_experts} experts is on a node, and no other; look at {odd[:8]}")
    held = tuple(_placed(were, set(experts)) for were, experts in zip(before.experts, wanted, strict=True))
    if held == before.experts:
        shares = shares or before.shares
    if not shares and sum(map(len, wanted)) > num_experts:
        shares = first_homes(held, num_experts)
    return LayerExperts(held, shares)


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


def num_to_load(held: Sequence[Held], had: Sequence[Held], num_layers: int) -> int:
    """Experts of layers that a node is to hold, and does not yet.

    Args:
        held, had: of all layers, or of each; () for none in any.
    """
    had = had or ((),)
    layers = range(num_layers if held else 0)
    return sum(len(set(at_layer(held, layer)) - {HOLE, *at_layer(had, layer)}) for layer in layers)


def check_layers(placement: Placement | None, num_layers: int) -> None:
    """Raises ConfigError: it is of a model with another number of layers."""
    if placement is not None and len(placement.layers) not in (1, num_layers):
        raise ConfigError(
            f"a placement of {len(placement.layers)} layers is not for this model, which has {num_layers} with experts"
        )


def padded(placement: Placement, num_nodes: int) -> Placement:
    """The same with places for nodes that may come."""
    missing = num_nodes - placement.num_nodes
    assert missing >= 0, f"{placement} has more than {num_nodes} nodes"
    layers = [LayerExperts(one.experts + ((),) * missing, one.shares) for one in placement.layers]
    return Placement.of_layers(layers, placement.num_experts, placement.version)


# -- who holds what ----------------------------------------------------------------------------------------------------


def is_as(placement: Placement, chosen: Chosen) -> bool:
    """Whether nodes hold already what is wanted of them."""
    of_layers = _of_layers(chosen)
    num_layers = max(len(of_layers), len(placement.layers))
    return all(
        _sets(at_layer(placement.layers, layer)) == [set(one) for one in _wanted(at_layer(of_layers, layer))]
        for layer in range(num_layers)
    )


def copies_of(placement: Placement) -> list[int]:
    """On how many nodes each expert is, in the layer where it is on fewest."""
    counts = [_num_homes(layer, range(placement.num_nodes)) for layer in placement.layers]
    return [min(homes[expert] for homes in counts) for expert in range(placement.num_experts)]


def lost_experts(placement: Placement, nodes: Collection[int]) -> list[int]:
    """Those that, in some layer, none of these nodes holds."""
    every, lost = set(range(placement.num_experts)), set[int]()
    for layer in placement.layers:
        lost |= every.difference(*(layer.experts[node] for node in nodes))
    return sorted(lost)


def scarce_experts(placement: Placement, nodes: Collection[int], copies: Sequence[int]) -> list[int]:
    """Those that, in some layer, are on fewer of these nodes than `copies` says, or than there are."""
    wanted = [min(one, len(nodes)) for one in copies]
    if wanted == [1] * placement.num_experts:
        return lost_experts(placement, nodes)
    scarce = set[int]()
    for layer in placement.layers:
        homes = _num_homes(layer, nodes)
        scarce.update(expert for expert, least in enumerate(wanted) if homes[expert] < least)
    return sorted(scarce)


def _num_homes(layer: LayerExperts, nodes: Collection[int]) -> Counter[int]:
    return Counter(itertools.chain.from_iterable(layer.experts[node] for node in nodes))


P = ParamSpec("P")


def in_each_layer(
    choose: Callable[Concatenate[LayerExperts, P], list[set[int]]],
) -> Callable[Concatenate[Placement, P], Chosen]:
    """What is chosen for a layer, for all of a placement: once where they are alike."""

    @functools.wraps(choose)
    def choose_all(placement: Placement, /, *args: P.args, **options: P.kwargs) -> Chosen:
        chosen = tuple(choose(layer, *args, **options) for layer in placement.layers)
        return ByLayer(chosen) if placement.further else chosen[0]

    return choose_all


@in_each_layer
def with_node(layer: LayerExperts, node: int, nodes: Collection[int], copies: Sequence[int] = ()) -> list[set[int]]:
    """`node` gets as many experts as the others then have, from those of `nodes` that hold most; nothing else moves.

    An expert that has replicas moves, too: no node gets one that it has, and none is on fewer nodes than before.

    Args:
        copies: of each expert, on how many nodes it is to be: where it is on fewer of `nodes`, `node` gets one more.
    """
    held, num_homes = _sets(layer), _num_homes(layer, {*nodes, node})
    held[node] |= {expert for expert, wanted in enumerate(copies) if num_homes[expert] < wanted}
    while True:
        fullest = max((other for other in nodes if other != node), key=lambda other: (len(held[other]), -other))
        movable = held[fullest] - held[node]
        if len(held[fullest]) - len(held[node]) < 2 or not movable:
            return held
        moved = max(movable)
        held[fullest].remove(moved)
        held[node].add(moved)


@in_each_layer
def spread_evenly(layer: LayerExperts, nodes: Collection[int]) -> list[set[int]]:
    """Each of `nodes` holds as many experts as the others, or one more; as few as possible move."""
    held = _sets(layer)
    while True:
        fullest = max(nodes, key=lambda node: (len(held[node]), -node))
        emptiest = min(nodes, key=lambda node: (len(held[node]), node))
        movable = held[fullest] - held[emptiest]
        if len(held[fullest]) - len(held[emptiest]) < 2 or not movable:
            return held
        moved = max(movable)
        held[fullest].remove(moved)
        held[emptiest].add(moved)


@in_each_layer
def without_node(layer: LayerExperts, node: int, nodes: Collection[int]) -> list[set[int]]:
    """`node` holds nothing; its experts go to those of `nodes` that hold least.

    One whose replicas are on all others already loses that replica.
    """
    held = _sets(layer)
    gone, held[node] = held[node], set()
    for expert in sorted(gone):
        _give(held, expert, [other for other in nodes if other != node])
    return held


@in_each_layer
def repaired(layer: LayerExperts, nodes: Collection[int], copies: Sequence[int] = ()) -> list[set[int]]:
    """Experts that are on too few of `nodes`, which live, go to those of them that hold least, and from the others.

    Args:
        copies: of each expert, on how many it is to be; by default one.
    """
    held, num_homes = _sets(layer), _num_homes(layer, nodes)
    copies = copies or [1] * len(set().union(*held))
    for expert, wanted in enumerate(copies):
        if num_homes[expert] >= min(wanted, len(nodes)):
            continue
        there = [node for node in nodes if expert in held[node]]
        for node, of_node in enumerate(held):
            if node not in there:
                of_node.discard(expert)
        for _ in range(min(wanted, len(nodes)) - len(there)):
            _give(held, expert, nodes)
    return held


def _give(held: list[set[int]], expert: int, nodes: Collection[int]) -> None:
    free = [node for node in nodes if expert not in held[node]]
    if free:
        held[min(free, key=lambda node: (len(held[node]), node))].add(expert)


def _sets(layer: LayerExperts) -> list[set[int]]:
    return [set(held) - {HOLE} for held in layer.experts]
