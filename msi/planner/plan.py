"""A plan: one deployment with what is predicted of it. The keys of its JSON are an interface."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from msi.errors import ConfigError
from msi.planner.pipeline import Stages

Kind = Literal["disaggregated", "colocated"]
Limit = Literal["tpot", "attention memory", "expert memory", "batch limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of the deployment.

    Attributes:
        input_len, output_len: tokens of the mean request.
        tpot_s: limit on the time per output token.

    Raises:
        ConfigError: names the number that is not above 0.
    """

    input_len: float
    output_len: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name, value in (("input_len", self.input_len), ("output_len", self.output_len)):
            if not 0 < value < math.inf:
                raise ConfigError(f"`{name}` {value:g}: give a length above 0 tokens")
        if not self.tpot_s > 0:
            raise ConfigError(f"`tpot_s` {self.tpot_s:g}: give a time above 0")

    @property
    def mean_len(self) -> float:
        """s: the mean context of a sequence that decodes."""
        return self.input_len + self.output_len / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One instance of a deployment; GPUs, memory and batch are the instance's.

    Attributes:
        kind: a colocated plan is one group of GPUs that does both: num_attention_nodes = num_expert_nodes = 1.
        baseline: of a colocated plan, the system it stands for; else "".
        t_attention_s, t_expert_s, t_comm_s: T_a, T_e, T_c of one micro-batch for one layer. T_a holds its share of
            the dense layers and of what comes once per pass; T_c one way.
        num_layers: L, the layers that have experts.
        batch_size: B, sequences in all micro-batches of all attention nodes.
        step_s: one pass from an empty pipeline to an empty one (the max form of Eq 5).
        tpot_s: one steady pass, L max(m T_f, T_a + T_e + 2 T_c): what throughput follows.
        attention_memory_bytes, expert_memory_bytes: per node, and what a node may plan with.
        limited_by: what keeps B from being one larger per micro-batch.
        num_instances: that fit into the counts of GPUs given.
    """

    kind: Kind
    baseline: str = ""
    attention_gpu: str
    expert_gpu: str
    tp_attention: int
    tp_expert: int
    num_attention_nodes: int
    num_expert_nodes: int
    experts_per_node: int
    num_micro_batches: int
    num_layers: int
    batch_size: int
    t_attention_s: float
    t_expert_s: float
    t_comm_s: float
    step_s: float
    tpot_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_cost: float
    tokens_per_s_per_watt: float
    attention_memory_bytes: float
    expert_memory_bytes: float
    attention_memory_limit_bytes: float
    expert_memory_limit_bytes: float
    limited_by: Limit
    num_instances: int
    threads_per_worker: int = 0

    @property
    def stages(self) -> Stages:
        return Stages(self.t_attention_s, self.t_expert_s, self.t_comm_s)

    @property
    def num_attention_gpus(self) -> int:
        return self.num_attention_nodes * self.tp_attention

    @property
    def num_expert_gpus(self) -> int:
        """0 for a colocated plan: its GPUs are counted once."""
        return 0 if self.kind == "colocated" else self.num_expert_nodes * self.tp_expert

    @property
    def num_gpus(self) -> int:
        return self.num_attention_gpus + self.num_expert_gpus

    @property
    def micro_batch(self) -> int:
        """b_a: sequences of one micro-batch on one attention node."""
        return self.batch_size // (self.num_micro_batches * self.num_attention_nodes)

    @property
    def attention_bubble(self) -> float:
        """Share of the steady pass in which an attention node's device idles."""
        return 1 - self.num_layers * self.num_micro_batches * self.t_attention_s / self.tpot_s

    @property
    def expert_bubble(self) -> float:
        return 1 - self.num_layers * self.num_micro_batches * self.t_expert_s / self.tpot_s

    def to_json(self) -> dict[str, Any]:
        derived = {
            "num_gpus": self.num_gpus,
            "attention_bubble": self.attention_bubble,
            "expert_bubble": self.expert_bubble,
        }
        return asdict(self) | derived


MAY_BE_ZERO = ("num_instances", "threads_per_worker")  # of the counts


def plan_from_json(values: Mapping[str, Any], source: str) -> Plan:
    """The inverse of `Plan.to_json`.

    Raises:
        ConfigError: names the key that is missing, of another type or out of range.
    """
    arguments: dict[str, Any] = {}
    for one in fields(Plan):
        if one.name not in values:
            raise ConfigError(f"{source}: {one.name} is missing; write the plan anew with msi-plan -o")
        value = values[one.name]
        kinds = {"int": (int,), "float": (int, float)}.get(str(one.type), (str,))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ConfigError(
                f"{source}: {one.name} is {value!r}; it must be {'a number' if str not in kinds else 'text'}"
            )
        if (words := {"Kind": get_args(Kind), "Limit": get_args(Limit)}.get(str(one.type))) and value not in words:
            raise ConfigError(f"{source}: {one.name} is {value!r}; it must be {' or '.join(words)}")
        if isinstance(value, int | float):
            is_positive = one.name == "tpot_s" or (one.type == "int" and one.name not in MAY_BE_ZERO)
            if not math.isfinite(value) or value < 0 or (is_positive and value == 0):
                allowed = "above 0" if is_positive else "not negative"
                raise ConfigError(f"{source}: {one.name} is {value!r}; it must be finite and {allowed}")
        arguments[one.name] = value
    return Plan(**arguments)
