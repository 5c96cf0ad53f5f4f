#!/usr/bin/env python3
"""What a second micro-batch brings at equal micro-batch size: m=2 against m=1, one attention and one expert worker.

    tools/bench_pingpong.py --batch 16 --input-len 640

A random Mixtral whose T_a and T_e are close to each other; `--intermediate-size` and `--input-len` move them. The total
batch doubles with m, so a micro-batch stays the same size. Both instances live all the time and take turns. Prints a
JSON line per run and one with the medians: the ratio of decode tokens/s, and for each m the measured pass over the
steady pass L max(m T_f, T_a + T_e + 2 T_c) of the stages measured meanwhile (without and with the head and sampling,
which belong to the attention worker but to no layer).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

from msi import Engine, SamplingParams
from msi.control.client_messages import Stats
from msi.planner.pipeline import Stages, steady_pass_s
from msi_launch.command_line import ScriptLine

VOCAB_SIZE = 2048


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("--batch", type=int, default=16, help="sequences per micro-batch")
    parser.add_argument("--input-len", type=int, default=640)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=640)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads-per-worker", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2])
    values: argparse.Namespace = parser.parse_args(words)
    return values


def config(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
        "hidden_size": arguments.hidden_size, "intermediate_size": arguments.intermediate_size,
        "num_hidden_layers": arguments.layers, "num_attention_heads": 16, "num_key_value_heads": 4,
        "num_local_experts": arguments.experts, "num_experts_per_tok": 2, "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


async def run(engine: Engine, num_lanes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One batch; what is counted is the time in which all its sequences decode."""
    chance = random.Random(0)
    params = SamplingParams(max_tokens=arguments.output_len, temperature=0, ignore_eos=True)
    seen: list[list[float]] = []

    async def one() -> None:
        times: list[float] = []
        seen.append(times)
        prompt = tuple(chance.randrange(3, VOCAB_SIZE) for _ in range(arguments.input_len))
        async for output in engine.generate(prompt, params):
            times += [time.monotonic()] * len(output.token_ids)

    requests = [asyncio.ensure_future(one()) for _ in range(num_lanes * arguments.batch)]
    samples: list[tuple[float, Stats]] = []
    while not all(request.done() for request in requests):
        samples.append((time.monotonic(), await engine.stats()))
        await asyncio.wait(requests, timeout=0.2)
    await asyncio.gather(*requests)
    begin, end = max(times[0] for times in seen), min(times[-1] for times in seen)
    counted = sum(1 for times in seen for at in times if begin < at <= end)
    if not counted:
        raise SystemExit("the batch never decoded as a whole; give a longer --output-len")
    rate = counted / (end - begin)
    _, stats = max((at, stats) for at, stats in samples if at < end)  # medians of the last stages: decoding alone
    (attention,) = (worker.status for worker in stats.workers if worker.role == "attention")
    stages = Stages(attention.times.attention_s, attention.times.expert_s, attention.times.comm_s)
    sample_s = attention.counters["sample_s"] / max(1.0, attention.counters["passes"])
    steady_s = steady_pass_s(stages, num_lanes, arguments.layers)
    pass_s = num_lanes * arguments.batch / rate
    return {
        "m": num_lanes, "decode_tokens_per_s": rate, "t_attention_s": stages.attention_s,
        "t_expert_s": stages.expert_s, "t_comm_s": stages.comm_s, "t_sample_s": sample_s, "pass_s": pass_s,
        "steady_pass_s": steady_s, "pass_over_steady": pass_s / steady_s,
        "pass_over_steady_with_sampling": pass_s / (steady_s + num_lanes * sample_s),
    }  # fmt: skip


async def main() -> None:
    arguments = parse()
    found: dict[int, list[dict[str, Any]]] = {m: [] for m in arguments.micro_batches}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config(arguments)))
        async with AsyncExitStack() as stack:
            engines = {
                m: await stack.enter_async_context(
                    Engine.local(
                        model=Path(folder), load_format="dummy", micro_batches=m, report=progress,
                        threads_per_worker=arguments.threads_per_worker, gpu_memory_utilization=0.3,
                        max_num_seqs=m * arguments.batch,
                    )
                )
                for m in arguments.micro_batches
            }  # fmt: skip
            for _ in range(arguments.repeat):
                for m, engine in engines.items():
                    found[m].append(await run(engine, m, arguments))
                    print(json.dumps(found[m][-1]), flush=True)
    names = next(iter(found.values()))[0].keys()
    medians = {m: {name: median(one[name] for one in runs) for name in names} for m, runs in found.items()}
    first = arguments.micro_batches[0]
    ratios = {
        f"m{m}_over_m{first}": median(
            a["decode_tokens_per_s"] / b["decode_tokens_per_s"] for a, b in zip(runs, found[first], strict=True)
        )
        for m, runs in found.items()
        if m != first
    }
    print(json.dumps({"medians": list(medians.values()), **ratios}))


def progress(sentence: str) -> None:
    if sys.stderr.isatty():
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main())
