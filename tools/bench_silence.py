#!/usr/bin/env python3
"""How soon a worker is missed: one that goes silent, as where its host vanishes, and one that is killed.

    tools/bench_silence.py --rounds 10
    tools/bench_silence.py --rounds 10 --kill            # by a launcher on the same machine, which sees the end

Without `--kill` the coordinator listens on a network (the loopback device), and each process is started by itself; a
worker is stopped by SIGSTOP, so that its connections stay and nobody is told, and goes on once it is missed. Between
two rounds all workers are there again, for long enough that the coordinator knows the pace of their signs of life. With
`--kill` it is an instance of one launcher, and the worker is started again.

Told: from the signal until the coordinator's account of the instance has the worker as lost, asked for every ten
milliseconds; median, 99th percentile, and the longest. On a busy machine patience grows, as it is to.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator
from statistics import median

from msi import Engine
from msi_launch.command_line import ScriptLine, integer, number

ROLES = {"attention-0": "attention", "expert-0": "expert", "expert-1": "expert"}
OPTIONS = ("--threads-per-worker", "1", "--expert-redundancy", "1", "--log-level", "error")
LOOK_EVERY_S = 0.01
MISSED_WITHIN_S = READY_WITHIN_S = 60.0


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("--rounds", type=integer(1, 10_000), default=10, metavar="N", help="of each worker; 10")
    parser.add_argument("--kill", action="store_true", help="kill -9, under a launcher, in place of SIGSTOP")
    parser.add_argument("--rest", type=number(0, 1e4), default=8.0, metavar="S", help="between two; 8")
    parser.add_argument("--json", action="store_true", help="one object")
    values: argparse.Namespace = parser.parse_args()
    return values


async def is_ready(engine: Engine, worker_id: str) -> bool:
    """Whether it serves."""
    return any(one.worker_id == worker_id and one.state == "ready" for one in (await engine.stats()).workers)


async def all_ready(engine: Engine) -> None:
    async with asyncio.timeout(READY_WITHIN_S):
        for worker_id in ROLES:
            while not await is_ready(engine, worker_id):
                await asyncio.sleep(LOOK_EVERY_S)


async def missed_after(engine: Engine, worker_id: str, pid: int, number: signal.Signals) -> float:
    """Seconds from the signal until this life of the worker does not count as serving."""
    (incarnation,) = [one.incarnation for one in (await engine.stats()).workers if one.worker_id == worker_id]
    began = time.monotonic()
    os.kill(pid, number)
    async with asyncio.timeout(MISSED_WITHIN_S):
        while any(
            (one.worker_id, one.incarnation, one.state) == (worker_id, incarnation, "ready")
            for one in (await engine.stats()).workers
        ):
            await asyncio.sleep(LOOK_EVERY_S)
    return time.monotonic() - began


@contextlib.asynccontextmanager
async def by_themselves() -> AsyncGenerator[tuple[Engine, dict[str, int]], None]:
    """An instance whose processes were each started by hand, on a network; its workers' process ids."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    common = (*OPTIONS, "--coordinator", address)
    front = ("--role", "coordinator", "--no-gateway", "--attention-workers", "1", "--expert-workers", "2")
    words: dict[str, tuple[str, ...]] = {"coordinator": front}
    words |= {worker_id: ("--role", role, "--worker-id", worker_id) for worker_id, role in ROLES.items()}
    processes = {}
    try:
        for name, of_one in words.items():
            processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "msi_launch", *common, *of_one, stdin=asyncio.subprocess.DEVNULL
            )
        async with Engine.connect(address) as engine:
            yield engine, {name: process.pid for name, process in processes.items()}
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await asyncio.gather(*(process.wait() for process in processes.values()))


async def silent(rounds: int, rest_s: float) -> list[float]:
    found = []
    async with by_themselves() as (engine, pids):
        for number in range(rounds * len(ROLES)):
            worker_id = [*ROLES][number % len(ROLES)]
            await all_ready(engine)
            await asyncio.sleep(rest_s)
            try:
                found.append(await missed_after(engine, worker_id, pids[worker_id], signal.SIGSTOP))
            finally:
                os.kill(pids[worker_id], signal.SIGCONT)
    return found


async def killed(rounds: int, rest_s: float) -> list[float]:
    found = []
    async with Engine.local(attention_workers=1, expert_workers=2, expert_redundancy=1, threads_per_worker=1) as engine:
        for number in range(rounds * len(ROLES)):
            worker_id = [*ROLES][number % len(ROLES)]
            await all_ready(engine)
            await asyncio.sleep(rest_s)
            found.append(await missed_after(engine, worker_id, engine.pids[worker_id], signal.SIGKILL))
    return found


async def main() -> None:
    arguments = parse()
    found = await (killed if arguments.kill else silent)(arguments.rounds, arguments.rest)
    tail = sorted(found)[int(0.99 * len(found))]
    if arguments.json:
        print(json.dumps({"schema_version": 1, "missed_after_s": found}))
        return
    how = "killed" if arguments.kill else "silent"
    print(
        f"a worker that is {how}, {len(found)} times: missed after {1e3 * median(found):.0f} ms in the median, "
        f"{1e3 * tail:.0f} ms at the 99th percentile, {1e3 * max(found):.0f} ms at most"
    )


if __name__ == "__main__":
    asyncio.run(main())
