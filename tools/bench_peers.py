#!/usr/bin/env python3
"""This server beside vLLM's CPU engine, llama.cpp and transformers: the same checkpoint, the same cores, in turns.

    tools/bench_peers.py MODEL [--peers msi vllm llama.cpp transformers] [--batch 1 8 32] [--rounds 3]
        [--quantization int8] [--json FILE] [--figure FILE]
    tools/bench_peers.py --redraw FILE --figure FILE

Each is installed into an environment of its own in .clients/, at a pinned version, the first time (several GB); one
that cannot be installed, or cannot serve this checkpoint, is left out with a sentence. All serve HTTP, and are asked
the same: batches that are sent at once (tokens/s while all decode, and end to end), one prompt of --long tokens, and
Poisson arrivals. Who is not asked stands still. transformers has static batches alone. A JSON line is printed per
measurement, then a table of the medians; ratios are those of this server over another, of the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from rich.console import Console
from rich.table import Table

from msi.models.families import load_config
from msi_launch.command_line import ScriptLine, integer, number, one_of
from tools.bench_decode import machine_read_gb_per_s
from tools.peers import load
from tools.peers.servers import PEERS, Running, Setting, python_of

OURS = "msi"
WARM_TOKENS = 4
Figures = dict[str, dict[str, list[float]]]  # by what was measured, then by server, of each round


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--peers", nargs="+", type=one_of(*PEERS), default=list(PEERS), metavar="P",
                        help="of " + ", ".join(PEERS))  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=integer(1, 256), default=[1, 8, 32], metavar="B")
    parser.add_argument("--input-len", type=integer(1, 100_000), default=128, metavar="N")
    parser.add_argument("--output-len", type=integer(2, 100_000), default=64, metavar="N")
    parser.add_argument("--long", type=integer(0, 100_000), default=1000, metavar="N", help="0 leaves it out")
    parser.add_argument("--rate", type=number(0, 1e6), default=1.0, metavar="R", help="of Poisson arrivals per second")
    parser.add_argument("--requests", type=integer(0, 100_000), default=16, metavar="N", help="of them; 0: none")
    parser.add_argument("--rounds", type=integer(1, 1000), default=3, metavar="N")
    parser.add_argument("--threads", type=integer(1, 1024), default=2, metavar="T")
    parser.add_argument("--quantization", type=one_of("none", "int8"), default="none", metavar="Q")
    parser.add_argument("--json", type=Path, help="where the medians go", metavar="FILE")
    parser.add_argument("--figure", type=Path, help="where a picture goes", metavar="FILE")
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="measure nothing: draw what --json kept")
    values: argparse.Namespace = parser.parse_args()
    if values.model is None and values.redraw is None:
        sys.stderr.write("tools/bench_peers.py: model is missing; or give --redraw what --json kept\n")
        raise SystemExit(2)
    return values


def processor() -> str:
    """Its name, and which of the units that matter here it has."""
    about = Path("/proc/cpuinfo").read_text()
    name = next((line.partition(":")[2].strip() for line in about.splitlines() if line.startswith("model name")), "?")
    flags = set(next((line for line in about.splitlines() if line.startswith("flags")), "").split())
    kind = "AVX2 only" if "avx512f" not in flags else "AVX512"
    kind += ", BF16" if "avx512_bf16" in flags else ""
    return f"{name} ({kind}{', AMX' if 'amx_bf16' in flags else ''})"


async def start_all(names: list[str], setting: Setting) -> list[Running]:
    """Those that can serve it; of each other a sentence says why not."""
    running = []
    for name in names:
        try:
            python = await asyncio.to_thread(python_of, name)
            running.append(await Running.start(name, python, setting))
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        else:
            running[-1].stand_still()
    return running


async def measure(server: Running, seed: int, vocab_size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Everything, once. Raises ValueError: it did not answer as it was asked."""
    found: dict[str, float] = {}
    for batch in arguments.batch:
        asked = load.prompts(seed + batch, batch, arguments.input_len, vocab_size)
        figures = await load.batch(server.url, asked, arguments.output_len)
        found |= {f"{name}, {batch}": value for name, value in figures.items()}
    if arguments.long:
        figures = await load.batch(server.url, load.prompts(seed, 1, arguments.long, vocab_size), WARM_TOKENS)
        found[f"ttft_s of {arguments.long}"] = figures["ttft_s"]
    if arguments.requests:
        asked = load.prompts(seed + 1000, arguments.requests, arguments.input_len, vocab_size)
        found |= await load.poisson(server.url, asked, arguments.output_len, arguments.rate, seed)
    return found


async def in_turns(servers: list[Running], vocab_size: int, arguments: argparse.Namespace) -> Figures:
    """Every round of every server; the first, in which kernels are compiled and memory is taken, is not counted."""
    figures: Figures = defaultdict(lambda: defaultdict(list))
    for number_of_round in range(-1, arguments.rounds):
        for server in list(servers):
            server.go_on()
            try:
                if number_of_round < 0:
                    asked = load.prompts(7, max(arguments.batch), arguments.input_len, vocab_size)
                    await load.batch(server.url, asked, WARM_TOKENS)
                    continue
                found = await measure(server, 10_000 * (1 + number_of_round), vocab_size, arguments)
            except ValueError as error:
                print(f"{server.name} is left out: {error}", file=sys.stderr, flush=True)
                servers.remove(server)
                await server.end()
                continue
            finally:
                if server in servers:
                    server.stand_still()
            print(json.dumps({"server": server.name, **found}), flush=True)
            for name, value in found.items():
                figures[name][server.name].append(value)
    return figures


def ratio(name: str, ours: list[float], theirs: list[float]) -> float:
    """How much better ours are, of the same rounds: more tokens, or less time."""
    pairs = [
        (a, b) if name.endswith("per_s") or "per_s," in name else (b, a) for a, b in zip(ours, theirs, strict=True)
    ]
    return median(a / b for a, b in pairs)


def table(figures: Figures, servers: list[str]) -> Table:
    """Medians, and in brackets how much better ours are."""
    made = Table("", *servers)
    for name, by_server in figures.items():
        cells = []
        for server in servers:
            values = by_server.get(server, [])
            cell = f"{median(values):.3g}" if values else ""
            ours = by_server.get(OURS, [])
            if values and server != OURS and len(ours) == len(values):
                cell += f"  ({ratio(name, ours, values):.2f})"
            cells.append(cell)
        made.add_row(name, *cells)
    return made


def draw(figures: Figures, servers: list[str], about: dict[str, Any], path: Path) -> None:
    """A panel for each figure, a bar for each server."""
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(figures) // columns)
    figure = Figure(figsize=(4 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (name, by_server), panel in zip(figures.items(), panels, strict=False):  # in this order no panel is left out
        heights = [median(by_server[server]) if by_server.get(server) else 0.0 for server in servers]
        bars = panel.bar(servers, heights, color=[f"C{at}" for at in range(len(servers))])
        panel.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=7)
        panel.set_title(name, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.margins(y=0.2)
    for panel in list(panels):
        panel.set_visible(False)
    figure.suptitle(f"{about['model']}, {about['threads']} threads, {about['processor']}", fontsize=9)
    figure.savefig(path)


async def main() -> None:
    arguments = parse()
    if arguments.redraw is not None:
        kept = json.loads(arguments.redraw.read_text())
        draw(kept["rounds_of"], list(kept["weights"]), kept, arguments.figure or arguments.redraw.with_suffix(".png"))
        return
    config, _ = load_config(arguments.model)
    context = max(arguments.long, arguments.input_len) + arguments.output_len + WARM_TOKENS
    setting = Setting(
        arguments.model.resolve(), arguments.threads, arguments.quantization, max(8, *arguments.batch), context
    )
    servers = await start_all(arguments.peers, setting)
    names = [server.name for server in servers]
    try:
        figures = await in_turns(servers, config.vocab_size, arguments)
        for server in servers:
            figures["start_s"][server.name].append(server.start_s)
            server.go_on()
            figures["memory_mb"][server.name].append(await asyncio.to_thread(server.memory_mb))
            server.stand_still()
    finally:
        for server in servers:
            await server.end()
    about = {
        "model": arguments.model.resolve().name, "threads": arguments.threads, "processor": processor(),
        "machine_read_gb_per_s": machine_read_gb_per_s(arguments.threads),
        "weights": {name: PEERS[name].held_as[arguments.quantization] for name in names},
        "versions": {name: list(PEERS[name].packages) for name in names}, "input_len": arguments.input_len,
        "output_len": arguments.output_len, "rate": arguments.rate, "rounds": arguments.rounds,
    }  # fmt: skip
    print(json.dumps(about))
    Console(width=160).print(table(figures, names))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**about, "rounds_of": figures}, indent=1) + "\n")
    if arguments.figure is not None:
        draw(figures, names, about, arguments.figure)


if __name__ == "__main__":
    asyncio.run(main())
