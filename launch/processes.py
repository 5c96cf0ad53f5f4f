"""One process of an instance: the coordinator with its gateway, or a worker."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from msi.engine import Engine
from msi.errors import ConfigError, EngineError
from msi.instance import create_coordinator, create_worker
from msi.server.gateway import Gateway
from msi.watchdog import LoopWatch

from .arguments import LaunchArguments
from .logs import has_live_terminal

if TYPE_CHECKING:
    from msi.worker import Worker  # with torch, which only workers need

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """This process is killed as soon as its parent is gone, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the launcher is gone already")


async def run_worker(arguments: LaunchArguments) -> None:
    """Until it is shut down. SIGTERM drains it; a launcher's own child ends at once."""
    watch = LoopWatch(arguments.worker_id or arguments.role)
    worker = create_worker(
        arguments.options, arguments.coordinator, arguments.role, arguments.worker_id, arguments.trace_dir,
        arguments.advertise_host, watch, arguments.trust,
    )  # fmt: skip
    watch.start()
    task = asyncio.ensure_future(worker.run())
    showing = None if arguments.parent else asyncio.ensure_future(show_loading(worker))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    loop.add_signal_handler(signal.SIGTERM, task.cancel if arguments.parent else worker.drain)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        watch.stop()
        if showing is not None:
            showing.cancel()


async def show_loading(worker: Worker) -> None:
    """A bar on a terminal while weights are read; nothing elsewhere. The log says when they are."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        return
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("weights", total=None)
        loaded, total = worker.loaded
        while not total or loaded < total:
            progress.update(bar, completed=loaded, total=total or None)
            await asyncio.sleep(0.1)
            loaded, total = worker.loaded


async def run_coordinator(arguments: LaunchArguments) -> None:
    """Until SIGTERM or SIGINT."""
    watch = LoopWatch("coordinator")
    try:
        where = arguments.coordinator or "tcp://127.0.0.1:*"
        coordinator = create_coordinator(arguments.options, where, watch, arguments.trust)
        watch.start()
        async with asyncio.TaskGroup() as tasks:
            loop = asyncio.get_running_loop()
            running = tasks.create_task(coordinator.run())
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, running.cancel)
            log.info("coordinator at %s", coordinator.address)
            if not arguments.has_gateway:
                _announce(arguments.announce, coordinator.address)
                return
            async with Engine(address=coordinator.address, secret=arguments.trust.secret) as engine:
                gateway = Gateway(
                    engine,
                    host=arguments.host,
                    port=arguments.port,
                    api_key=arguments.api_key,
                    chat_template=_template(arguments.chat_template),
                    log_requests=arguments.enable_log_requests,
                    log_load=not arguments.disable_log_stats and not has_live_terminal(),
                )
                url = await gateway.start()
                log.info("HTTP at %s", url)
                _announce(arguments.announce, coordinator.address)
                try:
                    await asyncio.wait([running])
                finally:
                    await gateway.close()
    except* EngineError as group:
        error = group.exceptions[0]
        _announce(arguments.announce, str(error))
        raise error from None
    finally:
        watch.stop()


def _template(path: Path | None) -> str:
    try:
        return "" if path is None else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from error


def _announce(fd: int, line: str) -> None:
    """Tells the launcher where the coordinator is, or why it is not."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.write(fd, (line + "\n").encode())
            os.close(fd)
