"""One instance as child processes of this one: a coordinator, its workers, and what serves HTTP for it, each started
again when it dies. The others go on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from msi.control.messages import CLIENT_END
from msi.control.restarts import Restarts
from msi.errors import ConfigError, EngineError, Unavailable
from msi.instance.children import Child
from msi.instance.fork_server import CAN_FORK, ForkServer, forks_workers, waiting_asleep
from msi.instance.gpus import Gpus, num_gpus
from msi.instance.instance import check_device, check_files, worker_ids
from msi.json_log import with_fields
from msi.net.control import ControlClient, MessageClient
from msi.net.secret import Secret
from msi.net.socket_dir import SocketDir
from msi.options import InstanceOptions
from msi.settings import SHARING

log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
ADDRESS_TIMEOUT_S = 60.0
NO_ROOM_AGAIN_S = 2.0
STARTS_WITHIN_S = 1.0  # a coordinator, at best: with less grace nobody waits for it
EMBEDDED = ("--no-gateway", "--log-level", "warning", "--shutdown-timeout", "0")


async def start_coordinator(
    options: InstanceOptions, bind: str, flags: tuple[str, ...], secret: Secret | None = None
) -> tuple[Child, str]:
    """A coordinator as a child; its address.

    Args:
        secret: what workers and clients have to hold, where it listens on a network.

    Raises:
        ConfigError: it cannot work; in its own words.
        Unavailable: it does not start in time.
    """
    child = await Child.start(_coordinator_words(options, bind, flags), secret)
    return child, await _address_of(child)


def _coordinator_words(options: InstanceOptions, bind: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    return (*options.flags(), "--role", "coordinator", "--coordinator", bind, *flags)


async def _address_of(child: Child) -> str:
    """Once it serves; where it does not, it has ended, and this raises what `start_coordinator` does."""
    try:
        async with asyncio.timeout(ADDRESS_TIMEOUT_S):
            while (message := await child.hear()) is not None:
                if address := message.get("address"):
                    return str(address)
            await child.process.wait()
    except TimeoutError:
        await stop_children(child, grace_s=0)
        raise Unavailable(f"the coordinator did not start within {ADDRESS_TIMEOUT_S:g} s") from None
    except BaseException:
        await stop_children(child, grace_s=0)
        raise
    child.close()
    raise ConfigError(child.failure or "the coordinator ended while it started; what it said is above")


async def _all_or_none(*works: Coroutine[Any, Any, None]) -> None:
    """Until all are done; where one raises, the others are given up, and this raises that."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stop_children(*children: Child, grace_s: float = STOP_GRACE_S) -> None:
    """Ends them: those that have not ended when the grace is over are killed."""
    for child in children:
        child.tell(end=True)
        child.signal(signal.SIGTERM)  # where it has not come so far that it listens
    waits = [asyncio.ensure_future(child.process.wait()) for child in children]
    if waits:
        await asyncio.wait(waits, timeout=grace_s)
        for child in children:
            child.signal(signal.SIGKILL)
        await asyncio.gather(*waits)
    for child in children:
        child.close()


class HttpServer(Protocol):
    """What serves HTTP for an instance: a process of its own, so that its streams survive the coordinator."""

    url: str

    @property
    def pid(self) -> int:
        """0 before its start."""

    async def start(self, address: str) -> None:
        """Of the coordinator, which may come later. Raises EngineError: it cannot serve."""

    async def keep_alive(self) -> None:
        """Starts it again when it ends, until it is to end."""

    def drain(self) -> None:
        """It takes nothing new, and ends when what runs has; the second time, at once."""

    def fail(self, reason: str) -> None:
        """What runs ends with this sentence, and it with that."""

    async def wait(self) -> None:
        """Until one that was told to drain has ended."""

    async def stop(self) -> None:
        """Until it has ended, if need be by force. Idempotent."""


class ProcessInstance:
    """Coordinator and workers as child processes, which end with this one however it ends.

    One that ends is started again (see `msi.control.restarts`); of a worker's end the coordinator and every client are
    told at once.

    Args:
        coordinator_flags, worker_flags: for their command lines.
        report_failure: called once the instance cannot go on.
        http: serves for it; started and ended with it.
    """

    def __init__(
        self,
        options: InstanceOptions,
        report_failure: Callable[[EngineError], None],
        coordinator_flags: tuple[str, ...] = EMBEDDED,
        worker_flags: tuple[str, ...] = ("--log-level", "warning"),
        trace_dir: Path | None = None,
        http: HttpServer | None = None,
    ) -> None:
        check_files(options)  # what cannot work is said before anything starts
        check_device(options.host.device)
        self._options = options
        self._report_failure = report_failure
        self._http = http
        self._coordinator_flags = coordinator_flags
        self._worker_flags = worker_flags + (() if trace_dir is None else ("--trace-dir", str(trace_dir)))
        self._children: dict[str, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: SocketDir | None = None
        self._stopping = asyncio.Event()
        self._leaving: set[str] = set()  # workers that are not started again
        waiting = waiting_asleep(len(worker_ids(options)), options.num_threads)
        self._forks = ForkServer("workers", waiting) if forks_workers(options.host.device) else None
        self._coordinator_forks = ForkServer("coordinator") if CAN_FORK else None
        self._gpus = Gpus(options.host.device, num_gpus(os.environ))
        self._placed_first: list[str] = []  # until all of them are children

    @property
    def url(self) -> str:
        """Where HTTP is served, "" for nowhere."""
        return "" if self._http is None else self._http.url

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, the coordinator's and the gateway's too."""
        pids = {name: child.pid for name, child in self._children.items()}
        return pids if self._http is None else {**pids, "gateway": self._http.pid}

    async def start(self) -> MessageClient:
        """Raises what `start_coordinator` does."""
        self._sockets = SocketDir()
        address = self._sockets.address("coordinator")
        if self._forks is not None:  # first, as it has most to load
            await self._forks.start()
        # all load what they need beside each other: they may knock before somebody is there
        await _all_or_none(self._start_workers(address), self._serve(address))
        coordinator = self._children["coordinator"]
        self._say_what_runs(coordinator)
        self._watch(self._watch_coordinator(coordinator, address))
        for role, worker_id in worker_ids(self._options):
            self._watch(self._keep_alive(address, role, worker_id))
        return ControlClient(address, CLIENT_END)

    async def _serve(self, address: str) -> None:
        """Once a coordinator is there, and HTTP is served. Raises what `start_coordinator` does."""
        serving = None if self._http is None else asyncio.ensure_future(self._http.start(address))
        try:
            try:
                coordinator = await self._start_coordinator(address)
            except OSError as error:
                raise Unavailable(f"the coordinator cannot be started: {error.strerror or error}") from error
            await _address_of(coordinator)
            if self._http is not None and serving is not None:
                await serving
                self._watch(self._http.keep_alive())
        finally:
            if serving is not None:
                serving.cancel()

    async def _start_coordinator(self, bind: str) -> Child:
        """It may serve later. Raises OSError: it cannot be started."""
        words, forks = _coordinator_words(self._options, bind, self._coordinator_flags), self._coordinator_forks
        child = await (Child.start(words) if forks is None else Child.fork(words, forks))
        self._children["coordinator"] = child
        return child

    async def _add_worker(self, address: str, role: str) -> None:
        """An operator wants one more."""
        numbers = (number for number in count() if f"{role}-{number}" not in self._children)
        worker_id = f"{role}-{next(numbers)}"
        try:
            await self._start_worker(address, role, worker_id)
        except OSError as error:
            log.error("%s cannot be started: %s", worker_id, error.strerror or error)
            return
        self._leaving.discard(worker_id)
        self._watch(self._keep_alive(address, role, worker_id, is_added=True))

    def _watch(self, running: Coroutine[Any, Any, None]) -> None:
        async def watched() -> None:
            try:
                await running
            except EngineError as error:
                self._fail(error)
            except Exception as error:
                log.exception("a process is not watched any more")
                self._fail(EngineError(f"the launcher failed: {error!r}"))

        self._tasks.append(asyncio.get_running_loop().create_task(watched()))

    def _fail(self, error: EngineError) -> None:
        """The instance cannot go on; whoever waits for something is told why."""
        self._stopping.set()  # workers end with it
        if self._http is not None:
            self._http.fail(str(error))
        self._report_failure(error)

    async def _start_workers(self, address: str) -> None:
        """Raises Unavailable: what they need cannot be loaded, or there is no room for them."""
        self._placed_first = [worker_id for _, worker_id in worker_ids(self._options)]
        for role, worker_id in worker_ids(self._options):  # each is told how many share its GPU
            self._gpus.device_of(worker_id, role, self._placed_first)
        for role, worker_id in worker_ids(self._options):
            try:
                await self._start_worker(address, role, worker_id)
            except OSError as error:
                raise Unavailable(f"{worker_id} cannot be started: {error.strerror or error}") from error
        self._placed_first = []
        if placed := self._gpus.said([worker_id for _, worker_id in worker_ids(self._options)]):
            log.info("on GPUs: %s", placed)

    async def _start_worker(self, address: str, role: str, worker_id: str) -> None:
        """Raises OSError: it cannot be started."""
        words = (
            *self._options.flags(), "--role", role, "--worker-id", worker_id, "--coordinator", address,
            "--transport", self._options.chosen_transport, *self._worker_flags,
        )  # fmt: skip
        device = self._gpus.device_of(worker_id, role, {*self._children, *self._placed_first} - self._leaving)
        if device == self._options.host.device:
            starting = Child.start(words) if self._forks is None else Child.fork(words, self._forks)
        else:  # of two flags the last one counts
            told = {SHARING: str(max(1, self._gpus.sharing(worker_id)))}
            starting = Child.start((*words, f"--device={device}"), environment=told)
        self._children[worker_id] = await starting

    async def _watch_coordinator(self, child: Child, bind: str) -> None:
        """Starts it again at its address within the grace: workers and clients go on with the new one."""
        restarts, grace_s = Restarts(), self._options.timeouts.coordinator_grace_s
        while True:
            restarts.ready(time.monotonic())
            while (message := await child.hear()) is not None:
                if role := message.get("start"):
                    await self._add_worker(bind, str(role))
                elif worker_id := message.get("forget"):
                    self._leaving.add(str(worker_id))
                elif worker_id := message.get("keep"):
                    self._leaving.discard(str(worker_id))
            await child.process.wait()
            if self._stopping.is_set():
                return
            gone_at = time.monotonic()
            while child.has_ended:  # also one that does not come so far that it serves
                child.close()
                how = f"the coordinator (pid {child.pid}) is gone: {child.end}"
                delay_s = restarts.ended(time.monotonic(), has_said_why=bool(child.failure))
                if child.failure or delay_s is None:
                    raise Unavailable(how)
                if time.monotonic() + delay_s + STARTS_WITHIN_S > gone_at + grace_s:
                    raise Unavailable(f"{how}; nobody could take its place within {grace_s:g} s")
                log.warning("%s; it is started again%s", how, f" in {delay_s:g} s" if delay_s else "")
                if await self._stops_within(delay_s):
                    return
                with contextlib.suppress(OSError):  # a machine without room for a process may have some later
                    child = await self._start_coordinator(bind)
                    with contextlib.suppress(ConfigError, Unavailable):
                        await _address_of(child)
            self._say_what_runs(child)

    def _say_what_runs(self, coordinator: Child) -> None:
        """And that more may be started here. Ids of workers begin with their role."""
        workers = {name: child for name, child in self._children.items() if name != "coordinator"}
        serving = [name for name, child in workers.items() if child.is_ready and not child.has_ended]
        running = Counter(name.rpartition("-")[0] for name in workers)
        forgotten = [name for name in workers if name in self._leaving]
        coordinator.tell(launches=True, serving=serving, running=running, forgotten=forgotten)

    async def _keep_alive(self, address: str, role: str, worker_id: str, *, is_added: bool = False) -> None:
        """Tells of a worker's end, and starts it again as long as that helps.

        Raises Unavailable: it never could work, and it is one of those that there are to be; one that was added to them
        is only given up.
        """
        restarts = Restarts()
        while True:
            child = self._children[worker_id]
            while (message := await child.hear()) is not None:
                if message.get("ready"):
                    restarts.ready(time.monotonic())
            await child.process.wait()
            child.close()
            self._children["coordinator"].tell(
                exited=worker_id, pid=child.pid, how=child.end, has_crashed=child.has_crashed
            )
            if self._stopping.is_set():
                return
            if worker_id in self._leaving:  # an operator removed it
                del self._children[worker_id]
                return
            delay_s = restarts.ended(time.monotonic(), has_said_why=bool(child.failure))
            how = f"{worker_id} (pid {child.pid}) is gone: {child.end}"
            if delay_s is None:
                why = child.failure or f"{how}, again and again; it is not started again"
                if not is_added:
                    raise Unavailable(why)
                log.error("%s was added and cannot work; all else goes on without it: %s", worker_id, why)
                self._children["coordinator"].tell(given_up=worker_id, role=role, why=why)
                del self._children[worker_id]
                return
            log.warning(
                "%s; it is started again%s", how, f" in {delay_s:g} s" if delay_s else "",
                extra=with_fields(worker=worker_id, worker_pid=child.pid, end=child.end, again_in_s=delay_s),
            )  # fmt: skip
            if await self._stops_within(delay_s) or not await self._start_again(address, role, worker_id):
                return

    async def _start_again(self, address: str, role: str, worker_id: str) -> bool:
        """However often it takes: a machine without room for a process may have some later. False: it is to stop."""
        while True:
            try:
                await self._start_worker(address, role, worker_id)
                return True
            except OSError as error:
                log.warning(
                    "%s cannot be started (%s); trying again in %g s",
                    worker_id,
                    error.strerror or error,
                    NO_ROOM_AGAIN_S,
                )
            if await self._stops_within(NO_ROOM_AGAIN_S):
                return False

    async def _stops_within(self, delay_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()
        return self._stopping.is_set()

    async def drain(self) -> None:
        """Until all have ended as they were told: when their requests have, or when their own patience is over."""
        self._stopping.set()
        if self._http is not None:  # first: what it has taken in, the coordinator is still to take
            self._http.drain()
            await self._http.wait()
        coordinator = self._children.get("coordinator")
        if coordinator is not None:
            coordinator.tell(drain=True)
            await coordinator.process.wait()

    async def stop(self) -> None:
        self._stopping.set()
        if self._http is not None:
            self._http.drain()
            self._http.drain()
            await self._http.stop()
        await stop_children(*self._children.values())
        for forks in (self._forks, self._coordinator_forks):
            if forks is not None:
                await forks.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._sockets is not None:
            self._sockets.close()
