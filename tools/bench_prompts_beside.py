#!/usr/bin/env python3
"""What `--prefill-delay` brings those who stream, and costs those who send prompts.

    tools/bench_prompts_beside.py [MODEL] [--delays 0 50] [--streams 4] [--clients 3] [--seconds 10] [--rounds 5] [...]

Serves a model (the demo model without one) by msi-launch, once for each delay in milliseconds, and asks each in turn:
streams, beside clients that send one prompt of --prompt tokens after the other, each of other words, and want a token.
Printed of each round: prompt tokens per second (of the whole time), generated tokens per second of all streams, and
the median and the longest wait between two pieces of a stream; at the end the medians over rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi_launch.command_line import ScriptLine, integer, number
from tools.served import Served, served

STREAMED = {"prompt": "It was a fine morning", "max_tokens": 400, "ignore_eos": True, "stream": True}
IDS = range(10, 1000)  # of tokens: whatever model it is has them
ROUND_S = 300.0


async def stream(session: aiohttp.ClientSession, url: str, waits: list[float], until: float) -> None:
    """One request after the other; the waits between pieces of each."""
    while time.monotonic() < until:
        last_at = 0.0
        async with session.post(f"{url}/v1/completions", json=STREAMED) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    if now > until:
                        return
                    if last_at:
                        waits.append(now - last_at)
                    last_at = now


async def send_prompts(
    session: aiohttp.ClientSession, url: str, chance: random.Random, lengths: list[int], until: float
) -> int:
    """Tokens of the prompts that were through."""
    done = 0
    while time.monotonic() < until:
        prompt = chance.choices(IDS, k=chance.randint(*lengths))
        async with session.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 1}) as response:
            assert response.status == 200, await response.text()
        done += len(prompt)
    return done


async def one_round(instance: Served, seed: int, arguments: Any) -> dict[str, float]:
    chance = random.Random(seed)
    waits: list[float] = []
    async with asyncio.timeout(ROUND_S), aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begun_at = time.monotonic()
        until = begun_at + arguments.seconds
        streaming = [asyncio.create_task(stream(session, instance.url, waits, until)) for _ in range(arguments.streams)]
        sending = [
            send_prompts(session, instance.url, random.Random(chance.random()), arguments.prompt, until)
            for _ in range(arguments.clients)
        ]
        sent = await asyncio.gather(*sending)
        took_s = time.monotonic() - begun_at
        await asyncio.gather(*streaming)
    return {
        "prompt_tokens_per_s": sum(sent) / took_s,
        "generated_tokens_per_s": len(waits) / arguments.seconds,
        "median_wait_ms": 1e3 * statistics.median(waits),
        "longest_wait_ms": 1e3 * max(waits),
    }


async def measure(arguments: Any) -> None:
    found: dict[float, list[dict[str, float]]] = {delay: [] for delay in arguments.delays}
    words = [arguments.model] if arguments.model else []
    words += ["--attention-workers", "1", "--expert-workers", "1", "--threads-per-worker", "1"]
    async with contextlib.AsyncExitStack() as stack:
        instances = {
            delay: await stack.enter_async_context(served(*words, "--prefill-delay", f"{delay:g}"))
            for delay in arguments.delays
        }
        for turn in range(arguments.rounds + 1):
            for delay in instances if turn % 2 else reversed(instances):
                seen = await one_round(instances[delay], turn, arguments)
                if turn:  # the first one warms
                    found[delay].append(seen)
                    print(
                        json.dumps({"delay_ms": delay} | {name: round(of, 1) for name, of in seen.items()}), flush=True
                    )
    for delay, rounds in found.items():
        medians = {name: round(statistics.median(one[name] for one in rounds), 1) for name in rounds[0]}
        print(json.dumps({"delay_ms": delay, "medians_of": len(rounds)} | medians))


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", help="the demo model without it")
    parser.add_argument("--delays", type=number(0, 1e6), nargs="+", default=[0.0, 50.0], metavar="MS", help="0 50")
    parser.add_argument("--streams", type=integer(1, 256), default=4, metavar="N", help="at a time; 4")
    parser.add_argument("--clients", type=integer(1, 256), default=3, metavar="N", help="that send prompts; 3")
    parser.add_argument("--prompt", type=integer(1, 100_000), nargs=2, default=[300, 1000], metavar="N",
                        help="tokens of a prompt, from and to; 300 1000")  # fmt: skip
    parser.add_argument("--seconds", type=number(1, 600), default=10.0, metavar="S", help="of a round; 10")
    parser.add_argument("--rounds", type=integer(1, 100), default=5, metavar="N", help="of each in turn; 5")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
