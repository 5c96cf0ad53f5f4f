#!/usr/bin/env python3
"""Goodput under overload: requests that have their tokens in time, at multiples of the load that the instance can take.

    tools/bench_overload.py                          # under the virtual clock: the same to the bit each time
    tools/bench_overload.py --real --seconds 30      # the demo model on this machine
    tools/bench_overload.py --real --urgent 0.2 --hurried 0.2 --within 4

Arrivals are Poisson and do not wait for answers (open loop); lengths are log-normal. Capacity is the rate at which as
many requests are finished when all come at once. A request counts as good if its first token comes within `--ttft-slo`
and each further one takes at most `--tpot-slo` on average (milliseconds), whatever the server was told; goodput is good
requests over the time in which requests came. At each load the instance runs twice: told of both objectives, and not.
With `--urgent` that share of requests goes before the others (priority -1), and with `--hurried` that share gives its
whole answer so many seconds (`--within`; what would come later is ended): these are told apart.
Prints a JSON line per run, and at the end the goodput at the greatest load over that at capacity.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from msi import Engine, SamplingParams
from msi.errors import EngineError
from msi.settings import SchedulerLimits, ServiceLevel
from msi.simulator.deployment import Deployment
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival, lognormal_lengths, poisson
from msi_launch.command_line import ScriptLine, number

INPUT_LEN, OUTPUT_LEN = 96, 32  # medians
URGENT = -1  # their priority


@dataclass(frozen=True)
class LinearCosts:
    """The paper's T_a = k1 b + k2 and T_e = k3 b + k4, in seconds, as a small model on a CPU has them."""

    def attention_s(self, num_tokens: int, num_context_tokens: int) -> float:
        return 20e-6 * num_tokens + 50e-9 * num_context_tokens + 0.4e-3

    def pass_s(self, num_logit_rows: int) -> float:
        return 20e-6 * num_logit_rows + 0.2e-3

    def expert_s(self, num_expert_rows: float, num_active_experts: int) -> float:
        return 10e-6 * num_expert_rows + 0.4e-3

    def comm_s(self, num_bytes: int) -> float:
        return 0.05e-3


@dataclass(frozen=True)
class Result:
    """One request; times in seconds, None where it did not come."""

    ttft_s: float | None
    tpot_s: float | None
    num_tokens: int
    error: str = ""

    def is_good(self, service: ServiceLevel) -> bool:
        if self.error or self.ttft_s is None or self.ttft_s > service.ttft_slo_ms / 1000:
            return False
        return self.tpot_s is None or self.tpot_s <= service.tpot_slo_ms / 1000


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("--real", action="store_true", help="the demo model on this machine")
    parser.add_argument("--told-alone", action="store_true", help="leave out the runs that are told of no objective")
    parser.add_argument("--seconds", type=float, default=20.0, help="in which requests come")
    parser.add_argument("--loads", default="0.5,1,2,3", help="multiples of capacity")
    parser.add_argument("--ttft-slo", type=int, default=1000)
    parser.add_argument("--tpot-slo", type=int, default=100)
    parser.add_argument("--attention-workers", type=int, default=1)
    parser.add_argument("--expert-workers", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--urgent", type=number(None, 1), default=0.0, metavar="F", help="share that goes first")
    parser.add_argument("--hurried", type=number(None, 1), default=0.0, metavar="F", help="share with little time")
    parser.add_argument("--within", type=number(0, 1e4), default=4.0, metavar="S", help="so much; 4")
    parser.add_argument("--seed", type=int, default=0)
    values: argparse.Namespace = parser.parse_args(arguments)
    return values


def simulated(values: argparse.Namespace, arrivals: Sequence[Arrival], service: ServiceLevel) -> list[Result]:
    limits = SchedulerLimits(
        max_model_len=4096, max_num_seqs=values.max_num_seqs, max_num_waiting=100_000, enable_prefix_caching=False,
        num_gpu_blocks_override=4096,
    )  # fmt: skip
    deployment = Deployment(
        num_layers=4, num_experts=8, top_k=2, num_attention=values.attention_workers, num_expert=values.expert_workers,
        num_micro_batches=2, limits=limits, service=service,
    )  # fmt: skip
    report = simulate(deployment, LinearCosts(), arrivals, seed=values.seed)
    return [Result(one.ttft_s, one.tpot_s, one.num_tokens, one.error_kind) for one in report.requests]


async def real(engine: Engine, arrivals: Sequence[Arrival]) -> list[Result]:
    started, chance = time.monotonic(), random.Random(1)
    vocab_size = engine.welcome.vocab_size

    async def one(arrival: Arrival, prompt: list[int]) -> Result:
        await asyncio.sleep(max(0.0, started + arrival.arrival_s - time.monotonic()))
        came, times = time.monotonic(), []
        params = SamplingParams(max_tokens=arrival.output_len, temperature=0, ignore_eos=True)
        try:
            priority, timeout_s = arrival.priority, arrival.timeout_s
            async for output in engine.generate(prompt, params, priority=priority, timeout_s=timeout_s):
                times += [time.monotonic()] * len(output.token_ids)
        except EngineError as error:
            return Result(None, None, len(times), type(error).__name__)
        tpot_s = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
        return Result(times[0] - came, tpot_s, len(times))

    prompts = [[chance.randrange(3, vocab_size) for _ in range(one.input_len)] for one in arrivals]
    return await asyncio.gather(*map(one, arrivals, prompts))


def told(
    name: str, load: float, arrivals: Sequence[Arrival], results: list[Result], seconds: float, promised: ServiceLevel
) -> float:
    """Prints what was found; goodput in requests per second."""
    good = sum(one.is_good(promised) for one in results)
    ttfts = sorted(one.ttft_s for one in results if one.ttft_s is not None and not one.error)
    line = {
        "run": name, "load": load, "requests": len(results), "good": good, "goodput_per_s": round(good / seconds, 2),
        "refused": sum(bool(one.error) for one in results),
        "ttft_p50_s": round(ttfts[len(ttfts) // 2], 3) if ttfts else None,
        "ttft_p99_s": round(ttfts[int(0.99 * (len(ttfts) - 1))], 3) if ttfts else None,
        "tokens_per_s": round(sum(one.num_tokens for one in results) / seconds, 1),
    }  # fmt: skip
    kinds: dict[str, list[Result]] = {}
    for arrival, one in zip(arrivals, results, strict=True):
        kinds.setdefault(kind_of(arrival), []).append(one)
    if len(kinds) > 1:
        line["kinds"] = {kind: shares(each, promised) for kind, each in sorted(kinds.items())}
    print(json.dumps(line), flush=True)
    return good / seconds


def shares(results: Sequence[Result], promised: ServiceLevel) -> dict[str, float]:
    """Of one kind of request: good ones, those that ended with an error after tokens, and those without any."""
    counts = {
        "good": sum(one.is_good(promised) for one in results),
        "cut_off": sum(bool(one.error and one.num_tokens) for one in results),
        "refused": sum(bool(one.error and not one.num_tokens) for one in results),
    }
    return {what: round(count / len(results), 3) for what, count in counts.items()}


def arrivals_of(values: argparse.Namespace, per_s: float) -> list[Arrival]:
    """Poisson, of as many seconds as were asked for."""
    lengths = lognormal_lengths(INPUT_LEN, OUTPUT_LEN, most=400)
    many = poisson(int(2 * per_s * values.seconds) + 100, per_s, lengths, values.seed)
    chance = random.Random(values.seed)

    def of_a_kind(one: Arrival) -> Arrival:
        drawn = chance.random()
        if drawn < values.urgent:
            return replace(one, priority=URGENT)
        return replace(one, timeout_s=values.within) if drawn < values.urgent + values.hurried else one

    return [of_a_kind(one) for one in many if one.arrival_s < values.seconds]


def kind_of(arrival: Arrival) -> str:
    return "urgent" if arrival.priority == URGENT else "hurried" if arrival.timeout_s else "usual"


async def main() -> int:
    values = parse()
    promised = ServiceLevel(ttft_slo_ms=values.ttft_slo, tpot_slo_ms=values.tpot_slo)
    loads = [float(one) for one in values.loads.split(",")]

    async def run(arrivals: Sequence[Arrival], service: ServiceLevel) -> list[Result]:
        if not values.real:
            return await asyncio.to_thread(simulated, values, arrivals, service)
        options = {
            "attention_workers": values.attention_workers, "expert_workers": values.expert_workers,
            "max_num_seqs": values.max_num_seqs, "enable_prefix_caching": False, "micro_batches": 2,
            "max_num_waiting": 100_000, "ttft_slo": service.ttft_slo_ms, "tpot_slo": service.tpot_slo_ms,
        }  # fmt: skip
        async with Engine.local(**options) as engine:
            return await real(engine, arrivals)

    burst = [
        replace(one, arrival_s=0.0, priority=0, timeout_s=0.0) for one in arrivals_of(values, 400 / values.seconds)
    ]
    before = time.monotonic()
    results = await run(burst, ServiceLevel())
    elapsed_s = max((one.ttft_s or 0.0) + (one.tpot_s or 0.0) * (one.num_tokens - 1) for one in results)
    capacity = len(burst) / elapsed_s
    print(json.dumps({"capacity_per_s": round(capacity, 2), "took_s": round(time.monotonic() - before, 1)}), flush=True)
    goodput: dict[tuple[str, float], float] = {}
    for load in loads:
        arrivals = arrivals_of(values, load * capacity)
        for name, service in (("told", promised), ("not told", ServiceLevel()))[: 1 if values.told_alone else 2]:
            results = await run(arrivals, service)
            goodput[name, load] = told(name, load, arrivals, results, values.seconds, promised)
    ratios = {
        name: round(goodput[name, max(loads)] / goodput[name, 1.0], 3)
        for name in ("told", "not told")
        if goodput.get((name, 1.0))
    }
    print(json.dumps({"goodput_at_greatest_load_over_that_at_capacity": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
