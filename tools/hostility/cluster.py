"""An instance as on a cluster, all of it on this machine: workers, a gateway and two coordinators, of which one stands
by for the other. Each is a process started by itself; whoever ends is started again, as systemd or Kubernetes would.

    python -m tools.hostility.cluster [MODEL] [options of msi-launch] --port 0

A coordinator that ends was lost for good: what is started in its place stands by for the other one. So the elder of the
two leads, and `family` numbers them by age: "coordinator" leads, "coordinator-2" stands by.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msi.net.secret import VARIABLE
from msi_launch.parent import end_with_parent
from tools.hostility.operators import coordinator_address
from tools.hostility.processes import tcp_ports

MODULE = "tools.hostility.cluster"
ENDS_WITHIN_S = 8.0
HEALTHY_AFTER_S = 10.0  # who never lived for so long, and ends by itself, cannot work
AGAIN_S = 1.0  # until the next start of who lived shorter
FIRST_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST_PORT = 15_000


@dataclass(frozen=True, slots=True)
class Line:
    """How a process is started first, and how again: words for msi-launch."""

    first: tuple[str, ...]
    again: tuple[str, ...]


def lines_of(
    words: Sequence[str], numbers: Mapping[str, int], coordinators: tuple[str, str], serving: Sequence[str]
) -> dict[str, Line]:
    """How each process of an instance is started, by name.

    Args:
        words: for all but the gateway.
        numbers: of workers, by role.
        coordinators: where they listen.
        serving: for the gateway.
    """
    first, second = coordinators
    coordinating = (*words, "--role", "coordinator", "--no-gateway", "--coordinator")
    standing_by = (*coordinating, first, "--standby", second)
    lines = {
        "coordinator": Line((*coordinating, first), standing_by),
        "standby": _always(*coordinating, second, "--standby", first),
    }
    where = ("--coordinator", ",".join(coordinators))
    for role, count in numbers.items():
        for index in range(count):
            name = f"{role}-{index}"
            lines[name] = _always(*words, "--role", role, "--worker-id", name, *where)
    lines["gateway"] = _always("--role", "gateway", *where, *serving)
    return lines


def _always(*words: str) -> Line:
    return Line(words, words)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, and that no connection is given while nobody listens there yet."""
    chosen: list[int] = []
    numbers = range(LOWEST_PORT, max(LOWEST_PORT + 1000, int(FIRST_EPHEMERAL.read_text().split()[0])))
    for port in random.sample(numbers, len(numbers)):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            chosen.append(port)
        if len(chosen) == count:
            return chosen
    raise SystemExit("no port is free on this machine")


async def keep(name: str, line: Line) -> None:
    """One process and its successors, for ever; cancelled, it ends the one that runs.

    Raises:
        SystemExit: it cannot work.
    """
    words, has_been_healthy, keeper = line.first, False, os.getpid()
    while True:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "msi_launch", *words, stdin=asyncio.subprocess.DEVNULL,
            preexec_fn=lambda: end_with_parent(keeper),
        )  # fmt: skip
        began_at = time.monotonic()
        try:
            status = await process.wait()
        finally:
            await end(name, process)
        is_healthy = time.monotonic() - began_at >= HEALTHY_AFTER_S
        has_been_healthy |= is_healthy
        if status > 0 and not has_been_healthy:
            raise SystemExit(f"{name} ended with status {status} as it started; what it said is above")
        print(f"{name} (pid {process.pid}) ended with status {status}; it is started again", file=sys.stderr)
        words = line.again
        await asyncio.sleep(0 if is_healthy else AGAIN_S)


async def end(name: str, process: asyncio.subprocess.Process) -> None:
    """If need be by force."""
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), ENDS_WITHIN_S)
        except TimeoutError:
            print(f"{name} (pid {process.pid}) did not end within {ENDS_WITHIN_S:g} s of SIGTERM", file=sys.stderr)
            process.kill()
            await process.wait()


async def keep_all(lines: Mapping[str, Line]) -> None:
    """Until SIGTERM. Raises SystemExit: one of them cannot work."""
    kept = [asyncio.ensure_future(keep(name, line)) for name, line in lines.items()]
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    try:
        await asyncio.wait([*kept, waiting := asyncio.ensure_future(asked.wait())], return_when="FIRST_COMPLETED")
        waiting.cancel()
        why = [str(one.exception()) for one in kept if one.done()]
    finally:
        for one in kept:
            one.cancel()
        await asyncio.gather(*kept, return_exceptions=True)
    if why:
        raise SystemExit(why[0])


# -- for who watches it ----------------------------------------------------------------------------------------------


def share_secret() -> None:
    """What this process starts from now on has a secret in common."""
    os.environ.setdefault(VARIABLE, secrets.token_hex(32))


def has_successor(pids: Mapping[str, int]) -> bool:
    """Whether the elder coordinator leads, and the other one hears it.

    Args:
        pids: of the processes, by the names that `family` gives.
    """
    if not {"coordinator", "coordinator-2"} <= set(pids):
        return False
    try:
        port = int(coordinator_address(pids["coordinator"]).rpartition(":")[2])
        return port in tcp_ports(pids["coordinator"]).listening and port in tcp_ports(pids["coordinator-2"]).connected
    except (OSError, ValueError):  # one of them has just gone
        return False


def main() -> None:
    parser = argparse.ArgumentParser(prog=MODULE, allow_abbrev=False)
    parser.add_argument("--attention-workers", type=int, default=1)
    parser.add_argument("--expert-workers", type=int, default=1)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--api-key", required=True)
    own, words = parser.parse_known_args()
    numbers = {"attention": own.attention_workers, "expert": own.expert_workers}
    words += [word for role, count in numbers.items() for word in (f"--{role}-workers", str(count))]
    *ports, http = free_ports(3)
    first, second = (f"tcp://127.0.0.1:{port}" for port in ports)
    serving = ("--port", str(own.port or http), "--api-key", own.api_key)
    share_secret()
    asyncio.run(keep_all(lines_of(words, numbers, (first, second), serving)))


if __name__ == "__main__":
    main()
