#!/usr/bin/env python3
"""Half an hour of mixed load: does anything grow, hang or break?

    tools/soak.py --minutes 30

Random prompts (some with common beginnings), lengths, sampling and cancels, with a KV cache so small that blocks run
out. Every minute prints a JSON line: requests so far, errors, resident memory of all processes; the last line compares
memory after the first fifth with memory at the end. Exits with status 1 if a request failed, none of the last minute's
ended, a KV block was lost, or memory grew by more than 5 %. `--requests` ends it after so many instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from contextlib import aclosing
from pathlib import Path

from msi import Engine, SamplingParams
from msi.errors import EngineError
from msi_launch.command_line import ScriptLine

GROWTH = 1.05
KV_BLOCKS = 96


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="the demo model without it")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--attention-workers", type=int, default=2)
    parser.add_argument("--expert-workers", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--transport", default="auto")
    values: argparse.Namespace = parser.parse_args()
    return values


class Load:
    """Clients that ask, sometimes change their minds, and ask again."""

    def __init__(self, engine: Engine) -> None:
        self.finished = self.cancelled = self.started = 0
        self.errors: list[str] = []
        self._engine = engine
        self._chance = random.Random(0)
        self._beginnings = [self._tokens(48 * (1 + index % 3)) for index in range(12)]

    def _tokens(self, count: int) -> list[int]:
        return [self._chance.randrange(3, 1500) for _ in range(count)]

    async def client(self, is_over: asyncio.Event, limit: int) -> None:
        chance = self._chance
        while not is_over.is_set() and not (limit and self.started >= limit):
            self.started += 1
            prompt = (chance.choice(self._beginnings) if chance.random() < 0.5 else []) + self._tokens(
                chance.randrange(1, 120)
            )
            params = SamplingParams(
                max_tokens=chance.randrange(1, 60), temperature=chance.choice([0.0, 0.8]), top_p=0.95,
                seed=chance.randrange(2**32), ignore_eos=True,
            )  # fmt: skip
            stop_after = chance.randrange(0, 20) if chance.random() < 0.2 else -1
            try:
                await self._one(prompt, params, stop_after)
            except EngineError as error:
                self.errors.append(str(error))

    async def _one(self, prompt: list[int], params: SamplingParams, stop_after: int) -> None:
        seen = 0
        async with aclosing(self._engine.generate(prompt, params)) as outputs:
            async for output in outputs:
                seen += len(output.token_ids)
                if 0 <= stop_after <= seen and output.finish_reason is None:
                    self.cancelled += 1
                    return
        self.finished += 1


def resident_bytes(engine: Engine) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(
        int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in [*engine.pids.values(), os.getpid()]
    )


async def main() -> int:
    arguments = parse()
    async with Engine.local(
        model=arguments.model, attention_workers=arguments.attention_workers, transport=arguments.transport,
        expert_workers=arguments.expert_workers, micro_batches=arguments.micro_batches, threads_per_worker=1,
        num_gpu_blocks_override=KV_BLOCKS,
    ) as engine:  # fmt: skip
        load, is_over = Load(engine), asyncio.Event()
        clients = [
            asyncio.ensure_future(load.client(is_over, arguments.requests)) for _ in range(arguments.concurrency)
        ]
        begun = time.monotonic()
        early = progress = 0
        stuck = False
        while not all(client.done() for client in clients):
            await asyncio.wait(clients, timeout=60.0 if not arguments.requests else 5.0)
            minutes = (time.monotonic() - begun) / 60
            share = load.started / arguments.requests if arguments.requests else minutes / arguments.minutes
            memory = resident_bytes(engine)
            if not early and share >= (0.1 if arguments.requests else 0.2):
                early = memory
            stuck = load.finished == progress and not is_over.is_set()
            progress = load.finished
            print(
                json.dumps(
                    {
                        "minutes": round(minutes, 1), "finished": load.finished, "cancelled": load.cancelled,
                        "errors": len(load.errors), "memory_bytes": memory,
                    }
                ),
                flush=True,
            )  # fmt: skip
            if share >= 1 or stuck:
                is_over.set()
        await asyncio.gather(*clients)
        late = resident_bytes(engine)
        await asyncio.sleep(3.0)  # a heartbeat, so that the counters are those of idle workers
        stats = await engine.stats()
    counters = [worker.status.counters for worker in stats.workers if worker.role == "attention"]
    lost = sum(one["kv_blocks_lost"] for one in counters)
    summary = {
        "finished": load.finished,
        "cancelled": load.cancelled,
        "errors": load.errors[:3],
        "kv_blocks_lost": lost,
        "preemptions": sum(one["preemptions"] for one in counters),
        "prefix_hit_tokens": sum(one["prefix_hit_tokens"] for one in counters),
        "memory_late_over_early": late / early if early else None,
    }
    print(json.dumps(summary))
    return int(bool(load.errors) or stuck or lost > 0 or (early > 0 and late > GROWTH * early))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
