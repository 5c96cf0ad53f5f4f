#!/usr/bin/env python3
"""A deployment under a virtual clock: what throughput and latency it would have, without the hardware.

    tools/simulate.py --attention-workers 8 --expert-workers 8 --micro-batches 3 --requests 500 --rate 20
    tools/simulate.py --requests-file trace.jsonl --fault attention-0:slow:10@5 --fault expert-1:dead@20 --json
    tools/simulate.py --plan plan.json --requests 2000 --rate 150
    tools/simulate.py --attention-ms 0.9 --expert-ms 0.9 --comm-ms 0.2 --trace simulated.json

Scheduler, lanes, waves, workers and coordinator are the product's own; devices and networks take the times given here
or predicted for a plan, one layer of one micro-batch at a time. The model's numbers default to Mixtral-8x22B's. --trace
writes a Chrome trace as `msi-launch --trace` does. Equal seeds give equal results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from msi.errors import ConfigError
from msi.planner.plan_file import read_plan_file
from msi.planner.stage_costs import ConstantCosts, StageCosts
from msi.simulator.deployment import Deployment, parse_fault
from msi.simulator.planned import deployment_of_plan
from msi.simulator.popularity import read_popularity
from msi.simulator.report import Percentiles, Report
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival, bursts, fixed_lengths, lognormal_lengths, poisson, read_trace
from msi_launch.command_line import ScriptLine


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    shape = parser.add_argument_group("deployment")
    shape.add_argument("--plan", type=Path, help="what msi-plan -o wrote: deployment and stage times are the plan's")
    shape.add_argument("--attention-workers", type=int, default=1)
    shape.add_argument("--expert-workers", type=int, default=1)
    shape.add_argument("--micro-batches", default="auto", help="auto (measured, as at a real start) or 1 to 4")
    shape.add_argument("--colocated", action="store_true", help="both roles in one worker")
    shape.add_argument("--layers", type=int, default=56, help="those with experts")
    shape.add_argument("--experts", type=int, default=8)
    shape.add_argument("--top-k", type=int, default=2)
    shape.add_argument("--row-bytes", type=int, default=12_288, help="of a row on its way to the experts and back")
    shape.add_argument("--kv-blocks", type=int, default=8192, help="of 16 tokens, per attention worker")
    shape.add_argument("--max-num-seqs", type=int, default=256, help="per attention worker")
    shape.add_argument("--max-num-batched-tokens", type=int, default=0, help="per micro-batch; by default --slot-rows")
    shape.add_argument("--slot-rows", type=int, default=512)
    shape.add_argument("--max-model-len", type=int, default=65_536)
    costs = parser.add_argument_group("stage times, whatever the size of a batch")
    costs.add_argument("--attention-ms", type=float, default=1.0, help="T_a")
    costs.add_argument("--expert-ms", type=float, default=1.0, help="T_e")
    costs.add_argument("--comm-ms", type=float, default=0.2, help="T_c, one way")
    costs.add_argument("--pass-ms", type=float, default=0.5, help="embedding, head and sampling, once per pass")
    load = parser.add_argument_group("requests")
    load.add_argument("--requests-file", type=Path, help="JSON lines with arrival_s, input_len and output_len")
    load.add_argument("--requests", type=int, default=100)
    load.add_argument("--rate", type=float, default=10.0, help="Poisson arrivals per second")
    load.add_argument("--burst", type=int, default=0, help="so many at once instead, every --burst-s seconds")
    load.add_argument("--burst-s", type=float, default=10.0)
    load.add_argument("--input-len", type=int, help="by default log-normal around the paper's median, 571")
    load.add_argument("--output-len", type=int, help="by default log-normal around the paper's median, 159")
    load.add_argument(
        "--popularity", default="uniform", help="uniform, uniform-drawn, zipf:EXPONENT, or a JSON file of weights"
    )
    parser.add_argument("--fault", action="append", default=[], metavar="WORKER:KIND[:AMOUNT]@SECONDS",
                        help="slow by a factor, stalled for seconds, or dead; may be repeated")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace for Perfetto to this file")
    values: argparse.Namespace = parser.parse_args(arguments)
    return values


def deployment_of(args: argparse.Namespace) -> tuple[Deployment, StageCosts]:
    """Raises ConfigError."""
    if args.plan is not None:
        return deployment_of_plan(read_plan_file(args.plan))
    if args.micro_batches != "auto" and not args.micro_batches.isdecimal():
        raise ConfigError(f"--micro-batches {args.micro_batches}: give auto or 1 to 4")
    deployment = Deployment(
        num_layers=args.layers,
        num_experts=args.experts,
        top_k=args.top_k,
        num_attention=args.attention_workers,
        num_expert=args.expert_workers,
        num_micro_batches=0 if args.micro_batches == "auto" else int(args.micro_batches),
        is_colocated=args.colocated,
        row_bytes=args.row_bytes,
        answer_row_bytes=args.row_bytes,
        num_kv_blocks=args.kv_blocks,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        slot_rows=args.slot_rows,
        max_model_len=args.max_model_len,
    )
    stages_s = []
    for name in ("attention", "expert", "comm", "pass"):
        milliseconds = getattr(args, f"{name}_ms")
        if not 0 <= milliseconds < math.inf:
            raise ConfigError(f"--{name}-ms {milliseconds:g}: give milliseconds of at least 0")
        stages_s.append(milliseconds / 1e3)
    return deployment, ConstantCosts(*stages_s)


def arrivals_of(args: argparse.Namespace) -> list[Arrival]:
    """Raises ConfigError."""
    if args.requests_file is not None:
        return read_trace(args.requests_file)
    fixed = (args.input_len, args.output_len)
    if fixed == (None, None):
        lengths = lognormal_lengths()
    elif None in fixed:
        raise ConfigError("give both --input-len and --output-len, or neither")
    else:
        lengths = fixed_lengths(*fixed)
    if args.burst:
        return bursts(args.requests, args.burst, args.burst_s, lengths, args.seed)
    return poisson(args.requests, args.rate, lengths, args.seed)


def run(args: argparse.Namespace) -> tuple[Deployment, Report]:
    """Raises ConfigError."""
    deployment, costs = deployment_of(args)
    arrivals = arrivals_of(args)
    faults = [parse_fault(text) for text in args.fault]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=None)
        report = simulate(
            deployment,
            costs,
            arrivals,
            popularity=read_popularity(args.popularity),
            faults=faults,
            seed=args.seed,
            trace=args.trace,
            report_progress=_seldom(lambda done, wanted: progress.update(task, completed=done, total=wanted)),
        )
    return deployment, report


def _seldom(update: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """At most ten times a second of the wall clock's."""
    last_at = 0.0

    def maybe(done: int, wanted: int) -> None:
        nonlocal last_at
        if (now := time.monotonic()) - last_at > 0.1:
            last_at = now
            update(done, wanted)

    return maybe


def show(report: Report, console: Console) -> None:
    summary = Table(title="Simulated", show_header=False)
    for name, value in (
        ("requests", f"{report.num_requests}, of which {report.num_failed} failed"),
        ("virtual time", f"{report.duration_s:.2f} s"),
        ("micro-batches", str(report.num_micro_batches)),
        ("throughput", f"{report.tokens_per_s:.1f} tokens/s, {report.requests_per_s:.2f} requests/s"),
        ("time to first token", _times(report.ttft_s)),
        ("time per output token", _times(report.tpot_s)),
        ("messages", f"{report.num_messages:,}"),
    ):
        summary.add_row(name, value)
    console.print(summary)
    workers = Table("worker", "busy", "bubble", title="Workers")
    for worker in report.workers:
        workers.add_row(worker.worker_id, f"{worker.busy:.1%}", f"{worker.bubble:.1%}")
    console.print(workers)
    for (kind, reason), count in Counter((one.error_kind, one.error) for one in report.failed).most_common(10):
        console.print(f"{count} x {kind}: {reason}", highlight=False)


def _times(times: Percentiles | None) -> str:
    if times is None:
        return "-"
    return f"p50 {times.p50_s * 1e3:.1f} ms, p90 {times.p90_s * 1e3:.1f} ms, p99 {times.p99_s * 1e3:.1f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        deployment, report = run(args)
    except ConfigError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"deployment": asdict(deployment)} | report.to_json()))
    else:
        show(report, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
