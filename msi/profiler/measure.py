"""What the stages of a model take on this machine: a profile for the planner and the simulator.

T_a over sequences and context lengths, T_e over active experts and rows, and what comes once per pass, all with the
runtime's own code (`sides.py`) in processes of their own (`process.py`): a side alone, and while a process of the other
side computes too. T_c is what is left of passes over a real link once the computing is taken away, halved: wake-ups,
posts and event loops included. Sizes are gone through several times, while nothing else takes the cores if that can be
had (`calm.py`), and medians kept: these are noisy machines.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from msi.device.choice import check_device
from msi.errors import ConfigError
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
)
from msi.precision import Precision
from msi.profiler.calm import CALM, Others
from msi.profiler.process import Hosting, StageProcess
from msi.profiler.sides import SLOT_ROWS, AttentionSize, ExpertSize, Timed

PASSES = 2  # of one size at a time, before the next size has its turn
MOST_TRIES = 4  # to measure a size while others rest
COMM_REPEAT = 4  # what is left is a small difference of two large times
SCHEDULING_CONTEXT = 128
Steps = Callable[[str, int], Callable[[], None]]  # begins a part of so many steps; what to call after each of them


@dataclass(frozen=True, slots=True)
class Measuring:
    """What to measure, and how carefully.

    Attributes:
        device: "cpu", "cuda" or "cuda:N"; on a GPU each side is measured alone.
        threads: of a worker; each number is measured. Empty: 1 and 2.
        batches: sequences per micro-batch. Empty: 1, 2, 4, ... 64.
        contexts: tokens of each sequence in the KV cache. Empty: 64, 256 and 1024.
        transports: those between the sides, of "inproc", "shm" and "tcp".
        repeat: how often all sizes are gone through.
        patience_s: how long to wait, in all, for a calm machine.
        is_quick: few sizes, once: to see that it works.
    """

    model_dir: Path
    device: str = "cpu"
    precision: Precision = Precision()
    load_format: str = "auto"
    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    transports: tuple[str, ...] = ("inproc", "shm", "tcp")
    repeat: int = 3
    patience_s: float = 300.0
    is_quick: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured."""

    attention: tuple[AttentionSize, ...]
    expert: tuple[ExpertSize, ...]
    comm: tuple[int, ...]  # sequences

    @property
    def num_seqs(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(size.num_tokens for size in self.attention))


def measure(asked: Measuring, begin: Steps) -> Profile:
    """Takes minutes; loads the model twice.

    Args:
        begin: told what is being measured, and in how many steps.

    Raises:
        ConfigError: the model, the device or the sizes cannot be measured here.
    """
    check_device(asked.device)
    config, values = load_config(asked.model_dir)
    quick = asked.is_quick
    threads = asked.threads or ((1,) if quick else (1, 2))
    batches = asked.batches or ((1, 4) if quick else (1, 2, 4, 8, 16, 32, 64))
    contexts = asked.contexts or ((16, 64) if quick else (64, 256, 1024))
    if max(contexts) > config.max_position_embeddings or max(batches) > SLOT_ROWS:
        raise ConfigError(
            f"contexts of {max(contexts)} tokens and batches of {max(batches)} sequences: at most "
            f"{config.max_position_embeddings} tokens, the positions of this model, and {SLOT_ROWS} sequences, the "
            "rows of a slot"
        )
    sizes = sizes_of(config, batches, contexts, quick)
    repeat = 1 if quick else asked.repeat
    # one GPU cannot tell what two do to each other: with CUDA each worker has its own
    contentions = ("alone", "overlapped") if asked.device == "cpu" else ("alone",)

    link_key = secrets.token_bytes(32)  # goes to the processes with what they are to do, by a pipe

    def hosting(role: str) -> Hosting:
        return Hosting(
            asked.model_dir.resolve(), role, asked.device, asked.precision, asked.load_format, max(batches),
            max(contexts), link_key,
        )  # fmt: skip

    with ExitStack() as stack:
        attention, expert = (stack.enter_context(StageProcess(hosting(role))) for role in ("attention", "expert"))
        precision = _load(begin, attention, expert)
        bench = Bench(attention, expert, begin, config.num_experts, 0.0 if quick else asked.patience_s)
        bench.stages(sizes, threads, contentions, repeat)
        for process in (attention, expert):
            process.call("use_threads", threads[0])
        comm = [
            point
            for transport in asked.transports
            if transport != "inproc"
            for point in bench.comm(transport, sizes.comm, attention, expert, repeat, config.num_sparse_layers)
        ]
        scheduling = [bench.scheduling(num_seqs) for num_seqs in sizes.num_seqs]
    with StageProcess(hosting("colocated")) as both:
        _load(begin, both)
        both.call("use_threads", threads[0])
        if "inproc" in asked.transports:
            comm += bench.comm("inproc", sizes.comm, both, both, repeat, config.num_sparse_layers)
        routing = bench.routing(sizes.num_seqs, both)
    return Profile(
        device=asked.device,
        host=f"{processor()}, {os.cpu_count()} cores",
        num_cores=os.cpu_count() or 1,
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=asked.model_dir.resolve().name,
        config_digest=config_digest(values),
        precision=precision,
        attention=tuple(bench.attention_points()),
        expert=tuple(bench.expert_points()),
        passes=tuple(bench.pass_points()),
        comm=tuple(comm),
        scheduling=tuple(scheduling),
        routing=tuple(routing),
    )


def _load(begin: Steps, *processes: StageProcess) -> Precision:
    step = begin("reading weights", len(processes))
    precision = Precision()
    for process in processes:
        process.start("load")
    for process in processes:
        precision = process.result()
        step()
    return precision


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
        self, attention: StageProcess, expert: StageProcess, begin: Steps, num_experts: int, patience_s: float
    ) -> None:
        self._attention = attention
        self._expert = expert
        self._begin = begin
        self._num_experts = num_experts
        self._others = Others(lambda: (attention.pid, expert.pid), patience_s)
        self._timed: dict[tuple[int, str, AttentionSize | ExpertSize], list[Timed]] = defaultdict(list)

    def stages(self, sizes: Sizes, threads: tuple[int, ...], contentions: tuple[str, ...], repeat: int) -> None:
        """T_a, T_e and the pass cost, alone and beside the middle size of the other side."""
        total = repeat * len(threads) * len(contentions) * (len(sizes.attention) + len(sizes.expert))
        step = self._begin("stages", total)
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
                        step()

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
        step = self._begin(f"link over {transport}", repeat * len(batches))
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
                step()
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
        step = self._begin("routing", 1)
        both.call("link", "inproc", both.call("listen", "inproc"))
        active = both.call("routing", batches)
        step()
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
