#!/usr/bin/env python3
"""Throughput under arrivals: Poisson traffic of mixed lengths over the same tokens as one static batch.

    tools/bench_mixed.py --requests 96 --utilization 2.0

Lengths are log-normal around the paper's medians (571 tokens in, 159 out), scaled to the model's context. The static
run sends everything at once; the mixed run sends the same requests at `--utilization` times the rate at which the
static one finished them, so that the batch stays bound (above 1) as under heavy traffic. Both count all tokens, prompts
included, from the first arrival to the last answer; the prefix cache is off, so that the same prompts cost the same
again. Runs alternate. Prints a JSON line per run and one with the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from msi import Engine, SamplingParams
from msi.models.families import load_config
from msi.settings import DEMO_MODEL
from msi_launch.command_line import ScriptLine

MEDIAN_INPUT, MEDIAN_OUTPUT = 571, 159  # of the paper's production traces
SPREAD = 0.6  # standard deviation of the logarithm


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    num_output: int


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="the demo model without it")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--utilization", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--attention-workers", type=int, default=1)
    parser.add_argument("--expert-workers", type=int, default=1)
    parser.add_argument("--micro-batches", type=int, default=0)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    values: argparse.Namespace = parser.parse_args()
    return values


def jobs(count: int, vocab_size: int, context: int) -> list[Job]:
    """The same for every run: prompts and answers whose longest fit the context."""
    chance = random.Random(0)
    scale = context / (4 * (MEDIAN_INPUT + MEDIAN_OUTPUT))

    def length(middle: int, most: int) -> int:
        return max(1, min(most, round(scale * middle * math.exp(chance.gauss(0, SPREAD)))))

    made = []
    for _ in range(count):
        num_input, num_output = length(MEDIAN_INPUT, context * 3 // 4), length(MEDIAN_OUTPUT, context // 4)
        made.append(Job(tuple(chance.randrange(3, vocab_size) for _ in range(num_input)), num_output))
    return made


async def run(engine: Engine, todo: list[Job], rate: float) -> dict[str, float]:
    """All jobs; `rate` requests per second arrive, at once where it is infinite."""
    chance = random.Random(1)
    started = time.monotonic()
    ttfts: list[float] = []
    tpots: list[float] = []

    async def one(job: Job) -> None:
        arrived = time.monotonic()
        times: list[float] = []
        params = SamplingParams(max_tokens=job.num_output, temperature=0, ignore_eos=True)
        async for output in engine.generate(job.prompt, params):
            times += [time.monotonic()] * len(output.token_ids)
        ttfts.append(times[0] - arrived)
        if len(times) > 1:
            tpots.append((times[-1] - times[0]) / (len(times) - 1))

    requests = []
    for job in todo:
        requests.append(asyncio.ensure_future(one(job)))
        if math.isfinite(rate):
            await asyncio.sleep(chance.expovariate(rate))
    await asyncio.gather(*requests)
    elapsed = time.monotonic() - started
    return {
        "tokens_per_s": sum(len(job.prompt) + job.num_output for job in todo) / elapsed,
        "requests_per_s": len(todo) / elapsed,
        "median_ttft_s": median(ttfts),
        "median_tpot_s": median(tpots),
        "p99_tpot_s": quantiles(tpots, n=100)[98],
    }


async def main() -> None:
    arguments = parse()
    config, _ = load_config(arguments.model or DEMO_MODEL)
    todo = jobs(arguments.requests, config.vocab_size, config.max_position_embeddings)
    static, mixed = [], []
    async with Engine.local(
        model=arguments.model, attention_workers=arguments.attention_workers, report=_progress,
        expert_workers=arguments.expert_workers, micro_batches=arguments.micro_batches,
        max_num_seqs=arguments.max_num_seqs, enable_prefix_caching=False,
    ) as engine:  # fmt: skip
        await run(engine, todo[:8], math.inf)  # warm up
        for _ in range(arguments.repeat):
            static.append(await run(engine, todo, math.inf))
            print(json.dumps({"kind": "static", **static[-1]}), flush=True)
            mixed.append(await run(engine, todo, arguments.utilization * static[-1]["requests_per_s"]))
            print(json.dumps({"kind": "mixed", **mixed[-1]}), flush=True)
    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(mixed, static, strict=True)]
    print(json.dumps({"requests": len(todo), "mixed_over_static": median(ratios)}))


def _progress(sentence: str) -> None:
    if sys.stderr.isatty():
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main())
