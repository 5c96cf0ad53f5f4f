"""What the planner is asked: a model, a workload, the hardware that is there, and what counts as best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msi.errors import ConfigError
from msi.planner.assumptions import DEFAULTS, Assumptions
from msi.planner.hardware import Gpu
from msi.planner.model_shape import ModelShape
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.planner.plan import Plan, Workload
from msi.planner.profile import Profile

Objective = Literal["gpu", "cost", "watt", "cluster"]
OBJECTIVES: tuple[Objective, ...] = ("gpu", "cost", "watt", "cluster")
TP_SIZES = (1, 2, 4, 8)
MAX_MICRO_BATCH = 1 << 16  # sequences of one micro-batch on one attention node


@dataclass(frozen=True, slots=True)
class Pool:
    """GPUs of one type that are there."""

    gpu: Gpu
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"{self.count} GPUs of type {self.gpu.name}: give at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan must keep to beyond memory and TPOT.

    Attributes:
        tp_sizes: GPUs of a tensor-parallel group that are tried.
        micro_batches: values of m that are tried.
        max_micro_batch: sequences of one micro-batch on one attention node.
        max_batch: sequences of an instance; 0 for any number.
    """

    tp_sizes: tuple[int, ...] = TP_SIZES
    micro_batches: tuple[int, ...] = tuple(range(1, MAX_MICRO_BATCHES + 1))
    max_micro_batch: int = MAX_MICRO_BATCH
    max_batch: int = 0


@dataclass(frozen=True, slots=True)
class StageFactors:
    """What T_a, T_e and T_c were measured to be, over what the model or profile says."""

    attention: float = 1.0
    expert: float = 1.0
    comm: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to search: a model for a workload, on these GPUs.

    Attributes:
        attention, expert: types and counts that each side may use; a type in both is shared: as many GPUs as the
            larger of its two counts.
        profile: of the one machine that is planned for, in place of the roofline.
        factors: corrections from a running instance.
    """

    model: ModelShape
    workload: Workload
    attention: tuple[Pool, ...]
    expert: tuple[Pool, ...]
    objective: Objective = "gpu"
    given: Assumptions = DEFAULTS
    limits: Limits = Limits()
    profile: Profile | None = None
    factors: StageFactors = StageFactors()


def score_of(plan: Plan, objective: Objective) -> float:
    """Tokens per second over what the objective counts."""
    match objective:
        case "gpu":
            return plan.tokens_per_s_per_gpu
        case "cost":
            return plan.tokens_per_s_per_cost
        case "watt":
            return plan.tokens_per_s_per_watt
        case "cluster":
            return plan.tokens_per_s * plan.num_instances
