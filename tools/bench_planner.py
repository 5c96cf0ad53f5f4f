#!/usr/bin/env python3
"""How long the deployment search takes: 4 GPU types on 64 nodes of eight, 64 nodes of each, and 10,000 GPUs.

    tools/bench_planner.py --model deepseek-v3

Both sides may use every type. Prints a JSON line per fleet: wall-clock and CPU seconds of one search, and the best
plan's tokens/s per GPU.
"""

from __future__ import annotations

import json
import time

from msi.planner.hardware import read_catalogue
from msi.planner.plan import Workload
from msi.planner.search import search
from msi.planner.task import OBJECTIVES, Pool, Task
from msi_launch.command_line import ScriptLine

FLEETS = {
    "4 types, 64 nodes": {"a800": 128, "h20": 128, "l40s": 128, "h800": 128},
    "4 types, 64 nodes each": {"a800": 512, "h20": 512, "l40s": 512, "h800": 512},
    "10,000 GPUs of one type": {"a800": 10_000},
    "10,000 GPUs of 4 types": {"a800": 2500, "h20": 2500, "l40s": 2500, "h800": 2500},
}


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("--model", default="mixtral-8x22b")
    parser.add_argument("--objective", choices=OBJECTIVES, default="cost")
    arguments = parser.parse_args()
    catalogue = read_catalogue()
    for name, counts in FLEETS.items():
        pools = tuple(Pool(catalogue.gpu(gpu), count) for gpu, count in counts.items())
        task = Task(
            model=catalogue.model(arguments.model),
            workload=Workload(input_len=571, output_len=159, tpot_s=0.150),
            attention=pools,
            expert=pools,
            objective=arguments.objective,
        )
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        plan = search(task, num_plans=1)[0]
        figures = {
            "fleet": name,
            "model": arguments.model,
            "wall_s": round(time.perf_counter() - wall_s, 3),
            "cpu_s": round(time.process_time() - cpu_s, 3),
            "tokens_per_s_per_gpu": round(plan.tokens_per_s_per_gpu, 1),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
