"""A client of the coordinator: requests as token ids out, their progress in. What the engine stands on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from msi.control.inbox import Inbox
from msi.control.lateness import read_first, sleep_late
from msi.control.messages import (
    PROTOCOL_VERSION,
    Cancel,
    ClientHeartbeat,
    ClientHello,
    ClientPulse,
    HeartbeatAck,
    InstanceStatus,
    Outputs,
    Refused,
    Stats,
    StatsRequest,
    Submit,
    Welcome,
)
from msi.errors import ConfigError, EngineError, Failure, RequestFailed, Unavailable
from msi.net.control import MessageClient
from msi.types import Progress, Request

HEARTBEAT_S = 1.0
LOST_AFTER_S = 8.0  # a coordinator that is silent; on this host, whose end somebody sees, it may stand for longer
LOCAL_LOST_AFTER_S = 30.0
HELLO_TIMEOUT_S = 120.0
STATS_AGAIN_S = 2.0
STATS_ASKED = 5  # times
HELLO_AGAIN_S = 2.0


class CoordinatorClient:
    """One connection to a coordinator. `start` before anything else, `close` after everything.

    Args:
        control: the way there; closed with this.
        clock: seconds, monotonic.
    """

    def __init__(self, control: MessageClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = control.address
        self.status = InstanceStatus(False, "connecting", "")
        self._control = control
        self._clock = clock
        self._inboxes: dict[str, Inbox] = {}
        self._status_changed = asyncio.Condition()
        self._stats: asyncio.Future[Stats] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._last_heard = self._clock()
        self._token = secrets.token_hex(8)
        self._must_greet = False  # the coordinator does not know us
        self._num_outputs = 0
        self._num_submits = 0
        self._lost_after_s = LOST_AFTER_S if self.address.startswith("tcp://") else LOCAL_LOST_AFTER_S
        self._failure: EngineError | None = None  # why nothing works any more, or for the moment

    async def start(self, timeout_s: float = HELLO_TIMEOUT_S) -> Welcome:
        """Says hello.

        Raises:
            Unavailable: no answer within `timeout_s`.
            ConfigError: refused, with the coordinator's reason.
        """
        deadline = self._clock() + timeout_s
        while True:
            self._control.send(ClientHello(PROTOCOL_VERSION, self._token))
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
        self._control.keep_alive(lambda late_s: ClientPulse(self._token), HEARTBEAT_S)
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
        for request_id, inbox in self._inboxes.items():
            inbox.put(Progress(request_id, failure=Failure.of(error)))

    async def wait_status(self, last: InstanceStatus) -> InstanceStatus:
        """The instance's status as soon as it is another than `last`."""
        async with self._status_changed:
            await self._status_changed.wait_for(lambda: self.status != last)
            return self.status

    async def stats(self, *, is_watching: bool = False) -> Stats:
        """Raises Unavailable when no answer comes, however often it asks."""
        for _ in range(STATS_ASKED):
            if self._stats is None or self._stats.done():
                self._stats = asyncio.get_running_loop().create_future()
            self._control.send(StatsRequest(is_watching))
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(asyncio.shield(self._stats), STATS_AGAIN_S)
        waited_s = STATS_ASKED * STATS_AGAIN_S
        raise Unavailable(f"the coordinator at {self.address} did not answer for {waited_s:g} s")

    async def generate(self, requests: Sequence[Request]) -> AsyncGenerator[Progress, None]:
        """What is new of these requests until the last one. Leaving early, or being cancelled, cancels them.

        Raises:
            EngineError: a request was refused or lost; of the class that the coordinator named. The others end too.
        """
        if self._failure is not None:
            raise Failure.of(self._failure).error()
        inbox = Inbox()
        try:
            for request in requests:
                self._inboxes[request.request_id] = inbox
                self._control.send(Submit(request))
                self._num_submits += 1
                if len(requests) > 1:
                    await asyncio.sleep(0)  # others have their turn between the copies for each choice
            while any(request.request_id in self._inboxes for request in requests):
                update = await inbox.get()
                if update.request_id not in self._inboxes:  # cancelled since
                    continue
                if update.is_last:
                    del self._inboxes[update.request_id]
                if update.failure is not None:
                    raise update.failure.error()
                yield update
        finally:
            for request in requests:
                self.cancel(request.request_id)

    def cancel(self, request_id: str) -> None:
        """No more updates of this request; nothing happens if it is over."""
        if self._inboxes.pop(request_id, None) is not None:
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
                    self._take(message)
                case HeartbeatAck():
                    self._check_outputs(message.num_outputs)
                case InstanceStatus():
                    await self._set_status(message)
                case Stats() if self._stats is not None and not self._stats.done():
                    self._stats.set_result(message)
                case Welcome():
                    self._must_greet = False
                    self._num_outputs = self._num_submits = 0
                case Refused():
                    self._must_greet = True  # at the next beat, so that two who disagree do not talk all day
                    self._end_all(RequestFailed(f"requests in flight are lost: {message.reason}"))
                case _:
                    pass

    def _take(self, outputs: Outputs) -> None:
        self._check_outputs(outputs.number - 1)
        self._num_outputs = outputs.number
        for update in outputs.progress:
            if (inbox := self._inboxes.get(update.request_id)) is not None:
                inbox.put(update)

    def _check_outputs(self, num_sent: int) -> None:
        """So many were sent to us so far: where one is missing, tokens are, and nobody can say whose."""
        if num_sent != self._num_outputs and not self._must_greet:
            self._num_outputs = num_sent
            self._end_all(RequestFailed("tokens were lost on the way from the coordinator"))

    async def _set_status(self, status: InstanceStatus) -> None:
        async with self._status_changed:
            self.status = status
            self._status_changed.notify_all()

    async def _beat(self) -> None:
        while True:
            hello = ClientHello(PROTOCOL_VERSION, self._token)
            self._control.send(hello if self._must_greet else ClientHeartbeat(self._num_submits))
            late_s = await sleep_late(HEARTBEAT_S, self._clock)
            self._last_heard += late_s
            if not await read_first(self._control, self._clock):
                continue
            silent_s = self._clock() - self._last_heard
            if silent_s > self._lost_after_s:
                reason = f"the coordinator at {self.address} has given no sign of life for {silent_s:.0f} s"
                self._end_all(RequestFailed(reason))
                with contextlib.suppress(RuntimeError):
                    await self._set_status(InstanceStatus(False, reason, ""))
