#!/usr/bin/env python3
"""What moving a request to another attention worker costs: its KV cache sent, or computed again.

    tools/bench_migration.py                      # the demo model
    tools/bench_migration.py MODEL --contexts 128 512 2048 --dtype bfloat16
    tools/bench_migration.py --moves --contexts 768 --transport shm tcp

A request goes on elsewhere when its worker is lost, is drained, or has too much to do. Of a lost worker nothing can be
sent; of the others the KV cache of `context` tokens is. Computing it again is measured as the time to the first token
of a prompt of so many tokens, on 1 + 1 workers that have nothing else to do; sending, as its bytes over the throughput
of one process to one over our data plane (`tools/bench_m2n.py`, messages of 1 MB), and two ways of one message. What
that leaves out makes sending look better: blocks have to be laid out, agreed on, and awaited.

With --moves it is done: a stream of 2 + 1 workers whose attention worker is removed, and the longest time between two
of its tokens from then on, less the median before; with blocks sent, and, in turns with that, on an instance without a
prefix cache, where they are computed again. Medians; the tokens of both are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above
from msi import Engine, SamplingParams
from msi.control.client_messages import WorkerStats
from msi.control.orders import Order, Ordered
from msi.models.families import load_config
from msi.settings import DEMO_MODEL
from msi_launch.command_line import ScriptLine, integer

VALUE_BYTES = {"float32": 4, "bfloat16": 2}
MESSAGE = "1M"
ANSWER, MOVED_AFTER = 240, 30  # tokens of an answer that moves, and those before that
LOOK_EVERY_S = 0.02


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO_MODEL, help="the demo model without it")
    parser.add_argument("--contexts", type=integer(1, 100_000), nargs="+", default=[64, 256, 768], metavar="N")
    parser.add_argument("--dtype", choices=list(VALUE_BYTES), default="float32", help="of KV cache and computing")
    parser.add_argument("--transport", nargs="+", default=["shm", "tcp"], metavar="T", help="shm tcp")
    parser.add_argument("--moves", action="store_true", help="move requests, and measure the pauses of their streams")
    parser.add_argument("--rounds", type=integer(1, 1000), default=5, metavar="N")
    values: argparse.Namespace = parser.parse_args()
    return values


async def computed_s(values: argparse.Namespace, vocab_size: int) -> list[float]:
    """For each context, the median."""
    chance, params = random.Random(0), SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    times: list[list[float]] = [[] for _ in values.contexts]
    async with Engine.local(
        model=values.model, attention_workers=1, expert_workers=1, threads_per_worker=1, dtype=values.dtype,
        enable_prefix_caching=False, max_num_seqs=8,
    ) as engine:  # fmt: skip
        for number in range(1 + values.rounds):
            for context, of_one in zip(values.contexts, times, strict=True):
                prompt = [chance.randrange(3, vocab_size) for _ in range(context)]
                started = time.monotonic()
                async for _ in engine.generate(prompt, params):
                    pass
                if number:  # the first warms up
                    of_one.append(time.monotonic() - started)
    return [median(of_one) for of_one in times]


def link(transport: str) -> tuple[float, float]:
    """Bytes per second of one process to one, and seconds of one message."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "m2n.json"
        subprocess.run(
            [
                sys.executable, str(Path(__file__).with_name("bench_m2n.py")), "--senders", "1", "--receivers", "1",
                "--sizes", f"4K,{MESSAGE}", "--pattern", "dispatch", "--transport", transport, "--against", "",
                "--turns", "3", "--json", str(output),
            ],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        small, large = json.loads(output.read_text())["rows"]
    return large["gbytes_per_s"] * 1e9, small["median_us"] * 1e-6


def compared(context: int, again_s: float, token_bytes: int, ways: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """One line."""
    num_bytes = context * token_bytes
    sent = {name: num_bytes / rate + 2 * latency_s for name, (rate, latency_s) in ways.items()}
    return {
        "context": context,
        "kv_mbytes": round(num_bytes / 1e6, 3),
        "computed_again_ms": round(1e3 * again_s, 2),
        **{f"sent_{name}_ms": round(1e3 * seconds, 3) for name, seconds in sent.items()},
        **{f"again_over_{name}": round(again_s / seconds, 1) for name, seconds in sent.items()},
    }


def _runs(worker: WorkerStats) -> bool:
    return worker.role == "attention" and worker.status.num_running > 0


async def moved(engine: Engine, prompt: list[int]) -> tuple[float, list[int]]:
    """Seconds that a stream paused, and its tokens."""
    client = engine._require_client()
    token_ids: list[int] = []
    came_at: list[float] = []
    params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
    leaving: asyncio.Task[Ordered] | None = None
    asked_at = 0

    async def leave() -> Ordered:
        nonlocal asked_at
        while not (names := [one.worker_id for one in (await engine.stats()).workers if _runs(one)]):
            await asyncio.sleep(LOOK_EVERY_S)  # who runs it is told with signs of life
        asked_at = len(came_at)
        return await client.order(Order(0, "remove", names[0], "", 60.0))

    async for output in engine.generate(prompt, params):
        token_ids += output.token_ids
        came_at.append(time.monotonic())
        if len(token_ids) >= MOVED_AFTER and leaving is None:
            leaving = asyncio.create_task(leave())
    assert leaving is not None
    assert leaving.done() or asked_at, f"an answer of {ANSWER} tokens ended before its worker was known"
    for answer in (await leaving, await client.order(Order(0, "add", "", "attention", 60.0))):
        assert not answer.failure, answer.failure
    gaps = [later - sooner for sooner, later in itertools.pairwise(came_at)]
    return max(gaps[asked_at - 1 :]) - median(gaps[: asked_at - 1]), token_ids


async def pauses(values: argparse.Namespace, transport: str, context: int, vocab_size: int) -> dict[str, Any]:
    """One line."""
    chance = random.Random(context)

    def started(caches: bool) -> Engine:
        return Engine.local(
            model=values.model, attention_workers=2, expert_workers=1, threads_per_worker=1, dtype=values.dtype,
            enable_prefix_caching=caches, max_num_seqs=8, micro_batches=1, transport=transport,
        )  # fmt: skip

    sent_s, again_s = [], []
    async with started(True) as sending, started(False) as computing:
        for number in range(1 + values.rounds):
            prompt = [chance.randrange(3, vocab_size) for _ in range(context)]
            (sent, tokens), (again, others) = await moved(sending, prompt), await moved(computing, prompt)
            assert tokens == others, "a move changed the answer"
            if number:
                sent_s.append(sent)
                again_s.append(again)
        counts = [one.status.attention for one in (await sending.stats()).workers if one.status.attention is not None]
        moves = [(await one.stats()).counters["moves"] for one in (sending, computing)]
    return {
        "context": context,
        "transport": transport,
        "pause_sent_ms": round(1e3 * median(sent_s), 1),
        "pause_again_ms": round(1e3 * median(again_s), 1),
        "again_over_sent": round(median(a / s for a, s in zip(again_s, sent_s, strict=True)), 1),
        "sent_ms": [round(1e3 * one, 1) for one in sent_s],
        "again_ms": [round(1e3 * one, 1) for one in again_s],
        "moves": moves,
        "blocks_received_by_those_left": [one.kv_blocks_received for one in counts],
    }


def main() -> None:
    values = parse()
    if values.moves:
        config, _ = load_config(values.model)
        for transport in values.transport:
            for context in values.contexts:
                print(json.dumps(asyncio.run(pauses(values, transport, context, config.vocab_size))), flush=True)
        return
    config, _ = load_config(values.model)
    token_bytes = config.kv_values_per_token * VALUE_BYTES[values.dtype]
    ways = {name: link(name) for name in values.transport}
    print(json.dumps({name: f"{rate / 1e9:.2f} GB/s, {1e6 * us:.0f} us" for name, (rate, us) in ways.items()}))
    for context, again_s in zip(values.contexts, asyncio.run(computed_s(values, config.vocab_size)), strict=True):
        print(json.dumps(compared(context, again_s, token_bytes, ways)))


if __name__ == "__main__":
    main()
