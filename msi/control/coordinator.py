"""The coordinator: the shell around `Cluster`, `Router`, `Clients` and `LaneChoice` that sends, receives and waits.

Carries requests to attention workers and tokens back to clients. Every decision is made by those four, in
`msi.control.membership`, `request_routing`, `clients` and `lane_choice`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from msi.attention.journal import RequestAccount
from msi.control.changes import ChangesOfPlacement
from msi.control.client_messages import (
    ClientHeartbeat,
    ClientHello,
    ClientPulse,
    InstanceStatus,
    Resubmit,
    Stats,
    StatsRequest,
    Welcome,
    WorkerStats,
)
from msi.control.clients import Clients
from msi.control.counters import AttentionCounters, ExpertCounters
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
from msi.control.operator import Operator
from msi.control.orders import Order, Ordered
from msi.control.overload import Objectives, backlog_of
from msi.control.rebalancing import Rebalancing
from msi.control.request_routing import Router
from msi.control.routed import Updates
from msi.control.size_watch import SizeWatch
from msi.control.takeover import Takeover
from msi.errors import Failure, InvalidRequest, Unavailable, one_line
from msi.kernels import BLOCK_TOKENS
from msi.net.control import MessageServer
from msi.planner.pipeline import Stages
from msi.request_spans import OpenSpans
from msi.types import Placement, Progress, Request
from msi.watchdog import LoopWatch

if TYPE_CHECKING:
    from msi.planner.drift import DriftWatch, Observation  # with numpy, which only an instance with a plan needs

log = logging.getLogger(__name__)

TICK_S = 0.25
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
        self._drift = drift
        self._watch = watch
        self._spans = spans
        self._is_private = is_private
        self._cluster = Cluster(plan, clock())
        self._router = Router(
            max_model_len=plan.limits.max_model_len,
            max_num_seqs=plan.limits.max_num_seqs,
            max_waiting=plan.num_attention * plan.limits.max_num_waiting,
            max_resumptions=plan.max_resumptions,
            hold_timeout_s=plan.timeouts.hold_timeout_s,
            objectives=Objectives.of(plan.service),
            backlog=backlog_of(plan.limits.max_num_seqs),
        )
        self._takeover = Takeover()
        self._clients = Clients(welcome)
        self._changes = ChangesOfPlacement(self._cluster, self._carry_out)
        self._balance = Rebalancing(plan.rebalance, self._cluster, self._changes, clock())
        self.operator = Operator(self._cluster, self._changes, self._balance, self._carry_out, server.address, clock)
        self._sizes = SizeWatch()
        self._lane_choice = LaneChoice(plan, num_micro_batches, num_layers)
        self._is_ending = False
        self._all_ended = asyncio.Event()
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
            for route in (*self._cluster.routes, *self._clients.routes):
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
        cluster = self._cluster
        is_client = route in self._clients
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
                    self._takeover.begins(worker_id, message.num_requests, now)
            case RequestAccount():
                if worker_id := cluster.attention_at(route):
                    self._takeover.account(worker_id, message, now, is_known=self._router.knows(message.request_id))
            case Linked():
                self._carry_out(cluster.linked(route, message))
            case Placed():
                self._carry_out(cluster.placed(route, message))
            case PeerLost():
                self._carry_out(cluster.peer_lost(route, message))
            case RequestsFailed() if cluster.knows(route, message.worker_id, message.incarnation):
                self._tell(self._router.fail(message.request_ids, message.failure, message.worker_id))
                self._takeover.failed(message.worker_id, message.request_ids)
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
            case RequestsFailed() | WorkerFailed() | Calibrated() | CalibrationCutShort():
                log.debug("dropped %s: not from the member that it names", type(message).__name__)
            case ClientHello() if not cluster.has_route(route):
                answer, gone = self._clients.hello(route, message, now)
                self._forget_clients(gone)
                self._carry_out([answer])
            case ClientPulse():
                self._clients.pulse(message, now)
                return
            case Submit() | Resubmit() | Cancel() | ClientHeartbeat() | StatsRequest() | Superseded() | Order() if (
                not is_client
            ):
                self._server.send(
                    route, HelloAgain("the coordinator does not know this client; say hello first", cluster.term)
                )
            case Submit():
                self._submit(route, message, now)
            case Resubmit():
                self._clients.submits(route)
                if not self._router.has(route, message.request.request_id):
                    self._takeover.claim(route, self._traced(route, message.request))
            case Cancel():
                self._takeover.unclaim(route, message.request_id)
                if self._spans is not None:
                    self._spans.end((route, message.request_id), "cancelled")
                if (given := self._router.cancel(route, message.request_id)) is not None:
                    self._cancel(*given)
            case ClientHeartbeat():
                self._client_beats(route, message, now)
            case Superseded():
                if self._is_private and message.term > cluster.term:
                    self.give_way(message)
            case Order():
                self._tasks.create_task(self._obey(route, message), name="order")
            case StatsRequest():
                if message.is_watching:
                    cluster.watch(now)
                drift = {} if self._drift is None else {**self._drift.ratios, "alarms": self._drift.num_alarms}
                dropped = {kind: float(count) for kind, count in self._server.dropped.items()}
                counters = self._router.counters
                counters |= self._balance.counters() | ({} if self._watch is None else self._watch.counters())
                stats = Stats(
                    cluster.num_lanes, len(self._router), cluster.stats(is_watching=message.is_watching), drift,
                    counters=counters, dropped=dropped, num_waiting=self._router.num_unrouted,
                )  # fmt: skip
                self._server.send(route, stats)
            case ClientHello():
                self._server.send(route, Refused("this connection is a worker's, and can be no client's"))
            case _:
                log.warning("dropped %s: not for a coordinator", type(message).__name__)
        if cluster.superseded_by:
            self.give_way(Superseded(cluster.superseded_by, ""))
        self._advance(now)

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
            self._tell(self._router.progress(message.worker_id, message.progress, now))
            self._takeover.progress(message.worker_id, message.progress)
            self._let_experts_end()
        elif instructions:
            self._carry_out(instructions)

    def _let_experts_end(self) -> None:
        if not len(self._router):
            self._carry_out(self._cluster.no_requests_left())

    def _heartbeat(self, route: bytes, message: Heartbeat, now: float) -> None:
        self._carry_out(self._cluster.heartbeat(route, message, now))
        if (member := self._cluster.member(route, message.worker_id, message.incarnation)) is not None:
            self._balance.hear(member)
            belief = message.belief
            found = self._router.reconcile(message.worker_id, belief.request_ids, belief.acked, now)
            for request_id in found.unknown_here:
                if not self._takeover.holds(message.worker_id, request_id):
                    self._server.send(route, Cancel(request_id))
            self._tell(found.updates)

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

    # -- clients' messages -------------------------------------------------------------------------------------------

    def _forget_clients(self, routes: Iterable[bytes]) -> None:
        """They are gone: nobody waits for their requests."""
        for route in routes:
            if self._spans is not None:
                self._spans.end_where(lambda key, route=route: key[0] == route, "its client is gone")  # type: ignore
            self._takeover.client_lost(route)
            for worker_id, request_id in self._router.client_lost(route):
                self._cancel(worker_id, request_id)

    def _client_beats(self, route: bytes, heartbeat: ClientHeartbeat, now: float) -> None:
        if not self._clients.beats(route, heartbeat.num_submits, now):
            self._forget_clients([route])
            self._server.send(route, HelloAgain("requests were lost on the way to the coordinator", self.term))
            return
        self._say_status(now)
        self._carry_out([self._clients.acknowledged(route, self._cluster.term)])

    def _submit(self, route: bytes, message: Submit, now: float) -> None:
        request = self._traced(route, message.request)
        self._clients.submits(route)
        if (given := self._takeover.displaced(request.request_id)) is not None:
            self._cancel(*given)
        if request.params.seed is None:
            failure = Failure.of(InvalidRequest("give every request a seed"))
            refusal: Progress | None = Progress(request.request_id, failure=failure)
        elif self._is_ending:
            failure = Failure.of(Unavailable("the server is ending; it takes no new requests"))
            refusal = Progress(request.request_id, failure=failure)
        else:
            refusal = self._router.add(request, route, now)
        if refusal is not None:
            self._tell({route: [refusal]})

    def _traced(self, route: bytes, request: Request) -> Request:
        if self._spans is None or not request.trace:
            return request
        key = (route, request.request_id)
        return replace(request, trace=self._spans.begin(key, "coordinator", request.trace))

    def _settle(self, now: float) -> None:
        """Requests of the coordinator before go on where they are, or are computed again."""
        settled = self._takeover.settle(now, is_complete=not self._cluster.awaits_accounts(now))
        for given in settled.cancelled:
            self._cancel(*given)
        for one in settled.taken:
            self._router.adopt(one.request, one.request_id, one.worker_id, one.client, now)
            self._tell(self._router.progress(one.worker_id, one.behind, now))
        for client, request in settled.resumed:
            self._router.resume(request, client, now)

    # -- the end -----------------------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests; returns once those that are here have ended, after `timeout_s` with an error.

        Cancelling it leaves those that run alone.
        """
        self._is_ending = True
        self._advance(self._clock())
        try:
            async with asyncio.timeout(timeout_s):
                await self._all_ended.wait()
        except TimeoutError:
            error = Unavailable(
                f"the server was shut down before this request was done; it had {timeout_s:g} s from then"
                if timeout_s
                else "the server was shut down before this request was done"
            )
            updates, given = self._router.fail_all(Failure.of(error))
            for worker_id, request_id in given:
                self._cancel(worker_id, request_id)
            self._tell(updates)

    # -- acting ------------------------------------------------------------------------------------------------------

    def _carry_out(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._server.send(instruction.route, instruction.message)
                case Lost():
                    log.warning("attention worker %s was lost: %s", instruction.worker_id, instruction.reason)
                    self._takeover.worker_lost(instruction.worker_id)
                    self._tell(
                        self._router.worker_lost(
                            instruction.worker_id, instruction.reason, self._clock(), instruction.has_crashed
                        )
                    )

    def _tell(self, updates: Updates) -> None:
        if self._spans is not None:
            self._end_spans(self._spans, updates)
        self._carry_out(self._clients.outputs(updates))

    @staticmethod
    def _end_spans(spans: OpenSpans, updates: Updates) -> None:
        for route, items in updates.items():
            for one in items:
                if one.is_last:
                    spans.end((route, one.request_id), "" if one.failure is None else str(one.failure.error()))

    def _cancel(self, worker_id: str, request_id: str) -> None:
        member = next((m for m in self._cluster.live("attention") if m.worker_id == worker_id), None)
        if member is not None:
            self._server.send(member.route, Cancel(request_id))

    def _advance(self, now: float) -> None:
        """What follows from the state as it is now: requests routed, lanes chosen, clients told."""
        cluster = self._cluster
        if self._takeover:
            self._settle(now)
        serving = cluster.serving
        capacities = {worker_id: (member.num_blocks - 1) * BLOCK_TOKENS for worker_id, member in serving.items()}
        acks = {worker_id: member.num_acks for worker_id, member in serving.items()}
        for worker_id, request in self._router.route(capacities, acks, now):
            self._server.send(serving[worker_id].route, Submit(request))
        self._tell(self._router.take_ended())
        self._carry_out(self._lane_choice.next(cluster, now))
        self._changes.look()
        self.operator.look()
        if self._is_ending and not len(self._router):
            self._all_ended.set()
        if not self._clients.are_told(self._is_ready):
            self._say_status(now)

    @property
    def _is_ready(self) -> bool:
        return bool(self._cluster.serving) and not self._is_ending

    def _say_status(self, now: float) -> None:
        """To the clients that do not know it."""
        status = InstanceStatus(self._is_ready, self._sentence(now), self._cluster.failure)
        self._carry_out(self._clients.statuses(status))

    def _sentence(self, now: float) -> str:
        if self._is_ending:
            return f"ending, {len(self._router)} requests run"
        return self._cluster.sentence(now) + self._lane_choice.remark

    async def _tick(self) -> None:
        while True:
            late_s = await sleep_late(TICK_S, self._clock)
            has_read_all = await read_first(self._server, self._clock)
            if not has_read_all:
                late_s += TICK_S  # whoever seems silent may have spoken
            now = self._clock()
            self._carry_out(self._cluster.tick(now, late_s))
            self._tell(self._router.expire(now, self._cluster.sentence(now)))
            for given in self._router.take_to_cancel():
                self._cancel(*given)
            self._forget_clients(self._clients.tick(now, late_s))
            self._say_status(now)
            self._let_experts_end()
            self._advance(now)
            if self._drift is not None:
                self._look_for_drift(self._drift)
            if (question := self._balance.next(now)) is not None:
                self._tasks.create_task(self._balance.look(question), name="rebalance")
            experts = [one for one in self._cluster.live("expert") if self._cluster.is_of_use(one)]
            serving = list(self._cluster.serving.values())
            if (resized := self._sizes.look(serving, experts, self._cluster.num_lanes, now)) is not None:
                self._look_at_lanes(*resized)

    def _look_at_lanes(self, sentence: str, stages: Stages) -> None:
        """Another number of workers serves."""
        log.info("%s", sentence)
        running = self._cluster.num_lanes
        chosen, why = self._lane_choice.again(running, stages)
        log.info("%s", why)
        if chosen != running:
            self._carry_out(self._cluster.use_lanes(chosen))

    def _look_for_drift(self, watch: DriftWatch) -> None:
        live = [worker for worker in self._cluster.stats() if worker.state == "ready"]
        found = watch.look(observed(worker) for worker in live)
        for drift in found:
            log.warning("drift: %s", drift)
        if found:
            self._tasks.create_task(_say_choice(watch), name="choice")


async def _say_choice(watch: DriftWatch) -> None:
    log.warning("drift: %s", await asyncio.to_thread(watch.choice_now))  # a search may take a second


def observed(worker: WorkerStats) -> Observation:
    """What a worker's last heartbeat says of its stages."""
    from msi.planner.drift import Observation

    status = worker.status
    attention, experts = status.attention or AttentionCounters(), status.experts or ExpertCounters()
    is_attention = worker.role == "attention"
    return Observation(
        worker_id=worker.worker_id,
        role=worker.role,
        compute_s=attention.attention_s + attention.shared_experts_s if is_attention else experts.expert_batches_s,
        comm_s=status.times.comm_s,
        batches=experts.batches,
        passes=attention.passes,
        batch_tokens=attention.batch_tokens,
        batch_contexts=attention.batch_contexts,
    )
