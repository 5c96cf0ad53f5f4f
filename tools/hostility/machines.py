"""Faults of machines: a process killed, or stopped for a while. Streams may then end with an error, and only then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass

from tools.hostility.processes import family
from tools.hostility.wire import Target, ask

STOPPED_S = (0.2, 2.5)
RECOVERY_S = 60.0
SETTLED_S = 2.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; from `began_at` to `ended_at`, when requests were taken again, its effects are forgiven."""

    what: str
    began_at: float
    ended_at: float

    def covers(self, begun_at: float, ended_at: float) -> bool:
        return begun_at <= self.ended_at and ended_at >= self.began_at


async def strike(target: Target, launcher: int, chance: random.Random) -> Fault:
    """Stops or kills one process of the instance, and waits until it serves again.

    Raises:
        TimeoutError: it did not within `RECOVERY_S`.
    """
    processes = family(launcher)
    workers = [name for name in processes if name.startswith(("attention", "expert"))]
    others = [name for name in processes if name not in workers and name != "launcher"]
    began_at = time.monotonic()
    kind = chance.choice(["kill", "stop", "stop", "harmless"])
    if kind == "kill" and workers:
        name = chance.choice(workers)
        what = f"kill -9 of {name}"
        send_signal(processes[name], signal.SIGKILL)
    elif kind == "stop":
        name = chance.choice([*workers, *others, "launcher"])
        seconds = chance.uniform(*STOPPED_S)
        what = f"{name} stopped for {seconds:.1f} s"
        send_signal(processes[name], signal.SIGSTOP)
        await asyncio.sleep(seconds)
        send_signal(processes[name], signal.SIGCONT)
    else:
        what = "SIGWINCH, SIGCHLD, SIGURG and SIGCONT to all"
        for pid in processes.values():
            for number in (signal.SIGWINCH, signal.SIGCHLD, signal.SIGURG, signal.SIGCONT):
                send_signal(pid, number)
    await asyncio.sleep(0.5)
    async with asyncio.timeout(RECOVERY_S):
        while not await is_ready(target):
            await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLED_S)
    return Fault(what, began_at, time.monotonic())


async def is_ready(target: Target) -> bool:
    try:
        return (await ask(target, "GET", "/ready")).status == 200
    except (OSError, TimeoutError):
        return False


def send_signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
