#!/usr/bin/env python3
"""All kinds of hostile requests, bodies, sockets and signals against a running instance, beside live streams.

    tools/hostile.py --minutes 10                         # the demo model, attention and experts apart, seed 0
    tools/hostile.py --minutes 2 --only large large_chat  # some attacks alone; --list names them
    tools/hostile.py --no-faults --json hostile.json      # no process is killed or stopped

Starts msi-launch, learns the greedy texts of four streams and their pace undisturbed, then attacks from a process of
its own while the streams go on; now and then a process of the instance is stopped or killed. At the end it waits until
the instance is idle again. Fails (status 1) when

- a server error other than 503 was answered, or nothing, or an error that is not one JSON object;
- a stream's text changed, or a stream ended with an error outside a fault of a machine;
- a process ended that was not killed here;
- a piece of a live stream came more than --delay-ms after the one before, faults of machines apart;
- memory grew by more than 10 % (--growth) between the first fifth and the end, or descriptors are left over at the end.

Attackers run at a lower priority, yet on few cores they take time from the server: run it on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi_launch.command_line import ScriptLine, integer, number, one_of
from tools.hostility.attacker import NAMES
from tools.hostility.machines import Fault, strike
from tools.hostility.processes import family, held, num_descriptors
from tools.hostility.server import API_KEY, ROOT, Server
from tools.hostility.streams import LiveStream, live_streams

SLOW_S = 0.05  # shorter waits are not kept: looking through them made the watcher late itself
CALM_S = 10.0  # streams alone, before and after
FAULT_EVERY_S = 25.0
SPARE_DESCRIPTORS = 8
NUM_SHOWN_GAPS = 40


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", help="the demo model without it")
    parser.add_argument("--minutes", type=number(0, 1e5), default=10.0, metavar="N", help="10")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0")
    parser.add_argument("--attention-workers", type=integer(1, 64), default=1, metavar="N", help="1")
    parser.add_argument("--expert-workers", type=integer(1, 64), default=1, metavar="N", help="1")
    parser.add_argument("--delay-ms", type=number(0, 1e6), default=100.0, metavar="MS", help="allowed of a piece; 100")
    parser.add_argument("--growth", type=number(1, 100), default=1.1, metavar="N", help="allowed of memory; 1.1")
    parser.add_argument("--no-faults", action="store_true", help="no process is killed or stopped")
    parser.add_argument("--only", nargs="+", default=[], type=one_of(*NAMES), metavar="ATTACK", help="some alone")
    parser.add_argument("--list", action="store_true", help="name the attacks, and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was seen")
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), metavar="FILE", help="what the server says")
    values: argparse.Namespace = parser.parse_args()
    return values


class Attackers:
    """The attacking process, and what it reported."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    async def run(self, server: Server, arguments: argparse.Namespace, seconds: float) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tools.hostility.attacker", f"http://{server.target.host}:{server.target.port}",
            API_KEY, str(arguments.seed), str(server.process.pid), *arguments.only,
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        reading = asyncio.ensure_future(self._read(process.stdout))
        try:
            await asyncio.wait({reading}, timeout=seconds)
            process.stdin.close()
            await asyncio.wait({reading}, timeout=70.0)
        finally:
            reading.cancel()
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _read(self, stdout: asyncio.StreamReader) -> None:
        while line := await stdout.readline():
            self.reports.append(json.loads(line))


class Watch:
    """What happened to the machine while attacks ran."""

    def __init__(self, server: Server, streams: list[LiveStream]) -> None:
        self.faults: list[Fault] = []
        self.deaths: list[str] = []
        self.late_s = 0.0  # the most that this process's own clock was late: not the server's doing
        self._server = server
        self._streams = streams
        self._seen: dict[str, int] = family(server.process.pid)
        self._calm = asyncio.Event()  # no fault is in the making
        self._calm.set()
        self._since = time.monotonic()

    async def strike_now_and_then(self, chance: random.Random) -> None:
        while True:
            await asyncio.sleep(FAULT_EVERY_S * chance.uniform(0.5, 1.5))
            self._calm.clear()
            try:
                self.faults.append(await strike(self._server.target, self._server.process.pid, chance))
            except TimeoutError:
                self.deaths.append("the instance did not serve again within a minute of a fault")
            self._seen = family(self._server.process.pid)
            self._calm.set()

    async def last_fault_is_over(self) -> None:
        """One that was made while the attacks ended is told, too, and leaves nobody stopped."""
        await self._calm.wait()

    async def count_deaths(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if not self._calm.is_set():
                continue
            now = await asyncio.to_thread(family, self._server.process.pid)
            for name, pid in self._seen.items():
                if name.startswith("helper"):
                    continue  # they may be ended and started again when a request takes too long
                if now.get(name) != pid and self._calm.is_set():
                    self.deaths.append(f"{name} (pid {pid}) ended by itself")
            if self._calm.is_set():
                self._seen = now

    async def measure_own_lateness(self) -> None:
        while True:
            begun_at = time.monotonic()
            await asyncio.sleep(0.01)
            self.late_s = max(self.late_s, time.monotonic() - begun_at - 0.01)

    async def say_progress(self, attackers: Attackers) -> None:
        while True:
            await asyncio.sleep(15.0)
            resident = await asyncio.to_thread(memory, self._server)
            line = {
                "attacks": len(attackers.reports),
                "faults": len(self.faults),
                "answers": sum(stream.num_answers for stream in self._streams),
                "worst_gap_ms": round(1e3 * worst_gap_s(self._streams, self.faults, self._since), 1),
                "memory_mb": sum(resident.values()) >> 20,
            }
            print(json.dumps(line), flush=True)


def worst_gap_s(
    streams: list[LiveStream], faults: list[Fault], since: float = 0.0, until: float = float("inf")
) -> float:
    """The longest wait for the next piece of a live stream, faults of machines apart.

    Looks no further than the first that no fault excuses: the watcher is late itself while it looks.
    """
    gaps = [(gap.seconds, gap.ended_at) for stream in streams for gap in stream.gaps]
    gaps.sort(reverse=True)
    seen = (
        s for s, ended_at in gaps if since <= ended_at <= until and not _is_forgiven(faults, ended_at - s, ended_at)
    )
    return next(seen, 0.0)


def worst_gaps(
    streams: list[LiveStream], faults: list[Fault], reports: list[dict[str, Any]], since: float, until: float
) -> list[dict[str, Any]]:
    """The longest waits, and the attacks that ran meanwhile."""
    gaps = [
        (gap, stream.name)
        for stream in streams
        for gap in stream.gaps
        if since <= gap.ended_at <= until and not _is_forgiven(faults, gap.ended_at - gap.seconds, gap.ended_at)
    ]
    gaps.sort(key=lambda one: -one[0].seconds)
    return [
        {
            "ms": round(1e3 * gap.seconds, 1),
            "at": round(gap.ended_at - since, 3),
            "stream": name,
            "beside": [
                report["attack"]
                for report in reports
                if report["began_at"] < gap.ended_at and report["ended_at"] > gap.ended_at - gap.seconds
            ],
        }
        for gap, name in gaps[:NUM_SHOWN_GAPS]
    ]


def _is_forgiven(faults: list[Fault], begun_at: float, ended_at: float) -> bool:
    return any(fault.covers(begun_at, ended_at) for fault in faults)


def memory(server: Server) -> dict[str, int]:
    """Resident bytes of each process."""
    return {name: _resident_bytes(pid) for name, pid in family(server.process.pid).items()}


def _resident_bytes(pid: int) -> int:
    try:
        return held(pid).resident_bytes
    except OSError:
        return 0


async def attack(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run; what was seen."""
    streams = live_streams(server.target, max_tokens=150)
    living = [asyncio.ensure_future(stream.run()) for stream in streams]
    while not all(stream.num_answers for stream in streams):
        await asyncio.sleep(0.1)
    calm_from = time.monotonic()
    await asyncio.sleep(CALM_S)
    calm_until = time.monotonic()
    for stream in streams:
        stream.slow_s = SLOW_S
    descriptors_before = num_descriptors(server.process.pid)
    watch, attackers = Watch(server, streams), Attackers()
    chance = random.Random(arguments.seed)
    watching = [
        asyncio.ensure_future(one)
        for one in (
            watch.count_deaths(), watch.measure_own_lateness(), watch.say_progress(attackers),
            *(() if arguments.no_faults else (watch.strike_now_and_then(chance),)),
        )
    ]  # fmt: skip
    seconds = 60 * arguments.minutes
    attacking = asyncio.ensure_future(attackers.run(server, arguments, seconds))
    await asyncio.wait({attacking}, timeout=seconds / 5)
    early = memory(server)
    await attacking
    hostile_until = time.monotonic()
    await watch.last_fault_is_over()
    for one in watching:
        one.cancel()
    await asyncio.sleep(CALM_S)
    for one in living:
        one.cancel()
    await asyncio.gather(*living, *watching, return_exceptions=True)
    await asyncio.sleep(CALM_S)
    late = memory(server)
    return _summary(server, watch, streams, attackers.reports) | {
        "seed": arguments.seed,
        "minutes": arguments.minutes,
        "calm_gap_ms": 1e3 * worst_gap_s(streams, [], calm_from, calm_until),
        "worst_gap_ms": 1e3 * worst_gap_s(streams, watch.faults, calm_until, hostile_until),
        "worst_gaps": worst_gaps(streams, watch.faults, attackers.reports, calm_until, hostile_until),
        "memory_late_over_early": sum(late.values()) / sum(early.values()),
        "memory_early": early,
        "memory_late": late,
        "descriptors_before": descriptors_before,
        "descriptors_after": num_descriptors(server.process.pid),
    }


def _summary(server: Server, watch: Watch, streams: list[LiveStream], reports: list[dict[str, Any]]) -> dict[str, Any]:
    outcomes: dict[str, Counter[str]] = {}
    violations: Counter[str] = Counter()
    for report in reports:
        outcomes.setdefault(report["attack"], Counter()).update(report["outcomes"])
        if not _is_forgiven(watch.faults, report["began_at"], report["ended_at"]):
            violations.update(f"{report['attack']}: {sentence}" for sentence in report["violations"])
    errors = [
        f"{stream.name}: {what}"
        for stream in streams
        for begun_at, ended_at, what in stream.errors
        if not _is_forgiven(watch.faults, begun_at, ended_at)
    ]
    return {
        "attacks": len(reports),
        "outcomes": outcomes,
        "violations": dict(violations),
        "faults": [fault.what for fault in watch.faults],
        "deaths": watch.deaths,
        "answers": sum(stream.num_answers for stream in streams),
        "stream_errors": errors,
        "wrong_texts": [f"{stream.name}: {text[:200]!r}" for stream in streams for text in stream.wrong],
        "own_lateness_ms": 1e3 * watch.late_s,
        "is_alive": server.process.returncode is None,
    }


def faults_of(seen: dict[str, Any], delay_ms: float, growth: float) -> list[str]:
    """Why the run failed, in sentences; nothing if it did not."""
    found = [f"{count} x {what}" for what, count in seen["violations"].items()]
    found += seen["deaths"] + seen["stream_errors"] + seen["wrong_texts"]
    if not seen["is_alive"]:
        found.append("msi-launch ended")
    if seen["worst_gap_ms"] > delay_ms:
        found.append(f"a live stream waited {seen['worst_gap_ms']:.0f} ms; at most {delay_ms:g} are allowed")
    if seen["memory_late_over_early"] > growth:
        found.append(f"memory at the end is {seen['memory_late_over_early']:.3f} of that after a fifth")
    for name, before in seen["descriptors_before"].items():
        if (after := seen["descriptors_after"].get(name, 0)) > before + SPARE_DESCRIPTORS:
            found.append(f"{name} holds {after} descriptors; {before} before")
    return found


async def main() -> int:
    arguments = parse()
    if arguments.list:
        print("\n".join(NAMES))
        return 0
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)  # nothing is left behind
    server = await Server.start(
        (
            *([arguments.model] if arguments.model else []), "--attention-workers", str(arguments.attention_workers),
            "--expert-workers", str(arguments.expert_workers), "--threads-per-worker", "1",
            "--dtype", "float32",  # texts are compared: bfloat16's depend on who else runs
        ),
        arguments.log,
    )  # fmt: skip
    try:
        seen = await attack(server, arguments)
    finally:
        await server.stop()
    found = faults_of(seen, arguments.delay_ms, arguments.growth)
    if arguments.json:
        arguments.json.write_text(json.dumps(seen, indent=1) + "\n")
    print(json.dumps({name: seen[name] for name in ("attacks", "answers", "faults", "calm_gap_ms", "worst_gap_ms",
                                                    "own_lateness_ms", "memory_late_over_early")}))  # fmt: skip
    for sentence in found:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        status = asyncio.run(main())
    except asyncio.CancelledError:
        status = 128 + signal.SIGTERM
    sys.exit(status)
