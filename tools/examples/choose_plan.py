#!/usr/bin/env python3
"""The planner from Python: the cheapest way to serve a model, and whether splitting it is worth it.

tools/examples/choose_plan.py [MODEL]         # a name of the catalogue; mixtral-8x22b without it
"""

from __future__ import annotations

import sys

from msi import ConfigError
from msi.planner.choose import best_plans, is_it_worth_it
from msi.planner.hardware import read_catalogue
from msi.planner.plan import Workload
from msi.planner.task import Pool, Task


def main(model: str) -> None:
    catalogue = read_catalogue(None)
    task = Task(
        model=catalogue.model(model),
        workload=Workload(input_len=571, output_len=159, tpot_s=0.150),  # tokens, tokens, seconds per output token
        attention=(Pool(catalogue.gpu("h20"), 64),),
        expert=(Pool(catalogue.gpu("l40s"), 64), Pool(catalogue.gpu("h20"), 64)),
        objective="cost",
    )
    plans = best_plans(task, num_plans=3)
    for plan in plans:
        print(
            f"{plan.num_attention_nodes} x {plan.tp_attention} {plan.attention_gpu} + "
            f"{plan.num_expert_nodes} x {plan.tp_expert} {plan.expert_gpu}, m = {plan.num_micro_batches}, "
            f"{plan.batch_size} sequences: {plan.tokens_per_s:.0f} tokens/s, {plan.tpot_s * 1e3:.0f} ms each"
        )
    verdict = is_it_worth_it(task, plans)
    print(f"worth splitting: {verdict.is_worth_it}, {verdict.gain:.2f} times the tokens per price")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "mixtral-8x22b")
    except ConfigError as error:
        sys.exit(str(error))
