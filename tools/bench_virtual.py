#!/usr/bin/env python3
"""What replicas cost, and what moving requests and letting slow workers go brings, under the virtual clock.

    tools/bench_virtual.py                       # all three; the same to the bit each time, on any machine
    tools/bench_virtual.py replicas              # each expert twice over once, while nothing fails
    tools/bench_virtual.py moving                # one attention worker of two turns six times slower
    tools/bench_virtual.py draining              # one expert worker of three turns ten times slower

Coordinator, schedulers, lanes, links and waves are the product's; stage times are those below. Prints a JSON line per
run. `replicas`: decode tokens/s of 32 sequences of 120 tokens, 2 + 2 workers with m=2, where all rows of an expert go
to the first worker that has it, as they do, and where they take turns among both, over that with each expert once.
`moving`: when the last of 24 requests of 250 tokens ends, by `--balance-attention` off and auto. `draining`: when the
last of 12 requests of 1,000 tokens and 20 of 100 ends, 2 + 3 workers with each expert twice, where a slow worker stays
and where it leaves after five seconds (`--drain-slow-after`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from msi.planner.stage_costs import ConstantCosts
from msi.settings import AttentionBalance, SlowWorkers
from msi.simulator.deployment import Deployment, Fault
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival
from msi_launch.command_line import ScriptLine, one_of

MODELS = ((8, 2), (16, 4), (64, 6))  # experts, and those of a token
POPULARITIES = ("uniform-drawn", "zipf:1.2")


@dataclass(frozen=True, slots=True)
class CostsOfExperts(ConstantCosts):
    """A batch takes longer by its rows and by the experts whose weights it reads."""

    def expert_s(self, num_expert_rows: float, num_active_experts: int) -> float:
        return 0.2e-3 + 5e-6 * num_expert_rows + 0.1e-3 * num_active_experts


@dataclass(frozen=True, slots=True)
class CostsOfSequences(ConstantCosts):
    """Attention takes longer by the sequences of a step."""

    def attention_s(self, num_tokens: int, num_context_tokens: int) -> float:
        return 1e-3 + 1e-3 * num_tokens


def replicas() -> Iterator[dict[str, Any]]:
    costs, arrivals = CostsOfExperts(0.3e-3, 0.0, 0.05e-3, 0.3e-3), [Arrival(0.0, 4, 120)] * 32
    for popularity in POPULARITIES:
        for num_experts, top_k in MODELS:
            once = Deployment(
                num_layers=4, num_experts=num_experts, top_k=top_k, num_attention=2, num_expert=2, num_micro_batches=2
            )
            first = replace(once, expert_redundancy=1)
            in_turns = replace(first, placement=replace(first.plan.placement, shares=()))
            tokens_per_s = [
                simulate(one, costs, arrivals, popularity=popularity).tokens_per_s for one in (once, first, in_turns)
            ]
            yield {
                "experts": num_experts, "top_k": top_k, "popularity": popularity,
                "once_tokens_per_s": round(tokens_per_s[0], 1),
                "first_over_once": round(tokens_per_s[1] / tokens_per_s[0], 2),
                "in_turns_over_once": round(tokens_per_s[2] / tokens_per_s[0], 2),
            }  # fmt: skip


def moving() -> Iterator[dict[str, Any]]:
    two = Deployment(num_layers=6, num_experts=8, top_k=2, num_attention=2, num_expert=2, num_micro_batches=1)
    costs, arrivals = CostsOfSequences(0.0, 1e-4, 1e-5), [Arrival(0.0, 8, 250)] * 24
    fault = Fault(1.0, "attention-0", "slow", 6.0)
    for balance in (AttentionBalance("off"), AttentionBalance("auto")):
        report = simulate(replace(two, balance=balance), costs, arrivals, faults=[fault])
        yield {"balance_attention": balance.balance_attention, "last_ends_s": round(report.duration_s, 1)}


def draining() -> Iterator[dict[str, Any]]:
    three = Deployment(
        num_layers=2, num_experts=6, top_k=2, num_attention=2, num_expert=3, num_micro_batches=2, expert_redundancy=1
    )
    arrivals = [Arrival(0.0, 4, 1000)] * 12 + [Arrival(0.5 * number, 4, 100) for number in range(20)]
    costs, fault = ConstantCosts(3e-3, 3e-3, 0.2e-3, 0.3e-3), Fault(2.0, "expert-1", "slow", 10.0)
    for after_s in (0, 5):
        slow = SlowWorkers(drain_slow_after_s=after_s)
        report = simulate(replace(three, slow=slow), costs, arrivals, faults=[fault])
        yield {"drain_slow_after_s": after_s, "last_ends_s": round(report.duration_s, 1)}


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "replicas": replicas,
    "moving": moving,
    "draining": draining,
}


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("case", nargs="?", type=one_of(*CASES), metavar="CASE", help="replicas, moving or draining")
    asked = parser.parse_args().case
    for case in CASES if asked is None else [asked]:
        for found in CASES[case]():
            print(json.dumps({"case": case} | found), flush=True)


if __name__ == "__main__":
    main()
