"""What an instance consists of: its plan, its coordinator and its workers, ready to run.

`msi.instance.inproc` runs all of it in the calling process, `msi.instance.processes` as child processes.
"""

from __future__ import annotations

import logging
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from msi.control.client_messages import Welcome
from msi.control.coordinator import Coordinator
from msi.control.following import way_to
from msi.control.members import InstancePlan
from msi.control.messages import COORDINATOR_END, WORKER_END
from msi.errors import ConfigError
from msi.models.config import ModelConfig, config_digest
from msi.models.families import load_config
from msi.models.files import read_json
from msi.models.required import check_weights
from msi.models.texts import read_texts
from msi.net.control import MessageClient, MessageServer
from msi.net.control_server import ControlServer
from msi.net.secret import NO_SECRET, Trust
from msi.options import InstanceOptions
from msi.placement import PlaceExperts, Placement, place_with_replicas
from msi.placement_change import padded
from msi.planner.expert_counts import check_counts, read_counts
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.request_spans import open_spans
from msi.watchdog import LoopWatch

if TYPE_CHECKING:
    from msi.planner.drift import DriftWatch
    from msi.worker.host import Host
    from msi.worker.torch_host import HostSettings
    from msi.worker.worker import Worker

log = logging.getLogger(__name__)


def build_plan(options: InstanceOptions, place: PlaceExperts | None = None) -> tuple[InstancePlan, ModelConfig]:
    """Experts are placed as the options say, or by `place`.

    Raises:
        ConfigError: the model directory or the options cannot work, or the plan is for another model.
    """
    config, values = load_config(options.source.model_dir)
    if place is None:
        place = partial(_placed, options, config)
    if options.plan is not None:
        from msi.planner.plan_file import check_model, read_plan_file  # with numpy, which only a plan needs

        check_model(
            read_plan_file(options.plan), options.source.model_dir.name, config_digest(values), str(options.plan)
        )
    max_model_len = options.limits.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"`max_model_len` {max_model_len} is more than the {config.max_position_embeddings} positions of this model"
        )
    lanes = 1 if options.colocated and not options.micro_batches else options.micro_batches or MAX_MICRO_BATCHES
    max_attention, max_expert = options.max_workers
    max_expert = max(options.expert_workers, min(max_expert, config.num_experts))
    plan = InstancePlan(
        instance=secrets.token_hex(16),
        num_attention=options.attention_workers,
        num_expert=options.expert_workers,
        is_colocated=options.colocated,
        placement=padded(place(config.num_experts, options.expert_workers), max_expert),
        limits=replace(
            options.limits,
            max_model_len=max_model_len,
            max_num_batched_tokens=options.limits.max_num_batched_tokens or options.link.slot_rows,
        ),
        link=replace(options.link, num_lanes=lanes),
        timeouts=options.timeouts,
        precision=options.precision,
        max_resumptions=options.max_resumptions,
        service=options.service,
        rebalance=options.rebalance,
        slow=options.slow,
        balance=options.balance,
        max_attention=max_attention,
        max_expert=max_expert,
    )
    return plan, config


def _placed(options: InstanceOptions, config: ModelConfig, num_experts: int, num_nodes: int) -> Placement:
    """By how often experts are chosen, where they may have replicas or that is known.

    Waves are taken to be full: of every attention worker as many sequences as a micro-batch can have.
    """
    redundancy, num_redundant = options.expert_redundancy, options.redundant_experts
    before = place_with_replicas(num_experts, num_nodes, redundancy, num_redundant)
    if options.expert_popularity is None and not num_redundant:
        return before
    from msi.planner.rebalance import FLOOR_ROWS
    from msi.planner.replicas import place_by_popularity  # with numpy

    counts = [[1.0] * num_experts]
    if options.expert_popularity is not None:
        counts = read_counts(options.expert_popularity)
        check_counts(counts, num_experts, config.num_sparse_layers, options.expert_popularity)
    seqs = max(1, options.limits.max_num_seqs // (options.micro_batches or MAX_MICRO_BATCHES // 2))
    rows = options.attention_workers * seqs * config.top_k
    load = [[rows * one / sum(of_layer) for one in of_layer] for of_layer in counts]
    return place_by_popularity(load, FLOOR_ROWS, before, redundancy)


def check_files(options: InstanceOptions) -> None:
    """Looks at all that a local instance will read. Raises ConfigError: some of it cannot work."""
    _, config = build_plan(options)
    if options.source.load_format != "dummy":
        check_weights(options.source.model_dir, config)


def listen(bind: str, trust: Trust = NO_SECRET) -> ControlServer:
    """Where a coordinator is reached. Raises ConfigError: the port is in use, or open to others."""
    if bind.startswith("tcp://"):
        trust.check_listening(bind.removeprefix("tcp://").rpartition(":")[0], "the coordinator")
        if trust.secret is None:
            log.warning("no secret: whoever connects to %s is taken for one of this instance, and can read it", bind)
    return ControlServer(bind, COORDINATOR_END, trust.secret)


def create_coordinator(
    options: InstanceOptions,
    server: MessageServer,
    watch: LoopWatch | None = None,
    place: PlaceExperts | None = None,
    *,
    term: int = 0,
    is_private: bool = False,
) -> Coordinator:
    """Takes the server over, and closes it where this raises.

    Args:
        term, is_private: see `msi.control.succession` and `Coordinator`.

    Raises:
        ConfigError: the model directory or the options cannot work.
    """
    try:
        plan, config = build_plan(options, place)
        plan = replace(plan, term=term, is_on_network=server.address.startswith("tcp://"))
        for remark in config.remarks:
            log.warning("%s", remark)
        return Coordinator(
            server,
            plan,
            _welcome(options, plan, config),
            num_micro_batches=options.micro_batches,
            num_layers=config.num_sparse_layers,
            drift=_drift_watch(options),
            watch=watch,
            spans=open_spans(options.otlp_traces_endpoint, "coordinator"),
            is_private=is_private,
        )
    except BaseException:
        server.close()
        raise


def _welcome(options: InstanceOptions, plan: InstancePlan, config: ModelConfig) -> Welcome:
    source = options.source
    texts = read_texts(source.model_dir, read_json(source.model_dir / "config.json"), source.generation_config)
    return Welcome(
        model_name=source.model_name,
        vocab_size=config.vocab_size,
        max_model_len=plan.limits.max_model_len,
        tokenizer=texts.tokenizer,
        chat_templates=texts.chat_templates,
        special_tokens=texts.special_tokens,
        sampling_defaults=texts.sampling_defaults,
        tool_call_parser=source.tool_call_parser,
        reasoning_parser=source.reasoning_parser,
        coordinator_grace_s=options.timeouts.coordinator_grace_s,
    )


def _drift_watch(options: InstanceOptions) -> DriftWatch | None:
    if options.plan is None:
        return None
    from msi.planner.drift import DriftWatch
    from msi.planner.plan_file import read_plan_file

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
    control: MessageClient | None = None,
    make_host: Callable[[HostSettings], Host] | None = None,
) -> Worker:
    """A worker, and its way to the coordinator, a socket by default; by default its devices and transports are real.

    Raises ConfigError: the model directory or the settings cannot work.
    """
    from msi.worker.torch_host import HostSettings, TorchHost  # torch takes a second, and only workers need it
    from msi.worker.worker import Worker, WorkerSettings

    host = HostSettings(
        coordinator=coordinator.partition(",")[0],
        source=options.source,
        host=options.host,
        precision=options.precision,
        advertise_host=advertise_host,
        num_threads=options.num_threads,
        trust=trust,
    )
    settings = WorkerSettings(
        coordinator=coordinator,
        role=role,
        worker_id=worker_id,
        trace_dir=trace_dir,
        timeouts=options.timeouts,
        otlp_traces_endpoint=options.otlp_traces_endpoint,
    )
    control = control or way_to(coordinator, WORKER_END, trust.secret)
    made = TorchHost(host) if make_host is None else make_host(host)
    return Worker(settings, made, control, watch)


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

    async def start(self) -> MessageClient:
        """Starts everything and returns a client's way to the coordinator; raises EngineError if it cannot."""

    async def stop(self) -> None:
        """Ends everything; nothing is left behind. Idempotent."""


def new_trace_dir() -> Path:
    """Where the workers of an instance leave their parts of a trace."""
    return Path(tempfile.mkdtemp(prefix="msi-trace-"))
