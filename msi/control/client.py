"""A client of the coordinator: requests as token ids out, their progress in. What the engine stands on.

It knows what it has of each request, so that a coordinator which does not know it, as one that took another's place,
is told all that is wanted and what is there already: the streams go on behind that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msi.control.client_messages import (
    ClientHeartbeat,
    ClientHello,
    ClientPulse,
    InstanceStatus,
    Outputs,
    Resubmit,
    Stats,
    StatsRequest,
    Welcome,
)
from msi.control.inbox import Inbox
from msi.control.lateness import read_first, sleep_late
from msi.control.messages import PROTOCOL_VERSION, Cancel, HeartbeatAck, HelloAgain, Refused, Submit
from msi.control.orders import Order, Ordered
from msi.errors import ConfigError, EngineError, Failure, InvalidRequest, RequestFailed, Unavailable, shown
from msi.net.alarm import Alarm
from msi.net.control import MessageClient
from msi.types import Progress, Request

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
AGAIN_S = 0.2  # where none was answered: what runs waits for another coordinator to hear of it
LOST_AFTER_S = 8.0  # a coordinator that is silent; on this host, whose end somebody sees, it may stand for longer
LOCAL_LOST_AFTER_S = 30.0
HELLO_TIMEOUT_S = 120.0
STATS_AGAIN_S = 2.0
STATS_ASKED = 5  # times
HELLO_AGAIN_S = 2.0
MAX_HELD = 1024  # requests that wait for a coordinator; the next is refused


@dataclass(slots=True, eq=False)
class _Asked:
    """A request in flight, and what came of it."""

    request: Request
    inbox: Inbox
    has_come: Alarm
    came_at: float
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    num_scored: int = 0
    is_over: bool = False

    def take(self, update: Progress) -> None:
        self.token_ids.extend(update.token_ids)
        if update.prompt_logprobs is not None:
            self.num_scored += len(update.prompt_logprobs)
        self.is_over |= update.is_last
        self.inbox.put(update)
        self.has_come.ring()

    def rest(self, now: float) -> Request:
        """What is still wanted of it."""
        request = self.request
        if request.timeout_s:
            request = replace(request, timeout_s=max(0.001, request.timeout_s - (now - self.came_at)))
        return replace(request, output_token_ids=tuple(self.token_ids), num_scored=self.num_scored)


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
        self._asked: dict[str, _Asked] = {}
        self._status_changed = asyncio.Condition()
        self._stats: asyncio.Future[Stats] | None = None
        self._orders: dict[int, asyncio.Future[Ordered]] = {}
        self._num_orders = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._last_heard = self._clock()
        self._token = secrets.token_hex(8)
        self._must_greet = False  # the coordinator does not know us
        self._unknown_since = self._greeted_at = self._last_heard
        self._grace_s = 0.0
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
            self._greet()
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
        self._grace_s = answer.coordinator_grace_s
        self._control.keep_alive(lambda late_s: ClientPulse(self._token), HEARTBEAT_S)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._to_its_end(work)) for work in (self._receive(), self._beat())]
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
        self._end_orders(error)
        for request_id, asked in self._asked.items():
            if not asked.is_over:
                asked.take(Progress(request_id, failure=Failure.of(error)))

    def _end_orders(self, error: EngineError) -> None:
        for order in self._orders.values():
            if not order.done():
                order.set_exception(Failure.of(error).error())

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

    async def order(self, order: Order) -> Ordered:
        """What an operator asks for; the answer, whenever it comes.

        Raises:
            EngineError: the coordinator, or the connection to it, is lost: nobody knows whether it was done.
        """
        number = self._num_orders = self._num_orders + 1
        answer: asyncio.Future[Ordered] = asyncio.get_running_loop().create_future()
        self._orders[number] = answer
        try:
            self._control.send(replace(order, number=number))
            return await answer
        finally:
            del self._orders[number]

    async def generate(self, requests: Sequence[Request]) -> AsyncGenerator[Progress, None]:
        """What is new of these requests until the last one. Leaving early, or being cancelled, cancels them.

        Raises:
            InvalidRequest: one has the id of another that runs; that one goes on.
            EngineError: a request was refused or lost; of the class that the coordinator named. The others end too.
        """
        if self._failure is not None:
            raise Failure.of(self._failure).error()
        if len(self._asked) >= MAX_HELD and (silent_s := self._alone_s()) > self._lost_after_s:
            raise Unavailable(
                f"the coordinator at {self.address} has been gone for {silent_s:.0f} s, and {len(self._asked)} "
                "requests wait for it already; try again later"
            )
        inbox, has_come = Inbox(), Alarm()
        ours: list[str] = []
        try:
            for request in requests:
                if request.request_id in self._asked:
                    raise InvalidRequest(
                        f"request_id {shown(request.request_id)} is that of a request that runs; give each one of its "
                        "own, or none",
                        param="request_id",
                    )
                ours.append(request.request_id)
                self._asked[request.request_id] = _Asked(request, inbox, has_come, self._clock())
                inbox.num_open += 1
                if not self._must_greet:  # else with all others
                    self._control.send(Submit(request))
                    self._num_submits += 1
                if len(requests) > 1:
                    await asyncio.sleep(0)  # others have their turn between the copies for each choice
            while inbox.num_open:
                if (update := inbox.take()) is None:
                    await has_come.wait()
                    continue
                if update.request_id not in self._asked:  # cancelled since
                    continue
                if update.is_last:
                    del self._asked[update.request_id]
                    inbox.num_open -= 1
                if update.failure is not None:
                    raise update.failure.error()
                yield update
        finally:
            for request_id in ours:
                self.cancel(request_id)

    def cancel(self, request_id: str) -> None:
        """No more updates of this request; nothing happens if it is over."""
        if (asked := self._asked.pop(request_id, None)) is None:
            return
        asked.inbox.num_open -= 1
        if not self._must_greet:
            self._control.send(Cancel(request_id))

    async def _to_its_end(self, work: Coroutine[Any, Any, None]) -> None:
        """A bug of ours in there ends all requests with a sentence, and leaves none waiting for ever."""
        try:
            await work
        except Exception as error:
            log.exception("the connection to the coordinator at %s cannot go on", self.address)
            reason = f"the connection to the coordinator at {self.address} failed by a bug: {error!r}"
            self.fail(RequestFailed(reason))
            await self._set_status(InstanceStatus(False, reason, reason))

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
                case Ordered() if (order := self._orders.get(message.number)) is not None and not order.done():
                    order.set_result(message)
                case Welcome() if self._must_greet:
                    self._welcomed(message)
                case HelloAgain():
                    self._is_unknown()
                case Refused():
                    self._is_unknown()
                    self._end_all(RequestFailed(f"requests in flight are lost: {message.reason}"))
                case _:
                    pass

    def _take(self, outputs: Outputs) -> None:
        self._check_outputs(outputs.number - 1)
        if self._must_greet:
            return
        self._num_outputs = outputs.number
        for update in outputs.progress:
            if (asked := self._asked.get(update.request_id)) is not None and not asked.is_over:
                asked.take(update)

    def _check_outputs(self, num_sent: int) -> None:
        """So many were sent to us so far: where one is missing, tokens are, and nobody can say whose."""
        if num_sent != self._num_outputs:
            self._is_unknown()

    # -- a coordinator that does not know us -------------------------------------------------------------------------

    def _is_unknown(self) -> None:
        """What it says of requests does not count until it has welcomed us anew, and knows what we have."""
        if not self._must_greet:
            self._must_greet, self._unknown_since = True, self._clock()
        self._greet_again()

    def _greet_again(self) -> None:
        """Not all day: two may disagree, and the answer may be long."""
        if self._clock() - self._greeted_at >= HEARTBEAT_S:
            self._greet()

    def _greet(self) -> None:
        self._greeted_at = self._clock()
        self._num_submits = 0  # since this hello
        self._control.send(ClientHello(PROTOCOL_VERSION, self._token))

    def _welcomed(self, welcome: Welcome) -> None:
        self._must_greet = False
        self._end_orders(
            Unavailable(
                f"the coordinator at {self.address} was lost before it answered; what was asked may have been done: "
                "look at the status, and ask again if it was not"
            )
        )
        self._num_outputs = 0
        self._grace_s = welcome.coordinator_grace_s
        for asked in self._asked.values():
            if not asked.is_over:
                self._control.send(Resubmit(asked.rest(self._clock())))
                self._num_submits += 1

    def _alone_s(self) -> float:
        """For how long nobody has taken care of our requests."""
        now = self._clock()
        return max(now - self._last_heard, now - self._unknown_since if self._must_greet else 0.0)

    async def _set_status(self, status: InstanceStatus) -> None:
        async with self._status_changed:
            self.status = status
            self._status_changed.notify_all()

    async def _beat(self) -> None:
        while True:
            if self._must_greet:
                self._greet_again()
            else:
                self._control.send(ClientHeartbeat(self._num_submits))
            sent_at = self._clock()
            late_s = await sleep_late(AGAIN_S, self._clock)
            if self._last_heard >= sent_at:
                late_s += await sleep_late(HEARTBEAT_S - AGAIN_S, self._clock)
            self._last_heard += late_s
            if not await read_first(self._control, self._clock):
                continue
            alone_s = self._alone_s()
            if alone_s > max(self._lost_after_s, self._grace_s):
                self._give_up(f"the coordinator at {self.address} has given no sign of life for {alone_s:.0f} s")
            if (silent_s := self._clock() - self._last_heard) > self._lost_after_s:
                reason = f"the coordinator at {self.address} has given no sign of life for {silent_s:.0f} s"
                with contextlib.suppress(RuntimeError):
                    await self._set_status(InstanceStatus(False, reason, ""))

    def _give_up(self, reason: str) -> None:
        """Nobody came within the grace: what had begun was lost, and the rest may be asked for again."""
        self._end_orders(Unavailable(reason))
        for request_id, asked in self._asked.items():
            if not asked.is_over:
                error = RequestFailed(reason) if asked.token_ids else Unavailable(reason)
                asked.take(Progress(request_id, failure=Failure.of(error)))
