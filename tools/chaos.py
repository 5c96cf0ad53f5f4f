#!/usr/bin/env python3
"""Processes killed, stopped, slowed and cut off again and again while streams run: what do clients notice?

    tools/chaos.py --minutes 5                       # 2 + 2 workers of the demo model, each expert twice; every 10 s
    tools/chaos.py --minutes 5 --at-once 2           # two different processes at a time
    tools/chaos.py --minutes 5 --faults kill-attention --transport tcp --redundancy 0
    tools/chaos.py --minutes 5 --faults drain-attention drain-expert add-attention add-expert kill-expert
    tools/chaos.py --minutes 3 --standby --faults lose-coordinator kill-expert kill-attention
    tools/chaos.py --seed 3 --json chaos.json --picture chaos      # chaos.svg and chaos.png, which need matplotlib
    tools/chaos.py --redraw chaos.json --picture chaos
    tools/chaos.py --minutes 60 --json chaos.json --picture chaos --log chaos.log        # both are written as it goes
    tools/chaos.py --transport tcp --faults kill-expert delay-packets lose-packets       # needs root

Starts msi-launch, learns each stream's greedy text and the streams' pace undisturbed, then strikes by a schedule that
the seed fixes. Each stream asks for its text again and again; every answer is held against the undisturbed one. At the
end it waits until the instance is whole again. Fails (status 1) when

- a request ended with an error, or a text was not the undisturbed one to the letter;
- the instance was not whole again within a minute of a fault;
- a process ended that was not killed here, or descriptors, shared mappings, KV blocks or processes are left over at the
  end.

With --standby all processes are started each by itself, as on a cluster: a coordinator, one that stands by for it,
workers and a gateway. lose-coordinator kills the one that leads for good; the other one takes over, and a new one is
started that stands by for it.

With faults of the network it runs in a network namespace of its own, whose packets take a detour through a process that
delays and loses them: those between workers over TCP, and those of the streams.

It computes in float32: in bfloat16 the two likeliest tokens are often equally likely to the last bit, and computing a
row beside others turns their order.

Told of each fault: the longest wait of a stream for its next piece meanwhile (stall), and when the streams were as fast
as before again (recovery). A slow machine makes both longer: run it on an idle one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi_launch.command_line import ScriptLine, integer, number, one_of
from tools.hostility.chaos_report import Run, draw, summary, write
from tools.hostility.cluster import MODULE, has_successor, share_secret
from tools.hostility.disasters import (
    KINDS,
    LOSS,
    NETWORK,
    NOTICED_S,
    ORDERS,
    Disaster,
    Disasters,
    exists,
    is_whole,
)
from tools.hostility.network import enter_namespace
from tools.hostility.processes import Held, all_held, family
from tools.hostility.server import ROOT, Server
from tools.hostility.streams import PacedStream, paced_streams
from tools.hostility.wire import ask

WHOLE_WITHIN_S = 60.0
SUCCESSION_NOTICED_S = 5.0  # where nobody tells of a process's end
REVIVAL = "kill-coordinator"
SPARE_DESCRIPTORS = SPARE_MAPPINGS = 8
DRAWN_EVERY_S = 300.0
WRITTEN = ("json", "picture", "log", "redraw")  # where, which says nothing of what was seen


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", help="the demo model without it")
    parser.add_argument("--minutes", type=number(0, 1e5), default=5.0, metavar="N", help="5")
    parser.add_argument("--every", type=number(0, 1e5), default=10.0, metavar="S", help="seconds between faults; 10")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0")
    parser.add_argument("--streams", type=integer(1, 1024), default=8, metavar="N", help="8")
    parser.add_argument("--max-tokens", type=integer(1, 100_000), default=300, metavar="N", help="of an answer; 300")
    parser.add_argument("--calm", type=number(0, 1e5), default=10.0, metavar="S", help="seconds undisturbed before; 10")
    parser.add_argument("--attention-workers", type=integer(1, 64), default=2, metavar="N", help="2")
    parser.add_argument("--expert-workers", type=integer(1, 64), default=2, metavar="N", help="2")
    parser.add_argument("--transport", type=one_of("auto", "shm", "tcp"), default="auto", metavar="T", help="auto")
    parser.add_argument("--redundancy", type=integer(0, 63), default=1, metavar="R", help="more of each expert; 1")
    parser.add_argument("--standby", action="store_true", help="processes of a cluster, one coordinator standing by")
    parser.add_argument("--faults", nargs="+", type=one_of(*KINDS, *ORDERS, *NETWORK, LOSS), metavar="FAULT",
                        help=f"all of: {', '.join(KINDS)} ({LOSS} in place of {REVIVAL} with --standby); or "
                        f"{', '.join((*ORDERS, *NETWORK))}")  # fmt: skip
    parser.add_argument("--at-once", type=integer(1, 8), default=1, metavar="N", help="faults at a time; 1")
    parser.add_argument("--launch", nargs="+", default=[], metavar="OPTION", help="more for msi-launch, -- before each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was seen, after each fault")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="throughput and stalls over time")
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="run nothing: the picture of what was seen before")
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), metavar="FILE", help="what the server says")
    values: argparse.Namespace = parser.parse_args(argv)
    if values.faults is None:
        values.faults = [LOSS if kind == REVIVAL and values.standby else kind for kind in KINDS]
    if why := why_not_together(values.faults, has_standby=values.standby):
        parser.exit(2, f"{parser.prog}: {why}\n")
    return values


def why_not_together(faults: Sequence[str], *, has_standby: bool) -> str:
    """Why these cannot be had together, in a sentence; "" where they can."""
    if not has_standby and LOSS in faults:
        return f"--faults {LOSS} needs --standby: with nobody to take over, the instance would be lost with it"
    if has_standby and REVIVAL in faults:
        return (
            f"--faults {REVIVAL} is not for --standby: a coordinator that is killed comes back there only to stand by; "
            f"give {LOSS}"
        )
    if has_standby and (adding := [kind for kind in faults if kind.startswith("add-")]):
        return f"--faults {' '.join(adding)} is not for --standby: nobody starts more workers of a cluster when asked"
    return ""


def launched_with(arguments: argparse.Namespace) -> tuple[str, ...]:
    return (
        *([arguments.model] if arguments.model else []), "--attention-workers", str(arguments.attention_workers),
        "--expert-workers", str(arguments.expert_workers), "--threads-per-worker", "1",
        "--expert-redundancy", str(arguments.redundancy), "--dtype", "float32",
        "--transport", arguments.transport, *(f"--{option.removeprefix('--')}" for option in arguments.launch),
    )  # fmt: skip


async def whole_again(server: Server, num_workers: int, *, has_standby: bool = False) -> bool:
    await asyncio.sleep(SUCCESSION_NOTICED_S if has_standby else NOTICED_S)

    def is_led() -> bool:
        return not has_standby or has_successor(family(server.process.pid))

    try:
        async with asyncio.timeout(WHOLE_WITHIN_S):
            while not (await asyncio.to_thread(is_led) and await is_whole(server.target, num_workers)):
                await asyncio.sleep(0.1)
    except TimeoutError:
        return False
    return True


async def storm(server: Server, arguments: argparse.Namespace, run: Run) -> None:
    """Strikes until the time is over. The next fault comes when it is due, and when the instance is whole again."""
    num_workers = arguments.attention_workers + arguments.expert_workers
    disasters = Disasters(server.process.pid, random.Random(arguments.seed), arguments.faults)
    expected = family(server.process.pid)
    names = set(expected)  # of those that are there all the time
    until = time.monotonic() + 60 * arguments.minutes
    drawing = Drawing(arguments)
    while (due := time.monotonic() + arguments.every) < until:
        await asyncio.sleep(due - time.monotonic())
        run.settle(time.monotonic())
        if arguments.json:
            await asyncio.to_thread(write, arguments.json, summary(run))
            await drawing.look()
        now = await asyncio.to_thread(family, server.process.pid)
        run.deaths += [f"{name} ended by itself" for name, pid in expected.items() if now.get(name) != pid]
        struck = await disasters.strike(arguments.at_once)
        run.disasters += struck
        run.deaths += [f"{one.what}: {one.complaint}" for one in struck if one.complaint]
        if not await whole_again(server, num_workers, has_standby=arguments.standby):
            what = ", ".join(one.what for one in struck)
            run.deaths.append(f"the instance was not whole {WHOLE_WITHIN_S:g} s after {what}")
        for one in struck:
            one.whole_at = time.monotonic()
            say_progress(one, run.streams)
        there = await asyncio.to_thread(family, server.process.pid)  # and maybe one more, which is about to end
        expected = {name: pid for name, pid in there.items() if name in names}
    await drawing.end()


def say_progress(disaster: Disaster, streams: list[PacedStream]) -> None:
    line = {
        "fault": disaster.what,
        "stall_ms": round(1e3 * disaster.stall_of(streams)),
        "whole_again_s": round(disaster.whole_at - disaster.began_at, 1),
        "answers": sum(stream.num_answers for stream in streams),
        "errors": sum(stream.num_errors for stream in streams),
        "changed": sum(stream.num_wrong for stream in streams),
    }
    print(json.dumps(line), flush=True)


class Drawing:
    """The picture, now and then, by a process of its own that yields to all others: the streams are timed meanwhile."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._due = time.monotonic() + DRAWN_EVERY_S
        self._running: asyncio.subprocess.Process | None = None

    async def look(self) -> None:
        arguments, nice = self._arguments, shutil.which("nice")
        if not arguments.picture or time.monotonic() < self._due:
            return
        if self._running is None or self._running.returncode is not None:
            self._due = time.monotonic() + DRAWN_EVERY_S
            self._running = await asyncio.create_subprocess_exec(
                *([nice, "-n", "19"] if nice else []), sys.executable, str(Path(__file__).resolve()),
                "--redraw", str(arguments.json), "--picture", str(arguments.picture),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            )  # fmt: skip

    async def end(self) -> None:
        """None is drawn any more: the last one is to stay."""
        if self._running is not None and self._running.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._running.kill()
            await self._running.wait()


async def observed(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run; what was seen."""
    streams = paced_streams(server.target, arguments.streams, arguments.max_tokens)
    run = Run(streams)
    living = [asyncio.ensure_future(stream.run()) for stream in streams]
    while not all(stream.num_answers for stream in streams):
        await asyncio.sleep(0.1)
        if wrong := [one.errors for one in streams if one.errors]:
            raise SystemExit(f"a stream ended with an error before anything was done to it: {wrong[0]}")
    run.calm_from = time.monotonic()
    await asyncio.sleep(arguments.calm)
    before = all_held(server.process.pid)
    run.begin_storm(time.monotonic())
    await storm(server, arguments, run)
    run.storm_until = time.monotonic()
    await asyncio.sleep(arguments.calm)
    run.settle(run.storm_until)
    for one in living:
        one.cancel()
    await asyncio.gather(*living, return_exceptions=True)
    await asyncio.sleep(arguments.calm)
    after = all_held(server.process.pid)
    if arguments.standby:
        before["coordinator"] = having_stood_by(before)
    return summary(run) | {
        "options": {name: value for name, value in vars(arguments).items() if name not in WRITTEN},
        "descriptors_before": {name: one.num_descriptors for name, one in before.items()},
        "descriptors_after": {name: one.num_descriptors for name, one in after.items()},
        "memory_before": {name: one.resident_bytes for name, one in before.items()},
        "memory_after": {name: one.resident_bytes for name, one in after.items()},
        "leftovers": [*left_over(before, after), *await blocks_left_over(server)],
    }


def left_over(before: dict[str, Held], after: dict[str, Held]) -> list[str]:
    """In sentences."""
    found = []
    for name, now in after.items():
        then = before.get(name, Held(0, 0, 0))
        if now.num_descriptors > then.num_descriptors + SPARE_DESCRIPTORS:
            found.append(f"{name} holds {now.num_descriptors} descriptors; {then.num_descriptors} before")
        if now.num_mappings > then.num_mappings + SPARE_MAPPINGS:
            found.append(f"{name} has {now.num_mappings} shared mappings; {then.num_mappings} before")
    return found


def having_stood_by(before: dict[str, Held]) -> Held:
    """What a coordinator may hold that took over: its way to the one that it stood by for, too."""
    leading, standing = before["coordinator"], before["coordinator-2"]
    return Held(
        leading.resident_bytes,
        leading.num_descriptors + standing.num_descriptors,
        leading.num_mappings + standing.num_mappings,
    )


async def blocks_left_over(server: Server) -> list[str]:
    """KV blocks that are in use though no request runs."""
    metrics = (await ask(server.target, "GET", "/metrics")).body.decode()
    return [
        f"KV blocks are in use though nothing runs: {line}"
        for line in metrics.splitlines()
        if line.startswith("vllm:kv_cache_usage_perc") and float(line.rpartition(" ")[2]) > 0
    ]


def failures_of(seen: dict[str, Any]) -> list[str]:
    """Why the run failed, in sentences; nothing if it did not."""
    return [*seen["errors"], *seen["changed"], *seen["deaths"], *seen["leftovers"]]


async def main() -> int:
    arguments = parse()
    if arguments.redraw:
        draw(arguments.picture or arguments.redraw.with_suffix(""), json.loads(arguments.redraw.read_text()))
        return 0
    if set(arguments.faults) & set(NETWORK):
        enter_namespace()
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)  # nothing is left behind
    if arguments.standby:
        share_secret()
    module = MODULE if arguments.standby else "msi_launch"
    server = await Server.start(launched_with(arguments), arguments.log, module)
    children = family(server.process.pid)
    try:
        seen = await observed(server, arguments)
    finally:
        children |= family(server.process.pid)
        await server.stop()
    left = [f"{name} (pid {pid}) outlived msi-launch" for name, pid in children.items() if exists(pid)]
    seen["leftovers"] += left
    if arguments.json:
        write(arguments.json, seen)
    if arguments.picture:
        draw(arguments.picture, seen)
    print(json.dumps({name: value for name, value in seen.items() if isinstance(value, int | float)}))
    failures = failures_of(seen)
    for sentence in failures:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        status = asyncio.run(main())
    except asyncio.CancelledError:
        status = 128 + signal.SIGTERM
    sys.exit(status)
