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
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from msi.attention_role import AttentionRole
from msi.device.choice import open_device
from msi.device.cpu import CpuDevice
from msi.device.cuda import CudaDevice
from msi.errors import ConfigError, EngineError, TransportError, Unavailable
from msi.expert_role import ExpertRole
from msi.loading import DTYPES, LoadedPart, ModelFiles, resident_memory_bytes
from msi.messages import (
    MESSAGES,
    PROTOCOL_VERSION,
    Assignment,
    Calibrate,
    Calibrated,
    Cancel,
    Drain,
    Draining,
    Fence,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    HelloAgain,
    Refused,
    Shutdown,
    Submit,
    Topology,
    Undecided,
    UseLanes,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
    WorkerStatus,
)
from msi.net import shm
from msi.net.alarm import Alarm
from msi.net.auto import AutoTransport
from msi.net.codec import Codec
from msi.net.control import ControlClient
from msi.net.inproc import InprocTransport
from msi.net.shm import ShmTransport
from msi.net.tcp import TcpTransport, address_towards, split_address
from msi.net.transport import Transport
from msi.tracing import Tracer
from msi.types import StageTimes

log = logging.getLogger(__name__)

HELLO_EVERY_S = 5.0  # until the coordinator has told us our role


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is told on its command line; the rest comes with its assignment.

    Attributes:
        role: "attention", "expert" or "worker" (whichever is needed).
        device: "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's, or what the device computes fastest) or a dtype's name.
        num_threads: torch's threads for one operator; 0 leaves it to torch.
        transport: "inproc", "shm", "tcp", or "auto": shared memory within a host, TCP across.
        advertise_host: this host's address for peers on others; "" for the one on the way to the coordinator.
        memory_utilization: share of free memory that the host's attention workers may use for KV cache.
        reconnect_s: how long the coordinator may be gone before the worker gives up.
    """

    coordinator: str
    model_dir: Path
    role: str = "worker"
    worker_id: str = ""
    device: str = "cpu"
    dtype: str = "auto"
    load_format: str = "auto"
    transport: str = "shm"
    advertise_host: str = ""
    num_threads: int = 0
    memory_utilization: float = 0.9
    trace_dir: Path | None = None
    start_timeout_s: float = 120.0
    reconnect_s: float = 60.0


class _LifeEnds(Exception):
    """The worker is to introduce itself again; `reason` says why."""


class _WorkerEnds(Exception):
    """The worker is to end."""


@dataclass
class Life:
    """What one incarnation hosts."""

    assignment: Assignment
    attention: AttentionRole | None = None
    experts: ExpertRole | None = None
    transports: list[Transport] = field(default_factory=list)
    is_draining: bool = False


class Worker:
    """One worker of an instance.

    Raises:
        ConfigError: the model directory or the settings cannot work.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.worker_id = settings.worker_id
        self.life: Life | None = None
        self._process = secrets.token_hex(8)
        self._settings = settings
        self._files = ModelFiles(settings.model_dir, settings.load_format)
        self._loaded: LoadedPart | None = None
        self._device: CpuDevice | CudaDevice | None = None
        self._tracer: Tracer | None = None
        self._control = ControlClient(settings.coordinator, Codec(*MESSAGES))
        self._last_heard = time.monotonic()
        self._drain_wanted = Alarm()
        self._beat_at = time.monotonic()
        self._busy_at_beat = 0.0
        self._idle_s = 0.0

    async def run(self) -> None:
        """Until the coordinator says shutdown, or drained.

        Raises:
            ConfigError: refused, or the weights cannot be loaded.
            Unavailable: the coordinator cannot be reached, or was gone for too long.
        """
        try:
            while True:
                assignment = await self._introduce()
                try:
                    await self._live(assignment)
                except _LifeEnds as ending:
                    log.warning("%s: %s; introducing myself again", self.worker_id, ending)
        except _WorkerEnds:
            pass
        except EngineError as error:
            self._control.send(WorkerFailed(self.worker_id, str(error)))
            raise
        finally:
            if self._device is not None:
                await self._device.close()
            if self._tracer is not None:
                self._tracer.flush()
            self._control.close()

    @property
    def loaded(self) -> tuple[int, int]:
        """Bytes of weights read, and how many there are to read (0 until the role is known)."""
        return self._files.loaded_bytes, self._files.total_bytes

    def drain(self) -> None:
        """Asks to be drained: what runs is finished, then `run` returns."""
        self._drain_wanted.ring()

    # -- hello -------------------------------------------------------------------------------------------------------

    async def _introduce(self) -> Assignment:
        settings = self._settings
        device = self._device or open_device(settings.device, settings.num_threads)
        self._device = device
        wanted = self._files.config.dtype if settings.dtype == "auto" else settings.dtype
        if wanted not in DTYPES:
            raise ConfigError(f"dtype {wanted!r} is not supported; supported: auto, {', '.join(DTYPES)}")
        dtype = wanted if settings.dtype != "auto" else _name(device.compute_dtype(DTYPES[wanted]))
        hello = WorkerHello(
            PROTOCOL_VERSION, self.worker_id, settings.role, os.getpid(), socket.gethostname(),
            self._files.fingerprint(), dtype, self._process,
        )  # fmt: skip
        answer = await self._answer(hello)
        if isinstance(answer, Refused):
            raise ConfigError(answer.reason)
        self.worker_id = answer.worker_id
        self._last_heard = time.monotonic()
        if settings.trace_dir is not None and self._tracer is None:
            self._tracer = Tracer(answer.worker_id, settings.trace_dir)
            device.tracer = self._tracer
        return answer

    async def _answer(self, hello: WorkerHello) -> Assignment | Refused:
        """Says hello until the coordinator has decided. Raises Unavailable when it is silent for too long."""
        settings, loop = self._settings, asyncio.get_running_loop()
        patience_s = settings.start_timeout_s if self._loaded is None else settings.reconnect_s
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
                                    raise _WorkerEnds
                                if not isinstance(answer, Undecided):
                                    continue
                                if self._drain_wanted.is_ringing:
                                    raise _WorkerEnds
                                if not was_told:
                                    log.info("waiting for other workers: the role that they leave is this one's")
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
        life = self.life = Life(assignment)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._heartbeats(life), name="heartbeats")
                tasks.create_task(self._host(life, tasks), name="role")
        except* (_LifeEnds, _WorkerEnds, EngineError) as group:
            raise _first(group) from None
        finally:
            if life.experts is not None:
                life.experts.close()
            for transport in life.transports:
                await transport.close()

    async def _host(self, life: Life, tasks: asyncio.TaskGroup) -> None:
        """Loads and starts the role, then follows the coordinator's messages."""
        assignment, device, config = life.assignment, self._device, self._files.config
        dtype = DTYPES[assignment.dtype]
        assert device is not None
        receiving = tasks.create_task(self._follow(life), name="control")
        if self._loaded is None or not self._loaded.fits(assignment):
            self._loaded = None
            self._loaded = await asyncio.to_thread(self._files.load, assignment, device)
        loaded = self._loaded
        address, num_blocks = "", 0
        if loaded.experts is not None:
            life.experts = ExpertRole(assignment, config, loaded.experts, device, dtype, self._new_transport(life))
            address = await life.experts.listen()
        if loaded.attention is not None:
            num_blocks = self._files.num_kv_blocks(assignment, device, self._settings.memory_utilization)
            transport = self._new_transport(life)
            life.attention = AttentionRole(
                assignment, config, loaded.attention, device, dtype, transport, num_blocks, self._control.send
            )
            tasks.create_task(life.attention.run(), name="attention role")
        self._control.send(WorkerReady(assignment.worker_id, assignment.incarnation, address, num_blocks))
        tasks.create_task(self._drain_when_asked(life), name="drain")
        await receiving

    def _new_transport(self, life: Life) -> Transport:
        name = "inproc" if life.assignment.is_colocated else self._settings.transport
        transport: Transport
        if name == "inproc":
            transport = InprocTransport()
        elif name == "shm":
            transport = ShmTransport()
        elif name == "auto" and shm.is_available() is None:
            transport = AutoTransport(self._advertised_host())
        else:
            transport = TcpTransport(self._advertised_host())
        life.transports.append(transport)
        return transport

    def _advertised_host(self) -> str:
        settings = self._settings
        return settings.advertise_host or address_towards(*split_address(settings.coordinator))

    # -- the coordinator's messages ----------------------------------------------------------------------------------

    async def _follow(self, life: Life) -> None:
        assignment = life.assignment
        while True:
            message = await self._control.receive()
            self._last_heard = time.monotonic()
            attention, experts = life.attention, life.experts
            match message:
                case Submit() if attention is not None:
                    attention.submit(message.request)
                case Cancel() if attention is not None:
                    attention.cancel(message.request_id)
                case Topology() if attention is not None:
                    attention.use_topology(message)
                case UseLanes() if attention is not None:
                    attention.use_lanes(message.num_lanes)
                case Calibrate() if attention is not None:
                    await self._calibrate(attention, assignment, message)
                case Fence() if experts is not None:
                    experts.fence(message.worker_id)
                case Drain():
                    life.is_draining = True
                    self._drain_wanted.ring()
                case HelloAgain():
                    raise _LifeEnds(message.reason)
                case Shutdown() | Refused():
                    log.info("%s ends: %s", self.worker_id, message.reason)
                    raise _WorkerEnds
                case HeartbeatAck() | Assignment() | Fence():
                    pass
                case _:
                    log.warning("%s: %s came at the wrong time", self.worker_id, type(message).__name__)

    async def _calibrate(self, attention: AttentionRole, assignment: Assignment, order: Calibrate) -> None:
        try:
            times = await attention.calibrate(order.num_lanes, order.num_seqs, order.num_passes)
        except TransportError as error:
            log.warning("calibration was cut short: %s", error)
            return
        ids = (assignment.worker_id, assignment.incarnation)
        self._control.send(Calibrated(*ids, order.num_lanes, order.num_seqs, times))

    async def _drain_when_asked(self, life: Life) -> None:
        """Once asked to end: nothing new comes, what runs is finished, then goodbye."""
        await self._drain_wanted.wait()
        ids = (life.assignment.worker_id, life.assignment.incarnation)
        if not life.is_draining:
            self._control.send(Draining(*ids))
            await self._drain_wanted.wait()
        if life.attention is not None:
            await life.attention.wait_idle()
        self._control.send(Goodbye(*ids))
        raise _WorkerEnds

    # -- heartbeats --------------------------------------------------------------------------------------------------

    async def _heartbeats(self, life: Life) -> None:
        assignment = life.assignment
        while True:
            self._control.send(Heartbeat(assignment.worker_id, assignment.incarnation, self._status(life)))
            if self._tracer is not None:
                self._tracer.flush()
            await asyncio.sleep(assignment.heartbeat_s)
            silent_s = time.monotonic() - self._last_heard
            if silent_s > self._settings.reconnect_s:
                raise Unavailable(
                    f"{self.worker_id}: the coordinator at {self._settings.coordinator} has been silent for "
                    f"{silent_s:.0f} s"
                )

    def _status(self, life: Life) -> WorkerStatus:
        attention, experts = life.attention, life.experts
        times = StageTimes()
        counters: dict[str, float] = {}
        if attention is not None:
            times, counters = attention.times(), attention.counters()
        if experts is not None:
            counters |= experts.counters()
            if attention is None:
                times = experts.times()
        busy = self._busy_share()
        counters["at_s"] = time.monotonic()
        counters["busy_s"] = 0.0 if self._device is None else self._device.busy_s
        counters["loop_cpu_s"] = time.thread_time()
        counters["control_messages_sent"] = self._control.num_sent
        counters["rss_bytes"] = resident_memory_bytes()
        has_work = attention is None or not attention.is_idle
        return WorkerStatus(
            loaded_bytes=self._files.loaded_bytes,
            total_bytes=self._files.total_bytes,
            num_running=0 if attention is None else attention.num_running,
            num_waiting=0 if attention is None else attention.num_waiting,
            num_free_blocks=0 if attention is None else attention.num_free_blocks,
            times=replace(times, busy=busy, bubble=1 - busy if has_work else 0.0),
            counters=counters,
        )

    def _busy_share(self) -> float:
        now, busy_s = time.monotonic(), 0.0 if self._device is None else self._device.busy_s
        elapsed, self._beat_at = now - self._beat_at, now
        computed, self._busy_at_beat = busy_s - self._busy_at_beat, busy_s
        return min(1.0, computed / elapsed) if elapsed > 0 else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """The exception that ended a life: an error before an ending, an ending before a cancellation."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            flat.append(error)
    return min(flat, key=lambda error: isinstance(error, _LifeEnds | _WorkerEnds))
