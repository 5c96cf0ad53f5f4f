"""What is simulated: a deployment, and what goes wrong with it when."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from msi.control.members import InstancePlan
from msi.errors import ConfigError
from msi.placement import Placement, place_with_replicas
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.settings import (
    AttentionBalance,
    LinkShape,
    Rebalance,
    SchedulerLimits,
    ServiceLevel,
    SlowWorkers,
    Timeouts,
)

LIMITS = SchedulerLimits(
    max_model_len=65_536,
    max_num_seqs=256,
    max_num_waiting=1_000_000,
    enable_prefix_caching=False,  # a trace has lengths, not prompts
    num_gpu_blocks_override=8192,
)
MAY_BE_0 = ("num_micro_batches", "control_latency_s", "expert_redundancy", "redundant_experts")
FAULTS = ("slow", "stalled", "dead")
COORDINATOR = "coordinator"
NEVER_S = 1e6  # experts stay where they are: which nodes a change would take their rows to is not simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """An instance and the numbers of its model that matter.

    Attributes:
        num_micro_batches: m; 0 lets the coordinator measure and choose, as in reality.
        is_colocated: both roles in one worker, on one compute queue; messages then take no time.
        num_layers: those with experts.
        row_bytes, answer_row_bytes: of a row on its way to the experts and back.
        limits: of each attention worker; its KV blocks are `num_gpu_blocks_override`, of 16 tokens each.
        link: its number of lanes follows from m.
        expert_redundancy, redundant_experts: see `msi.placement.place_with_replicas`.
        placement: of experts, where it is another.
        control_latency_s: of every message to or from the coordinator.
        service: what requests that are taken can expect.
        rebalance: when experts are placed anew by load; loading them takes no time here.
        slow: when workers that are slow leave.
        balance: when requests move between attention workers.

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
    limits: SchedulerLimits = LIMITS
    link: LinkShape = LinkShape()
    control_latency_s: float = 100e-6
    expert_redundancy: int = 0
    redundant_experts: int = 0
    placement: Placement | None = None
    service: ServiceLevel = ServiceLevel()
    rebalance: Rebalance = Rebalance()
    slow: SlowWorkers = SlowWorkers(drain_slow_after_s=0)
    balance: AttentionBalance = AttentionBalance("off")

    def __post_init__(self) -> None:
        numbers = {one.name: getattr(self, one.name) for one in fields(self) if one.type in ("int", "float")}
        numbers |= {name: getattr(self.limits, name) for name in ("max_model_len", "num_gpu_blocks_override")}
        for name, value in numbers.items():
            least = 0 if name in MAY_BE_0 else 1
            if not least <= value < math.inf:
                raise ConfigError(f"{name} is {value!r}; give a number of at least {least}")
        if self.num_micro_batches > MAX_MICRO_BATCHES:
            raise ConfigError(f"num_micro_batches is {self.num_micro_batches}; give 1 to {MAX_MICRO_BATCHES}, or 0")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}; a token cannot have more than the {self.num_experts} experts")
        if (most := self.limits.max_num_batched_tokens) > self.link.slot_rows:
            raise ConfigError(f"max_num_batched_tokens is {most}; a slot has {self.link.slot_rows} rows")
        if self.is_colocated and (self.num_attention, self.num_expert) != (1, 1):
            raise ConfigError("a colocated instance is one worker with both roles; leave the numbers of workers out")
        self._placed()

    def _placed(self) -> Placement:
        placed = place_with_replicas(self.num_experts, self.num_expert, self.expert_redundancy, self.redundant_experts)
        return self.placement or placed

    @property
    def plan(self) -> InstancePlan:
        return InstancePlan(
            instance="simulated",
            num_attention=self.num_attention,
            num_expert=self.num_expert,
            is_colocated=self.is_colocated,
            placement=self._placed(),
            limits=replace(
                self.limits, max_num_batched_tokens=self.limits.max_num_batched_tokens or self.link.slot_rows
            ),
            link=replace(self.link, num_lanes=self.num_micro_batches or MAX_MICRO_BATCHES),
            service=self.service,
            rebalance=self.rebalance,
            slow=self.slow,
            balance=self.balance,
            timeouts=Timeouts(reload_after_s=NEVER_S),
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
    """Something that goes wrong with a worker, or with the coordinator.

    Attributes:
        at_s: seconds after the start.
        kind: "slow" (everything it computes takes `amount` times as long from now on), "stalled" (its device does
            nothing for `amount` seconds) or "dead" (as by kill -9; another coordinator takes its place after `amount`
            seconds).
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
        if self.worker == COORDINATOR and self.kind != "dead":
            raise ConfigError(f"the coordinator cannot be {self.kind} here; give {COORDINATOR}:dead:SECONDS@AT")
        if (self.kind != "dead" or self.worker == COORDINATOR) and not 0 < self.amount < math.inf:
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
    workers = [*(worker_id for _, worker_id in deployment.workers), COORDINATOR]
    for fault in faults:
        if fault.worker not in workers:
            raise ConfigError(f"fault of {fault.worker!r}, which is not there; there are {', '.join(workers)}")
