#!/usr/bin/env python3
"""The picture of README: real traces of one attention and one expert worker, with one micro-batch and with two.

    tools/draw_pingpong.py                    # runs both, then draws tools/results/pingpong.svg and .png
    tools/draw_pingpong.py --redraw           # from tools/results/pingpong.json, where the last run's spans are

Model and load are those of `tools/bench_pingpong.py`, whose micro-batches keep their size; each run has `--trace`. Of
each, one decode pass of usual length is shown, on one scale of time. Needs matplotlib: pip install -e '.[plot]'
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from msi import Engine
from msi.profiler.calm import CALM, Others
from msi.profiler.measure import processor
from msi_launch.command_line import ScriptLine
from tools import bench_pingpong
from tools.hostility.processes import family

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = {"attention": 1.0, "sample": 1.0, "experts": 0.0}  # which worker's, by the name of a span
LANES = ("#2f5d8a", "#d9822b")
SAMPLING = ("#9db8d1", "#f0c797")  # what belongs to no layer
IDLE, INK, QUIET = "#f1f1ee", "#22262a", "#7a7f85"
HEIGHT = 0.74  # of a bar
SETTLED = 6  # passes from the start that are left aside: prompts


@dataclass(frozen=True, slots=True)
class Span:
    """What one worker did for one lane; `start_ms` counts from the left edge of the picture."""

    name: str
    lane: int
    start_ms: float
    duration_ms: float
    layer: int

    @property
    def end_ms(self) -> float:
        return self.start_ms + self.duration_ms


@dataclass(frozen=True, slots=True)
class Recording:
    """One pass of lane 0, and what the others did meanwhile.

    Attributes:
        tokens_per_s: of the whole run, while all sequences decode.
        others_share: of all cores' time in that run, what other processes took; None where it was not measured.
    """

    num_micro_batches: int
    tokens_per_s: float
    others_share: float | None
    spans: tuple[Span, ...]


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("--redraw", action="store_true", help="draw what was recorded before")
    parser.add_argument("--output", type=Path, default=RESULTS / "pingpong", help="without .json, .svg and .png")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds in which to find a calm machine")
    values: argparse.Namespace = parser.parse_args()
    return values


def main() -> None:
    arguments = parse()
    record_file = arguments.output.with_suffix(".json")
    if not arguments.redraw:
        record_file.write_text(json.dumps(asyncio.run(record(arguments.patience)), indent=1) + "\n")
    draw(json.loads(record_file.read_text()), arguments.output)


# -- recorded --------------------------------------------------------------------------------------------------------


async def record(patience_s: float) -> dict[str, Any]:
    load = bench_pingpong.parse(["--output-len", "24"])
    recordings = [await calmest(num_lanes, load, patience_s / 2) for num_lanes in (1, 2)]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "host": f"{processor()}, {os.cpu_count()} cores",
        "batch": load.batch,
        "recordings": [asdict(one) for one in recordings],
    }


async def calmest(num_lanes: int, load: argparse.Namespace, patience_s: float) -> Recording:
    """The first run that others hardly disturb, or the least disturbed one."""
    ends_at = time.monotonic() + patience_s
    best, least = await traced(num_lanes, load)
    while least > CALM and time.monotonic() < ends_at:
        recording, share = await traced(num_lanes, load)
        if share < least:
            best, least = recording, share
    return best


async def traced(num_lanes: int, load: argparse.Namespace) -> tuple[Recording, float]:
    """A run, and of all cores' time what other processes took meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        (Path(folder) / "config.json").write_text(json.dumps(bench_pingpong.config(load)))
        engine = Engine.local(
            model=Path(folder), load_format="dummy", micro_batches=num_lanes, trace=trace,
            threads_per_worker=load.threads_per_worker, gpu_memory_utilization=0.3, max_num_seqs=num_lanes * load.batch,
        )  # fmt: skip
        async with engine:
            others = Others(lambda: [pid for pid in family(os.getpid()).values() if pid != os.getpid()], 0.0)
            mark = others.mark()
            measured = await bench_pingpong.run(engine, num_lanes, load)
            share = others.share_since(mark)
        events = json.loads(trace.read_text())["traceEvents"]
    recording = Recording(num_lanes, measured["decode_tokens_per_s"], round(share, 3), usual_pass(events))
    return recording, share


def usual_pass(events: list[dict[str, Any]]) -> tuple[Span, ...]:
    """The spans beside a pass of lane 0 that took the median time: from one sampling to the next."""
    spans = layered(
        sorted((one for one in events if one["ph"] == "X" and one["name"] in ROWS), key=lambda one: one["ts"])
    )
    ends = [span.end_ms for span in spans if span.name == "sample" and span.lane == 0]
    passes = list(zip(ends[SETTLED:-2], ends[SETTLED + 1 : -1], strict=True))
    usual = median_low([end - begin for begin, end in passes])
    begin, end = next((begin, end) for begin, end in passes if end - begin == usual)
    return tuple(
        Span(span.name, span.lane, round(span.start_ms - begin, 3), round(span.duration_ms, 3), span.layer)
        for span in spans
        if span.end_ms > begin and span.start_ms < end + usual  # as much again: the scale is that of the longer one
    )


def layered(events: list[dict[str, Any]]) -> list[Span]:
    """Counts each lane's layers from one sampling to the next."""
    layers: dict[tuple[int, str], int] = {}
    spans = []
    for event in events:
        name, lane = event["name"], event["args"]["lane"]
        if name == "sample":
            layers = {key: layer for key, layer in layers.items() if key[0] != lane}
        layer = layers[lane, name] = layers.get((lane, name), 0) + 1
        spans.append(Span(name, lane, event["ts"] / 1e3, event["dur"] / 1e3, layer))
    return spans


# -- drawn -----------------------------------------------------------------------------------------------------------


def draw(recorded: dict[str, Any], output: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"font.size": 8, "font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "msi"})
    from matplotlib import pyplot

    recordings = [
        Recording(**{**one, "spans": tuple(Span(**span) for span in one["spans"])}) for one in recorded["recordings"]
    ]
    window_ms = next(span.end_ms for span in recordings[0].spans if span.name == "sample" and span.start_ms > 0)
    figure, panels = pyplot.subplots(2, 1, figsize=(9.0, 3.5), sharex=True)
    for panel, recording in zip(panels, recordings, strict=True):
        draw_panel(panel, recording, window_ms)
        title(panel, recording, recorded["batch"])
    panels[1].set_xlabel(
        f"milliseconds of decoding; a number is the layer, pale is sampling and the head. "
        f"{recorded['host']}, {recorded['date']}",
        color=QUIET,
        fontsize=7,
        loc="left",
    )
    figure.subplots_adjust(left=0.075, right=0.925, top=0.92, bottom=0.125, hspace=0.34)
    figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(output.with_suffix(".png"), dpi=200, metadata={"Software": None})


def draw_panel(panel: Any, recording: Recording, window_ms: float) -> None:
    for name, row in (("attention", 1.0), ("experts", 0.0)):
        panel.broken_barh([(0, window_ms)], (row - HEIGHT / 2, HEIGHT), color=IDLE, linewidth=0, zorder=1)
        panel.text(-0.008 * window_ms, row, name, ha="right", va="center", color=INK)
        busy = busy_share(recording, row, window_ms)
        panel.text(1.008 * window_ms, row, f"busy {100 * busy:.0f} %", ha="left", va="center", color=INK)
    for span in recording.spans:
        begin, end = max(0.0, span.start_ms), min(window_ms, span.end_ms)
        if end <= begin:
            continue
        colour = (SAMPLING if span.name == "sample" else LANES)[span.lane]
        row = ROWS[span.name]
        panel.broken_barh([(begin, end - begin)], (row - HEIGHT / 2, HEIGHT), color=colour, linewidth=0, zorder=3)
        if span.name != "sample" and end - begin > 0.012 * window_ms:
            panel.text((begin + end) / 2, row, str(span.layer), ha="center", va="center", color="white", fontsize=7,
                       zorder=4)  # fmt: skip
    for one, two in journeys(recording.spans):
        if one.end_ms > 0 and two.start_ms < window_ms:
            rows = [ROWS[one.name], ROWS[two.name]]
            edge = HEIGHT / 2 if rows[0] < rows[1] else -HEIGHT / 2
            panel.plot([one.end_ms, two.start_ms], [rows[0] + edge, rows[1] - edge], color=LANES[one.lane],
                       linewidth=0.8, zorder=2, solid_capstyle="round")  # fmt: skip
    panel.set(xlim=(0, window_ms), ylim=(-0.5, 1.5), yticks=[])
    panel.tick_params(axis="x", colors=QUIET, labelsize=7, length=2, width=0.5)
    for side in panel.spines.values():
        side.set_visible(False)


def journeys(spans: tuple[Span, ...]) -> list[tuple[Span, Span]]:
    """What a lane did on one worker, and what followed from it on the other: rows went from the one to the other."""
    found = []
    for lane in {span.lane for span in spans}:
        own = sorted((span for span in spans if span.lane == lane), key=lambda span: span.start_ms)
        found += [(one, two) for one, two in pairwise(own) if ROWS[one.name] != ROWS[two.name]]
    return found


def busy_share(recording: Recording, row: float, window_ms: float) -> float:
    inside = (
        max(0.0, min(window_ms, span.end_ms) - max(0.0, span.start_ms))
        for span in recording.spans
        if ROWS[span.name] == row
    )
    return sum(inside) / window_ms


def title(panel: Any, recording: Recording, batch: int) -> None:
    one = recording.num_micro_batches == 1
    what = "One micro-batch" if one else "Two micro-batches"
    means = "each worker waits for the other" if one else "while one is away, the other computes"
    load = f"{recording.num_micro_batches} x {batch} sequences"
    at: dict[str, Any] = {"transform": panel.transAxes, "va": "baseline"}
    panel.text(0.0, 1.05, what, fontsize=9, fontweight="bold", color=INK, **at)
    panel.text(0.19, 1.05, f"{means}; {load}", color=QUIET, **at)
    panel.text(1.0, 1.05, f"{recording.tokens_per_s:.0f} tokens/s", ha="right", color=INK, fontweight="bold", **at)


if __name__ == "__main__":
    main()
