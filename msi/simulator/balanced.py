"""What rebalancing would come to: a deployment whose experts are placed by popularity, by the product's planner."""

from __future__ import annotations

from dataclasses import replace

from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.planner.replicas import place_by_popularity
from msi.planner.stage_costs import StageCosts
from msi.simulator.deployment import Deployment
from msi.simulator.popularity import Popularity, build_routing

MANY_ROWS = 4096  # then an expert's time is that of its rows


def placed_by_popularity(deployment: Deployment, costs: StageCosts, popularity: Popularity, seed: int) -> Deployment:
    """The same memory on each node, and at least as many replicas of each expert as its redundancy asks for.

    Waves are taken to be full: of every attention worker, as many sequences as a micro-batch can have.

    Raises:
        ConfigError: popularity that cannot be.
    """
    before = deployment.plan.placement
    routing = build_routing(
        popularity, before, deployment.top_k, most_tokens=1, seed=seed, num_layers=deployment.num_layers
    )
    num_lanes = deployment.num_micro_batches or MAX_MICRO_BATCHES // 2
    num_tokens = deployment.num_attention * max(1, deployment.limits.max_num_seqs // num_lanes)
    load = [[num_tokens * share for share in of_layer] for of_layer in routing.chosen()]
    placed = place_by_popularity(load, rows_of_floor(costs), before, deployment.expert_redundancy)
    return replace(deployment, placement=placed)


def rows_of_floor(costs: StageCosts) -> float:
    """Rows that take as long as an expert's weights take to be read; 0 where time does not depend on either."""
    row_s = (costs.expert_s(2 * MANY_ROWS, 1) - costs.expert_s(MANY_ROWS, 1)) / MANY_ROWS
    read_s = (costs.expert_s(2, 2) - costs.expert_s(1, 1)) - row_s
    return max(0.0, read_s / row_s) if row_s > 0 else 0.0
