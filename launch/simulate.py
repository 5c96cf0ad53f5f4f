"""msi-simulate: a deployment under a virtual clock: what throughput and latency it would have, without the hardware."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from msi.errors import ConfigError
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.planner.plan_file import read_plan_file
from msi.planner.stage_costs import ConstantCosts, StageCosts
from msi.settings import AttentionBalance, LinkShape, Rebalance
from msi.simulator.balanced import placed_by_popularity
from msi.simulator.deployment import LIMITS, Deployment, parse_fault
from msi.simulator.planned import deployment_of_plan
from msi.simulator.popularity import read_popularity
from msi.simulator.report import Percentiles, Report
from msi.simulator.simulation import simulate
from msi.simulator.workload import Arrival, bursts, fixed_lengths, lognormal_lengths, poisson, read_trace

from .command import open_missing_streams, run_command
from .command_line import CommandLine, file_to_ask, file_to_write, integer, number, one_of

MOST = 1_000_000_000  # of whatever is counted
MOST_S = 1e9


def main() -> None:
    """Runs msi-simulate with the arguments of this process; does not return."""
    open_missing_streams()
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs msi-simulate; the exit status."""
    return run_command("msi-simulate", lambda: _run(argv))


def _run(argv: list[str]) -> None:
    values = parse(argv)
    deployment, report = simulated(values)
    if values.json:
        print(json.dumps({"deployment": asdict(deployment)} | report.to_json()))
    else:
        show(report, Console())


# -- the command line ------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises ConfigError. --help and --version print, and end the process."""
    parser = CommandLine(
        "msi-simulate",
        "Run a deployment under a virtual clock. Scheduler, lanes, waves, workers and coordinator are the product's "
        "own; devices and networks take the times given here, or those predicted for a plan. The model's numbers "
        "default to Mixtral-8x22B's. Equal seeds give equal results.",
        usage="msi-simulate [options]",
    )
    _add_deployment(parser)
    _add_stages(parser)
    _add_requests(parser)
    _add_output(parser)
    values: argparse.Namespace = parser.parse_args(argv)
    return values


def _add_deployment(parser: CommandLine) -> None:
    add = parser.add_argument_group("deployment").add_argument
    add("--plan", type=file_to_ask, metavar="FILE",
        help="what msi-plan -o wrote: deployment and stage times are the plan's")  # fmt: skip
    add("--attention-workers", type=integer(1, MOST), default=1, metavar="N", help="1")
    add("--expert-workers", type=integer(1, MOST), default=1, metavar="N", help="1")
    add("--micro-batches", default="auto", type=one_of("auto", *map(str, range(1, MAX_MICRO_BATCHES + 1))), metavar="M",
        help=f"auto (measured, as at a real start) or 1 to {MAX_MICRO_BATCHES}")  # fmt: skip
    add("--colocated", action="store_true", help="both roles in one worker")
    add("--layers", type=integer(1, MOST), default=56, metavar="N", help="those with experts; 56")
    add("--experts", type=integer(1, MOST), default=8, metavar="N", help="of a layer; 8")
    add("--top-k", type=integer(1, MOST), default=2, metavar="N", help="experts of a token; 2")
    add("--expert-redundancy", type=integer(0, MOST), default=0, metavar="R", help="replicas of each expert; 0")
    add("--redundant-experts", type=integer(0, MOST), default=0, metavar="N", help="replicas on top of that; 0")
    add("--by-popularity", action="store_true",
        help="experts and replicas are placed by --popularity, in the same memory, as rebalancing would")  # fmt: skip
    add("--rebalance-interval", type=number(0, 1e6), metavar="S",
        help="experts are placed anew by load, as by msi-launch --rebalance auto, every S seconds")  # fmt: skip
    add("--balance-attention", action="store_true",
        help="requests move between attention workers, as by msi-launch --balance-attention auto")  # fmt: skip
    add("--row-bytes", type=integer(1, MOST), default=12_288, metavar="N",
        help="of a row on its way to the experts and back; 12288")  # fmt: skip
    add("--kv-blocks", type=integer(1, MOST), default=8192, metavar="N",
        help="of 16 tokens, per attention worker; 8192")  # fmt: skip
    add("--max-num-seqs", type=integer(1, MOST), default=256, metavar="N", help="per attention worker; 256")
    add("--max-num-batched-tokens", type=integer(0, MOST), default=0, metavar="N",
        help="per micro-batch; by default --slot-rows")  # fmt: skip
    add("--slot-rows", type=integer(1, MOST), default=512, metavar="N", help="of a landing slot; 512")
    add("--max-model-len", type=integer(1, MOST), default=65_536, metavar="N", help="tokens of a sequence; 65536")
    add("--fault", action="append", default=[], metavar="WORKER:KIND[:AMOUNT]@SECONDS",
        help="slow by a factor, stalled for seconds, or dead; may be repeated")  # fmt: skip


def _add_stages(parser: CommandLine) -> None:
    add = parser.add_argument_group("stage times, whatever the size of a batch").add_argument
    add("--attention-ms", type=number(0, MOST_S), default=1.0, metavar="MS", help="T_a, of a layer; 1")
    add("--expert-ms", type=number(0, MOST_S), default=1.0, metavar="MS", help="T_e, of a layer; 1")
    add("--comm-ms", type=number(0, MOST_S), default=0.2, metavar="MS", help="T_c, one way; 0.2")
    add("--pass-ms", type=number(0, MOST_S), default=0.5, metavar="MS",
        help="embedding, head and sampling, once per pass; 0.5")  # fmt: skip


def _add_requests(parser: CommandLine) -> None:
    add = parser.add_argument_group("requests").add_argument
    add("--requests-file", type=file_to_ask, metavar="FILE",
        help="JSON lines with arrival_s, input_len and output_len")  # fmt: skip
    add("--requests", type=integer(1, MOST), default=100, metavar="N", help="how many; 100")
    add("--rate", type=number(None, MOST_S), default=10.0, metavar="R", help="Poisson arrivals per second; 10")
    add("--burst", type=integer(0, MOST), default=0, metavar="N", help="so many at once instead, every --burst-s")
    add("--burst-s", type=number(None, MOST_S), default=10.0, metavar="S", help="between bursts; 10")
    add("--input-len", type=integer(1, MOST), metavar="N", help="by default log-normal around the paper's median, 571")
    add("--output-len", type=integer(1, MOST), metavar="N", help="by default log-normal around the paper's median, 159")
    add("--popularity", default="uniform", metavar="P",
        help="of experts: uniform, uniform-drawn, zipf:EXPONENT, layers:EXPONENT (so in each layer, in an order of "
        "its own), or a JSON file of weights")  # fmt: skip
    add("--seed", type=integer(0, 2**63 - 1), default=0, metavar="N", help="0")


def _add_output(parser: CommandLine) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="one JSON object on standard output")
    add("--trace", type=file_to_write, metavar="FILE", help="a Chrome trace for Perfetto, as msi-launch writes it")


# -- what is simulated -----------------------------------------------------------------------------------------------


def deployment_of(args: argparse.Namespace) -> tuple[Deployment, StageCosts]:
    """Raises ConfigError."""
    rebalance = Rebalance("auto", args.rebalance_interval) if args.rebalance_interval else Rebalance()
    balance = AttentionBalance("auto" if args.balance_attention else "off")
    if args.plan is not None:
        deployment, costs = deployment_of_plan(read_plan_file(args.plan))
        replicas = {"expert_redundancy": args.expert_redundancy, "redundant_experts": args.redundant_experts}
        return replace(deployment, rebalance=rebalance, balance=balance, **replicas), costs
    deployment = Deployment(
        num_layers=args.layers,
        num_experts=args.experts,
        top_k=args.top_k,
        num_attention=args.attention_workers,
        num_expert=args.expert_workers,
        num_micro_batches=0 if args.micro_batches == "auto" else int(args.micro_batches),
        is_colocated=args.colocated,
        expert_redundancy=args.expert_redundancy,
        redundant_experts=args.redundant_experts,
        row_bytes=args.row_bytes,
        answer_row_bytes=args.row_bytes,
        limits=replace(
            LIMITS,
            num_gpu_blocks_override=args.kv_blocks,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_model_len=args.max_model_len,
        ),
        link=LinkShape(slot_rows=args.slot_rows),
        rebalance=rebalance,
        balance=balance,
    )
    stages_ms = (args.attention_ms, args.expert_ms, args.comm_ms, args.pass_ms)
    return deployment, ConstantCosts(*(milliseconds / 1e3 for milliseconds in stages_ms))


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


def simulated(args: argparse.Namespace) -> tuple[Deployment, Report]:
    """Raises ConfigError."""
    deployment, costs = deployment_of(args)
    arrivals = arrivals_of(args)
    faults = [parse_fault(text) for text in args.fault]
    popularity = read_popularity(args.popularity)
    if args.by_popularity:
        deployment = placed_by_popularity(deployment, costs, popularity, args.seed)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("simulating", total=None)
        report = simulate(
            deployment,
            costs,
            arrivals,
            popularity=popularity,
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
