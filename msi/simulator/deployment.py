"""What is simulated: a deployment, and what goes wrong with it when."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields

from msi.control.members import InstancePlan
from msi.errors import ConfigError
from msi.placement import place_evenly
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.settings import LinkShape, SchedulerLimits

FAULTS = ("slow", "stalled", "dead")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """An instance and the numbers of its model that matter.

    Attributes:
        num_micro_batches: m; 0 lets the coordinator measure and choose, as in reality.
        is_colocated: both roles in one worker, on one compute queue; messages then take no time.
        num_layers: those with experts.
        row_bytes, answer_row_bytes: of a row on its way to the experts and back.
        num_kv_blocks: blocks of KV cache, 16 tokens each, of one attention worker.
        max_num_seqs: the most sequences that run on an attention worker.
        slot_rows: of a landing slot; `max_num_batched_tokens` of a micro-batch are at most that (0: that many).
        control_latency_s: of every message to or from the coordinator.

    Raises:
        ConfigError: names the number, what was given and what is allowed.
    """

    num_layers: int
    num_experts: int
    top_k: int
    num_attention: int = 1
    num_expert: int = 1
    num_micro_batches: int = 0
    is_colocated: bool = False
    row_bytes: int = 2 * 6144
    answer_row_bytes: int = 2 * 6144
    num_kv_blocks: int = 8192
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 0
    slot_rows: int = 512
    max_model_len: int = 65_536
    max_num_waiting: int = 1_000_000
    control_latency_s: float = 100e-6

    def __post_init__(self) -> None:
        may_be_zero = ("num_micro_batches", "max_num_batched_tokens", "control_latency_s")
        for one in fields(self):
            value = getattr(self, one.name)
            least = 0 if one.name in may_be_zero else 1
            if one.name != "is_colocated" and not least <= value < math.inf:
                raise ConfigError(f"{one.name} is {value!r}; give a number of at least {least}")
        if self.num_micro_batches > MAX_MICRO_BATCHES:
            raise ConfigError(f"num_micro_batches is {self.num_micro_batches}; give 1 to {MAX_MICRO_BATCHES}, or 0")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}; a token cannot have more than the {self.num_experts} experts")
        if self.max_num_batched_tokens > self.slot_rows:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; a slot has {self.slot_rows} rows"
            )
        if self.is_colocated and (self.num_attention, self.num_expert) != (1, 1):
            raise ConfigError("a colocated instance is one worker with both roles; leave the numbers of workers out")
        place_evenly(self.num_experts, self.num_expert)

    @property
    def plan(self) -> InstancePlan:
        return InstancePlan(
            instance="simulated",
            num_attention=self.num_attention,
            num_expert=self.num_expert,
            is_colocated=self.is_colocated,
            placement=place_evenly(self.num_experts, self.num_expert),
            limits=SchedulerLimits(
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens or self.slot_rows,
                max_num_waiting=self.max_num_waiting,
                enable_prefix_caching=False,  # a trace has lengths, not prompts
                num_gpu_blocks_override=self.num_kv_blocks,
            ),
            link=LinkShape(self.num_micro_batches or MAX_MICRO_BATCHES, self.slot_rows),
        )

    @property
    def workers(self) -> list[tuple[str, str]]:
        """(role, id) of every worker."""
        num_expert = 0 if self.is_colocated else self.num_expert
        return [("expert", f"expert-{index}") for index in range(num_expert)] + [
            ("attention", f"attention-{index}") for index in range(self.num_attention)
        ]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong with a worker.

    Attributes:
        at_s: seconds after the start.
        kind: "slow" (everything it computes takes `amount` times as long from now on), "stalled" (its device does
            nothing for `amount` seconds) or "dead" (as by kill -9).
    """

    at_s: float
    worker: str
    kind: str
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ConfigError(f"fault {self.kind!r} is not one; give {', '.join(FAULTS)}")
        if not 0 <= self.at_s < math.inf:
            raise ConfigError(f"a fault of {self.worker} comes at {self.at_s!r} s; give a time of at least 0")
        if self.kind != "dead" and not 0 < self.amount < math.inf:
            what = "the factor" if self.kind == "slow" else "the seconds"
            raise ConfigError(f"{self.worker} is to be {self.kind} by {self.amount!r}; give {what}, above 0")


def parse_fault(text: str) -> Fault:
    """WORKER:KIND[:AMOUNT]@SECONDS, such as attention-0:slow:10@5 or expert-1:dead@2.5. Raises ConfigError."""
    what, _, at = text.rpartition("@")
    worker, _, rest = what.partition(":")
    kind, _, amount = rest.partition(":")
    try:
        return Fault(float(at), worker, kind, float(amount or 0))
    except ValueError:
        raise ConfigError(
            f"fault {text!r} cannot be read; give WORKER:KIND@SECONDS, such as attention-0:slow:10@5, "
            f"expert-1:stalled:0.5@3 or expert-1:dead@2.5"
        ) from None


def check_faults(faults: Collection[Fault], deployment: Deployment) -> None:
    """Raises ConfigError: a fault is of a worker that is not there."""
    workers = [worker_id for _, worker_id in deployment.workers]
    for fault in faults:
        if fault.worker not in workers:
            raise ConfigError(f"fault of {fault.worker!r}, which is not there; the workers are {', '.join(workers)}")
