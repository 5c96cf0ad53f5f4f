"""A worker process: introduces itself to the coordinator, loads what it is assigned, hosts a role until told to end.

One life is one incarnation. When the coordinator no longer knows the worker (it was silent too long, or the
coordinator is new), the life ends and the worker says hello again; weights and device stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from msi.attention.role import AttentionRole
from msi.control.messages import (
    PROTOCOL_VERSION,
    Account,
    AccountWanted,
    Adopted,
    Assignment,
    Calibrate,
    Calibrated,
    CalibrationCutShort,
    Cancel,
    Drain,
    Draining,
    Fence,
    Goodbye,
    HeartbeatAck,
    HelloAgain,
    Placed,
    Refused,
    Shutdown,
    Submit,
    Topology,
    Undecided,
    UseLanes,
    UsePlacement,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
)
from msi.control.move_messages import Release
from msi.errors import ConfigError, EngineError, Unavailable, one_line
from msi.experts.role import ExpertRole
from msi.net.alarm import Alarm
from msi.net.control import MessageClient
from msi.net.transport import Transport
from msi.placement import Placement
from msi.placement_change import check_layers, num_to_load
from msi.request_spans import OpenSpans, open_spans
from msi.settings import Timeouts
from msi.tracing import Tracer
from msi.watchdog import LoopWatch
from msi.worker.heartbeats import Heartbeats
from msi.worker.host import Host
from msi.worker.life import Life, LifeEnds, WorkerEnds, what_ended
from msi.worker.watching import Watching

log = logging.getLogger(__name__)

HELLO_EVERY_S = 5.0  # until the coordinator has told us our role


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told at its start; the rest comes with its assignment.

    Attributes:
        coordinator: its address, as it stands in sentences.
        role: "attention", "expert" or "worker" (whichever is needed).
        timeouts: until an assignment says others; how long the coordinator may be gone is said here alone.
        otlp_traces_endpoint: where spans of requests go; "" for none.
    """

    coordinator: str
    role: str = "worker"
    worker_id: str = ""
    trace_dir: Path | None = None
    timeouts: Timeouts = Timeouts()
    otlp_traces_endpoint: str = ""


class Worker:
    """One worker of an instance.

    Args:
        host: what it runs on; closed when `run` ends.
        control: the way to the coordinator; closed then, too.
        watch: of the loop that this runs on; what it measures goes with the heartbeats.
    """

    def __init__(
        self, settings: WorkerSettings, host: Host, control: MessageClient, watch: LoopWatch | None = None
    ) -> None:
        self.worker_id = settings.worker_id
        self.life: Life | None = None
        self._process = secrets.token_hex(8)
        self._settings = settings
        self._host = host
        self._control = control
        self._clock = host.clock
        self._has_loaded = False
        self._watching = Watching(host)
        self._heartbeats = Heartbeats(
            self._process, settings.coordinator, settings.timeouts, host, control, self._watching, watch
        )
        self._spans: OpenSpans | None = None
        self._drain_wanted = Alarm()
        self.has_been_ready = asyncio.Event()

    async def run(self) -> None:
        """Until the coordinator says shutdown, or drained.

        Raises:
            ConfigError: refused, or the weights cannot be loaded.
            Unavailable: the coordinator cannot be reached, or was gone for too long.
        """
        try:
            await self._host.prepare()
            while True:
                assignment = await self._introduce()
                try:
                    await self._live(assignment)
                except LifeEnds as ending:
                    log.warning("%s: %s; introducing myself again", self.worker_id, str(ending))
        except WorkerEnds:
            pass
        except EngineError as error:
            if self.life is not None:  # nobody has heard of us otherwise
                self._control.send(WorkerFailed(self.worker_id, self.life.assignment.incarnation, str(error)))
            raise
        finally:
            await self._host.close()
            self._watching.flush()
            self._control.close()
            if self._spans is not None:
                await self._spans.close()

    @property
    def loaded(self) -> tuple[int, int]:
        """Bytes of weights read, and how many there are to read (0 until the role is known)."""
        return self._host.loaded

    def drain(self) -> None:
        """Asks to be drained: what runs is finished, then `run` returns."""
        self._drain_wanted.ring()

    # -- hello -------------------------------------------------------------------------------------------------------

    async def _introduce(self) -> Assignment:
        settings = self._settings
        answer = await self._answer(self._hello())
        if isinstance(answer, Refused):
            raise ConfigError(answer.reason)
        answer.place.check_is_built()
        self.worker_id = answer.worker_id
        if settings.trace_dir is not None and self._watching.tracer is None:
            self._watching.trace(Tracer(answer.worker_id, settings.trace_dir))
        if self._spans is None and answer.has_attention:
            self._spans = open_spans(settings.otlp_traces_endpoint, answer.worker_id)
        return answer

    def _hello(self) -> WorkerHello:
        fingerprint, precision = self._host.introduce()
        return WorkerHello(
            PROTOCOL_VERSION, self.worker_id, self._settings.role, os.getpid(), socket.gethostname(),
            fingerprint, precision, self._process, self._host.products,
        )  # fmt: skip

    async def _answer(self, hello: WorkerHello) -> Assignment | Refused:
        """Says hello until the coordinator has decided. Raises Unavailable when it is silent for too long."""
        settings, loop = self._settings, asyncio.get_running_loop()
        patience_s = (
            settings.timeouts.start_timeout_s
            if not self._has_loaded
            else max(1.0, settings.timeouts.coordinator_grace_s)
        )
        was_told = False
        try:
            async with asyncio.timeout(patience_s) as patience:
                while True:
                    self._control.send(hello)
                    is_there = False
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(HELLO_EVERY_S):
                            while not isinstance(answer := await self._control.receive(), Assignment | Refused):
                                if isinstance(answer, Shutdown):
                                    raise WorkerEnds
                                if not isinstance(answer, Undecided):
                                    continue
                                if self._drain_wanted.is_ringing:
                                    raise WorkerEnds
                                if not was_told:
                                    log.info("%s", answer.reason)
                                was_told = is_there = True
                                patience.reschedule(loop.time() + patience_s)
                        return answer
                    if not is_there:
                        log.warning("the coordinator at %s does not answer yet", settings.coordinator)
        except TimeoutError:
            raise Unavailable(
                f"no coordinator answered at {settings.coordinator} for {patience_s:g} s; is it running there?"
            ) from None

    # -- one life ----------------------------------------------------------------------------------------------------

    async def _live(self, assignment: Assignment) -> None:
        life = self.life = Life(assignment, last_heard=self._clock(), term=assignment.term)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._heartbeats.run(life), name="heartbeats")
                tasks.create_task(self._host_role(life, tasks), name="role")
        except* (LifeEnds, WorkerEnds, EngineError) as group:
            raise what_ended(group) from None
        finally:
            await life.close()

    async def _host_role(self, life: Life, tasks: asyncio.TaskGroup) -> None:
        """Loads and starts the role, then follows the coordinator's messages."""
        assignment, clock = life.assignment, self._clock
        receiving = tasks.create_task(self._follow(life, tasks), name="control")
        started = clock()
        if self._has_loaded:
            self._host.free_former()
        model = await self._host.load(assignment)
        self._has_loaded = True
        address, num_blocks = "", 0
        if model.has_experts:
            life.experts = ExpertRole(assignment, model, self._new_transport(life), clock=clock)
            if self._host.loaded[0] and not assignment.has_attention:
                num_loaded = num_to_load(assignment.experts, (), model.shape.num_sparse_layers)
                life.experts.has_loaded(num_loaded, clock() - started)
            address = await life.experts.listen()
        if model.has_attention:
            num_blocks = model.num_kv_blocks()
            life.attention = AttentionRole(
                assignment, model, self._new_transport(life), num_blocks, self._control.send, clock=clock,
                tracer=self._watching.spans, spans=self._spans,
            )  # fmt: skip
            tasks.create_task(life.attention.run(), name="attention role")
            address = address or await life.attention.exchange_blocks(
                partial(self._host.new_block_transport, assignment)
            )
        life.ready = WorkerReady(assignment.worker_id, assignment.incarnation, address, num_blocks)
        self._control.send(life.ready)
        self.has_been_ready.set()
        tasks.create_task(self._drain_when_asked(life), name="drain")
        await receiving

    def _new_transport(self, life: Life) -> Transport:
        transport = self._host.new_transport(life.assignment)
        life.transports.append(transport)
        return transport

    # -- the coordinator's messages ----------------------------------------------------------------------------------

    async def _follow(self, life: Life, tasks: asyncio.TaskGroup) -> None:
        assignment = life.assignment
        while True:
            message = await self._control.receive()
            life.last_heard = self._clock()
            attention, experts = life.attention, life.experts
            match message:
                case Submit() if attention is not None:
                    attention.requests.submit(message.request)
                case Cancel() if attention is not None:
                    attention.requests.cancel(message.request_id)
                case Release() if attention is not None:
                    tasks.create_task(attention.release(message), name="release")
                case Topology() if attention is not None:
                    attention.links.use_topology(message)
                case UsePlacement():
                    tasks.create_task(self._use_placement(life, message), name="placement")
                case UseLanes() if attention is not None:
                    await _ended(life.calibrating)
                    attention.use_lanes(message.num_lanes)
                case Calibrate() if attention is not None:
                    life.calibrating = tasks.create_task(
                        self._calibrate(attention, assignment, message, after=life.calibrating), name="calibration"
                    )
                case Fence() if experts is not None:
                    experts.fence(message.worker_id)
                case Drain():
                    life.is_draining = True
                    self._drain_wanted.ring()
                case HelloAgain() | Adopted() if message.term < life.term:
                    log.warning("%s: a coordinator that was superseded is not obeyed", self.worker_id)
                case HelloAgain():
                    raise LifeEnds(message.reason)
                case AccountWanted():
                    self._give_account(life)
                case Adopted():
                    life.term = message.term
                case Shutdown() | Refused():
                    log.info("%s: ending: %s", self.worker_id, message.reason)
                    raise WorkerEnds
                case HeartbeatAck():
                    life.acked, life.standing = message.number, message.standing
                    if attention is not None:
                        attention.requests.journal.heard(life.last_heard)
                    self._watching.follow(message.is_watched, attention)
                case Assignment() | Fence() | Undecided():
                    pass
                case _:
                    log.warning("%s: %s came at the wrong time", self.worker_id, type(message).__name__)

    def _give_account(self, life: Life) -> None:
        """To a coordinator that is new. Raises LifeEnds: there is nothing to go on with."""
        attention = life.attention
        if life.ready is None or (attention is not None and not attention.num_lanes):
            raise LifeEnds("the coordinator is new")
        hosted = attention or life.experts
        requests = [] if attention is None else attention.requests.accounts()
        assert hosted is not None, "it is ready"
        self._control.send(
            Account(
                self._hello(), life.assignment, life.term, life.ready, hosted.placement,
                is_linked=attention is not None and attention.links.is_complete,
                is_draining=life.is_draining,
                num_lanes=0 if attention is None else attention.num_lanes,
                num_passes=0 if attention is None else attention.requests.num_reports,
                num_requests=len(requests),
                acked=life.acked,
                standing=life.standing,
            )
        )  # fmt: skip
        for one in requests:
            self._control.send(one)

    async def _use_placement(self, life: Life, message: UsePlacement) -> None:
        """Loads what is new, and drops what is not wanted any more, beside the work; says so, or why it cannot."""
        placement, former = message.placement, message.former
        experts, ours = life.experts, life.assignment
        wanted, failure = (placement, former), ""
        if life.placing.locked() and life.wanted == wanted:
            return  # told again, since what it loads takes a while
        life.wanted = wanted
        async with life.placing:
            try:
                if life.attention is not None:
                    life.attention.use_placement(placement)
                if experts is not None and _follows(wanted, experts.placed):
                    for one in wanted:
                        check_layers(one, experts.num_layers)
                    had = replace(ours, placement=experts.placed[0], former=experts.placed[1])
                    assignment = replace(ours, placement=placement, former=former)
                    started = self._clock()
                    model = await self._host.load(assignment) if assignment.experts else None
                    num_layers = 0 if model is None else model.shape.num_sparse_layers
                    if num_new := num_to_load(assignment.experts, had.experts, num_layers):
                        experts.has_loaded(num_new, self._clock() - started)
                    experts.use_placement(placement, former, model)
            except (EngineError, MemoryError, RuntimeError) as error:
                failure = str(error) if isinstance(error, EngineError) else one_line(error)
                log.error("%s: placement %d cannot be used: %s", self.worker_id, placement.version, failure)
        if experts is not None and not ours.is_colocated:
            has_former = experts.placed[1] is not None
            self._control.send(Placed(ours.worker_id, ours.incarnation, placement.version, has_former, failure))

    async def _calibrate(
        self,
        attention: AttentionRole,
        assignment: Assignment,
        order: Calibrate,
        after: asyncio.Task[None] | None,
    ) -> None:
        await _ended(after)
        ids = (assignment.worker_id, assignment.incarnation, order.order)
        try:
            times = await attention.measuring.calibrate(order.num_lanes, order.num_seqs, order.num_passes)
        except EngineError as error:
            self._control.send(CalibrationCutShort(*ids, str(error)))
            return
        self._control.send(Calibrated(*ids, times))

    async def _drain_when_asked(self, life: Life) -> None:
        """Once asked to end: nothing new comes, what runs is finished, then goodbye."""
        await self._drain_wanted.wait()
        ids = (life.assignment.worker_id, life.assignment.incarnation)
        while not life.is_draining:
            self._control.send(Draining(*ids))
            await self._drain_wanted.wait(life.assignment.timeouts.heartbeat_s)
        if life.attention is not None:
            await life.attention.requests.wait_idle()
        self._control.send(Goodbye(*ids))
        raise WorkerEnds


def _follows(wanted: tuple[Placement, Placement | None], placed: tuple[Placement, Placement | None]) -> bool:
    """Whether it is newer: the same placement is, once there is none before it any more."""
    return (wanted[0].version, wanted[1] is None) > (placed[0].version, placed[1] is None)


async def _ended(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        await asyncio.wait([task])
