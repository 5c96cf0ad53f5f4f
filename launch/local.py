"""Everything on this machine: an instance, its HTTP server, and a status line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.status import Status

from msi.engine import Engine
from msi.errors import EngineError
from msi.messages import Stats
from msi.types import SamplingParams

from .arguments import LaunchArguments

log = logging.getLogger(__name__)

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
    gateway = ["--host", arguments.host, "--port", str(arguments.port),
               "--shutdown-timeout", str(arguments.shutdown_timeout_s)]  # fmt: skip
    if arguments.api_key:
        gateway.append(f"--api-key={arguments.api_key}")
    if arguments.chat_template is not None:
        gateway.append(f"--chat-template={arguments.chat_template.absolute()}")
    flags = {
        "coordinator_flags": (*level, *(("--no-gateway",) if arguments.prompt is not None else gateway)),
        "worker_flags": level,
    }
    line = StatusLine()
    engine = Engine(options=arguments.options, report=line.update, process_flags=flags)
    stops = Stops(line)
    running = asyncio.ensure_future(_run(engine, arguments, line, stops))
    at_once = asyncio.ensure_future(stops.at_once.wait())
    await asyncio.wait({at_once, running}, return_when=asyncio.FIRST_COMPLETED)
    at_once.cancel()
    if not running.done():
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


class Stops:
    """SIGINT and SIGTERM: the first asks the server to end, as soon as it serves; any other end comes at once."""

    def __init__(self, line: StatusLine) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self.can_drain = False
        self._line = line
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled, signal.Signals(number).name)

    def _signalled(self, name: str) -> None:
        if self.can_drain and not self.asked.is_set():
            self.asked.set()
            return
        if not self.at_once.is_set():
            self._line.say(f"{name}: ending at once")
        self.at_once.set()


async def _run(engine: Engine, arguments: LaunchArguments, line: StatusLine, stops: Stops) -> None:
    with line.shown():
        async with engine:
            pids = ", ".join(f"{name} {pid}" for name, pid in engine.pids.items())
            line.say(f"processes: {pids}" if pids else "all workers run in this process")
            if arguments.prompt is not None:
                await _answer(engine, arguments)
                return
            line.say(f"ready: {engine.model_name} at http://{arguments.host}:{arguments.port}/v1")
            stops.can_drain = True
            showing = asyncio.ensure_future(_show(engine, line))
            failed = asyncio.ensure_future(engine.wait_failed())
            asked = asyncio.ensure_future(stops.asked.wait())
            try:
                await asyncio.wait({failed, asked}, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    raise failed.result()
                line.say(
                    f"ending: no new requests; those that run have {arguments.shutdown_timeout_s:g} s "
                    f"(Ctrl-C or SIGTERM again ends at once)"
                )
                await engine.drain()
            finally:
                for task in (showing, failed, asked):
                    task.cancel()


async def _answer(engine: Engine, arguments: LaunchArguments) -> None:
    assert arguments.prompt is not None
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=0.8, seed=0)
    sys.stdout.write(arguments.prompt)
    async for output in engine.generate(arguments.prompt, params):
        sys.stdout.write(output.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


async def _show(engine: Engine, line: StatusLine) -> None:
    """What the instance does, once a second. A display: whatever it cannot show, it says so and goes on."""
    while True:
        is_ready, sentence = engine.status
        try:
            line.update(_summary(await engine.stats()) if is_ready else sentence)
        except EngineError as error:
            line.update(f"{error}; the figures are missing until it does")
        except Exception:
            log.exception("the status line could not be shown")
        await asyncio.sleep(STATUS_EVERY_S)


def _summary(stats: Stats) -> str:
    workers = []
    for worker in stats.workers:
        times = worker.status.times
        stage = times.attention_s if worker.role == "attention" else times.expert_s
        name = "T_a" if worker.role == "attention" else "T_e"
        workers.append(f"{worker.worker_id} {100 * times.busy:.0f} % busy, {name} {stage * 1e3:.2f} ms")
    return f"{stats.num_requests} requests, m = {stats.num_lanes} | " + " | ".join(workers)
