"""One instance on this machine: its plan, its coordinator and its workers, as processes or inside this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msi.coordinator import Coordinator
from msi.errors import ConfigError, EngineError, Unavailable
from msi.membership import InstancePlan
from msi.messages import COORDINATOR_END, WORKER_END, Welcome
from msi.models.config import ModelConfig, config_digest
from msi.models.families import load_config
from msi.models.files import read_json
from msi.models.required import check_weights
from msi.models.texts import read_texts
from msi.net.control import ControlClient, ControlServer, is_address
from msi.net.secret import NO_SECRET, VARIABLE, Secret, Trust
from msi.net.socket_dir import SocketDir
from msi.options import InstanceOptions
from msi.pipeline import MAX_MICRO_BATCHES
from msi.placement import place_evenly
from msi.planner.drift import DriftWatch
from msi.planner.plan_file import check_model, read_plan_file
from msi.watchdog import LoopWatch

if TYPE_CHECKING:
    from msi.worker import Worker

log = logging.getLogger(__name__)

RESTARTS_ALLOWED = 3  # of one worker, within RESTART_WINDOW_S
RESTART_WINDOW_S = 120.0
STOP_GRACE_S = 5.0
ADDRESS_TIMEOUT_S = 60.0


# -- what to run -----------------------------------------------------------------------------------------------------


def build_plan(options: InstanceOptions) -> tuple[InstancePlan, ModelConfig]:
    """Raises ConfigError: the model directory or the options cannot work, or the plan is for another model."""
    config, values = load_config(options.model_dir)
    if options.plan is not None:
        check_model(read_plan_file(options.plan), options.model_dir.name, config_digest(values), str(options.plan))
    max_model_len = options.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the {config.max_position_embeddings} positions of this model"
        )
    lanes = 1 if options.colocated and not options.micro_batches else options.micro_batches or MAX_MICRO_BATCHES
    plan = InstancePlan(
        instance=secrets.token_hex(16),
        num_attention=options.attention_workers,
        num_expert=options.expert_workers,
        is_colocated=options.colocated,
        placement=place_evenly(config.num_experts, options.expert_workers),
        num_lanes=lanes,
        slot_rows=options.slot_rows,
        max_model_len=max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.batched_tokens,
        dtype=options.dtype,
        start_timeout_s=options.start_timeout_s,
        peer_timeout_s=options.peer_timeout_s,
        max_num_waiting=options.max_num_waiting,
        has_prefix_cache=options.enable_prefix_caching,
        num_kv_blocks=options.num_gpu_blocks_override,
    )
    return plan, config


def check_files(options: InstanceOptions) -> None:
    """Looks at all that a local instance will read. Raises ConfigError: some of it cannot work."""
    _, config = build_plan(options)
    if options.load_format != "dummy":
        check_weights(options.model_dir, config)


def create_coordinator(
    options: InstanceOptions, bind: str, watch: LoopWatch | None = None, trust: Trust = NO_SECRET
) -> Coordinator:
    """Raises ConfigError: the model directory or the options cannot work, or the port is in use, or open to others."""
    if bind.startswith("tcp://"):
        trust.check_listening(bind.removeprefix("tcp://").rpartition(":")[0], "the coordinator")
        if trust.secret is None:
            log.warning("no secret: whoever connects to %s is taken for one of this instance, and can read it", bind)
    plan, config = build_plan(options)
    for remark in config.remarks:
        log.warning("%s", remark)
    model_dir = options.model_dir
    texts = read_texts(model_dir, read_json(model_dir / "config.json"), options.generation_config)
    welcome = Welcome(
        model_name=options.model_name,
        vocab_size=config.vocab_size,
        max_model_len=plan.max_model_len,
        tokenizer=texts.tokenizer,
        chat_templates=texts.chat_templates,
        special_tokens=texts.special_tokens,
        sampling_defaults=texts.sampling_defaults,
    )
    return Coordinator(
        ControlServer(bind, COORDINATOR_END, trust.secret),
        plan,
        welcome,
        num_micro_batches=options.micro_batches,
        num_layers=config.num_sparse_layers,
        drift=_drift_watch(options),
        watch=watch,
    )


def _drift_watch(options: InstanceOptions) -> DriftWatch | None:
    if options.plan is None:
        return None
    return DriftWatch(read_plan_file(options.plan), options.plan_drift)


def create_worker(
    options: InstanceOptions,
    coordinator: str,
    role: str,
    worker_id: str = "",
    trace_dir: Path | None = None,
    advertise_host: str = "",
    watch: LoopWatch | None = None,
    trust: Trust = NO_SECRET,
) -> Worker:
    """Raises ConfigError: the model directory or the settings cannot work."""
    from msi.torch_host import HostSettings, TorchHost  # torch takes a second, and only workers need it
    from msi.worker import Worker, WorkerSettings

    host = HostSettings(
        coordinator=coordinator,
        model_dir=options.model_dir,
        device=options.device,
        dtype=options.dtype,
        load_format=options.load_format,
        transport=options.transport,
        advertise_host=advertise_host,
        num_threads=options.num_threads,
        memory_utilization=options.gpu_memory_utilization,
        trust=trust,
    )
    settings = WorkerSettings(
        coordinator=coordinator,
        role=role,
        worker_id=worker_id,
        trace_dir=trace_dir,
        start_timeout_s=options.start_timeout_s,
    )
    return Worker(settings, TorchHost(host), ControlClient(coordinator, WORKER_END, trust.secret), watch)


def check_device(name: str) -> None:
    """Raises ConfigError where this machine has no such device."""
    if name != "cpu":
        from msi.device import choice

        choice.check_device(name)


def worker_ids(options: InstanceOptions) -> list[tuple[str, str]]:
    """(role, id) of every worker of a local instance."""
    num_expert = 0 if options.colocated else options.expert_workers
    return [("expert", f"expert-{index}") for index in range(num_expert)] + [
        ("attention", f"attention-{index}") for index in range(options.attention_workers)
    ]


class LocalInstance(Protocol):
    """A coordinator and its workers, started and stopped together; their sockets are for this user alone."""

    async def start(self) -> str:
        """Starts everything and returns the coordinator's address; raises EngineError if it cannot."""

    async def stop(self) -> None:
        """Ends everything; nothing is left behind. Idempotent."""


# -- in this process -------------------------------------------------------------------------------------------------


class InprocInstance:
    """Coordinator and workers as tasks of the calling event loop; each worker still has its own compute thread."""

    def __init__(
        self, options: InstanceOptions, report_failure: Callable[[EngineError], None], trace_dir: Path | None = None
    ) -> None:
        self._options = options
        self._report_failure = report_failure
        self._trace_dir = trace_dir
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: SocketDir | None = None
        self.workers: list[Worker] = []

    async def start(self) -> str:
        check_files(self._options)
        check_device(self._options.device)
        self._sockets = SocketDir()
        coordinator = create_coordinator(self._options, self._sockets.address("coordinator"))
        self._start(coordinator.run(), "coordinator")
        for role, worker_id in worker_ids(self._options):
            worker = create_worker(self._options, coordinator.address, role, worker_id, self._trace_dir)
            self.workers.append(worker)
            self._start(worker.run(), worker_id)
        return coordinator.address

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
                worker.life.attention.check_integrity()  # embedded workers are what tests use: none ends unchecked


# -- as processes ----------------------------------------------------------------------------------------------------


async def start_coordinator(
    options: InstanceOptions, bind: str, flags: tuple[str, ...], secret: Secret | None = None
) -> tuple[asyncio.subprocess.Process, str]:
    """A coordinator as a child, which ends with this process however it ends; its address.

    Args:
        secret: what workers and clients have to hold, where it listens on a network.

    Raises:
        ConfigError: it cannot work; in its own words.
        Unavailable: it does not start in time.
    """
    reader, writer = os.pipe()
    process: asyncio.subprocess.Process | None = None
    try:
        arguments = ("--role", "coordinator", "--coordinator", bind, "--announce", str(writer), *flags)
        process = await _spawn(options, arguments, pass_fds=(writer,), secret=secret)
        os.close(writer)
        writer = -1
        address = await asyncio.wait_for(asyncio.to_thread(_read_line, reader), ADDRESS_TIMEOUT_S)
        if is_address(address):
            started, process = process, None
            return started, address
        await process.wait()
        raise ConfigError(address or "the coordinator ended while it started; what it said is above")
    except TimeoutError:
        raise Unavailable(f"the coordinator did not start within {ADDRESS_TIMEOUT_S:g} s") from None
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _spawn(
    options: InstanceOptions, arguments: tuple[str, ...], pass_fds: tuple[int, ...] = (), secret: Secret | None = None
) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if secret is not None:  # never on a command line, which every user of the machine can read
        environment[VARIABLE] = secret.text
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "msi_launch", *options.flags(), *arguments, "--parent", str(os.getpid()),
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=pass_fds,
        env=environment,
    )  # fmt: skip


class ProcessInstance:
    """Coordinator and workers as child processes, which end with this one however it ends.

    A worker that dies is started again, unless it dies again and again.

    Args:
        coordinator_flags, worker_flags: for their command lines, such as where to serve HTTP.
        report_failure: called once the instance cannot go on.
    """

    def __init__(
        self,
        options: InstanceOptions,
        report_failure: Callable[[EngineError], None],
        coordinator_flags: tuple[str, ...] = ("--no-gateway", "--log-level", "warning"),
        worker_flags: tuple[str, ...] = ("--log-level", "warning"),
        trace_dir: Path | None = None,
    ) -> None:
        check_files(options)  # what cannot work is said before anything starts
        check_device(options.device)
        self._options = options
        self._report_failure = report_failure
        self._coordinator_flags = coordinator_flags
        self._worker_flags = worker_flags + (() if trace_dir is None else ("--trace-dir", str(trace_dir)))
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: SocketDir | None = None
        self._is_stopping = False

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, the coordinator's too."""
        return {name: process.pid for name, process in self._processes.items()}

    async def start(self) -> str:
        address = await self._start_coordinator()
        for role, worker_id in worker_ids(self._options):
            await self._start_worker(address, role, worker_id)
            self._watch(self._keep_alive(address, role, worker_id))
        return address

    def _watch(self, running: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(running))

    async def _start_coordinator(self) -> str:
        self._sockets = SocketDir()
        where = self._sockets.address("coordinator")
        process, address = await start_coordinator(self._options, where, self._coordinator_flags)
        self._processes["coordinator"] = process
        self._watch(self._watch_coordinator())
        return address

    async def _start_worker(self, address: str, role: str, worker_id: str) -> None:
        self._processes[worker_id] = await _spawn(
            self._options,
            (
                "--role", role, "--worker-id", worker_id, "--coordinator", address,
                "--transport", self._options.chosen_transport, *self._worker_flags,
            ),
        )  # fmt: skip

    async def _watch_coordinator(self) -> None:
        process = self._processes["coordinator"]
        status = await process.wait()
        if not self._is_stopping:
            self._report_failure(Unavailable(f"the coordinator (pid {process.pid}) {_how_it_ended(status)}"))

    async def _keep_alive(self, address: str, role: str, worker_id: str) -> None:
        """Starts a worker again when it dies, as long as that helps."""
        died_at: list[float] = []
        while True:
            process = self._processes[worker_id]
            status = await process.wait()
            if self._is_stopping or status == 0:
                return
            now = time.monotonic()
            died_at = [at for at in died_at if now - at < RESTART_WINDOW_S] + [now]
            how = f"{worker_id} (pid {process.pid}) {_how_it_ended(status)}"
            if status == EXIT_SENTENCE:
                await asyncio.sleep(SENTENCE_GRACE_S)  # the coordinator may know it too, and says it better
                self._report_failure(Unavailable(f"{worker_id} cannot work; what it said is above"))
                return
            if len(died_at) > RESTARTS_ALLOWED:
                self._report_failure(Unavailable(f"{how}, for the {len(died_at)}th time; it is not started again"))
                return
            log.warning("%s; starting it again", how)
            await asyncio.sleep(AFTER_LOSS_S)  # until the coordinator has noticed: a live id refuses a second
            await self._start_worker(address, role, worker_id)

    async def stop(self) -> None:
        self._is_stopping = True
        for process in self._processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        waits = [asyncio.ensure_future(process.wait()) for process in self._processes.values()]
        if waits:
            _, pending = await asyncio.wait(waits, timeout=STOP_GRACE_S)
            for process in self._processes.values():
                if pending and process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            await asyncio.gather(*waits)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._sockets is not None:
            self._sockets.close()


SENTENCE_GRACE_S = 2.0
EXIT_SENTENCE = 2  # a process said why it cannot work; starting it again would not help
AFTER_LOSS_S = 4.0


def _how_it_ended(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _read_line(fd: int) -> str:
    chunks = []
    while (chunk := os.read(fd, 4096)) and not chunk.endswith(b"\n"):
        chunks.append(chunk)
    return b"".join([*chunks, chunk]).decode().strip()


def new_trace_dir() -> Path:
    """Where the workers of an instance leave their parts of a trace."""
    return Path(tempfile.mkdtemp(prefix="msi-trace-"))
