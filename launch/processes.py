"""One process of an instance: the coordinator with a gateway beside it, or a worker."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from msi.control.coordinator import Coordinator
from msi.control.messages import CLIENT_END
from msi.control.standing_by import StandBy
from msi.errors import EngineError
from msi.instance.children import follow_launcher, tell_launcher
from msi.instance.instance import create_coordinator, create_worker, listen
from msi.net.control import ControlClient
from msi.watchdog import LoopWatch

from .arguments import LaunchArguments
from .command import requests_to_end, settle
from .logs import has_live_terminal

if TYPE_CHECKING:
    from msi.worker.worker import Worker  # with torch, which only workers need

log = logging.getLogger(__name__)


async def run_worker(arguments: LaunchArguments) -> None:
    """Until it is shut down. SIGTERM drains it, a second one ends it at once; SIGINT does, too, but for a child."""
    watch = LoopWatch(arguments.worker_id or arguments.role)
    worker = create_worker(
        arguments.options, arguments.coordinator, arguments.role, arguments.worker_id, arguments.trace_dir,
        arguments.advertise_host, watch, arguments.trust,
    )  # fmt: skip
    watch.start()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(worker.run())
    beside = [
        asyncio.ensure_future(_tell_when_ready(worker, arguments.announce)),
        asyncio.ensure_future(follow_launcher(arguments.announce, lambda message: _cancel(task, message))),
    ]
    if not arguments.parent:
        beside.append(asyncio.ensure_future(show_loading(worker)))
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    ending = Ending(drain=worker.drain, end=task.cancel)
    for number in requests_to_end():
        loop.add_signal_handler(number, ending.asked)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        watch.stop()
        for one in beside:
            one.cancel()


class Ending:
    """What a process does when it is asked to end: the first time it drains, then it ends at once."""

    def __init__(self, *, drain: Callable[[], object], end: Callable[[], object]) -> None:
        self._drain = drain
        self._end = end
        self._was_asked = False

    def asked(self) -> None:
        (self._end if self._was_asked else self._drain)()
        self._was_asked = True


async def _tell_when_ready(worker: Worker, announce: int) -> None:
    await worker.has_been_ready.wait()
    settle()
    tell_launcher(announce, ready=True)


def _cancel(task: asyncio.Task[None], message: dict[str, Any]) -> None:
    if message.get("end"):
        task.cancel()


async def show_loading(worker: Worker) -> None:
    """A bar on a terminal while weights are read; nothing elsewhere. The log says when they are."""
    from rich.console import Console  # who is a launcher's child starts sooner without
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    if not console.is_terminal or not has_live_terminal():
        return
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("weights", total=None)
        loaded, total = worker.loaded
        while not total or loaded < total:
            progress.update(bar, completed=loaded, total=total or None)
            await asyncio.sleep(0.1)
            loaded, total = worker.loaded


async def run_coordinator(arguments: LaunchArguments) -> None:
    """Until SIGTERM or SIGINT, and until the requests that run then have ended; a second signal ends it at once."""
    if arguments.standby:
        await stand_by(arguments)
        return
    watch = LoopWatch("coordinator")
    try:
        where = arguments.coordinator or "tcp://127.0.0.1:*"
        server = listen(where, arguments.trust)
        is_private = arguments.trust.secret is not None or server.address.startswith("ipc://")
        coordinator = create_coordinator(arguments.options, server, watch, is_private=is_private)
        watch.start()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(coordinator.run())
            ending = CoordinatorEnding(
                coordinator, arguments.shutdown_timeout_s, is_child=arguments.parent > 0, announce=arguments.announce
            )
            following = tasks.create_task(follow_launcher(arguments.announce, ending.told))
            log.info("coordinator at %s", coordinator.address)
            settle()
            try:
                if arguments.has_gateway:
                    await _serve(arguments, coordinator, ending, running)
                else:
                    tell_launcher(arguments.announce, address=coordinator.address)
                    await ending.wait(running)
            finally:
                running.cancel()
                following.cancel()
    except* EngineError as group:
        raise group.exceptions[0] from None
    finally:
        watch.stop()


async def stand_by(arguments: LaunchArguments) -> None:
    """A coordinator that takes over from another; it ends as any does."""
    watch = LoopWatch("coordinator")
    listen(arguments.coordinator, arguments.trust).close()  # what cannot be is said now

    def create(term: int) -> Coordinator:
        server = listen(arguments.coordinator, arguments.trust)
        return create_coordinator(arguments.options, server, watch, term=term, is_private=True)

    other = ControlClient(arguments.standby, CLIENT_END, arguments.trust.secret)
    standing = StandBy(other, create)
    running = asyncio.ensure_future(standing.run())
    beside: list[asyncio.Task[None]] = []

    async def drain() -> None:
        if standing.coordinator is not None:
            await standing.coordinator.drain(arguments.shutdown_timeout_s)
        running.cancel()

    ending = Ending(drain=lambda: beside.append(asyncio.create_task(drain())), end=running.cancel)
    for number in (signal.SIGINT, *requests_to_end()):
        asyncio.get_running_loop().add_signal_handler(number, ending.asked)
    watch.start()
    settle()
    log.info("standing by for the coordinator at %s", arguments.standby)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        watch.stop()


class CoordinatorEnding:
    """What ends a coordinator: signals, or its launcher, which also tells of workers that ended.

    A signal to a whole group of processes reaches a launcher's child, too: it is then no second one.
    """

    def __init__(self, coordinator: Coordinator, timeout_s: float, *, is_child: bool, announce: int = -1) -> None:
        self._coordinator = coordinator
        self._announce = announce
        self._timeout_s = timeout_s
        self._is_child = is_child
        self._is_asked = asyncio.Event()
        self._is_urgent = asyncio.Event()
        loop = asyncio.get_running_loop()
        if is_child:
            loop.add_signal_handler(signal.SIGTERM, self._is_asked.set)
            return
        asked = Ending(drain=self._is_asked.set, end=self._is_urgent.set)
        for number in (signal.SIGINT, *requests_to_end()):
            loop.add_signal_handler(number, asked.asked)

    def told(self, message: dict[str, Any]) -> None:
        """By the launcher."""
        if message.get("drain"):
            self._is_asked.set()
        elif message.get("end"):
            self._is_asked.set()
            self._is_urgent.set()
        elif message.get("launches"):
            self._coordinator.operator.launcher = functools.partial(tell_launcher, self._announce)
            self._coordinator.launched(message["serving"], message["running"], message["forgotten"])
        elif worker_id := message.get("exited"):
            self._coordinator.worker_exited(worker_id, message["pid"], message["how"], message["has_crashed"])
        elif worker_id := message.get("given_up"):
            self._coordinator.operator.given_up(worker_id, message["role"], message["why"])

    async def tell(self, asked: Callable[[], None]) -> None:
        """Calls `asked` when it is asked to end, and again when it is urgent."""
        await self._is_asked.wait()
        asked()
        await self._is_urgent.wait()
        asked()

    async def wait(self, running: asyncio.Task[None]) -> None:
        """Until it is time to end, or `running` has ended; every request has then."""
        if not await _first(running, self._is_asked.wait()):
            return
        if not self._is_child:  # a launcher says it itself
            log.info("asked to end: no new requests; those that run have %g s", self._timeout_s)
        draining = asyncio.ensure_future(self._coordinator.drain(self._timeout_s))
        await _first(running, draining, self._is_urgent.wait())
        if not draining.done():
            draining.cancel()
            await self._coordinator.drain(0)


async def _first(running: asyncio.Task[None], *others: Awaitable[object]) -> bool:
    """Until one is done; False if it is `running`."""
    waits = [asyncio.ensure_future(other) for other in others]
    await asyncio.wait([running, *waits], return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    return not running.done()


async def _serve(
    arguments: LaunchArguments, coordinator: Coordinator, ending: CoordinatorEnding, running: asyncio.Task[None]
) -> None:
    from .gateway_process import gateway_of  # which a worker does not need

    gateway = gateway_of(arguments)
    beside: list[asyncio.Future[None]] = []
    try:
        await gateway.start(coordinator.address)
        log.info("HTTP at %s", gateway.url)
        tell_launcher(arguments.announce, address=coordinator.address)
        beside = [asyncio.ensure_future(gateway.keep_alive()), asyncio.ensure_future(ending.tell(gateway.drain))]
        await ending.wait(running)
    finally:
        await gateway.stop()
        for task in beside:
            task.cancel()
