#!/usr/bin/env python3
"""What a prefix hit is worth: TTFT of a prompt whose beginning is cached over that of one which is not.

    tools/bench_prefix.py MODEL --input-len 2000 --cached 1900

Each round sends a new prompt (cold), then one with the same first `cached` tokens and another end (warm), then as many
new tokens as that end has (alone), so all see the same machine. Prints a JSON line per round and one with the medians;
`most_warm_ttft_s` is what was asked for: 1.15 times that of the end alone, and 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from statistics import median

from msi import Engine, SamplingParams
from msi.models.families import load_config
from msi_launch.command_line import ScriptLine


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--input-len", type=int, default=2000)
    parser.add_argument("--cached", type=int, default=1900)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attention-workers", type=int, default=1)
    parser.add_argument("--expert-workers", type=int, default=1)
    parser.add_argument("--colocated", action="store_true")
    parser.add_argument("--threads-per-worker", type=int, default=0)
    values: argparse.Namespace = parser.parse_args()
    return values


async def ttft_s(engine: Engine, prompt: list[int]) -> float:
    started = time.monotonic()
    async for _ in engine.generate(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)):
        break
    return time.monotonic() - started


async def main() -> None:
    arguments = parse()
    config, _ = load_config(arguments.model)
    chance = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(3, config.vocab_size) for _ in range(count)]

    rounds = []
    engine = Engine.local(
        model=arguments.model, colocated=arguments.colocated, attention_workers=arguments.attention_workers,
        expert_workers=arguments.expert_workers, threads_per_worker=arguments.threads_per_worker,
        max_num_seqs=8, report=_progress,
    )  # fmt: skip
    async with engine:
        await ttft_s(engine, tokens(arguments.input_len))  # warm up
        for _ in range(arguments.rounds):
            prompt = tokens(arguments.input_len)
            cold = await ttft_s(engine, prompt)
            end = tokens(arguments.input_len - arguments.cached)
            warm = await ttft_s(engine, prompt[: arguments.cached] + end)
            alone = await ttft_s(engine, tokens(len(end)))
            rounds.append((cold, warm, alone))
            times = {"cold_ttft_s": cold, "warm_ttft_s": warm, "alone_ttft_s": alone}
            print(json.dumps({**times, "ratio": warm / cold, "over_alone": warm / alone}), flush=True)
    about = {"model": arguments.model.name, "input_len": arguments.input_len, "cached": arguments.cached}
    cold, warm, alone = (median(times) for times in zip(*rounds, strict=True))
    medians = {
        "median_cold_ttft_s": cold,
        "median_warm_ttft_s": warm,
        "median_alone_ttft_s": alone,
        "median_ratio": median(warm / cold for cold, warm, _ in rounds),
        "most_warm_ttft_s": 1.15 * alone + 0.02,
    }
    print(json.dumps({**about, **medians}))


def _progress(sentence: str) -> None:
    if sys.stderr.isatty():
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main())
