"""The coordinator: the shell around `Cluster` and `Router` that talks to workers and clients.

Assigns roles, notices who comes and goes, carries requests to attention workers and tokens back to clients. Every
decision is made in `msi.membership`, `msi.routing` and `msi.pipeline`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msi.kernels import BLOCK_TOKENS
from msi.membership import Cluster, InstancePlan, Instruction, Lost, Send
from msi.messages import (
    FROM_WORKER,
    PROTOCOL_VERSION,
    Calibrate,
    Calibrated,
    Cancel,
    ClientHeartbeat,
    ClientHello,
    Draining,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    InstanceStatus,
    Linked,
    Outputs,
    PassDone,
    PeerLost,
    Refused,
    RequestsFailed,
    Shutdown,
    Stats,
    StatsRequest,
    Submit,
    Welcome,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
    WorkerStats,
)
from msi.net.control import MessageServer
from msi.pipeline import Stages, calibration_steps, choose_micro_batches
from msi.planner.drift import DriftWatch, Observation
from msi.routing import Router, Updates
from msi.watchdog import LoopWatch

log = logging.getLogger(__name__)

TICK_S = 0.25
CLIENT_LOST_AFTER_S = 10.0
CALIBRATION_BATCH = 32
CALIBRATION_PASSES = 3
CALIBRATION_TIMEOUT_S = 60.0


@dataclass
class _Client:
    last_seen: float
    status: InstanceStatus | None = None  # as last told


class Coordinator:
    """One per instance.

    Args:
        server: where workers and clients are heard; closed when `run` ends.
        num_micro_batches: m, or 0 to choose by measurement.
        num_layers: of the model.
        drift: holds what workers measure against the plan that runs, if there is one.
        watch: of the loop that this runs on; what it measures is told with the stats.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self.address = server.address
        self._clock = clock
        self._plan = plan
        self._welcome = welcome
        self._num_micro_batches = num_micro_batches
        self._num_layers = num_layers
        self._drift = drift
        self._watch = watch
        self._cluster = Cluster(plan, clock())
        self._router = Router()
        self._clients: dict[bytes, _Client] = {}
        self._calibrations: asyncio.Queue[Calibrated] = asyncio.Queue()
        self._calibrating: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serves for ever. Cancel it to stop; workers are then told to end."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._receive(), name="control")
                tasks.create_task(self._tick(), name="tick")
        finally:
            for route in self._cluster.routes:
                self._server.send(route, Shutdown("the coordinator ended"))
            self._server.close()

    # -- messages ----------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            route, message = await self._server.receive()
            self._handle(route, message, self._clock())

    def _handle(self, route: bytes, message: Any, now: float) -> None:
        cluster = self._cluster
        is_client = route in self._clients
        match message:
            case _ if is_client and isinstance(message, FROM_WORKER):
                self._server.send(route, Refused("this connection is a client's, and can be no worker's"))
                return
            case PassDone() if not cluster.knows(route, message.worker_id, message.incarnation):
                pass  # earlier ones may have been lost with its connection: its requests will be, too
            case PassDone():
                self._tell(self._router.progress(message.worker_id, message.progress))
                if not len(self._router):
                    self._carry_out(cluster.no_requests_left())
            case Heartbeat():
                self._carry_out(cluster.heartbeat(route, message, now))
            case Submit():
                self._submit(route, message, now)
            case Cancel():
                self._cancel(self._router.cancel(route, message.request_id), message.request_id)
            case ClientHeartbeat() if route in self._clients:
                self._clients[route].last_seen = now
                self._server.send(route, HeartbeatAck())
            case ClientHello() if not cluster.has_route(route):
                self._greet(route, message, now)
            case WorkerHello():
                self._carry_out(cluster.hello(route, message, now))
            case WorkerReady():
                self._carry_out(cluster.ready(route, message))
            case Linked():
                self._carry_out(cluster.linked(route, message))
            case PeerLost():
                self._carry_out(cluster.peer_lost(route, message))
            case RequestsFailed():
                self._tell(self._router.fail(message.request_ids, message.failure))
            case WorkerFailed():
                log.error("%s: %s", message.worker_id, message.reason)
                self._carry_out(cluster.worker_failed(message.worker_id, message.reason))
            case Draining():
                self._carry_out(cluster.draining(route, message.worker_id, message.incarnation))
                if not len(self._router):
                    self._carry_out(cluster.no_requests_left())
            case Goodbye():
                self._carry_out(cluster.goodbye(route, message))
            case Calibrated():
                self._calibrations.put_nowait(message)
            case StatsRequest() if route in self._clients:
                drift = {} if self._drift is None else {**self._drift.ratios, "alarms": self._drift.num_alarms}
                dropped = {kind: float(count) for kind, count in self._server.dropped.items()}
                counters = {} if self._watch is None else self._watch.counters()
                stats = Stats(
                    cluster.num_lanes, len(self._router), cluster.stats(), drift, counters=counters, dropped=dropped
                )
                self._server.send(route, stats)
            case ClientHeartbeat() | StatsRequest():
                self._server.send(route, Refused("the coordinator does not know this client; say hello first"))
            case ClientHello():
                self._server.send(route, Refused("this connection is a worker's, and can be no client's"))
        self._advance(now)

    def _greet(self, route: bytes, hello: ClientHello, now: float) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            reason = f"client speaks protocol version {hello.protocol_version}, the coordinator {PROTOCOL_VERSION}"
            self._server.send(route, Refused(reason))
            return
        self._clients[route] = _Client(now)
        self._server.send(route, self._welcome)

    def _submit(self, route: bytes, message: Submit, now: float) -> None:
        request = message.request
        if route not in self._clients or request.params.seed is None:
            self._server.send(route, Refused("say hello first, and give every request a seed"))
            return
        refusal = self._router.add(request, route, now)
        if refusal is not None:
            self._tell({route: [refusal]})

    # -- acting ------------------------------------------------------------------------------------------------------

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self._server.send(instruction.route, instruction.message)
                case Lost():
                    log.warning("attention worker %s was lost: %s", instruction.worker_id, instruction.reason)
                    self._tell(self._router.worker_lost(instruction.worker_id, instruction.reason))

    def _tell(self, updates: Updates) -> None:
        for client, items in updates.items():
            self._server.send(client, Outputs(tuple(items)))

    def _cancel(self, worker_id: str, request_id: str) -> None:
        member = next((m for m in self._cluster.live("attention") if m.worker_id == worker_id), None)
        if member is not None:
            self._server.send(member.route, Cancel(request_id))

    def _advance(self, now: float) -> None:
        """What follows from the state as it is now: requests routed, lanes chosen, clients told."""
        serving = self._cluster.serving
        capacities = {worker_id: (member.num_blocks - 1) * BLOCK_TOKENS for worker_id, member in serving.items()}
        for worker_id, request in self._router.route(capacities):
            self._server.send(serving[worker_id].route, Submit(request))
        if not self._cluster.num_lanes and self._cluster.is_linked and self._calibrating is None:
            self._calibrating = self._tasks.create_task(self._choose_lanes(), name="calibration")
        is_ready = bool(serving)
        for route, client in self._clients.items():
            if client.status is None or client.status.is_ready != is_ready:
                self._say_status(route, client, now)

    def _say_status(self, route: bytes, client: _Client, now: float) -> None:
        status = InstanceStatus(bool(self._cluster.serving), self._cluster.sentence(now), self._cluster.failure)
        if status != client.status:
            client.status = status
            self._server.send(route, status)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            self._carry_out(self._cluster.tick(now))
            self._tell(self._router.expire(now, self._cluster.sentence(now)))
            for route, client in list(self._clients.items()):
                if now - client.last_seen > CLIENT_LOST_AFTER_S:
                    del self._clients[route]
                    for worker_id, request_id in self._router.client_lost(route):
                        self._cancel(worker_id, request_id)
                else:
                    self._say_status(route, client, now)
            self._advance(now)
            if self._drift is not None:
                self._look_for_drift(self._drift)

    def _look_for_drift(self, watch: DriftWatch) -> None:
        live = [worker for worker in self._cluster.stats() if worker.state == "ready"]
        found = watch.look(observed(worker) for worker in live)
        for drift in found:
            log.warning("drift: %s", drift)
        if found:
            self._tasks.create_task(_say_choice(watch), name="choice")

    # -- the number of micro-batches ---------------------------------------------------------------------------------

    async def _choose_lanes(self) -> None:
        """Once every worker is connected: m as given, or by measurement."""
        chosen = self._num_micro_batches
        if self._plan.is_colocated and not chosen:
            log.info("1 micro-batch: both roles share one compute queue, so nothing could overlap")
            chosen = 1
        if not chosen:
            try:
                chosen, why = await self._measure()
                log.info("%s", why)
            except TimeoutError:
                chosen = 1
                log.warning("1 micro-batch: stages could not be measured within %g s", CALIBRATION_TIMEOUT_S)
        self._carry_out(self._cluster.use_lanes(chosen))
        self._advance(self._clock())

    async def _measure(self) -> tuple[int, str]:
        batch_size = min(CALIBRATION_BATCH, self._plan.max_num_seqs, self._plan.max_num_batched_tokens)
        measured: dict[int, Stages] = {}
        async with asyncio.timeout(CALIBRATION_TIMEOUT_S):
            for step in calibration_steps(batch_size):
                members = self._cluster.live("attention")
                order = Calibrate(step.num_lanes, step.num_seqs, CALIBRATION_PASSES)
                for member in members:
                    self._server.send(member.route, order)
                times = [(await self._calibrations.get()).times for _ in members]
                measured[step.num_lanes] = Stages(
                    sum(one.attention_s for one in times) / len(times),
                    sum(one.expert_s for one in times) / len(times),
                    sum(one.comm_s for one in times) / len(times),
                )
        return choose_micro_batches(measured, batch_size, self._num_layers)


async def _say_choice(watch: DriftWatch) -> None:
    log.warning("drift: %s", await asyncio.to_thread(watch.choice_now))  # a search may take a second


def observed(worker: WorkerStats) -> Observation:
    """What a worker's last heartbeat says of its stages."""
    counters = worker.status.counters
    computing = ("attention_s", "shared_experts_s") if worker.role == "attention" else ("expert_batches_s",)
    return Observation(
        worker_id=worker.worker_id,
        role=worker.role,
        compute_s=sum(counters.get(name, 0.0) for name in computing),
        comm_s=worker.status.times.comm_s,
        **{name: counters.get(name, 0.0) for name in ("batches", "passes", "batch_tokens", "batch_contexts")},
    )
