"""Processes beside the gateway that understand large requests, so that nobody waits for another's.

Parsing, templates and tokenising grow with what a client sent and hold the interpreter while they run. Small bodies are
understood where they arrive; the others go through here: at most so many at a time, the rest in a bounded queue that
gives every client its turn, large ones never in all processes at once. One that takes too long ends with its process,
which is started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from msi.errors import InvalidRequest, Unavailable
from msi.json_log import is_json_logged
from msi.net.framing import read_frame, write_frame
from msi.server.preparer import GOES_ON

log = logging.getLogger(__name__)

NUM_PREPARERS = 2
MAX_QUEUED = 64
LARGE_BYTES = 512 * 1024
WITHIN_S = 20.0
ENDS_WITHIN_S = 5.0
LEAST_SHARE = 0.1  # of a processor, for a request that takes too long to be to blame for it


@dataclass(eq=False, slots=True)
class _Job:
    client: object
    task: bytes
    is_large: bool
    result: asyncio.Future[bytes] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Preparers:
    """A pool. Processes are started when they are first needed, or by `start`.

    Args:
        setup: the first frame that each process gets.
        within_s: time for one request; 0 for the usual.
    """

    def __init__(self, setup: bytes, num_preparers: int = NUM_PREPARERS, within_s: float = 0.0) -> None:
        assert num_preparers >= 2, "one is kept from large requests"
        self.num_given_up = 0
        self._setup = setup
        self._num_preparers = num_preparers
        self._within_s = within_s or WITHIN_S
        self._waiting: dict[object, deque[_Job]] = {}  # by client, whose turn it is first
        self._num_large = 0  # running
        self._idle: list[_Preparer] = []
        self._running: set[asyncio.Task[None]] = set()

    async def prepare(self, client: object, task: bytes, *, is_slow: bool = False) -> bytes:
        """What a process makes of a task. Cancellation takes it out of the queue; one that runs is ended by its time.

        Args:
            client: whose turn it takes, such as a connection.
            is_slow: it is known to take long, though it may be small.

        Raises:
            InvalidRequest: it took too long, or more memory than there is.
            Unavailable: too many wait.
        """
        if sum(map(len, self._waiting.values())) >= MAX_QUEUED:
            raise Unavailable(f"{MAX_QUEUED} large requests wait to be understood already; try again")
        job = _Job(client, task, is_large=is_slow or len(task) > LARGE_BYTES)
        self._waiting.setdefault(client, deque()).append(job)
        self._start_what_can_run()
        try:
            return await job.result
        except asyncio.CancelledError:
            self._leave(job)
            raise

    async def start(self) -> None:
        """Starts every process, so that no request waits for it."""
        while len(self._idle) + len(self._running) < self._num_preparers:
            self._idle.append(await _Preparer.start(self._setup))

    async def close(self) -> None:
        """What waits or runs ends with Unavailable."""
        for jobs in self._waiting.values():
            for job in jobs:
                if not job.result.done():
                    job.result.set_exception(Unavailable("the server ends"))
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.gather(*(preparer.end() for preparer in self._idle))
        self._idle.clear()

    def _leave(self, job: _Job) -> None:
        """Nobody waits for it any more: it takes no place in the queue, and no memory."""
        jobs = self._waiting.get(job.client)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.client]

    def _start_what_can_run(self) -> None:
        while len(self._running) < self._num_preparers and (job := self._next()) is not None:
            self._num_large += job.is_large
            task = asyncio.get_running_loop().create_task(self._run(job))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start_what_can_run()

    async def _take(self) -> _Preparer:
        """One that waits for work, or a new one. Raises Unavailable."""
        while self._idle:
            preparer = self._idle.pop()
            if preparer.is_alive:
                return preparer
            preparer.close()
        return await self._new()

    async def _new(self) -> _Preparer:
        """Raises Unavailable."""
        try:
            return await _Preparer.start(self._setup)
        except OSError as error:
            log.warning("no process can be started for large requests: %s", error)
            raise Unavailable("large requests cannot be understood now; try again") from error

    def _next(self) -> _Job | None:
        """The first job that may run now, of the client whose turn it is."""
        may_be_large = self._num_large < self._num_preparers - 1
        for client, jobs in list(self._waiting.items()):
            if may_be_large or not jobs[0].is_large:
                del self._waiting[client]
                job = jobs.popleft()
                if jobs:
                    self._waiting[client] = jobs  # behind the others
                return job
        return None

    async def _run(self, job: _Job) -> None:
        preparer: _Preparer | None = None
        try:
            if job.result.done():  # its client has just left
                return
            preparer = await self._take()
            try:
                answer = await preparer.prepare(job.task, self._within_s)
            except (OSError, EOFError):  # whatever ended it need not have been this request
                await preparer.kill()
                preparer = await self._new()
                answer = await preparer.prepare(job.task, self._within_s)
            if not job.result.done():
                job.result.set_result(answer[1:])
            if answer[:1] == GOES_ON:
                self._idle.append(preparer)
                preparer = None
        except TimeoutError:
            self._fail(job, f"this request was not understood within {self._within_s:g} s; send a smaller one")
        except (OSError, EOFError):
            self._fail(job, "this request took more memory to understand than there is; send a smaller one")
        except Unavailable as error:
            if not job.result.done():
                job.result.set_exception(error)
        finally:
            if preparer is not None:
                await preparer.kill()
            self._num_large -= job.is_large
            if not job.result.done():
                job.result.set_exception(Unavailable("the server ends"))

    def _fail(self, job: _Job, sentence: str) -> None:
        self.num_given_up += 1
        log.warning("a request of %d bytes: %s", len(job.task), sentence)
        if not job.result.done():
            job.result.set_exception(InvalidRequest(sentence))


class _Preparer:
    """One process."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @staticmethod
    async def start(setup: bytes) -> _Preparer:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "msi.server.preparer", str(theirs.fileno()), str(os.getpid()),
                    *(["json"] if is_json_logged() else []),
                    stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        preparer = _Preparer(process, reader, writer)
        try:
            await write_frame(writer, setup)
        except BaseException:
            await preparer.kill()
            raise
        return preparer

    async def prepare(self, task: bytes, within_s: float) -> bytes:
        """It is of no use after an error, nor after cancellation.

        Raises:
            TimeoutError, OSError or EOFError.
            Unavailable: the time is over, and it could hardly compute meanwhile.
        """
        before_s = self._processor_s()
        try:
            async with asyncio.timeout(within_s):
                await write_frame(self._writer, task)
                return await read_frame(self._reader)
        except TimeoutError:
            if self._processor_s() - before_s < within_s * LEAST_SHARE:
                raise Unavailable("the processes that understand large requests stand still; try again") from None
            raise

    def _processor_s(self) -> float:
        """Processor time that it has had; infinite where nobody knows."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it is gone, or this is another system
            return math.inf
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    def close(self) -> None:
        """It ends by itself once nothing more can come."""
        self._writer.close()

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._writer.close()
        ending = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.shield(ending)
        finally:  # it takes no time; nobody is left behind, not even where this is cancelled
            await ending

    async def end(self) -> None:
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), ENDS_WITHIN_S)
        except TimeoutError:
            await self.kill()
