"""What `tools/chaos.py` does to an instance: processes killed, stopped, slowed, connections broken, workers that come
and go.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.hostility.breaking import break_control, break_data
from tools.hostility.machines import send_signal
from tools.hostility.network import Trouble
from tools.hostility.operators import come_and_go, coordinator_addresses, ctl
from tools.hostility.processes import family
from tools.hostility.streams import PacedStream
from tools.hostility.wire import Target, ask

NOTICED_S = 1.0  # by then whoever is to notice has
PULSE_S = 0.1
STOPPED_S = (0.5, 6.0)  # shorter and longer than a silence that counts as a loss
KINDS = (
    "kill-attention",
    "stop-attention",
    "reset-control",
    "kill-expert",
    "stop-expert",
    "reset-data",
    "slow-attention",
    "slow-expert",
    "kill-coordinator",
    "stop-coordinator",
)
LOSS = "lose-coordinator"  # with one that stands by: the one that leads is killed, and never comes back
NETWORK = ("delay-packets", "lose-packets")  # of all processes
ORDERS = (
    "drain-attention",
    "drain-expert",
    "add-attention",
    "add-expert",
)  # nothing goes wrong: an operator is at work


@dataclass(slots=True)
class Disaster:
    """One fault.

    Attributes:
        whole_at: when all workers served again.
        complaint: of an order that was not carried out.
        stall_s: the longest wait for a piece that began before all was well again, and ended after it went wrong.
        recovery_s: until the streams were nearly as fast as undisturbed; -1 where they were not before the next fault.
        is_settled: the last two are known.
    """

    kind: str
    what: str
    began_at: float
    whole_at: float = 0.0
    complaint: str = ""
    stall_s: float = 0.0
    recovery_s: float = -1.0
    is_settled: bool = False

    def stall_of(self, streams: Iterable[PacedStream]) -> float:
        """`stall_s`, by what these have seen so far."""
        gaps = (gap for stream in streams for gap in stream.gaps)
        return max(
            (
                gap.seconds
                for gap in gaps
                if gap.ended_at >= self.began_at and gap.ended_at - gap.seconds <= self.whole_at
            ),
            default=0.0,
        )


class Disasters:
    """By a schedule that `chance` fixes.

    Args:
        launcher: process id.
        kinds: of `KINDS`, `ORDERS` and `NETWORK`; `LOSS` of an instance in which a coordinator stands by.
    """

    def __init__(self, launcher: int, chance: random.Random, kinds: Sequence[str]) -> None:
        self._launcher = launcher
        self._chance = chance
        self._kinds = kinds

    async def strike(self, count: int = 1) -> list[Disaster]:
        """So many at once, of different processes; returns when they are done, not when they are over."""
        pids = await asyncio.to_thread(family, self._launcher)
        drawn: dict[str, Coroutine[Any, Any, Disaster]] = {}
        for kind in self._chance.sample(self._kinds, min(count, len(self._kinds))):
            name, disaster = self._drawn(kind, pids)
            if name in drawn:
                disaster.close()
            else:
                drawn[name] = disaster
        return await asyncio.gather(*drawn.values())

    def _drawn(self, kind: str, pids: dict[str, int]) -> tuple[str, Coroutine[Any, Any, Disaster]]:
        """Whom it strikes, and how."""
        chance = self._chance
        role = next((one for one in ("expert", "coordinator") if kind.endswith(one)), "attention")
        name = chance.choice(sorted(name for name in pids if name.startswith(role)))
        name = role if kind == LOSS else name  # the elder one leads
        seconds = chance.uniform(*STOPPED_S)
        expert = chance.choice(sorted(name for name in pids if name.startswith("expert")) or [name])
        if kind in NETWORK:
            return "network", troubled(kind, seconds)
        if kind in ORDERS:
            return name, ordered(kind, role, name, pids)
        if kind.startswith("reset"):
            return name, broken(kind, name, expert, pids)
        return name, signalled(kind, name, seconds, pids[name])


async def signalled(kind: str, name: str, seconds: float, pid: int) -> Disaster:
    """A process is killed, stands still, or is slow."""
    began_at = time.monotonic()
    if kind == LOSS:
        send_signal(pid, signal.SIGKILL)
        return Disaster(kind, "the coordinator that leads lost for good", began_at)
    if kind.startswith("kill"):
        send_signal(pid, signal.SIGKILL)
        return Disaster(kind, f"kill -9 of {name}", began_at)
    if kind.startswith("slow"):
        await slowed(pid, seconds)
        return Disaster(kind, f"{name} slow for {seconds:.1f} s", began_at)
    send_signal(pid, signal.SIGSTOP)
    await asyncio.sleep(seconds)
    send_signal(pid, signal.SIGCONT)
    return Disaster(kind, f"{name} stopped for {seconds:.1f} s", began_at)


async def broken(kind: str, name: str, expert: str, pids: dict[str, int]) -> Disaster:
    """A connection of a worker's: to the coordinator, or to an expert worker."""
    began_at = time.monotonic()
    if kind == "reset-control":
        other, was_broken = "the coordinator", await asyncio.to_thread(break_control, pids["coordinator"], pids[name])
    else:
        other, was_broken = expert, await asyncio.to_thread(break_data, pids[name], pids[expert])
    return Disaster(kind, f"{name}'s connection to {other} broken{'' if was_broken else ': none'}", began_at)


async def troubled(kind: str, seconds: float) -> Disaster:
    """Packets are late, or some are lost, for a while."""
    began_at = time.monotonic()
    trouble = await asyncio.to_thread(Trouble, kind)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(trouble.end)
    return Disaster(kind, f"{trouble.words} for {seconds:.1f} s", began_at)


async def ordered(kind: str, role: str, name: str, pids: dict[str, int]) -> Disaster:
    """What an operator has done."""
    began_at, address = time.monotonic(), coordinator_addresses(pids)
    if kind.startswith("add"):
        complaint = await come_and_go(address, role)
        return Disaster(kind, f"one {role} worker more, and it went again", began_at, complaint=complaint)
    _, complaint = await ctl(address, "drain", name, "--within", "1")
    return Disaster(kind, f"{name} drained", began_at, complaint=complaint)


async def slowed(pid: int, seconds: float) -> None:
    """A process runs for a tenth of the time, in pulses, as on a core that others have."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        send_signal(pid, signal.SIGSTOP)
        await asyncio.sleep(0.9 * PULSE_S)
        send_signal(pid, signal.SIGCONT)
        await asyncio.sleep(0.1 * PULSE_S)


async def is_whole(target: Target, num_workers: int) -> bool:
    """Whether requests are taken and all workers are there."""
    try:
        if (await ask(target, "GET", "/ready")).status != 200:
            return False
        metrics = (await ask(target, "GET", "/metrics")).body.decode()
    except (OSError, TimeoutError):
        return False
    return num_ready(metrics) >= num_workers


def num_ready(metrics: str) -> int:
    """Workers that serve, of what /metrics says."""
    lines = (line for line in metrics.splitlines() if line.startswith("msi_workers{") and 'state="ready"' in line)
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


def exists(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
