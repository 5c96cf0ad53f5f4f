"""Everything on this machine: an instance, its HTTP server, and a status line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import sys
import time
from dataclasses import replace

from msi.engine import Engine
from msi.errors import EngineError
from msi.options import InstanceOptions
from msi.types import SamplingParams
from msi.watchdog import LoopWatch

from .arguments import LaunchArguments
from .command import requests_to_end, settle
from .display import StatusLine, summary
from .gateway_process import gateway_of
from .panel import panel, tokens_of, why_this_transport

log = logging.getLogger(__name__)

STATUS_EVERY_S = 1.0
REDRAWN_TIMES = 2  # meanwhile: lines of the log erase what is shown
SAID_WITHIN_S = 0.5
DRAIN_GRACE_S = 10.0  # beyond the time that the coordinator was told, for one that stands still


async def serve(arguments: LaunchArguments) -> None:
    """Serves until it is asked to end, or answers one prompt. Raises EngineError when the instance cannot go on."""
    level = (replace(arguments, log_level="warning") if arguments.prompt is not None else arguments).log_flags
    patience = f"--shutdown-timeout={arguments.shutdown_timeout_s:g}"
    flags = {"coordinator_flags": (*level, "--no-gateway", patience), "worker_flags": level}
    line = StatusLine()
    has_http = arguments.prompt is None and arguments.options.chosen_transport != "inproc"
    http = gateway_of(arguments) if has_http else None
    engine = Engine(options=arguments.options, report=line.update, process_flags=flags, http=http)
    watch = LoopWatch("msi-launch")
    watch.start()
    stops = Stops(line)
    running = asyncio.ensure_future(_run(engine, arguments, line, stops))
    at_once = asyncio.ensure_future(stops.at_once.wait())
    await asyncio.wait({at_once, running}, return_when=asyncio.FIRST_COMPLETED)
    at_once.cancel()
    if not running.done():
        running.cancel()
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        watch.stop()
        if http is not None:
            await http.stop()


class Stops:
    """SIGINT, SIGTERM, SIGHUP: the first asks the server to end, as soon as it serves; any other end comes at once."""

    def __init__(self, line: StatusLine) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self.can_drain = False
        self._line = line
        for number in (signal.SIGINT, *requests_to_end()):
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
            line.say(f"processes: {pids}" if pids else "all workers run in this process", pids=engine.pids)
            if arguments.prompt is not None:
                await _answer(engine, arguments)
                return
            where = f"at {engine.url}/v1" if engine.url else "in this process, which serves no HTTP"
            settle()
            line.say(f"ready: {engine.model_name} {where}", model=engine.model_name, url=engine.url)
            stops.can_drain = True
            showing = asyncio.ensure_future(_show(engine, arguments.options, line, stops))
            failed = asyncio.ensure_future(engine.wait_failed())
            asked = asyncio.ensure_future(stops.asked.wait())
            try:
                await asyncio.wait({failed, asked}, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    raise failed.result()
                await _drain(engine, arguments.shutdown_timeout_s, line)
            finally:
                for task in (showing, failed, asked):
                    task.cancel()


async def _drain(engine: Engine, timeout_s: float, line: StatusLine) -> None:
    how_many = await _num_requests(engine)
    line.say(
        f"ending: no new requests; {how_many} run and have {timeout_s:g} s (a second signal or Ctrl-C ends at once)"
        if how_many
        else "ending: nothing runs"
    )
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s + DRAIN_GRACE_S):
            await engine.drain()


async def _num_requests(engine: Engine) -> str:
    """In words; "" for none."""
    try:
        count = (await asyncio.wait_for(engine.stats(), SAID_WITHIN_S)).num_requests
    except (EngineError, TimeoutError):
        return "requests that are there"
    return f"{count} request{'s' * (count != 1)}" if count else ""


async def _answer(engine: Engine, arguments: LaunchArguments) -> None:
    assert arguments.prompt is not None
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=0.8, seed=0)
    sys.stdout.write(arguments.prompt)
    async for output in engine.generate(arguments.prompt, params):
        sys.stdout.write(output.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


async def _show(engine: Engine, options: InstanceOptions, line: StatusLine, stops: Stops) -> None:
    """What the instance does, once a second. A display: what it cannot show, it says, and goes on."""
    where, links = (
        f"{engine.model_name} at {engine.url}/v1" if engine.url else engine.model_name,
        why_this_transport(options),
    )
    rate = Rate()
    while True:
        is_ready, sentence = engine.status
        try:
            stats = await engine.stats() if is_ready else None
            is_said = stops.asked.is_set()
            if stats is not None:
                size = shutil.get_terminal_size()
                per_s = rate.of(tokens_of(stats), time.monotonic())
                lines = panel(stats, per_s, where, links, columns=size.columns, rows=size.lines) if line.is_live else ""
                line.update(summary(stats), is_usual=is_ready, is_said=is_said, panel=lines)
            else:
                line.update(sentence, is_usual=is_ready, is_said=is_said)
        except EngineError as error:
            line.update(f"{error}; there are no figures until it does")
        except Exception:
            log.exception("the status line cannot be shown")
        for _ in range(REDRAWN_TIMES):
            await asyncio.sleep(STATUS_EVERY_S / REDRAWN_TIMES)
            line.redraw()


class Rate:
    """Of a count that grows, per second, since it was last asked for; it begins anew where a worker does."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def of(self, count: int, now: float) -> float:
        last, self._last = self._last, (count, now)
        return 0.0 if last is None or now <= last[1] else max(0, count - last[0]) / (now - last[1])
