"""Placement: which expert nodes hold which experts, in all layers alike or in each, and how they begin. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, TypeVar

from msi.errors import ConfigError
from msi.kernels.turns import first_homes

HOLE = -1  # in place of an expert: a local id that stands for none

Nodes = tuple[tuple[int, ...], ...]  # the experts of each, by local id
Shares = tuple[tuple[Annotated[int, range(61)], ...], ...]  # of each expert's rows, by its nodes


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """Where the experts of one layer are; as in `Placement`."""

    experts: Nodes
    shares: Shares = ()

    def check(self, num_nodes: int, num_experts: int) -> None:
        held = [[expert for expert in of_node if expert != HOLE] for of_node in self.experts]
        num_homes = Counter(expert for experts in held for expert in experts)
        assert len(held) == num_nodes, self
        assert all(len(set(experts)) == len(experts) for experts in held), self
        assert num_homes.keys() == set(range(num_experts)), self
        assert not self.shares or [len(one) for one in self.shares] == [num_homes[one] for one in range(num_experts)], (
            self
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """Which expert nodes hold which experts; an expert may be on several, a node may hold none.

    Rows name experts by their local ids, so a node can take rows of two placements at a time as long as no local id
    means one expert in the one and another in the other (`msi.placement_change`). A layer's local ids are its own.

    Attributes:
        experts: [num_nodes] the experts of each node; the index into a node's is the local expert id. Where one has
            left, and its id is not given away yet, there is a `HOLE`. Of all layers, or, where there are `further`,
            of the first.
        num_experts: of the model; in each layer, each is on one node at least.
        version: rises with every change.
        shares: [num_experts] of rows that choose an expert, how many of `msi.kernels.turns.TURNS` go to each of its
            nodes, by number; () for even ones.
        further: of the layers after the first; () where all are alike.
    """

    experts: Nodes
    num_experts: Annotated[int, range(1, 2**16)]
    version: Annotated[int, range(2**32)] = 0
    shares: Shares = ()
    further: tuple[LayerExperts, ...] = ()

    def __post_init__(self) -> None:
        for layer in self.layers:
            layer.check(self.num_nodes, self.num_experts)

    @staticmethod
    def of_layers(layers: Sequence[LayerExperts], num_experts: int, version: int = 0) -> Placement:
        """Of each layer, or of all; those that are alike are kept once."""
        first, *further = layers if len(set(layers)) > 1 else layers[:1]
        return Placement(first.experts, num_experts, version, first.shares, tuple(further))

    @property
    def layers(self) -> tuple[LayerExperts, ...]:
        """One for all, or one for each."""
        return LayerExperts(self.experts, self.shares), *self.further

    def of_layer(self, layer: int) -> Placement:
        """As if all were like this one."""
        if not self.further:
            return self
        one = self.layers[layer]
        return Placement(one.experts, self.num_experts, self.version, one.shares)

    @property
    def num_nodes(self) -> int:
        return len(self.experts)

    @property
    def num_used_nodes(self) -> int:
        """Up to the last that holds any: none behind it gets rows."""
        return 1 + max(node for node in range(self.num_nodes) if self.held_by(node))

    def held_by(self, node: int) -> tuple[int, ...]:
        """A node's experts in any layer, each once and without holes."""
        held = dict.fromkeys(expert for layer in self.layers for expert in layer.experts[node])
        return tuple(expert for expert in held if expert != HOLE)

    def num_held_by(self, node: int) -> int:
        """A node's experts in the layer of which it has most."""
        return max(sum(expert != HOLE for expert in layer.experts[node]) for layer in self.layers)


T = TypeVar("T")


def at_layer(of_layers: Sequence[T], layer: int) -> T:
    """Of one for all layers, or one for each."""
    return of_layers[layer if len(of_layers) > 1 else 0]


PlaceExperts = Callable[[int, int], Placement]  # of so many experts on so many nodes


def place_evenly(num_experts: int, num_nodes: int) -> Placement:
    """Consecutive runs of experts; the first nodes hold one more where num_nodes does not divide num_experts.

    Raises:
        ConfigError: more nodes than experts.
    """
    if not 1 <= num_nodes <= num_experts:
        raise ConfigError(
            f"{num_nodes} expert workers for {num_experts} experts; give between 1 and {num_experts} expert workers"
        )
    size, extra = divmod(num_experts, num_nodes)
    starts = [node * size + min(node, extra) for node in range(num_nodes + 1)]
    return Placement(tuple(tuple(range(start, end)) for start, end in pairwise(starts)), num_experts)


def place_with_replicas(num_experts: int, num_nodes: int, redundancy: int = 0, num_redundant: int = 0) -> Placement:
    """As `place_evenly`, with replicas behind each node's own experts; no two of an expert are on one node.

    The replicas of a node's experts are spread over all others, so that these share its rows when it is lost. Until
    then they get none: rows go where they would go without replicas.

    Args:
        redundancy: replicas of each expert besides the first.
        num_redundant: replicas on top of that, one each of so many experts, of every node's in turn.

    Raises:
        ConfigError: more nodes than experts, or more replicas than nodes.
    """
    first = place_evenly(num_experts, num_nodes).experts
    if redundancy >= num_nodes:
        raise ConfigError(
            f"`expert_redundancy` {redundancy} puts each expert on {redundancy + 1} workers, and there are "
            f"{num_nodes}; give at most {num_nodes - 1}, or more `expert_workers`"
        )
    most = num_experts if redundancy + 1 < num_nodes else 0
    if num_redundant > most:
        raise ConfigError(
            f"`redundant_experts` {num_redundant} is more than the {most} experts that could be on one worker more; "
            f"give at most {most}" + ("" if most else ", or more `expert_workers`")
        )
    held = [list(experts) for experts in first]
    in_turn = sorted(
        (local, node, expert) for node, of_node in enumerate(first) for local, expert in enumerate(of_node)
    )
    for number, (local, node, expert) in enumerate(in_turn):
        num_replicas = redundancy + (number < num_redundant)
        for replica in range(num_replicas):
            held[(node + 1 + (local + replica) % (num_nodes - 1)) % num_nodes].append(expert)
    shares = first_homes(held, num_experts) if redundancy or num_redundant else ()
    return Placement(tuple(map(tuple, held)), num_experts, shares=shares)
