#!/usr/bin/env python3
"""From the command to the first token: msi-launch is started, asked for a token once it is ready, and ended.

    tools/bench_start.py [MODEL] [--rounds 5] [--layout colocated 1+1 2+2] [--python PYTHON ...]

Prints a JSON line per start and one with the medians of each layout: seconds until all processes were started, until
"ready" was said, until the first token of a streamed completion came, and until the launcher had ended; processor
seconds of all processes together; the most memory they held, each page counted once for all that share it. `help_s` is
what `msi-launch --help` takes. PYTHON is that of another environment with another msi: starts of both alternate.
Without MODEL the demo model starts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi_launch.command_line import ScriptLine, integer, one_of
from tools.hostility.processes import shared_out_mb

LAYOUTS = {
    "colocated": ("--colocated",),
    "1+1": (),
    "2+2": ("--attention-workers", "2", "--expert-workers", "2"),
}
START_S = 120.0
ENDS_WITHIN_S = 30.0
PROMPT = "It was a fine morning"


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="the demo model without it")
    parser.add_argument("--rounds", type=integer(1, 1000), default=5, metavar="N")
    parser.add_argument("--layout", nargs="+", type=one_of(*LAYOUTS), default=["1+1"], metavar="L", help="of "
                        + ", ".join(LAYOUTS))  # fmt: skip
    parser.add_argument("--python", nargs="+", type=Path, default=[], help="of other environments with msi")
    values: argparse.Namespace = parser.parse_args()
    return values


async def start(python: Path, words: list[str]) -> dict[str, float]:
    """One start, and its end. Raises SystemExit: it ended before it was ready."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = await asyncio.create_subprocess_exec(
        python, "-m", "msi_launch", *words, "--port", "0",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, cwd="/",
    )  # fmt: skip
    assert process.stderr is not None
    found: dict[str, float] = {}
    draining: asyncio.Task[bytes] | None = None
    try:
        async with asyncio.timeout(START_S):
            while line := await process.stderr.readline():
                if b"processes: " in line:
                    found["processes_s"] = time.monotonic() - started
                if ready := re.search(rb"ready: .*(http://\S+)/v1", line):
                    break
            else:
                raise SystemExit("msi-launch ended before it was ready")
            found["ready_s"] = time.monotonic() - started
            draining = asyncio.create_task(process.stderr.read())
            await first_token(ready[1].decode())
            found["first_token_s"] = time.monotonic() - started
            found["memory_mb"] = await asyncio.to_thread(shared_out_mb, process.pid)
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), ENDS_WITHIN_S)
            found["ended_s"] = time.monotonic() - started
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if draining is not None:
            await draining
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["processor_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return found


async def first_token(url: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"{response.status}: {await response.text()}")
        await response.content.readuntil(b"\n\n")


def help_s(python: Path) -> float:
    started = time.monotonic()
    subprocess.run([python, "-m", "msi_launch", "--help"], check=True, stdout=subprocess.DEVNULL, cwd="/")
    return time.monotonic() - started


async def main() -> None:
    arguments = parse()
    pythons = [Path(sys.executable), *arguments.python]
    model = [] if arguments.model is None else [str(arguments.model.resolve())]
    runs: dict[tuple[str, Path], list[dict[str, float]]] = {}
    helps: dict[Path, list[float]] = {}
    for number in range(-1, arguments.rounds):  # what the first finds cold is not counted
        for python in pythons:
            helps.setdefault(python, []).append(help_s(python))
            for layout in arguments.layout:
                found = await start(python, [*model, *LAYOUTS[layout]])
                if number >= 0:
                    runs.setdefault((layout, python), []).append(found)
                    print(json.dumps({"layout": layout, "python": str(python), **found}), flush=True)
    for (layout, python), several in runs.items():
        figures = {name: median(run[name] for run in several) for name in several[0]}
        about = {"median_of": len(several), "layout": layout, "python": str(python), "cores": os.cpu_count()}
        print(json.dumps({**about, **figures, "help_s": median(helps[python][1:])}))


if __name__ == "__main__":
    asyncio.run(main())
