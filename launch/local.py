"""Everything on this machine: an instance, its HTTP server, and a status line."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.status import Status

from msi.engine import Engine
from msi.messages import Stats
from msi.types import SamplingParams

from .arguments import LaunchArguments

STATUS_EVERY_S = 1.0


class StatusLine:
    """One line at the bottom of a terminal; elsewhere, a line for each new state."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live: Status | None = None
        self._last = ""

    @contextlib.contextmanager
    def shown(self) -> Iterator[StatusLine]:
        if not self._console.is_terminal:
            yield self
            return
        with self._console.status("starting") as self._live:
            yield self
        self._live = None

    def update(self, sentence: str) -> None:
        if self._live is not None:
            self._live.update(sentence)
            return
        state = re.sub(r"\d+", "", sentence)
        if state != self._last:
            self._last = state
            self.say(sentence)

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


async def serve(arguments: LaunchArguments) -> None:
    """Serves until SIGINT or SIGTERM, or answers one prompt. Raises EngineError when the instance cannot go on."""
    level = ("--log-level", "warning" if arguments.prompt is not None else arguments.log_level)
    gateway = ["--host", arguments.host, "--port", str(arguments.port)]
    if arguments.api_key:
        gateway.append(f"--api-key={arguments.api_key}")
    if arguments.chat_template is not None:
        gateway.append(f"--chat-template={arguments.chat_template.absolute()}")
    flags = {
        "coordinator_flags": (*level, *(("--no-gateway",) if arguments.prompt is not None else gateway)),
        "worker_flags": level,
    }
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    line = StatusLine()
    engine = Engine(options=arguments.options, report=line.update, process_flags=flags)
    stopping = asyncio.ensure_future(stop.wait())
    running = asyncio.ensure_future(_run(engine, arguments, line))
    await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not running.done():
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def _run(engine: Engine, arguments: LaunchArguments, line: StatusLine) -> None:
    with line.shown():
        async with engine:
            pids = ", ".join(f"{name} {pid}" for name, pid in engine.pids.items())
            line.say(f"processes: {pids}" if pids else "all workers run in this process")
            if arguments.prompt is not None:
                await _answer(engine, arguments)
                return
            line.say(f"ready: {engine.model_name} at http://{arguments.host}:{arguments.port}/v1")
            showing = asyncio.ensure_future(_show(engine, line))
            failed = asyncio.ensure_future(engine.wait_failed())
            try:
                await asyncio.wait({showing, failed}, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    raise failed.result()
                showing.result()
            finally:
                showing.cancel()
                failed.cancel()


async def _answer(engine: Engine, arguments: LaunchArguments) -> None:
    assert arguments.prompt is not None
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=0.8, seed=0)
    sys.stdout.write(arguments.prompt)
    async for output in engine.generate(arguments.prompt, params):
        sys.stdout.write(output.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


async def _show(engine: Engine, line: StatusLine) -> None:
    """What the instance does, once a second."""
    while True:
        is_ready, sentence = engine.status
        line.update(_summary(await engine.stats()) if is_ready else sentence)
        await asyncio.sleep(STATUS_EVERY_S)


def _summary(stats: Stats) -> str:
    workers = []
    for worker in stats.workers:
        times = worker.status.times
        stage = times.attention_s if worker.role == "attention" else times.expert_s
        name = "T_a" if worker.role == "attention" else "T_e"
        workers.append(f"{worker.worker_id} {100 * times.busy:.0f} % busy, {name} {stage * 1e3:.2f} ms")
    return f"{stats.num_requests} requests, m = {stats.num_lanes} | " + " | ".join(workers)
