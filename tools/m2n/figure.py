"""The figure: latency, tail and throughput over size, as Figure 11 of the paper; and over M x N, as Figure 12."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot

from tools.m2n.systems import SYSTEMS

INK, QUIET = "#22262a", "#7a7f85"
OURS = ("#2f5d8a", "#d9822b", "#3b8a5a", "#8a2f3b", "#5a3b8a")
OTHERS = ("#7a7f85", "#a05d8a", "#8a7f2f", "#5d8a8a", "#b0645a", "#6a6ab0", "#4a4f55")
STYLES = ("solid", "dashed", "dotted")  # once all colours are taken
PANELS = (("median_us", "median, us"), ("p99_us", "99th percentile, us"), ("gbytes_per_s", "throughput, GB/s"))
PAIRS_BYTES = 256 << 10  # the size at which numbers of senders and receivers are compared
Rows = list[dict[str, Any]]


def draw(output: Path, kept: dict[str, Any]) -> None:
    """Writes `output`.svg and `output`.png."""
    mpl.rcParams.update({"font.size": 8, "font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "msi"})
    rows: Rows = kept["rows"]
    pairs = list(dict.fromkeys((row["senders"], row["receivers"]) for row in rows))
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    swept = max(pairs, key=lambda pair: len({row["size_bytes"] for row in rows if of_pair(row, pair)}))
    kinds = ("size", "pairs") if len(pairs) > 1 else ("size",)
    strips = [
        (kind, pattern)
        for kind in kinds
        for pattern in patterns
        if all(has_rows(rows, pattern, pair) for pair in (pairs if kind == "pairs" else [swept]))
    ]
    figure, grid = pyplot.subplots(len(strips), 3, figsize=(9.0, 2.3 * len(strips) + 0.5), squeeze=False)
    names = list(dict.fromkeys(row["system"] for row in rows))
    looks = looks_of(names)
    for (kind, pattern), panels in zip(strips, grid, strict=True):
        of_pattern = [row for row in rows if row["pattern"] == pattern]
        for panel, (key, label) in zip(panels, PANELS, strict=True):
            if kind == "size":
                over_size(panel, [row for row in of_pattern if of_pair(row, swept)], names, key, looks)
                panel.set_title(f"{pattern}, {swept[0]} x {swept[1]}", loc="left", color=INK, fontsize=8)
            else:
                over_pairs(panel, of_pattern, sorted(pairs), key, looks)
                panel.set_title(f"{pattern}, {PAIRS_BYTES >> 10} KB", loc="left", color=INK, fontsize=8)
            panel.set_ylabel(label, color=QUIET)
            panel.tick_params(colors=QUIET, labelsize=7, length=2, width=0.5)
            panel.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, frameon=False)
    figure.text(0.99, 0.005, f"{kept['host']}, {kept['date']}", ha="right", color=QUIET, fontsize=6)
    figure.tight_layout(rect=(0, 0.55 / (2.3 * len(strips) + 0.5), 1, 1))
    figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(output.with_suffix(".png"), dpi=200, metadata={"Software": None})
    pyplot.close(figure)


def has_rows(rows: Rows, pattern: str, pair: tuple[int, int]) -> bool:
    return any(row["pattern"] == pattern and of_pair(row, pair) for row in rows)


def of_pair(row: dict[str, Any], pair: tuple[int, int]) -> bool:
    return (row["senders"], row["receivers"]) == pair


def looks_of(names: list[str]) -> dict[str, dict[str, Any]]:
    """Ours stand out; no two are alike."""
    ours, others = lines(OURS, linewidth=1.8, zorder=3), lines(OTHERS, linewidth=0.9, zorder=2)
    return {name: next(ours if SYSTEMS[name].is_ours else others) for name in names}


def lines(colors: Sequence[str], **alike: float) -> Iterator[dict[str, Any]]:
    return ({"color": color, "linestyle": style, **alike} for style in STYLES for color in colors)


def over_size(panel: Any, rows: Rows, names: list[str], key: str, looks: dict[str, dict[str, Any]]) -> None:
    for name in names:
        first = {row["size_bytes"]: row[key] for row in reversed(rows) if row["system"] == name}
        points = sorted(first.items())
        if points:
            panel.plot(*zip(*points, strict=True), label=SYSTEMS[name].title, marker=".", markersize=3, **looks[name])
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    sizes = sorted({row["size_bytes"] for row in rows})
    shown = sizes[:: max(1, len(sizes) // 5)]
    panel.set_xticks(shown, [f"{size >> 10}K" if size < 1 << 20 else f"{size >> 20}M" for size in shown])


def over_pairs(
    panel: Any, rows: Rows, pairs: list[tuple[int, int]], key: str, looks: dict[str, dict[str, Any]]
) -> None:
    """Systems that were measured at all of them."""
    of = {
        (row["system"], row["senders"], row["receivers"]): row[key] for row in rows if row["size_bytes"] == PAIRS_BYTES
    }
    names = [name for name in looks if all((name, *pair) in of for pair in pairs)]
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        places = [at - 0.4 + (index + 0.5) * width for at in range(len(pairs))]
        panel.bar(places, [of[name, *pair] for pair in pairs], width, color=looks[name]["color"])
    panel.set_xticks(range(len(pairs)), [f"{senders} x {receivers}" for senders, receivers in pairs])
    if key != "gbytes_per_s":
        panel.set_yscale("log")
