"""What an instance is told, in frozen sections that travel whole: from the options into the plan, and from there to
each worker, where the one who needs a value reads it.

A new parameter is one field here, and what reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msi.errors import ConfigError, shown
from msi.net.rdma.options import RdmaOptions
from msi.parameters import check_parameters, parameter
from msi.planner.pipeline import MAX_MICRO_BATCHES

DEMO_MODEL = Path(__file__).parent / "demo_model"
SHARING = "MSI_ATTENTION_ON_GPU"  # tells a worker that was given a GPU how many attention workers have it
SLOT_ROWS = 512
TRANSPORTS = ("auto", "inproc", "shm", "tcp", "rdma")
MAX_NAME_CHARS = 256
MODEL_AND_WORKERS = "model and workers"  # headings of the command line's help
LIMITS = "limits"
TOOL_CALL_PARSERS = (
    "hermes", "qwen3_xml", "qwen3_coder", "mistral", "deepseek_v3", "deepseek_v31", "glm45", "glm47", "kimi_k2",
    "minimax_m2", "openai",
)  # fmt: skip
REASONING_PARSERS = (
    "deepseek_r1", "deepseek_v3", "qwen3", "glm45", "kimi_k2", "minimax_m2", "minimax_m2_append_think", "mistral",
    "openai_gptoss",
)  # fmt: skip


def _words(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


Count = Annotated[int, range(2**31)]
CountFromOne = Annotated[int, range(1, 2**31)]
Lanes = Annotated[int, range(1, 65)]
Seconds = Annotated[float, (0.0, 1e6)]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model is served, and from which files.

    Attributes:
        model: Hugging Face model directory; None for the bundled demo model.
    """

    model: Path | None = parameter(
        None, "Hugging Face model directory; the demo model without it", metavar="MODEL", group=MODEL_AND_WORKERS,
        file="directory",
    )  # fmt: skip
    served_model_name: str = parameter(
        "", "what clients call the model; MODEL by default", metavar="S", group=MODEL_AND_WORKERS,
        form=(r"[^\x00-\x1f\x7f]{1,256}", "a name of 1 to 256 printable characters"),
    )  # fmt: skip
    generation_config: str = parameter(
        "auto",
        "sampling parameters for requests that leave them out: auto (the model's own generation_config.json), vllm "
        "(none), or that of a folder",
        metavar="G",
        group=MODEL_AND_WORKERS,
    )
    load_format: str = parameter(
        "auto", "auto, or dummy: random weights from config.json alone", metavar="L", group=MODEL_AND_WORKERS,
        choices=("auto", "dummy"),
    )  # fmt: skip
    tool_call_parser: str = parameter(
        "auto", f"how the model writes calls of tools: auto (by its chat template), none, {_words(TOOL_CALL_PARSERS)}",
        metavar="P", group=MODEL_AND_WORKERS, choices=("auto", "none", *TOOL_CALL_PARSERS),
    )  # fmt: skip
    reasoning_parser: str = parameter(
        "auto",
        "how the model writes what it thinks, which is told apart: auto (by its chat template), none (it stays in the "
        f"text), {_words(REASONING_PARSERS)}",
        metavar="P", group=MODEL_AND_WORKERS, choices=("auto", "none", *REASONING_PARSERS),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_parameters(self)
        served, model = self.served_model_name, self.model
        if len(served) > MAX_NAME_CHARS or any(not char.isprintable() for char in served):
            raise ConfigError(f"`served_model_name` {shown(served)}: give up to {MAX_NAME_CHARS} printable characters")
        if not served and model is not None and not str(model).isprintable():
            raise ConfigError(f"the directory {shown(str(model))} is no name for clients; give `served_model_name`")

    @property
    def model_dir(self) -> Path:
        return DEMO_MODEL if self.model is None else self.model

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or ("demo" if self.model is None else str(self.model))


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What a worker runs on; told to each by itself.

    Attributes:
        threads_per_worker: torch threads of each worker; 0 shares the cores among the workers of a role.
        transport: "inproc" puts all workers into the calling process; "auto" takes shared memory within a host, and
            across hosts RDMA where both have cards that reach each other, else TCP.
        encrypt_rows: of connections over TCP, which are then taken in place of RDMA; the same for all processes.
        poll_us: see `msi.device.polling` and `msi.net.rdma.patience`.
        gpu_memory_utilization: share of free memory for KV cache (on a CPU, of free RAM).
    """

    device: str = parameter("cpu", "cpu, cuda or cuda:N", metavar="D", group=MODEL_AND_WORKERS)
    threads_per_worker: Annotated[int, range(1025)] = parameter(
        0, "by default the cores are shared among a role's workers", metavar="N", group=MODEL_AND_WORKERS
    )
    transport: str = parameter(
        "auto",
        "auto (shared memory within a host, across hosts RDMA where both have cards, else TCP), shm, tcp, rdma, or "
        "inproc: all workers in one process",
        metavar="T",
        group=MODEL_AND_WORKERS,
    )
    encrypt_rows: bool = parameter(
        False, "encrypt and sign rows that travel over TCP (TLS 1.3, by the secret)", group=MODEL_AND_WORKERS
    )
    poll_us: Annotated[int, range(100_001)] = parameter(
        0, "microseconds that a CPU's compute thread, and whoever waits for RDMA, looks for rows before it sleeps; "
        "pays where cores are idle",
        metavar="N", group=MODEL_AND_WORKERS,
    )  # fmt: skip
    cuda_queues: str = parameter(
        "streams",
        "how a GPU's lanes take turns: streams (nobody waits), threads (each has one, which waits for the GPU), or "
        "gates (streams that wait for rows themselves; hung on a GPU)",
        metavar="Q", group=MODEL_AND_WORKERS, choices=("streams", "threads", "gates"),
    )  # fmt: skip
    cuda_kernels: str = parameter(
        "auto",
        "what a GPU computes with: triton (kernels of our own), flashinfer (that library's attention, and lists that "
        "tokens are drawn from, and triton for the rest), deepgemm (that library's products with matrices in float8, "
        "and triton for the rest), plain (torch's operators), or auto (triton where it is installed, with what these "
        "libraries have where they are, too, and measured to be faster)",
        metavar="K", group=MODEL_AND_WORKERS, choices=("auto", "triton", "flashinfer", "deepgemm", "plain"),
    )  # fmt: skip
    cuda_rows: str = parameter(
        "host",
        "where rows for a GPU land: host (pinned memory, which it sees in place), or device (its own memory, with "
        "`transport` shm or rdma; not yet run on hardware)",
        metavar="W", group=MODEL_AND_WORKERS, choices=("host", "device"),
    )  # fmt: skip
    enforce_eager: bool = parameter(
        True,
        "launch attention kernel by kernel; without it, decoding replays captured graphs, which no GPU has run yet",
        group=MODEL_AND_WORKERS,
    )
    gpu_memory_utilization: Annotated[float, (0.0, 1.0)] = parameter(
        0.9, "share of free memory (on a CPU: of free RAM) for KV cache", metavar="F", group=LIMITS
    )
    rdma: RdmaOptions = RdmaOptions()

    def __post_init__(self) -> None:
        check_parameters(self)
        if self.device != "cpu" and not re.fullmatch(r"cuda(:\d{1,3})?", self.device):
            raise ConfigError(f"`device` {shown(self.device)} is not one; supported: cpu, cuda, cuda:N")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"`transport` {shown(self.transport)} is not one; supported: {', '.join(TRANSPORTS)}")
        if self.encrypt_rows and self.transport == "rdma":
            raise ConfigError("`encrypt_rows` is for TCP: RDMA cards send rows as they are; give `transport=tcp`")
        if not self.enforce_eager and self.cuda_queues != "streams":
            raise ConfigError(
                f"`enforce_eager` is off for `cuda_queues` streams alone: with {self.cuda_queues} no graph of decoding "
                "is captured; give `cuda_queues=streams`, or leave it on"
            )
        if self.cuda_rows == "device" and self.transport not in ("shm", "rdma"):
            raise ConfigError(
                f"`cuda_rows` device needs `transport` shm or rdma, not {self.transport}: others copy rows by the host"
            )


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What an attention worker may hold and run at a time.

    Attributes:
        max_model_len: the longest sequence, prompt included; 0 for what the model was made for.
        max_num_batched_tokens: tokens per micro-batch; 0 for the rows of a slot.
        prefill_delay_ms: passes that have prompts in them may take so long while other sequences decode, or three times
            as long as without prompts if that is more: with fewer tokens of prompts, as was measured. 0 for any time.
        max_num_waiting: requests that wait at an attention worker; the next is refused (503).
        enable_prefix_caching: requests with a common prefix share its KV blocks.
        num_gpu_blocks_override: KV blocks, whatever the memory allows; 0 for what it allows.
    """

    max_model_len: Count = parameter(
        0, "longest sequence, prompt included; the model's own by default", metavar="N", group=LIMITS
    )
    max_num_seqs: Annotated[int, range(1, (1 << 16) + 1)] = parameter(
        64, "sequences that run at a time, per attention worker", metavar="N", group=LIMITS
    )
    max_num_batched_tokens: Count = parameter(
        0, "tokens per micro-batch; by default the rows of a slot", metavar="N", group=LIMITS
    )
    prefill_delay_ms: Annotated[int, range(10**7)] = parameter(
        50, "milliseconds that prompts may keep those waiting that decode (0: any time)", metavar="MS", group=LIMITS,
        name="prefill_delay",
    )  # fmt: skip
    max_num_waiting: CountFromOne = parameter(
        1024, "requests that wait; the next is refused", metavar="N", group=LIMITS
    )
    enable_prefix_caching: bool = parameter(True, "share the KV blocks of common prefixes", group=LIMITS)
    num_gpu_blocks_override: Count = parameter(0, "KV blocks, whatever the memory allows", metavar="N", group=LIMITS)

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True, slots=True)
class LinkShape:
    """The slots between an attention and an expert worker.

    Attributes:
        num_lanes: lanes that slots are made for.
    """

    num_lanes: Lanes = MAX_MICRO_BATCHES
    slot_rows: Annotated[int, range(1, (1 << 16) + 1)] = parameter(
        SLOT_ROWS, "rows of a landing slot", metavar="N", group=LIMITS
    )

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long who is waited for.

    Attributes:
        start_timeout_s: workers may take so long to come.
        peer_timeout_s: an expert worker that owes an answer for that long is lost.
        reload_after_s: experts that are on no worker any more wait so long for theirs to come back, before others load
            them.
        heartbeat_s: between two heartbeats of a worker.
        lost_after_s: a worker that was not heard of for so long is lost.
        hedge_after_ms: rows that a node has owed for so long, and for much longer than exchanges take, go to replicas.
        hold_timeout_s: requests that run wait so long for a worker in place of theirs, or for experts that are on none.
        coordinator_grace_s: workers, gateways and what runs wait so long for a coordinator in place of theirs.
    """

    start_timeout_s: Seconds = parameter(120.0, "seconds that workers may take to come", metavar="S", group=LIMITS)
    peer_timeout_s: Seconds = parameter(
        4.0, "seconds after which an expert worker that owes an answer is lost", metavar="S", group=LIMITS
    )
    hold_timeout_s: Seconds = parameter(
        60.0, "seconds that running requests wait for a worker, or for experts, in place of those that were lost",
        metavar="S", group=LIMITS,
    )  # fmt: skip
    coordinator_grace_s: Seconds = parameter(
        60.0, "seconds that workers, gateways and requests wait for a coordinator in place of one that is gone",
        metavar="S", group=LIMITS,
    )  # fmt: skip
    reload_after_s: Seconds = parameter(
        5.0, "seconds after which the experts of a lost worker are loaded on others, where none of those has them",
        metavar="S", group=LIMITS,
    )  # fmt: skip
    hedge_after_ms: Annotated[int, range(10**7)] = parameter(
        150, "milliseconds after which an answer may be late: its rows are sent to other expert workers that hold the "
        "same experts (0: never)",
        metavar="MS", group=LIMITS, name="hedge_after",
    )  # fmt: skip
    heartbeat_s: Seconds = 1.0
    lost_after_s: Seconds = 3.0

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True, slots=True)
class Rebalance:
    """When experts are placed anew by how often they are chosen; see `msi.control.rebalancing`.

    Attributes:
        rebalance: "auto" or "off".
        rebalance_interval_s: of a window in which rows are counted; after each it is looked at.
        rebalance_threshold: what the slowest expert worker is to gain at least, as a share of its time.
    """

    rebalance: str = parameter(
        "off", "auto: experts and their replicas move between workers by how often they are chosen; off",
        metavar="auto|off", group=MODEL_AND_WORKERS, choices=("auto", "off"),
    )  # fmt: skip
    rebalance_interval_s: Seconds = parameter(
        60.0, "seconds in which rows are counted before it is looked at again", metavar="S", group=MODEL_AND_WORKERS
    )
    rebalance_threshold: Annotated[float, (0.0, 1.0)] = parameter(
        0.1, "what the slowest expert worker is to gain at least, as a share of its time", metavar="F",
        group=MODEL_AND_WORKERS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True, slots=True)
class SlowWorkers:
    """When a worker that is slow beside its peers leaves; see `msi.control.slow_workers`.

    Attributes:
        drain_slow_after_s: for how long it has been; 0 for never.
        drain_slow_factor: it takes so many times as long as the median of the others of its role, for the same work.
    """

    drain_slow_after_s: Annotated[int, range(10**6)] = parameter(
        60, "seconds after which a worker that is slow leaves, where others can take what it has (0: never)",
        metavar="S", group=LIMITS,
    )  # fmt: skip
    drain_slow_factor: Annotated[float, (1.0, 1e6)] = parameter(
        4.0, "slow is who takes so many times as long as the others of its role", metavar="F", group=LIMITS
    )

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True, slots=True)
class AttentionBalance:
    """When requests that run go on at another attention worker; see `msi.control.moving`.

    Attributes:
        balance_attention: "auto" or "off".
        balance_attention_threshold: by how much steps are to take longer there than at the other one with the request.
    """

    balance_attention: str = parameter(
        "auto", "auto: requests move off attention workers whose steps take longer than others', or that are drained; "
        "off",
        metavar="auto|off", group=MODEL_AND_WORKERS, choices=("auto", "off"),
    )  # fmt: skip
    balance_attention_threshold: Annotated[float, (0.0, 1e3)] = parameter(
        0.25, "by how much a step of theirs is to take longer than at the other worker with the request, as a share",
        metavar="F", group=MODEL_AND_WORKERS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_parameters(self)


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What requests that are taken can expect; those that could not are refused (429).

    Attributes:
        ttft_slo_ms: the first token comes within so many milliseconds; 0 for no such promise.
        tpot_slo_ms: each further one within so many, on average; workers run no more sequences than that allows.
    """

    ttft_slo_ms: Annotated[int, range(10**8)] = parameter(
        0, "milliseconds within which first tokens come: what would be later is refused (429)", metavar="MS",
        group=LIMITS, name="ttft_slo",
    )  # fmt: skip
    tpot_slo_ms: Annotated[int, range(10**8)] = parameter(
        0, "milliseconds that each further token takes at most, on average: no more sequences run than that allows",
        metavar="MS", group=LIMITS, name="tpot_slo",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_parameters(self)
