"""Placement: which expert nodes hold which experts. Pure."""

from __future__ import annotations

from msi.errors import ConfigError
from msi.types import Placement


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
    counts = [size + (node < extra) for node in range(num_nodes)]
    return Placement(tuple(node for node, count in enumerate(counts) for _ in range(count)), num_nodes)
