#!/usr/bin/env python3
"""CPU time that the loop threads spend per (layer, lane), by stage; what the compute threads compute is not in it.

    tools/bench_cpu_budget.py [MODEL] --attention-workers 2 --expert-workers 2 --micro-batches 2

Real worker processes over shared memory, measured with thread time while a batch decodes. A unit is one (layer, lane):
for an attention worker one turn, for an expert worker one batch that it takes. What the compute threads do of the
loop's work (posting, taking the next batch) is counted, too, and belongs to the total. Prints a JSON line per worker
and one with the medians per role.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from msi import Engine, SamplingParams
from msi.options import InstanceOptions
from msi_launch.command_line import ScriptLine
from msi_launch.main import run

WARM_UP_S = 1.0


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="the demo model without it")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--attention-workers", type=int, default=2)
    parser.add_argument("--expert-workers", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8.0)
    values: argparse.Namespace = parser.parse_args()
    return values


# -- in a worker -----------------------------------------------------------------------------------------------------

spent: dict[bool, defaultdict[str, float]] = {True: defaultdict(float), False: defaultdict(float)}  # on the loop?
units = Counter[str]()


def timed(owner: type, name: str, stage: str) -> None:
    """Adds the thread time of a method to a stage, of the loop thread or of the compute thread."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def measured(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            on_loop = threading.current_thread() is threading.main_thread()
            spent[on_loop][stage] += time.thread_time() - started

    setattr(owner, name, measured)


def counted(owner: type, name: str, counts: Callable[[Any], bool]) -> None:
    """Counts the calls of a method whose result counts as units."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def measured(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        units["units"] += counts(result)
        return result

    setattr(owner, name, measured)


def stages() -> tuple[list[tuple[type, str, str]], list[tuple[type, str, Callable[[Any], bool]]]]:
    """Methods and the stages that their time belongs to; and those whose calls are units if their results count."""
    from msi.attention.launching import LaneQueues
    from msi.attention.requests import Requests
    from msi.attention.scheduler import Scheduler
    from msi.experts.server import ExpertServer
    from msi.experts.waves import Waves
    from msi.net.shm import ShmTransport

    timed_ones = [
        (ShmTransport, "take", "read rings, check what landed"),
        (LaneQueues, "launch", "launch passes"),
        (Requests, "finish", "end passes"),
        (Scheduler, "plan", "plan passes"),
        (LaneQueues, "_packed", "post rows, launch the next layer"),
        (ExpertServer, "_finished", "take the next batch, post answers"),
    ]
    return timed_ones, [(LaneQueues, "_packed", lambda _: True), (Waves, "take", lambda batch: batch is not None)]


def work(arguments: list[str]) -> int:
    """Runs msi-launch with its stages timed; SIGUSR1 prints a snapshot."""
    from msi.worker.worker import Worker

    timed_ones, counted_ones = stages()
    for stage in timed_ones:
        timed(*stage)
    for unit in counted_ones:
        counted(*unit)
    original = Worker.run

    async def run_with_snapshots(worker: Worker) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, snapshot)
        await original(worker)

    Worker.run = run_with_snapshots  # type: ignore[assignment,method-assign]
    status: int = run(arguments)
    return status


def snapshot() -> None:
    shown = {"loop_s": time.thread_time(), "units": units["units"], "loop": spent[True], "compute": spent[False]}
    print(json.dumps(shown), flush=True)


# -- outside ---------------------------------------------------------------------------------------------------------


async def main() -> None:
    arguments = parse()
    options = InstanceOptions.of(
        model=arguments.model,
        attention_workers=arguments.attention_workers,
        expert_workers=arguments.expert_workers,
        micro_batches=arguments.micro_batches,
        threads_per_worker=1,
        load_format=arguments.load_format,
    )
    from msi.instance.instance import create_coordinator, listen, worker_ids

    coordinator = create_coordinator(options, listen("tcp://127.0.0.1:*"))
    running = asyncio.ensure_future(coordinator.run())
    workers = {}
    for role, worker_id in worker_ids(options):
        workers[worker_id] = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--worker", *options.flags(), "--role", role, "--worker-id", worker_id,
            "--coordinator", coordinator.address, "--parent", str(os.getpid()), "--log-level", "warning",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
    try:
        async with Engine.connect(coordinator.address) as engine:
            await engine.wait_ready(60.0)
            measured = await measure(engine, workers, arguments.batch, arguments.seconds)
    finally:
        for process in workers.values():
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*(process.wait() for process in workers.values()))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    report(measured)


async def measure(
    engine: Engine, workers: dict[str, asyncio.subprocess.Process], batch: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Microseconds per unit of each stage, by worker, while `batch` sequences decode."""
    is_over = asyncio.Event()

    async def load(index: int) -> None:
        while not is_over.is_set():
            params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
            async for _ in engine.generate([index + 3] * 4, params):
                if is_over.is_set():
                    break

    loads = [asyncio.ensure_future(load(index)) for index in range(batch)]
    await asyncio.sleep(WARM_UP_S)
    before = {name: await ask(process) for name, process in workers.items()}
    await asyncio.sleep(seconds)
    after = {name: await ask(process) for name, process in workers.items()}
    is_over.set()
    await asyncio.gather(*loads)
    return {name: per_unit(before[name], after[name]) for name in workers}


async def ask(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    process.send_signal(signal.SIGUSR1)
    answer: dict[str, Any] = json.loads(await asyncio.wait_for(process.stdout.readline(), 10))
    return answer


def per_unit(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    count: int = after["units"] - before["units"]

    def us(now_s: float, then_s: float) -> float:
        return 1e6 * (now_s - then_s) / count

    on_loop, handed_over = (
        {stage: us(total, before[thread].get(stage, 0.0)) for stage, total in after[thread].items()}
        for thread in ("loop", "compute")
    )
    loop_us = us(after["loop_s"], before["loop_s"])
    return {
        "units": count,
        "total_us": loop_us + sum(handed_over.values()),
        "loop_us": loop_us,
        **{f"loop: {stage}": value for stage, value in on_loop.items()},
        "loop: event loop and tasks": loop_us - sum(on_loop.values()),
        **{f"compute thread: {stage}": value for stage, value in handed_over.items()},
    }


def report(measured: dict[str, dict[str, float]]) -> None:
    for name, stages in measured.items():
        print(json.dumps({"worker": name, **{stage: round(value, 1) for stage, value in stages.items()}}))
    summary = {}
    for role in ("attention", "expert"):
        for which in ("total", "loop"):
            values = [stages[f"{which}_us"] for name, stages in measured.items() if name.startswith(role)]
            summary[f"{role}_{which}_us_per_layer_and_lane"] = round(median(values), 1)
    print(json.dumps(summary))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(work(sys.argv[2:]))
    asyncio.run(main())
