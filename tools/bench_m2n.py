#!/usr/bin/env python3
"""Rows from M senders to N receivers on one machine: our transports against others, in alternation.

    tools/bench_m2n.py --senders 2 --receivers 2 --sizes 2K..8M --transport shm,tcp \\
        --against gloo,mpi,mpi-tcp,zmq,ucx --json tools/results/m2n.json --figure tools/results/m2n

M + N processes of each system are started once and sleep while others run; then, size by size, each has its turn, five
times. A size is what one sender sends to one receiver. Two patterns:

    dispatch   in a round every sender sends to every receiver and waits for their empty acknowledgements. A time is
               that of one message, from when its sender began the round to when its receiver has it
    exchange   every receiver answers with as much, once it has what all senders sent. A time is one sender's, from
               when it began the round to when it has all answers

Medians and 99th percentiles are of the times, on the clock that all processes share; throughput is of all bytes over
the time of all rounds; of the five turns the median is taken. Contents are checked. Ours, Gloo and ZeroMQ sleep until
they are woken; MPI, UCX and shm-poll look again and again. What cannot run here is said and left out. Others come with:
pip install -e '.[m2n]'
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above
from msi.errors import ConfigError
from msi.profiler.measure import processor
from msi_launch.command_line import ScriptLine
from tools.m2n.fabric import PATTERNS, ROW_BYTES, Task
from tools.m2n.group import Group, Run
from tools.m2n.systems import PEERS, SYSTEMS, TRANSPORTS

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
BYTES_PER_RUN = 64 << 20  # of large sizes fewer rounds are enough
MIN_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Row:
    """One system at one size; medians of its turns."""

    system: str
    pattern: str
    senders: int
    receivers: int
    size_bytes: int
    median_us: float
    p99_us: float
    gbytes_per_s: float


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    add = parser.add_argument
    add("--senders", type=int, nargs="+", default=[2], metavar="M", help="one for each of --receivers")
    add("--receivers", type=int, nargs="+", default=[2], metavar="N")
    add("--sizes", type=sizes_of, default=sizes_of("2K..8M"), metavar="S", help="such as 2K..8M (doubling) or 4K,64K")
    add("--transport", type=names_of(TRANSPORTS), default=list(TRANSPORTS), help=",".join(TRANSPORTS))
    add("--against", type=names_of(PEERS), default=list(PEERS), help=",".join(PEERS))
    add("--pattern", type=names_of(PATTERNS), default=list(PATTERNS), help=",".join(PATTERNS))
    add("--turns", type=int, default=5, metavar="T", help="of each system, at each size")
    add("--rounds", type=int, default=200, metavar="R", help="of a turn, at most")
    add("--json", type=Path, metavar="FILE", help="write all rows into FILE")
    add("--figure", type=Path, metavar="PATH", help="draw PATH.svg and PATH.png")
    add("--redraw", type=Path, nargs="+", metavar="FILE", help="measure nothing: draw the rows of these files together")
    values: argparse.Namespace = parser.parse_args(words)
    if len(values.senders) != len(values.receivers) or min(values.senders + values.receivers) < 1:
        parser.exit(2, "tools/bench_m2n.py: give as many numbers of --senders as of --receivers, from 1 on\n")
    return values


def sizes_of(text: str) -> list[int]:
    """Bytes: a list, or a range that doubles. Raises ConfigError."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("..")
        size, end = _bytes_of(first), _bytes_of(last or first)
        while size <= end:
            found.append(size)
            size *= 2
    return sorted(set(found))


def _bytes_of(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KM]?)", text.strip())
    size = int(match[1]) * UNITS[match[2]] if match else 0
    if not size or size % ROW_BYTES:
        raise ConfigError(f"--sizes {text!r}: give multiples of {ROW_BYTES} bytes, such as 2K..8M or 4K,64K")
    return size


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return split


def rounds_of(size: int, num_pairs: int, most: int) -> int:
    """Of a turn, so that each size takes about as long as the others."""
    return max(min(MIN_ROUNDS, most), min(most, BYTES_PER_RUN // (size * num_pairs)))


# -- measured --------------------------------------------------------------------------------------------------------


def measure(values: argparse.Namespace) -> Iterator[Row]:
    said: set[str] = set()
    for num_senders, num_receivers in zip(values.senders, values.receivers, strict=True):
        names = []
        for name in [*values.transport, *values.against]:
            if why_not := SYSTEMS[name].why_not(num_senders + num_receivers):
                said.add(f"{name} is left out: it {why_not}")
            else:
                names.append(name)
        groups: dict[str, Group] = {}
        try:
            for name in names:
                groups[name] = Group(name, num_senders, num_receivers, tuple(values.sizes))
            for pattern in values.pattern:
                for size in values.sizes:
                    task = Task(pattern, size, rounds_of(size, num_senders * num_receivers, values.rounds))
                    yield from alternate(groups, task, values.turns, num_senders, num_receivers)
        finally:
            for group in groups.values():
                group.close()
    for sentence in sorted(said):
        print(sentence, file=sys.stderr)


def alternate(
    groups: dict[str, Group], task: Task, num_turns: int, num_senders: int, num_receivers: int
) -> Iterator[Row]:
    runs: dict[str, list[Run]] = {name: [] for name in groups}
    for _ in range(num_turns):
        for name, group in groups.items():
            runs[name].append(group.run(task))
    for name, of_one in runs.items():
        yield row_of(name, task, of_one, num_senders, num_receivers)


def row_of(name: str, task: Task, runs: Sequence[Run], num_senders: int, num_receivers: int) -> Row:
    num_bytes = task.rounds * task.size * num_senders * num_receivers * (2 if task.is_exchange else 1)
    return Row(
        name, task.pattern, num_senders, num_receivers, task.size,
        median_us=round(1e6 * median(median(run.times_s) for run in runs), 1),
        p99_us=round(1e6 * median(quantiles(run.times_s, n=100, method="inclusive")[98] for run in runs), 1),
        gbytes_per_s=round(median(num_bytes / run.took_s for run in runs) / 1e9, 3),
    )  # fmt: skip


# -- shown -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], pattern: str, num_senders: int, num_receivers: int) -> Table:
    """Median and 99th percentile in us, a system in each row and a size in each column."""
    of = {(row.system, row.size_bytes): row for row in rows
          if (row.pattern, row.senders, row.receivers) == (pattern, num_senders, num_receivers)}  # fmt: skip
    sizes = sorted({size for _, size in of})
    shown = Table(title=f"{pattern}, {num_senders} x {num_receivers}: median / p99 in us, GB/s")
    for heading in ("", *map(short, sizes)):
        shown.add_column(heading)
    for name in dict.fromkeys(name for name, _ in of):
        cells = [of[name, size] for size in sizes]
        shown.add_row(name, *(f"{one.median_us:.0f} / {one.p99_us:.0f}, {one.gbytes_per_s:.2f}" for one in cells))
    return shown


def short(size: int) -> str:
    unit = next(unit for unit in ("M", "K", "") if not size % UNITS[unit])
    return f"{size // UNITS[unit]} {unit}B"


def ratios(rows: Sequence[Row], ours: str, others: Sequence[str]) -> dict[tuple[str, int, int, int], tuple[str, float]]:
    """By (pattern, senders, receivers, size): the best of the others, and how many times as long as ours it takes."""
    found: dict[tuple[str, int, int, int], tuple[str, float]] = {}
    for mine in (row for row in rows if row.system == ours):
        key = mine.pattern, mine.senders, mine.receivers, mine.size_bytes
        peers = [
            row for row in rows
            if row.system in others and (row.pattern, row.senders, row.receivers, row.size_bytes) == key
        ]  # fmt: skip
        if peers:
            best = min(peers, key=lambda row: row.median_us)
            found[key] = best.system, best.median_us / mine.median_us
    return found


def main() -> None:
    values = parse()
    if values.redraw:
        files = [json.loads(file.read_text()) for file in values.redraw]
        joined = [row for file in files for row in file["rows"]]
        draw(values.figure or values.redraw[0].with_suffix(""), {**files[0], "rows": joined})
        return
    rows: list[Row] = []
    told: list[dict[str, Any]] = []
    kept: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "host": f"{processor()}, {os.cpu_count()} cores",
        "rows": told,
    }
    for row in measure(values):
        print(json.dumps(asdict(row)), flush=True)
        rows.append(row)
        told.append(asdict(row))
        if values.json:  # whatever ends a long run, what it measured is there
            values.json.write_text(as_json(kept))
    console = Console(width=40 + 24 * len(values.sizes))
    for pattern in values.pattern:
        for pair in zip(values.senders, values.receivers, strict=True):
            console.print(table(rows, pattern, *pair))
    if values.figure:
        draw(values.figure, kept)


def as_json(kept: dict[str, Any]) -> str:
    """A line for each row."""
    rows = kept["rows"]
    assert isinstance(rows, list)
    head = json.dumps({key: value for key, value in kept.items() if key != "rows"})[:-1]
    return head + ', "rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n"


def draw(output: Path, kept: dict[str, Any]) -> None:
    try:
        from tools.m2n.figure import draw as drawn
    except ImportError as error:
        sys.exit(f"the figure needs matplotlib ({error}); install it with: pip install -e '.[plot]'")
    drawn(output, kept)


if __name__ == "__main__":
    main()
