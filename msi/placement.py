"""Placement: which expert nodes hold which experts. Pure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from msi.errors import ConfigError
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
