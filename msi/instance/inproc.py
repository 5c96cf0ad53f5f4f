"""One instance inside the calling process: what tests use, and `transport="inproc"`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msi.control.coordinator import Coordinator
from msi.errors import EngineError
from msi.instance.instance import check_device, check_files, create_coordinator, create_worker, listen, worker_ids
from msi.net.control import MessageClient
from msi.net.control_inproc import InprocServer
from msi.net.socket_dir import SocketDir
from msi.options import InstanceOptions
from msi.placement import PlaceExperts

if TYPE_CHECKING:
    from msi.worker.worker import Worker

log = logging.getLogger(__name__)


class InprocInstance:
    """Coordinator and workers as tasks of the calling event loop; each worker still has its own compute thread.

    What they tell each other, and whoever started them, passes as objects; other processes of this user may be clients,
    too, through a socket.

    Args:
        place: says which expert nodes hold which experts.
    """

    def __init__(
        self,
        options: InstanceOptions,
        report_failure: Callable[[EngineError], None],
        trace_dir: Path | None = None,
        place: PlaceExperts | None = None,
    ) -> None:
        self._options = options
        self._report_failure = report_failure
        self._trace_dir = trace_dir
        self._place = place
        self.coordinator: Coordinator | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: SocketDir | None = None
        self.workers: list[Worker] = []

    async def start(self) -> MessageClient:
        check_files(self._options)
        check_device(self._options.host.device)
        self._sockets = SocketDir()
        server = InprocServer(beside=listen(self._sockets.address("coordinator")))
        coordinator = self.coordinator = create_coordinator(self._options, server, place=self._place)
        self._start(coordinator.run(), "coordinator")
        for role, worker_id in worker_ids(self._options):
            worker = create_worker(
                self._options, server.address, role, worker_id, self._trace_dir, control=server.connect(worker_id)
            )
            self.workers.append(worker)
            self._start(worker.run(), worker_id)
        return server.connect("client")

    def _start(self, running: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(running, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, EngineError):
                log.error("%s failed", task.get_name(), exc_info=error)
            self._report_failure(error if isinstance(error, EngineError) else EngineError(repr(error)))

    async def stop(self) -> None:
        for task in reversed(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._sockets is not None:
            self._sockets.close()
        for worker in self.workers:
            if worker.life is not None and worker.life.attention is not None:
                # embedded workers are what tests use: none ends unchecked
                worker.life.attention.requests.check_integrity()
