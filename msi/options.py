"""What an instance can be told: one frozen value that the command line and `Engine.local` both fill in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from msi.errors import ConfigError, shown
from msi.net import shm
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.planner.plan import Plan
from msi.planner.plan_file import read_plan_file

DEMO_MODEL = Path(__file__).parent / "demo_model"
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
SLOT_ROWS = 512
TRANSPORTS = ("auto", "inproc", "shm", "tcp")
LATER_TRANSPORTS = ("rdma",)
MAX_NAME_CHARS = 256
MAX_TIME_S = 1e6
MAX_COUNT = 2**31 - 1
INTEGERS = (
    ("attention_workers", 1, 1024),
    ("expert_workers", 1, 1024),
    ("threads_per_worker", 0, 1024),
    ("max_model_len", 0, MAX_COUNT),
    ("max_num_seqs", 1, 1 << 16),
    ("max_num_batched_tokens", 0, MAX_COUNT),
    ("slot_rows", 1, 1 << 16),
    ("max_num_waiting", 1, MAX_COUNT),
    ("num_gpu_blocks_override", 0, MAX_COUNT),
)
FRACTIONS = (
    ("gpu_memory_utilization", 1.0),
    ("plan_drift", 1e6),
    ("start_timeout_s", MAX_TIME_S),
    ("peer_timeout_s", MAX_TIME_S),
)


@dataclass(frozen=True, slots=True)
class InstanceOptions:
    """Options of one instance on this machine; names are those of msi-launch's flags.

    Attributes:
        model: Hugging Face model directory; None for the bundled demo model.
        micro_batches: m, or 0 to choose by measurement.
        colocated: both roles in one process.
        threads_per_worker: torch threads of each worker; 0 shares the cores among the workers of a role.
        transport: "inproc" puts all workers into the calling process; "auto" takes shared memory within a host and TCP
            across hosts.
        max_model_len: the longest sequence, prompt included; 0 for what the model was made for.
        max_num_seqs: sequences that run at a time, per attention worker.
        max_num_batched_tokens: tokens per micro-batch; 0 for the rows of a slot.
        slot_rows: rows of a slot.
        gpu_memory_utilization: share of free memory for KV cache (on a CPU, of free RAM).
        trace: file for a Chrome trace.
        peer_timeout_s: an expert worker that owes an answer for that long is lost.
        max_num_waiting: requests that wait at an attention worker; the next is refused (503).
        enable_prefix_caching: requests with a common prefix share its KV blocks.
        num_gpu_blocks_override: KV blocks per attention worker, whatever the memory allows; 0 for what it allows.
        generation_config: where the model's own sampling parameters come from: "auto" for its generation_config.json,
            "vllm" for nowhere, or a folder that holds such a file.
        plan: file of the plan that is run (see `with_plan`); the coordinator holds what is measured against it.
        plan_drift: how far T_a, T_e or T_c may part from the plan's, as a fraction, before the coordinator says so.

    Raises:
        ConfigError: names the option, what was given and what is allowed.
    """

    model: Path | None = None
    attention_workers: int = 1
    expert_workers: int = 1
    micro_batches: int = 0
    colocated: bool = False
    device: str = "cpu"
    threads_per_worker: int = 0
    transport: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 0
    slot_rows: int = SLOT_ROWS
    gpu_memory_utilization: float = 0.9
    served_model_name: str = ""
    trace: Path | None = None
    start_timeout_s: float = 120.0
    peer_timeout_s: float = 4.0
    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    num_gpu_blocks_override: int = 0
    generation_config: str = "auto"
    plan: Path | None = None
    plan_drift: float = 0.3

    def __post_init__(self) -> None:
        for name, least, most in INTEGERS:
            _between(name, getattr(self, name), least, most)
        for name, limit in FRACTIONS:
            _above_zero(name, getattr(self, name), limit)
        if not 0 <= self.micro_batches <= MAX_MICRO_BATCHES:
            raise ConfigError(f"--micro-batches {self.micro_batches}: give auto or 1 to {MAX_MICRO_BATCHES}")
        _check_name(self.served_model_name, self.model)
        if self.max_num_batched_tokens > self.slot_rows:
            raise ConfigError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is more than a slot's {self.slot_rows} rows"
            )
        if self.colocated and (self.attention_workers, self.expert_workers) != (1, 1):
            raise ConfigError("--colocated is one process with both roles; leave the numbers of workers out")
        if self.device != "cpu" and not re.fullmatch(r"cuda(:\d{1,3})?", self.device):
            raise ConfigError(f"--device {shown(self.device)} is not one; supported: cpu, cuda, cuda:N")
        if self.transport in LATER_TRANSPORTS:
            raise ConfigError(f"--transport {self.transport} is not built yet; supported: {', '.join(TRANSPORTS)}")
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("load-format", self.load_format, LOAD_FORMATS)

    @property
    def model_dir(self) -> Path:
        return DEMO_MODEL if self.model is None else self.model

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or ("demo" if self.model is None else str(self.model))

    @property
    def chosen_transport(self) -> str:
        """The transport between workers that are all on this machine."""
        if self.transport != "auto":
            return self.transport
        return "shm" if shm.is_available() is None else "tcp"

    @property
    def num_threads(self) -> int:
        """Torch threads of each worker."""
        if self.threads_per_worker:
            return self.threads_per_worker
        return max(1, (os.cpu_count() or 1) // max(self.attention_workers, self.expert_workers))

    @property
    def batched_tokens(self) -> int:
        return self.max_num_batched_tokens or self.slot_rows

    def flags(self) -> list[str]:
        """This as command-line arguments of msi-launch, for child processes."""
        arguments = [] if self.model is None else [_as_value(self.model)]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "model" and value != one.default:
                flag = _flag(one.name)
                if isinstance(value, bool):
                    arguments.append(flag if value else flag.replace("--", "--no-", 1))
                else:
                    arguments.append(f"{flag}={value}")
        return arguments


def with_plan(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as given, and for those left out what the plan that they name says; InstanceOptions takes the result.

    Raises:
        ConfigError: the plan cannot be read or run, or an option contradicts it.
    """
    path = given.get("plan")
    if path is None:
        return dict(given)
    planned = planned_options(read_plan_file(Path(path)).plan, path)
    for name, value in planned.items():
        if name in given and given[name] != value:
            shown, flag = ("auto" if given[name] == 0 else given[name]), "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {shown} contradicts {path}, which has {value}; leave the option out, or write another plan"
            )
    return {**planned, **given, "plan": Path(path)}


def planned_options(plan: Plan, source: object) -> dict[str, Any]:
    """What running a plan means. Raises ConfigError: the runtime cannot do it yet."""
    if (plan.tp_attention, plan.tp_expert) != (1, 1):
        raise ConfigError(
            f"{source} has tensor-parallel groups ({plan.tp_attention} GPUs for attention, {plan.tp_expert} for "
            "experts), and tensor parallelism is not built yet; plan with msi-plan --runnable"
        )
    options: dict[str, Any] = {
        "attention_workers": plan.num_attention_nodes,
        "expert_workers": plan.num_expert_nodes,
        "micro_batches": plan.num_micro_batches,
        "colocated": plan.kind == "colocated",
        "max_num_seqs": plan.micro_batch * plan.num_micro_batches,
        "slot_rows": max(plan.micro_batch, SLOT_ROWS),
    }
    if plan.threads_per_worker:
        options["threads_per_worker"] = plan.threads_per_worker
    return options


def _as_value(path: Path) -> str:
    """A path as a word of a command line that is no flag."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")


def _between(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{_flag(name)} {shown(value)}: give an integer from {least} to {most}")


def _above_zero(name: str, value: object, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
        what = "a number of seconds" if name.endswith("_s") else "a number"
        raise ConfigError(f"{_flag(name)} {shown(value)}: give {what} > 0, at most {most:g}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{name} {shown(value)} is not one; supported: {', '.join(allowed)}")


def _check_name(served: str, model: Path | None) -> None:
    """What clients call the model crosses JSON and logs."""
    if len(served) > MAX_NAME_CHARS or any(not char.isprintable() for char in served):
        raise ConfigError(f"--served-model-name {shown(served)}: give up to {MAX_NAME_CHARS} printable characters")
    if not served and model is not None and not str(model).isprintable():
        raise ConfigError(f"the directory {shown(str(model))} is no name for clients; give --served-model-name")
