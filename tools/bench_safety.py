#!/usr/bin/env python3
"""What being safe costs while nothing fails: replicas of experts, and hedging, beside an instance without.

    tools/bench_safety.py --rounds 9
    tools/bench_safety.py --rounds 9 --transport tcp --batch 8

Instances of the demo model (or MODEL) run side by side, and all but one rest: with each expert once; with each on two
workers; and with that and rows that are late sent to the other one, too, as by default. In each round each of them
decodes the same batch, in an order that turns. Prints each one's tokens per second, and that over the first one's in
the same round, both in the median, with the quartiles of the latter; and how many rows were sent twice.

That is 1.00 where safety costs nothing. How far two instances that are alike part is told, too: the first is there
twice, and whatever is within that is noise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from pathlib import Path
from statistics import median, quantiles

from msi import Engine, SamplingParams
from msi_launch.command_line import ScriptLine, integer, one_of

PROMPT = 16
WARM_UP = 16  # tokens
HEDGE_AFTER_MS = 150  # as by default
KINDS = {  # replicas of each expert, and when late rows go to them
    "once": (0, 0),
    "once, again": (0, 0),
    "replicas": (1, 0),
    "replicas, hedged": (1, HEDGE_AFTER_MS),
}


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="the demo model without it")
    parser.add_argument("--rounds", type=integer(2, 1000), default=9, metavar="N", help="9")
    parser.add_argument("--batch", type=integer(1, 512), default=32, metavar="B", help="sequences; 32")
    parser.add_argument("--tokens", type=integer(8, 4096), default=200, metavar="N", help="of an answer; 200")
    parser.add_argument("--transport", type=one_of("shm", "tcp"), default="shm", metavar="T", help="shm or tcp; shm")
    parser.add_argument("--json", action="store_true", help="one object")
    values: argparse.Namespace = parser.parse_args()
    return values


async def decoded_per_s(engine: Engine, batch: int, num_tokens: int) -> float:
    """Tokens, from the moment when every sequence has one."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    began, counted = [0.0] * batch, [0] * batch

    async def one(index: int) -> None:
        async for output in engine.generate([5 + index] * PROMPT, params):
            began[index] = began[index] or time.monotonic()
            counted[index] += len(output.token_ids)

    await asyncio.gather(*map(one, range(batch)))
    return (sum(counted) - batch) / (time.monotonic() - max(began))


async def num_sent_twice(engine: Engine) -> int:
    """Exchanges whose rows were, as they were late."""
    counted = [one.status.attention for one in (await engine.stats()).workers]
    return sum(one.hedges for one in counted if one is not None)


async def main() -> None:
    arguments = parse()
    per_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    async with contextlib.AsyncExitStack() as running:
        engines = {}
        for kind, (redundancy, hedge_after_ms) in KINDS.items():
            engine = Engine.local(
                arguments.model, attention_workers=2, expert_workers=2, micro_batches=2, threads_per_worker=1,
                transport=arguments.transport, expert_redundancy=redundancy, hedge_after=hedge_after_ms,
            )  # fmt: skip
            engines[kind] = await running.enter_async_context(engine)
        for engine in engines.values():
            await decoded_per_s(engine, arguments.batch, WARM_UP)
        kinds = list(KINDS)
        for number in range(arguments.rounds):
            turn = number % len(kinds)
            for kind in (*kinds[turn:], *kinds[:turn]):
                per_s[kind].append(await decoded_per_s(engines[kind], arguments.batch, arguments.tokens))
        num_hedged = await num_sent_twice(engines["replicas, hedged"])
    if arguments.json:
        print(json.dumps({"schema_version": 1, "num_sent_twice": num_hedged, "tokens_per_s": per_s}))
        return
    print(f"{'':17} {'tokens/s':>9} {'ratio':>6}   quartiles")
    for kind, values in per_s.items():
        ratios = [value / base for value, base in zip(values, per_s["once"], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        print(f"{kind:17} {median(values):9.0f} {middle:6.3f}   {low:.3f} to {high:.3f}")
    print(f"{num_hedged} exchanges were sent twice")


if __name__ == "__main__":
    asyncio.run(main())
