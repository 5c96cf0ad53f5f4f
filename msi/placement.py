"""Placement: which expert nodes hold which experts. Pure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from msi.errors import ConfigError
from msi.kernels.turns import first_homes
from msi.types import Placement

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
