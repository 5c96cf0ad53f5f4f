#!/usr/bin/env python3
"""A deployment under a virtual clock: what one slow expert worker of four costs, without any hardware.

tools/examples/simulate_faults.py
"""

from __future__ import annotations

from msi.planner.stage_costs import ConstantCosts
from msi.simulator.deployment import Deployment, Fault
from msi.simulator.simulation import simulate
from msi.simulator.workload import fixed_lengths, poisson

DEPLOYMENT = Deployment(
    num_layers=8, num_experts=8, top_k=2, num_attention=2, num_expert=4, num_micro_batches=2
)  # fmt: skip
COSTS = ConstantCosts(0.9e-3, 0.9e-3, 0.1e-3, 0.5e-3)  # T_a, T_e, T_c of a layer, and what comes once per pass: seconds


def main() -> None:
    arrivals = poisson(60, 40.0, fixed_lengths(64, 24), seed=0)  # requests, per second, tokens in and out
    for name, faults in (("undisturbed", []), ("expert-3 four times slower", [Fault(0.5, "expert-3", "slow", 4.0)])):
        report = simulate(DEPLOYMENT, COSTS, arrivals, faults=faults)
        assert report.tpot_s is not None
        print(
            f"{name}: {report.tokens_per_s:.0f} tokens/s, {report.tpot_s.p50_s * 1e3:.1f} ms per token, "
            f"{report.num_failed} failed"
        )


if __name__ == "__main__":
    main()
