#!/usr/bin/env python3
"""Measures what the stages of a model take on this machine, and writes a profile for the planner and the simulator.

    tools/profile_stages.py MODEL -o profile.json

T_a over sequences and context lengths, T_e over active experts and rows, and what comes once per pass, all with the
runtime's own code (`tools/stage_sides.py`) in processes of their own (`tools/stage_process.py`): a side alone, and
while a process of the other side computes too. T_c is what is left of passes over a real link once the computing is
taken away, halved: wake-ups, posts and event loops included. Sizes are gone through several times, while nothing else
takes the cores if that can be had, and medians written: these are noisy machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).parent.parent))
from msi.device.choice import check_device
from msi.errors import ConfigError, EngineError
from msi.models.config import ModelConfig, config_digest
from msi.models.families import load_config
from msi.planner.profile import (
    AttentionPoint,
    CommPoint,
    ExpertPoint,
    PassPoint,
    Profile,
    RoutingPoint,
    SchedulingPoint,
    to_json,
)
from msi_launch.command_line import ScriptLine
from tools.quiet import CALM, Others
from tools.stage_process import Hosting, StageProcess
from tools.stage_sides import SLOT_ROWS, AttentionSize, ExpertSize, Timed

PASSES = 2  # of one size at a time, before the next size has its turn
MOST_TRIES = 4  # to measure a size while others rest
COMM_REPEAT = 4  # what is left is a small difference of two large times
SCHEDULING_CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured."""

    attention: tuple[AttentionSize, ...]
    expert: tuple[ExpertSize, ...]
    comm: tuple[int, ...]  # sequences

    @property
    def num_seqs(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(size.num_tokens for size in self.attention))


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("profile.json"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; on a GPU sides are measured alone")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--threads", type=_numbers, default=None, help="threads per worker, such as 1,2 (the default)")
    parser.add_argument("--batches", type=_numbers, default=None, help="sequences per micro-batch: 1,2,4,8,16,32,64")
    parser.add_argument("--contexts", type=_numbers, default=None, help="tokens of each in the KV cache: 64,256,1024")
    parser.add_argument("--transport", default="inproc,shm,tcp", help="those between the sides, with commas")
    parser.add_argument("--repeat", type=int, default=3, help="how often all sizes are gone through")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait in all for a calm machine")
    parser.add_argument("--quick", action="store_true", help="few sizes, once: to see that it works")
    values: argparse.Namespace = parser.parse_args()
    return values


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({int(part) for part in text.split(",")}))
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{numbers[0]} is not above 0")
    return numbers


def main() -> int:
    arguments = parse()
    try:
        profile = measure(arguments)
    except EngineError as error:
        print(f"profile_stages: {error}", file=sys.stderr)
        return 2
    arguments.output.write_text(json.dumps(to_json(profile), indent=1) + "\n")
    print(f"{arguments.output}: {summary(profile)}")
    return 0


def measure(arguments: argparse.Namespace) -> Profile:
    """Raises ConfigError: the model, the device or the sizes cannot be measured here."""
    check_device(arguments.device)
    config, values = load_config(arguments.model)
    quick = arguments.quick
    threads = arguments.threads or ((1,) if quick else (1, 2))
    batches = arguments.batches or ((1, 4) if quick else (1, 2, 4, 8, 16, 32, 64))
    contexts = arguments.contexts or ((16, 64) if quick else (64, 256, 1024))
    transports = tuple(dict.fromkeys(arguments.transport.split(",")))
    if unknown := set(transports) - {"inproc", "shm", "tcp"}:
        raise ConfigError(f"--transport {unknown.pop()!r} is not one; supported: inproc, shm, tcp")
    if contexts[-1] > config.max_position_embeddings or batches[-1] > SLOT_ROWS:
        raise ConfigError(
            f"--contexts {contexts[-1]} and --batches {batches[-1]}: at most {config.max_position_embeddings} tokens, "
            f"the positions of this model, and {SLOT_ROWS} sequences, the rows of a slot"
        )
    sizes = sizes_of(config, batches, contexts, quick)
    repeat = 1 if quick else arguments.repeat
    # one GPU cannot tell what two do to each other: with CUDA each worker has its own
    contentions = ("alone", "overlapped") if arguments.device == "cpu" else ("alone",)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def hosting(role: str) -> Hosting:
            return Hosting(
                arguments.model.resolve(), role, arguments.device, arguments.dtype, arguments.load_format,
                batches[-1], contexts[-1],
            )  # fmt: skip

        with ExitStack() as stack:
            attention, expert = (stack.enter_context(StageProcess(hosting(role))) for role in ("attention", "expert"))
            dtype = _load(progress, attention, expert)
            patience_s = 0.0 if quick else arguments.patience
            bench = Bench(attention, expert, progress, config.num_experts, patience_s)
            bench.stages(sizes, threads, contentions, repeat)
            for process in (attention, expert):
                process.call("use_threads", threads[0])
            comm = [
                point
                for transport in transports
                if transport != "inproc"
                for point in bench.comm(transport, sizes.comm, attention, expert, repeat, config.num_sparse_layers)
            ]
            scheduling = [bench.scheduling(num_seqs) for num_seqs in sizes.num_seqs]
        with StageProcess(hosting("colocated")) as both:
            _load(progress, both)
            both.call("use_threads", threads[0])
            if "inproc" in transports:
                comm += bench.comm("inproc", sizes.comm, both, both, repeat, config.num_sparse_layers)
            routing = bench.routing(sizes.num_seqs, both)
    return Profile(
        device=arguments.device,
        host=f"{processor()}, {os.cpu_count()} cores",
        num_cores=os.cpu_count() or 1,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=arguments.model.resolve().name,
        config_digest=config_digest(values),
        dtype=dtype,
        attention=tuple(bench.attention_points()),
        expert=tuple(bench.expert_points()),
        passes=tuple(bench.pass_points()),
        comm=tuple(comm),
        scheduling=tuple(scheduling),
        routing=tuple(routing),
    )


def _load(progress: Progress, *processes: StageProcess) -> str:
    task = progress.add_task("reading weights", total=len(processes))
    dtype = ""
    for process in processes:
        process.start("load")
    for process in processes:
        dtype = process.result()
        progress.advance(task)
    return dtype


def sizes_of(config: ModelConfig, batches: tuple[int, ...], contexts: tuple[int, ...], quick: bool) -> Sizes:
    """Of experts: from one active to all of them, and rows per expert until twice the mean of the largest batch."""
    total, k = config.num_experts, config.top_k
    actives = sorted({1, total} if quick else {1, 2, -(-total // 4), -(-total // 2), -(-3 * total // 4), total})
    most_rows = max(2.0, 2 * batches[-1] * k / total)
    rows = [1 << power for power in range(10) if power == 0 or 1 << (power - 1) < most_rows]
    return Sizes(
        attention=tuple(AttentionSize(b, s) for b in batches for s in contexts),
        expert=tuple(
            ExpertSize(active, active * each)
            for active in actives
            for each in (rows[:: len(rows) - 1] if quick else rows)
            if active * each <= SLOT_ROWS * min(active, k)
        ),
        comm=tuple(b for b in batches if b in (batches[0], batches[-1]) or b in (8, 32)),
    )


class Bench:
    """Sends sizes to the two processes and keeps what they took."""

    def __init__(
        self, attention: StageProcess, expert: StageProcess, progress: Progress, num_experts: int, patience_s: float
    ) -> None:
        self._attention = attention
        self._expert = expert
        self._progress = progress
        self._num_experts = num_experts
        self._others = Others(lambda: (attention.pid, expert.pid), patience_s)
        self._timed: dict[tuple[int, str, AttentionSize | ExpertSize], list[Timed]] = defaultdict(list)

    def stages(self, sizes: Sizes, threads: tuple[int, ...], contentions: tuple[str, ...], repeat: int) -> None:
        """T_a, T_e and the pass cost, alone and beside the middle size of the other side."""
        total = repeat * len(threads) * len(contentions) * (len(sizes.attention) + len(sizes.expert))
        task = self._progress.add_task("stages", total=total)
        beside_attention = sizes.attention[len(sizes.attention) // 2]
        all_active = [size for size in sizes.expert if size.num_active_experts == self._num_experts]
        beside_expert = all_active[len(all_active) // 2]
        everything: list[AttentionSize | ExpertSize] = [*sizes.attention, *sizes.expert]
        for _ in range(repeat):
            for num_threads in threads:
                for process in (self._attention, self._expert):
                    process.call("use_threads", num_threads)
                for process, one in ((self._attention, beside_attention), (self._expert, beside_expert)):
                    process.call("measure", one, 2)  # the first passes take longer
                for contention in contentions:
                    for size in everything:
                        process, other = self._attention, self._expert
                        other_size: AttentionSize | ExpertSize = beside_expert
                        if isinstance(size, ExpertSize):
                            process, other, other_size = self._expert, self._attention, beside_attention
                        if contention == "overlapped":
                            other.call("begin_background", other_size)
                        self._timed[num_threads, contention, size] += self._calmly(process, size)
                        if contention == "overlapped":
                            other.call("end_background")
                        self._progress.advance(task)

    def _calmly(self, process: StageProcess, size: AttentionSize | ExpertSize) -> list[Timed]:
        """Passes during which others hardly took anything, or the least disturbed when patience is at an end."""
        tries: list[tuple[float, list[Timed]]] = []
        while True:
            mark = self._others.mark()
            timed: list[Timed] = process.call("measure", size, PASSES)
            tries.append((self._others.share_since(mark), timed))
            if tries[-1][0] <= CALM or self._others.left_s <= 0 or len(tries) == MOST_TRIES:
                return min(tries, key=lambda one: one[0])[1]
            self._others.wait_calm()

    def comm(
        self,
        transport: str,
        batches: tuple[int, ...],
        attention: StageProcess,
        expert: StageProcess,
        repeat: int,
        num_layers: int,
    ) -> list[CommPoint]:
        """T_c by message size: what passes over a link take beside computing, per layer and direction.

        Never less than the link's own figure, from a post to its completion: on a busy machine a side may be set aside
        with its work still counted while the other one goes on.
        """
        task = self._progress.add_task(f"link over {transport}", total=repeat * len(batches))
        processes = [attention] if attention is expert else [attention, expert]
        attention.call("link", transport, expert.call("listen", transport))
        attention.call("linked_passes", batches[-1], PASSES)
        left: dict[int, list[float]] = defaultdict(list)
        seen: dict[int, list[float]] = defaultdict(list)
        for _ in range(repeat):
            for num_seqs in batches:
                for _ in range(COMM_REPEAT):
                    before_s = sum(process.call("computed_s") for process in processes)
                    wall_s, comm_s = attention.call("linked_passes", num_seqs, PASSES)
                    seen[num_seqs].append(comm_s)
                    computed_s = sum(process.call("computed_s") for process in processes) - before_s
                    left[num_seqs].append((wall_s - computed_s) / (2 * num_layers * PASSES))
                self._progress.advance(task)
        for process in processes:
            process.call("unlink")
        return [
            CommPoint(
                transport,
                attention.call("message_bytes", num_seqs),
                max(median(left[num_seqs]), median(seen[num_seqs])),
            )
            for num_seqs in batches
        ]

    def scheduling(self, num_seqs: int) -> SchedulingPoint:
        times = self._attention.call("scheduling", num_seqs, SCHEDULING_CONTEXT, 20)
        return SchedulingPoint(num_seqs, median(times))

    def routing(self, batches: tuple[int, ...], both: StageProcess) -> list[RoutingPoint]:
        """How many experts the model's router hits; no times."""
        task = self._progress.add_task("routing", total=1)
        both.call("link", "inproc", both.call("listen", "inproc"))
        active = both.call("routing", batches)
        self._progress.advance(task)
        return [RoutingPoint(num_tokens, found) for num_tokens, found in zip(batches, active, strict=True)]

    # -- what was found ----------------------------------------------------------------------------------------------

    def attention_points(self) -> Iterator[AttentionPoint]:
        for (threads, contention, size), timed in self._timed.items():
            if isinstance(size, AttentionSize):
                layer_s = median(one.layer_s for one in timed)
                yield AttentionPoint(threads, contention, size.num_tokens, size.context_len, layer_s)

    def expert_points(self) -> Iterator[ExpertPoint]:
        for (threads, contention, size), timed in self._timed.items():
            if isinstance(size, ExpertSize):
                layer_s = median(one.layer_s for one in timed)
                active, rows = size.num_active_experts, size.num_expert_rows
                yield ExpertPoint(threads, contention, self._num_experts, active, rows, layer_s)

    def pass_points(self) -> Iterator[PassPoint]:
        once: dict[tuple[int, str, int], list[float]] = defaultdict(list)
        for (threads, contention, size), timed in self._timed.items():
            if isinstance(size, AttentionSize):
                once[threads, contention, size.num_tokens] += [one.once_s for one in timed]
        for (threads, contention, num_seqs), times in once.items():
            yield PassPoint(threads, contention, num_seqs, median(times))


def processor() -> str:
    """The processor's name, where the system says it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def summary(profile: Profile) -> str:
    """The paper's constants at the middle context, for whoever waited."""
    threads = profile.attention[0].threads
    contexts = sorted({point.context_len for point in profile.attention})
    context_len = contexts[len(contexts) // 2]
    fits = profile.fits(threads=threads, context_len=context_len)
    k1, k2, k3, k4 = (1e3 * k for k in (fits.k1, fits.k2, fits.k3, fits.k4))
    return (
        f"with {threads} threads and {context_len} tokens of context T_a = {k1:.3f} b + {k2:.3f} ms, "
        f"T_e of an expert = {k3:.3f} b + {k4:.3f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
