#!/usr/bin/env python3
"""Where the time of a decode pass goes on a CPU: its kernels, Python between them, hand-overs and waits.

    tools/profile_pass.py MODEL --batch 8 --threads 2 --picture pass.svg

Everything is in this process, both roles on one compute thread, one micro-batch. Every operation of the kernels is
timed without those inside it; a pass goes from one reading of logits to the next, and figures are medians over the
passes in which the whole batch decodes. Weights are compared with the roof: how long the machine takes to read them.
"Python" is the compute thread between kernels, "waits" what is left: loops, hand-overs, a queue without work. Where one
call computes all layers it is one part; with --by-parts they are computed part by part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi import Engine
from msi.kernels.cpu import CpuExpertBank, CpuKernels
from msi.kernels.native.compiled import NativeLinear
from msi.kernels.native.layers import NativeLayers
from msi.models.families import load_config
from msi_launch.command_line import ScriptLine
from tools.bench_decode import drive, machine_read_gb_per_s, run_ours

OPERATIONS = (
    "norm", "add_norm", "rope_table", "plan_attention", "rope_and_write", "paged_attention", "topk_softmax",
    "topk_sigmoid", "pack", "combine_norm", "logits", "draw",
)  # fmt: skip
PASS_ENDS_AT, LAYER_BEGINS_AT = "logits", "rope_and_write"
PYTHON, WAITS = "Python between kernels", "waits and hand-overs"


@dataclass(frozen=True, slots=True)
class Span:
    """One operation, without those that it calls.

    Attributes:
        weight_bytes: that it reads.
        num_rows: that it computes; 0 where that is not known.
    """

    name: str
    layer: int
    ends_at: float
    own_s: float
    weight_bytes: int
    num_rows: int


@dataclass
class Recorder:
    """Of the compute thread's operations, in the order in which they end."""

    spans: list[Span] = field(default_factory=list)
    _layer: int = -1
    _inside_s: list[float] = field(default_factory=lambda: [0.0])

    def timed(self, name: str, call: Callable[..., Any], weight_bytes: Callable[[], int] = lambda: 0) -> Any:
        """`call`, recorded; `weight_bytes`: of all its calls so far."""

        def recorded(*given: Any, **named: Any) -> Any:
            if name == LAYER_BEGINS_AT:
                self._layer += 1
            before, started = weight_bytes(), time.perf_counter()
            self._inside_s.append(0.0)
            try:
                return call(*given, **named)
            finally:
                ends_at = time.perf_counter()
                own_s = ends_at - started - self._inside_s.pop()
                self._inside_s[-1] += ends_at - started
                num_rows = given[0].shape[0] if given and hasattr(given[0], "shape") else 0
                read = weight_bytes() - before
                self.spans.append(Span(name, max(0, self._layer), ends_at, own_s, read, num_rows))
                if name == PASS_ENDS_AT:
                    self._layer = -1

        return recorded


RECORDER = Recorder()


@dataclass(frozen=True, slots=True)
class TimedLinear(NativeLinear):
    """Its calls from Python are recorded."""

    recorded: Callable[[Any], Any]

    def __call__(self, rows: Any) -> Any:
        return self.recorded(rows)


class TimedKernels(CpuKernels):
    """A CPU's kernels, whose operations are recorded."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        for name in OPERATIONS:
            setattr(self, name, RECORDER.timed(name, getattr(self, name)))

    def linear(self, weight: Any, bias: Any = None) -> Any:
        num_bytes, count = weight.numel() * weight.element_size(), 0
        product = super().linear(weight, bias)

        def counted(rows: Any) -> Any:
            nonlocal count
            count += 1
            return product(rows)

        name = f"product {weight.shape[1]} -> {weight.shape[0]}"
        recorded = RECORDER.timed(name, counted, lambda: count * num_bytes)
        if not isinstance(product, NativeLinear):
            return recorded
        return TimedLinear(product.library, product.packed, product.bias, product.num_outputs, recorded)

    def expert_bank(self, **given: Any) -> Any:
        bank: Any = super().expert_bank(**given)
        is_one_call = not isinstance(bank, CpuExpertBank)  # else its products count by themselves
        num_bytes = (lambda: bank.weight_bytes_read) if is_one_call else (lambda: 0)
        bank.run = RECORDER.timed("experts", bank.run, num_bytes)
        return bank


def timed_layers() -> Callable[..., Any]:
    """`NativeLayers.run`, recorded."""
    run, num_bytes = NativeLayers.run, 0

    def counted(layers: NativeLayers, hidden: Any, plans: Any, local_ids: Any, bank: Any, answers: Any) -> Any:
        nonlocal num_bytes
        before = bank.weight_bytes_read
        spent = run(layers, hidden, plans, local_ids, bank, answers)
        num_bytes += layers.dense_bytes + bank.weight_bytes_read - before
        return spent

    recorded = RECORDER.timed("all layers", counted, lambda: num_bytes)
    return lambda *given: recorded(*given)  # a function becomes a method


@dataclass(frozen=True, slots=True)
class Part:
    """A kernel's, or what lies between kernels, of one pass: medians over passes."""

    name: str
    calls: float
    seconds: float
    weight_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """Of a decode pass.

    Attributes:
        parts: add up to about `pass_s`, the longest first.
        layer_s: kernels of each layer.
    """

    pass_s: float
    num_passes: int
    parts: tuple[Part, ...]
    layer_s: tuple[float, ...]


def passes_of(spans: Iterable[Span], batch: int) -> list[tuple[float, list[Span]]]:
    """(wall time, operations) of each pass that computed logits of exactly the batch, and came after such a one."""
    found: list[tuple[float, list[Span]]] = []
    now: list[Span] = []
    last_end: float | None = None
    for span in spans:
        now.append(span)
        if span.name != PASS_ENDS_AT:
            continue
        is_decoding = span.num_rows == batch
        if is_decoding and last_end is not None:
            found.append((span.ends_at - last_end, now))
        last_end, now = (span.ends_at if is_decoding else None), []
    return found


def profile_of(spans: Iterable[Span], batch: int, busy: float) -> Profile:
    """Of the operations of a whole run; `busy`: how much of the time the compute thread computed.

    Raises:
        ValueError: the batch never decoded as a whole.
    """
    passes = passes_of(spans, batch)
    if not passes:
        raise ValueError("the batch never decoded as a whole; give a longer --output-len")
    names = sorted({span.name for _, inside in passes for span in inside})
    by_name: dict[str, list[tuple[int, float, int]]] = {name: [] for name in names}
    by_layer: dict[int, list[float]] = defaultdict(list)
    for _, inside in passes:
        for name in names:
            mine = [span for span in inside if span.name == name]
            sums = (len(mine), sum(span.own_s for span in mine), sum(span.weight_bytes for span in mine))
            by_name[name].append(sums)
        for layer in {span.layer for span in inside}:
            by_layer[layer].append(sum(span.own_s for span in inside if span.layer == layer))
    pass_s = median(wall_s for wall_s, _ in passes)
    kernels_s = median(sum(span.own_s for span in inside) for _, inside in passes)
    parts = [Part(name, *(median(values) for values in zip(*sums, strict=True))) for name, sums in by_name.items()]
    parts.append(Part(PYTHON, 0, max(0.0, busy * pass_s - kernels_s)))
    parts.append(Part(WAITS, 0, pass_s - max(busy * pass_s, kernels_s)))
    parts.sort(key=lambda part: -part.seconds)
    return Profile(pass_s, len(passes), tuple(parts), tuple(median(by_layer[layer]) for layer in sorted(by_layer)))


def table(profile: Profile, roof_gb_per_s: float) -> str:
    """A line for each part: time, share, calls, weights read, and how near that is to the roof."""
    lines = [f"{'':36}{'ms':>8}{'%':>6}{'calls':>7}{'MB':>9}{'GB/s':>7}{'roof %':>8}"]
    for part in profile.parts:
        line = f"{part.name:36}{part.seconds * 1e3:8.2f}{100 * part.seconds / profile.pass_s:6.1f}"
        line += f"{part.calls:7.0f}" if part.calls else " " * 7
        if part.weight_bytes:
            rate = part.weight_bytes / part.seconds / 1e9
            line += f"{part.weight_bytes / 1e6:9.1f}{rate:7.1f}{100 * rate / roof_gb_per_s:8.0f}"
        lines.append(line)
    read = sum(part.weight_bytes for part in profile.parts)
    roof_s = read / roof_gb_per_s / 1e9
    lines.append(
        f"{'a pass':36}{profile.pass_s * 1e3:8.2f}{100.0:6.1f}{'':7}{read / 1e6:9.1f}"
        f"{read / profile.pass_s / 1e9:7.1f}{100 * roof_s / profile.pass_s:8.0f}"
    )
    layers = ", ".join(f"{seconds * 1e3:.2f}" for seconds in profile.layer_s)
    return "\n".join([*lines, f"kernels of each layer, ms: {layers}"])


def draw(profiles: Sequence[tuple[str, Profile]], roof_gb_per_s: float, path: Path) -> None:
    """A bar for each profile, its parts behind one another, and where the roof is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.9 * len(profiles)), layout="constrained")
    axes = figure.subplots()
    longest_s = max(profile.pass_s for _, profile in profiles)
    names = list(dict.fromkeys(part.name for _, profile in profiles for part in profile.parts))
    for row, (_, profile) in enumerate(profiles):
        left = 0.0
        for part in profile.parts:
            colour = f"C{names.index(part.name) % 10}"
            axes.barh(row, part.seconds * 1e3, left=left, color=colour, edgecolor="white")
            if part.seconds > 0.09 * longest_s:
                axes.text(left + part.seconds * 5e2, row, part.name, ha="center", va="center", fontsize=6)
            left += part.seconds * 1e3
        roof_ms = sum(part.weight_bytes for part in profile.parts) / roof_gb_per_s / 1e6
        axes.plot([roof_ms, roof_ms], [row - 0.45, row + 0.45], color="black", linewidth=2)
    axes.set_yticks(range(len(profiles)), [name for name, _ in profiles])
    axes.set_xlabel(f"ms of a decode pass; black: its weights at the {roof_gb_per_s:.0f} GB/s that the machine reads")
    figure.savefig(path)


async def measure(model: Path, batch: int, arguments: argparse.Namespace) -> Profile:
    config, _ = load_config(model)
    chance = random.Random(0)
    prompts = [tuple(chance.randrange(3, config.vocab_size) for _ in range(arguments.input_len)) for _ in range(batch)]
    engine = Engine.local(
        model=model, transport="inproc", colocated=True, micro_batches=1, dtype=arguments.dtype,
        threads_per_worker=arguments.threads, max_num_seqs=max(64, batch),
    )  # fmt: skip
    with patch("msi.device.cpu.CpuKernels", TimedKernels), ExitStack() as at_start:
        if arguments.by_parts:
            at_start.enter_context(patch.object(NativeLayers, "of", lambda *given, **named: None))
        await engine.__aenter__()
    try:
        await drive(engine, prompts, 4)  # warm up
        RECORDER.spans.clear()
        run = await run_ours(engine, prompts, arguments.output_len)
    finally:
        await engine.close()
    try:
        return profile_of(list(RECORDER.spans), batch, next(iter(run.busy.values())))
    except ValueError as error:
        raise SystemExit(str(error)) from None


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--by-parts", action="store_true", help="layers are computed part by part")
    parser.add_argument("--picture", type=Path, help="where a picture goes")
    values: argparse.Namespace = parser.parse_args()
    return values


async def main() -> None:
    arguments = parse()
    NativeLayers.run = timed_layers()  # type: ignore[method-assign]
    roof = machine_read_gb_per_s(arguments.threads)
    profiles = []
    for batch in arguments.batch:
        profile = await measure(arguments.model, batch, arguments)
        profiles.append((f"batch {batch}", profile))
        print(
            f"\nbatch {batch}: {profile.num_passes} passes, {batch / profile.pass_s:.1f} tokens/s, roof {roof:.1f} GB/s"
        )
        print(table(profile, roof))
        parts = {part.name: part.seconds for part in profile.parts}
        print(json.dumps({"model": arguments.model.name, "batch": batch, "pass_s": profile.pass_s, "parts": parts}))
    if arguments.picture is not None:
        draw(profiles, roof, arguments.picture)


if __name__ == "__main__":
    asyncio.run(main())
