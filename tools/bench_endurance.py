#!/usr/bin/env python3
"""Whether serving gets slower or larger with time: pass times early and late, memory after few and many requests.

    tools/bench_endurance.py [MODEL] --passes 2100 --requests 5000

First a constant load (short sequences that start over, so that contexts stay the same) decodes for `passes` passes;
the median pass around the 100th is compared with that around the 2,000th. Then many short requests run, and the
resident memory of all processes after the first 500 is compared with that after all. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from statistics import median

from msi import Engine, SamplingParams
from msi_launch.command_line import ScriptLine

WINDOW = 100
KV_BLOCKS = 1024  # so few that 500 requests have used them all: later ones cannot grow what is kept


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="the demo model without it")
    parser.add_argument("--attention-workers", type=int, default=1)
    parser.add_argument("--expert-workers", type=int, default=1)
    parser.add_argument("--passes", type=int, default=2100)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=48)
    values: argparse.Namespace = parser.parse_args()
    return values


async def pass_times(engine: Engine, num_passes: int) -> list[float]:
    """Time between consecutive tokens of one sequence after another: one pass each, on one lane."""
    times: list[float] = []
    while len(times) < num_passes:
        last = None
        params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
        async for _ in engine.generate([5] * 16, params):
            now = time.monotonic()
            if last is not None:
                times.append(now - last)
            last = now
    return times


async def many_requests(engine: Engine, count: int, concurrency: int) -> None:
    left = iter(range(count))

    async def client() -> None:
        for index in left:
            params = SamplingParams(max_tokens=2 + index % 12, temperature=0.8, seed=index, ignore_eos=True)
            async for _ in engine.generate([3 + index % 50] * (1 + index % 40), params):
                pass

    await asyncio.gather(*(client() for _ in range(concurrency)))


def resident_bytes(engine: Engine) -> dict[str, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    pids = {**engine.pids, "this process": os.getpid()}
    return {name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for name, pid in pids.items()}


async def main() -> None:
    arguments = parse()
    async with Engine.local(
        model=arguments.model,
        attention_workers=arguments.attention_workers,
        expert_workers=arguments.expert_workers,
        micro_batches=1,
        threads_per_worker=1,
        num_gpu_blocks_override=KV_BLOCKS,
    ) as engine:
        times = await pass_times(engine, arguments.passes)
        early = median(times[100 - WINDOW // 2 : 100 + WINDOW // 2])
        late = median(times[-WINDOW:])
        first = min(500, arguments.requests // 10)
        await many_requests(engine, first, arguments.concurrency)
        before = resident_bytes(engine)
        await many_requests(engine, arguments.requests - first, arguments.concurrency)
        after = resident_bytes(engine)
    print(
        json.dumps(
            {
                "pass_100_s": early,
                f"pass_{len(times) - WINDOW // 2}_s": late,
                "late_over_early": late / early,
                "requests": arguments.requests,
                "memory_before_bytes": before,
                "memory_after_bytes": after,
                "memory_after_over_before": sum(after.values()) / sum(before.values()),
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
