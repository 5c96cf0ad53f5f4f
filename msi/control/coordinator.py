"""The coordinator: the shell that receives, hands on, and waits.

What follows from a message is decided by `Cluster`, in `msi.control.membership`, as far as it is about who is there;
requests and clients are `Traffic`'s. What workers measure, changes of placement and what operators ask for have files
of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msi.attention.journal import RequestAccount
from msi.control.changes import ChangesOfPlacement
from msi.control.client_messages import (
    ClientHeartbeat,
    ClientHello,
    ClientPulse,
    Resubmit,
    Stats,
    StatsRequest,
    Welcome,
)
from msi.control.due_changes import Choose
from msi.control.lane_choice import LaneChoice
from msi.control.lateness import read_first, sleep_late
from msi.control.members import InstancePlan, Instruction, Lost, Send
from msi.control.membership import Cluster
from msi.control.messages import (
    FROM_WORKER,
    Account,
    Calibrated,
    CalibrationCutShort,
    Cancel,
    Draining,
    Goodbye,
    Heartbeat,
    HelloAgain,
    Linked,
    PassDone,
    PeerLost,
    Placed,
    Pulse,
    Refused,
    RequestsFailed,
    Shutdown,
    Submit,
    Superseded,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
)
from msi.control.move_messages import Released
from msi.control.operator import Operator
from msi.control.orders import Order, Ordered
from msi.control.rebalancing import Rebalancing
from msi.control.stage_watch import StageWatch
from msi.control.traffic import Traffic
from msi.errors import Unavailable, one_line
from msi.net.control import MessageServer
from msi.placement import Placement
from msi.request_spans import OpenSpans
from msi.watchdog import LoopWatch

if TYPE_CHECKING:
    from msi.planner.drift import DriftWatch  # with numpy, which only an instance with a plan needs

log = logging.getLogger(__name__)

TICK_S = 0.25  # at most
LOOKS_PER_TICK = 5  # whether this loop has stood still
MESSAGES_AT_ONCE = 64  # before others get their turn on the loop


class Coordinator:
    """One per instance.

    Args:
        server: where workers and clients are heard; closed when `run` ends.
        num_micro_batches: m, or 0 to choose by measurement.
        num_layers: of the model.
        drift: holds what workers measure against the plan that runs, if there is one.
        watch: of the loop that this runs on; what it measures is told with the stats.
        spans: of requests; None where they are not traced.
        is_private: only those who were let in are heard, so that they are believed that another has taken over.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        server: MessageServer,
        plan: InstancePlan,
        welcome: Welcome,
        *,
        num_micro_batches: int,
        num_layers: int,
        drift: DriftWatch | None = None,
        watch: LoopWatch | None = None,
        spans: OpenSpans | None = None,
        is_private: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self.address = server.address
        self._clock = clock
        self._watch = watch
        self._spans = spans
        self._is_private = is_private
        self._cluster = Cluster(plan, clock())
        self._lane_choice = LaneChoice(plan, num_micro_batches, num_layers)
        self._stages = StageWatch(self._cluster, self._lane_choice, drift)
        self._traffic = Traffic(self._cluster, plan, welcome, self._sentence, spans)
        self._changes = ChangesOfPlacement(self._cluster, self._carry_out)
        self._balance = Rebalancing(plan.rebalance, self._cluster, self._changes, clock())
        self.operator = Operator(
            self._cluster, self._changes, self._balance, self._carry_out, server.address, clock,
            lambda: self._traffic.num_moved,
        )  # fmt: skip
        self._superseded: Superseded | None = None
        self._is_superseded = asyncio.Event()

    async def run(self) -> None:
        """Serves for ever. Cancel it to stop; workers are then told to end.

        Raises:
            Unavailable: another coordinator has taken over; who followed this one is told where that is reached.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._receive(), name="control")
                tasks.create_task(self._tick(), name="tick")
                tasks.create_task(self._until_superseded(), name="superseded")
        except ExceptionGroup as group:
            if self._superseded is None:
                raise
            raise group.exceptions[0] from None
        finally:
            for route in self._cluster.routes if self._superseded is None else []:
                self._server.send(route, Shutdown("the coordinator ended"))
            self._server.close()
            if self._spans is not None:
                await self._spans.close()

    @property
    def term(self) -> int:
        """Which coordinator of the instance this is; see `msi.control.succession`."""
        return self._cluster.term

    @property
    def has_workers(self) -> bool:
        return bool(self._cluster.live("attention") or self._cluster.live("expert"))

    def give_way(self, to: Superseded) -> None:
        """Another one coordinates: `run` ends, and nobody who follows this one is told to end with it."""
        if self._superseded is None:
            self._superseded = to
            for route in (*self._cluster.routes, *self._traffic.clients):
                self._server.send(route, to)
            self._is_superseded.set()

    async def _until_superseded(self) -> None:
        await self._is_superseded.wait()
        assert self._superseded is not None
        where = f" at {self._superseded.address}" if self._superseded.address else ""
        raise Unavailable(f"another coordinator{where} has taken over while this one was silent")

    # -- messages ----------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            for _ in range(MESSAGES_AT_ONCE):
                route, message = await self._server.receive()
                self._handle(route, message, self._clock())
            await asyncio.sleep(0)

    def _handle(self, route: bytes, message: Any, now: float) -> None:
        cluster, traffic = self._cluster, self._traffic
        is_client = traffic.is_client(route)
        match message:
            case _ if is_client and isinstance(message, FROM_WORKER):
                self._server.send(route, Refused("this connection is a client's, and can be no worker's"))
                return
            case PassDone():
                self._passed(route, message, now)
            case Heartbeat():
                self._heartbeat(route, message, now)
            case Pulse():
                if not (instructions := cluster.pulse(message, now)):
                    return  # of these there are many, and nothing follows
                self._carry_out(instructions)
            case WorkerHello():
                self._carry_out(cluster.hello(route, message, now))
            case WorkerReady():
                self._carry_out(cluster.ready(route, message))
            case Account():
                self._carry_out(cluster.adopt(route, message, now))
                if worker_id := cluster.attention_at(route):
                    traffic.taken_over(worker_id, message, now)
            case RequestAccount():
                if worker_id := cluster.attention_at(route):
                    traffic.account(worker_id, message, now)
            case Linked():
                self._carry_out(cluster.linked(route, message))
            case Placed():
                self._carry_out(cluster.placed(route, message))
            case PeerLost():
                self._carry_out(cluster.peer_lost(route, message))
            case RequestsFailed() if cluster.knows(route, message.worker_id, message.incarnation):
                self._carry_out(traffic.failed(message))
            case Released() if cluster.knows(route, message.worker_id, message.incarnation):
                self._carry_out(traffic.released(message, now))
            case WorkerFailed() if cluster.knows(route, message.worker_id, message.incarnation):
                log.error("%s: %s", message.worker_id, message.reason)
                self._carry_out(cluster.worker_failed(route, message))
            case Draining():
                self._carry_out(cluster.draining(route, message.worker_id, message.incarnation))
                self._let_experts_end()
            case Goodbye():
                self._carry_out(cluster.goodbye(route, message))
            case Calibrated() | CalibrationCutShort() if cluster.knows(route, message.worker_id, message.incarnation):
                self._lane_choice.hear(message, now)
            case RequestsFailed() | Released() | WorkerFailed() | Calibrated() | CalibrationCutShort():
                log.debug("dropped %s: not from the member that it names", type(message).__name__)
            case ClientHello() if not cluster.has_route(route):
                self._carry_out(traffic.hello(route, message, now))
            case ClientPulse():
                traffic.pulse(message, now)
                return
            case Submit() | Resubmit() | Cancel() | ClientHeartbeat() | StatsRequest() | Superseded() | Order() if (
                not is_client
            ):
                self._server.send(
                    route, HelloAgain("the coordinator does not know this client; say hello first", cluster.term)
                )
            case Submit():
                self._carry_out(traffic.submit(route, message, now))
            case Resubmit():
                traffic.resubmit(route, message)
            case Cancel():
                self._carry_out(traffic.cancel(route, message.request_id))
            case ClientHeartbeat():
                self._carry_out(traffic.beats(route, message, now))
            case Superseded():
                if self._is_private and message.term > cluster.term:
                    self.give_way(message)
            case Order():
                self._tasks.create_task(self._obey(route, message), name="order")
            case StatsRequest():
                if message.is_watching:
                    cluster.watch(now)
                self._server.send(route, self._stats(is_watching=message.is_watching))
            case ClientHello():
                self._server.send(route, Refused("this connection is a worker's, and can be no client's"))
            case _:
                log.warning("dropped %s: not for a coordinator", type(message).__name__)
        if cluster.superseded_by:
            self.give_way(Superseded(cluster.superseded_by, ""))
        self._advance(now)

    def _stats(self, *, is_watching: bool) -> Stats:
        counters = self._traffic.counters | self._balance.counters() | self.operator.slow.counters()
        counters |= {} if self._watch is None else self._watch.counters()
        return Stats(
            self._cluster.num_lanes, len(self._traffic), self._cluster.stats(is_watching=is_watching),
            self._stages.ratios, counters=counters,
            dropped={kind: float(count) for kind, count in self._server.dropped.items()},
            num_waiting=self._traffic.num_waiting,
        )  # fmt: skip

    async def _obey(self, route: bytes, order: Order) -> None:
        try:
            answer = await self.operator.obey(order)
        except Exception as error:  # a bug of ours, which is to end nothing but this
            log.exception("%s %s failed", order.verb, order.worker_id)
            answer = Ordered(order.number, failure=one_line(error))
        self._server.send(route, answer)

    # -- workers' messages -------------------------------------------------------------------------------------------

    def launched(self, serving: Sequence[str], running: Mapping[str, int], forgotten: Sequence[str]) -> None:
        """The launcher says what there is, see `Cluster.launched`."""
        self._cluster.launched(serving, running, forgotten)

    def worker_exited(self, worker_id: str, pid: int, how: str, has_crashed: bool) -> None:
        """The launcher, and nobody else, says that a process of its own has ended."""
        now = self._clock()
        self._carry_out(self._cluster.worker_exited(worker_id, pid, how, now, has_crashed=has_crashed))
        self._advance(now)

    def _passed(self, route: bytes, message: PassDone, now: float) -> None:
        instructions = self._cluster.passed(route, message)
        if instructions == []:
            self._carry_out(self._traffic.passed(message, now))
            self._let_experts_end()
        elif instructions:
            self._carry_out(instructions)

    def _let_experts_end(self) -> None:
        if not len(self._traffic):
            self._carry_out(self._cluster.no_requests_left())

    def _heartbeat(self, route: bytes, message: Heartbeat, now: float) -> None:
        self._carry_out(self._cluster.heartbeat(route, message, now))
        if (member := self._cluster.member(route, message.worker_id, message.incarnation)) is not None:
            self._balance.hear(member)
            self._carry_out(self._traffic.believed(route, message, now))

    async def change_placement(self, choose: Choose, remark: str) -> Placement:
        """Experts are placed as `choose` says, while requests run; returns the placement once nothing of the one before
        is on its way. Changes take turns; one that is cancelled goes on.

        Args:
            choose: called once it is its turn, with the placement that is used then and the nodes that are there; says
                which experts each node is to hold (`msi.placement_change` gives them their local ids).
            remark: what for, in a few words.

        Raises:
            ConfigError: it cannot be, or a worker could not load its part, or was lost; then all is as before.
        """
        return await self._changes.ask(choose, remark)

    # -- the end -----------------------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests; returns once those that are here have ended, after `timeout_s` with an error.

        Cancelling it leaves those that run alone.
        """
        self._traffic.end()
        self._advance(self._clock())
        self._carry_out(await self._traffic.ended(timeout_s))

    # -- acting ------------------------------------------------------------------------------------------------------

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._server.send(instruction.route, instruction.message)
                case Lost():
                    self._carry_out(self._traffic.worker_lost(instruction, self._clock()))

    def _advance(self, now: float) -> None:
        """What follows from the state as it is now: requests routed, lanes chosen, clients told."""
        self._carry_out(self._traffic.route(now))
        self._carry_out(self._lane_choice.next(self._cluster, now))
        self._changes.look()
        self.operator.look()
        self._carry_out(self._traffic.look(now))

    def _sentence(self, now: float) -> str:
        return self._cluster.sentence(now) + self._lane_choice.remark

    async def _tick(self) -> None:
        while True:
            delay_s = self._cluster.looks_again_in_s(self._clock(), TICK_S)
            late_s = await sleep_late(delay_s, self._clock, LOOKS_PER_TICK)
            has_read_all = await read_first(self._server, self._clock)
            if not has_read_all:
                late_s += delay_s  # whoever seems silent may have spoken
            now = self._clock()
            self._carry_out(self._cluster.tick(now, late_s))
            self._carry_out(self._traffic.tick(now, late_s))
            self.operator.slow.look(now)
            for role in self.operator.slow.replacements_due(now):
                self._tasks.create_task(self.operator.replace(role), name="replacement")
            self._let_experts_end()
            self._advance(now)
            if self._stages.has_drifted():
                self._tasks.create_task(self._stages.say_choice(), name="choice")
            if (question := self._balance.next(now)) is not None:
                self._tasks.create_task(self._balance.look(question), name="rebalance")
            self._carry_out(self._stages.look_at_size(now))
