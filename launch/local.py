"""Everything on this machine: an instance, its HTTP server, and a status line."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

from msi.engine import Engine
from msi.types import SamplingParams

from .arguments import LaunchArguments
from .display import StatusLine, summary

STATUS_EVERY_S = 1.0


async def serve(arguments: LaunchArguments) -> None:
    """Serves until SIGINT or SIGTERM, or answers one prompt. Raises EngineError when the instance cannot go on."""
    level = ("--log-level", "warning" if arguments.prompt is not None else arguments.log_level)
    flags = {
        "coordinator_flags": (
            *level,
            *(("--no-gateway",) if arguments.prompt is not None else arguments.serving_flags),
        ),
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
        line.update(summary(await engine.stats()) if is_ready else sentence, is_usual=is_ready)
        await asyncio.sleep(STATUS_EVERY_S)
