"""A client of the coordinator: requests as token ids out, updates in. What the engine stands on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from msi.errors import ConfigError, EngineError, Failure, RequestFailed, Unavailable
from msi.messages import (
    CLIENT_END,
    PROTOCOL_VERSION,
    Cancel,
    ClientHeartbeat,
    ClientHello,
    InstanceStatus,
    Outputs,
    Refused,
    RequestUpdate,
    Stats,
    StatsRequest,
    Submit,
    Welcome,
)
from msi.net.control import ControlClient, MessageClient
from msi.net.secret import Secret
from msi.types import Request

HEARTBEAT_S = 1.0
LOST_AFTER_S = 4.0
HELLO_TIMEOUT_S = 120.0
STATS_TIMEOUT_S = 10.0
HELLO_AGAIN_S = 2.0


class CoordinatorClient:
    """One connection to a coordinator. `start` before anything else, `close` after everything.

    Args:
        control: the way there; by default a socket.
        secret: the instance's, where it listens on a network and has one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        address: str,
        control: MessageClient | None = None,
        *,
        secret: Secret | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self.status = InstanceStatus(False, "connecting", "")
        self._control = control or ControlClient(address, CLIENT_END, secret)
        self._clock = clock
        self._queues: dict[str, asyncio.Queue[RequestUpdate]] = {}
        self._status_changed = asyncio.Condition()
        self._stats: asyncio.Future[Stats] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._last_heard = self._clock()
        self._failure: EngineError | None = None  # why nothing works any more, or for the moment

    async def start(self, timeout_s: float = HELLO_TIMEOUT_S) -> Welcome:
        """Says hello.

        Raises:
            Unavailable: no answer within `timeout_s`.
            ConfigError: refused, with the coordinator's reason.
        """
        deadline = self._clock() + timeout_s
        while True:
            self._control.send(ClientHello(PROTOCOL_VERSION))
            try:
                async with asyncio.timeout(min(HELLO_AGAIN_S, deadline - self._clock())):
                    answer = await self._control.receive()
            except TimeoutError:
                if self._clock() >= deadline:
                    raise Unavailable(
                        f"no coordinator answered at {self.address} for {timeout_s:g} s; is it running there?"
                    ) from None
                continue
            if isinstance(answer, Refused):
                raise ConfigError(answer.reason)
            if isinstance(answer, Welcome):
                break
        self._last_heard = self._clock()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._receive()), loop.create_task(self._beat())]
        return answer

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.fail(Unavailable("the engine was closed"))
        self._control.close()

    def fail(self, error: EngineError) -> None:
        """Every request in flight ends with this error, and new ones too."""
        self._failure = error
        self._end_all(error)

    def _end_all(self, error: EngineError) -> None:
        for request_id, queue in self._queues.items():
            queue.put_nowait(RequestUpdate(request_id, failure=Failure.of(error)))

    async def wait_status(self, last: InstanceStatus) -> InstanceStatus:
        """The instance's status as soon as it is another than `last`."""
        async with self._status_changed:
            await self._status_changed.wait_for(lambda: self.status != last)
            return self.status

    async def stats(self) -> Stats:
        """Raises Unavailable when no answer comes."""
        if self._stats is None or self._stats.done():
            self._stats = asyncio.get_running_loop().create_future()
            self._control.send(StatsRequest())
        try:
            return await asyncio.wait_for(asyncio.shield(self._stats), STATS_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(f"the coordinator at {self.address} did not answer for {STATS_TIMEOUT_S:g} s") from None

    async def generate(self, requests: Sequence[Request]) -> AsyncGenerator[RequestUpdate, None]:
        """Updates of these requests until the last one. Leaving early, or being cancelled, cancels them.

        Raises:
            EngineError: a request was refused or lost; of the class that the coordinator named. The others end too.
        """
        if self._failure is not None:
            raise Failure.of(self._failure).error()
        queue: asyncio.Queue[RequestUpdate] = asyncio.Queue()
        try:
            for request in requests:
                self._queues[request.request_id] = queue
                self._control.send(Submit(request))
            while any(request.request_id in self._queues for request in requests):
                update = await queue.get()
                if update.request_id not in self._queues:  # cancelled since
                    continue
                if update.is_last:
                    del self._queues[update.request_id]
                if update.failure is not None:
                    raise update.failure.error()
                yield update
        finally:
            for request in requests:
                self.cancel(request.request_id)

    def cancel(self, request_id: str) -> None:
        """No more updates of this request; nothing happens if it is over."""
        if self._queues.pop(request_id, None) is not None:
            self._control.send(Cancel(request_id))

    async def _receive(self) -> None:
        while True:
            try:
                message = await self._control.receive()
            except EngineError as error:  # another coordinator, which does not take us
                self.fail(error)
                await self._set_status(InstanceStatus(False, str(error), str(error)))
                return
            self._last_heard = self._clock()
            match message:
                case Outputs():
                    for update in message.updates:
                        if (queue := self._queues.get(update.request_id)) is not None:
                            queue.put_nowait(update)
                case InstanceStatus():
                    await self._set_status(message)
                case Stats() if self._stats is not None and not self._stats.done():
                    self._stats.set_result(message)
                case Refused():  # a coordinator that was started anew
                    self._end_all(RequestFailed("the coordinator was restarted; requests in flight are lost"))
                    self._control.send(ClientHello(PROTOCOL_VERSION))
                case _:
                    pass  # Welcome to a repeated hello, HeartbeatAck

    async def _set_status(self, status: InstanceStatus) -> None:
        async with self._status_changed:
            self.status = status
            self._status_changed.notify_all()

    async def _beat(self) -> None:
        while True:
            self._control.send(ClientHeartbeat())
            await asyncio.sleep(HEARTBEAT_S)
            silent_s = self._clock() - self._last_heard
            if silent_s > LOST_AFTER_S:
                reason = f"the coordinator at {self.address} has given no sign of life for {silent_s:.0f} s"
                self._end_all(RequestFailed(reason))
                with contextlib.suppress(RuntimeError):
                    await self._set_status(InstanceStatus(False, reason, ""))
