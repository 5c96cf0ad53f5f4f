"""What an instance can be told: one frozen value that the command line and `Engine.local` both fill in."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msi.errors import ConfigError
from msi.parameters import Parameter, check_parameters, parameter, parameters_of, section_of
from msi.planner.pipeline import MAX_MICRO_BATCHES
from msi.planner.plan import Plan
from msi.precision import Precision
from msi.settings import (
    LIMITS,
    MODEL_AND_WORKERS,
    SLOT_ROWS,
    AttentionBalance,
    HostOptions,
    LinkShape,
    ModelSource,
    Rebalance,
    SchedulerLimits,
    ServiceLevel,
    SlowWorkers,
    Timeouts,
)

DIAGNOSIS = "looking into it"  # a heading of the command line's help
Workers = Annotated[int, range(1, 1025)]
MORE_WORKERS = 2  # of each role than at the start, by default: seats for them cost address space alone


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceOptions:
    """Options of one instance on this machine: its own parameters, and sections that travel to whom they concern.

    Attributes:
        max_attention_workers, max_expert_workers: memory for rows is laid out for so many; see `InstancePlan`.
        expert_redundancy, redundant_experts: see `msi.placement.place_with_replicas`.
        expert_popularity: see `msi.planner.expert_counts`; without it all experts are taken to be chosen alike.
        micro_batches: m, or 0 to choose by measurement.
        colocated: both roles in one process.
        plan: file of the plan that is run (see `with_plan`); the coordinator holds what is measured against it.
        plan_drift: how far T_a, T_e or T_c may part from the plan's, as a fraction, before the coordinator says so.
        trace: file for a Chrome trace.
        otlp_traces_endpoint: where spans go; see `msi.request_spans`.

    Raises:
        ConfigError: names the parameter, what was given and what is allowed.
    """

    source: ModelSource = ModelSource()
    attention_workers: Workers = parameter(1, "attention processes", metavar="N", group=MODEL_AND_WORKERS)
    expert_workers: Workers = parameter(1, "expert processes", metavar="N", group=MODEL_AND_WORKERS)
    max_attention_workers: Annotated[int, range(1025)] = parameter(
        0, "as many may be there while it runs; by default two more than at the start", metavar="N",
        group=MODEL_AND_WORKERS,
    )  # fmt: skip
    max_expert_workers: Annotated[int, range(1025)] = parameter(
        0, "as many may be there while it runs; by default two more than at the start", metavar="N",
        group=MODEL_AND_WORKERS,
    )  # fmt: skip
    expert_redundancy: Annotated[int, range(64)] = parameter(
        0, "replicas of each expert besides the first, on other expert workers, which stand in when one is lost",
        metavar="R", group=MODEL_AND_WORKERS,
    )  # fmt: skip
    redundant_experts: Annotated[int, range(2**16)] = parameter(
        0, "replicas on top of that, of experts that are chosen most", metavar="N", group=MODEL_AND_WORKERS
    )
    expert_popularity: Path | None = parameter(
        None, "how often each expert is chosen, as a JSON list, or one for each layer, or what msi-ctl placement "
        "--json printed: experts and replicas are placed by it at the start", metavar="FILE", group=MODEL_AND_WORKERS,
        file="read",
    )  # fmt: skip
    rebalance: Rebalance = Rebalance()
    balance: AttentionBalance = AttentionBalance()
    micro_batches: Annotated[int, range(MAX_MICRO_BATCHES + 1)] = parameter(
        0, "in flight per attention worker: 1 to 4, or auto, which measures", metavar="M", group=MODEL_AND_WORKERS,
        zero="auto",
    )  # fmt: skip
    colocated: bool = parameter(
        False, "both roles in one process: the baseline, best for small models", group=MODEL_AND_WORKERS
    )
    plan: Path | None = parameter(
        None, "run a plan of msi-plan -o, and watch its predictions", metavar="FILE", group=MODEL_AND_WORKERS,
        file="read",
    )  # fmt: skip
    plan_drift: Annotated[float, (0.0, 1e6)] = parameter(
        0.3, "say so when stage times part from the plan's by more than this fraction", metavar="F",
        group=MODEL_AND_WORKERS,
    )  # fmt: skip
    host: HostOptions = HostOptions()
    precision: Precision = Precision()
    limits: SchedulerLimits = SchedulerLimits()
    link: LinkShape = LinkShape()
    timeouts: Timeouts = Timeouts()
    service: ServiceLevel = ServiceLevel()
    slow: SlowWorkers = SlowWorkers()
    max_resumptions: Annotated[int, range(2**15)] = parameter(
        3, "how often a request goes on elsewhere when its attention worker is lost", metavar="N", group=LIMITS
    )
    trace: Path | None = parameter(
        None, "write a Chrome trace at the end", metavar="FILE", group=DIAGNOSIS, file="write"
    )

    otlp_traces_endpoint: str = parameter(
        "", "send OpenTelemetry spans of requests to URL, such as http://localhost:4318/v1/traces", metavar="URL",
        group=DIAGNOSIS, form=(r"(https?://\S{1,1000})?", "a URL that begins with http:// or https://"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_parameters(self)
        self.precision.check_is_built()
        if self.limits.max_num_batched_tokens > self.link.slot_rows:
            raise ConfigError(
                f"`max_num_batched_tokens` {self.limits.max_num_batched_tokens} is more than a slot's "
                f"{self.link.slot_rows} rows"
            )
        for role in ("attention", "expert"):
            most, at_first = getattr(self, f"max_{role}_workers"), getattr(self, f"{role}_workers")
            if most and most < at_first:
                raise ConfigError(f"`max_{role}_workers` {most} is less than `{role}_workers` {at_first}")
        if self.colocated and (self.attention_workers, self.expert_workers) != (1, 1):
            raise ConfigError("`colocated` is one process with both roles; leave the numbers of workers out")

    @property
    def max_workers(self) -> tuple[int, int]:
        """Attention and expert workers that there is room for."""
        if self.colocated:
            return 1, 1
        pairs = (
            (self.max_attention_workers, self.attention_workers), (self.max_expert_workers, self.expert_workers),
        )  # fmt: skip
        attention, expert = (most or MORE_WORKERS + at_first for most, at_first in pairs)
        return attention, expert

    @staticmethod
    def of(**given: Any) -> InstanceOptions:
        """From parameters by their names: keywords of `Engine.local`, or msi-launch's flags.

        Raises:
            ConfigError: a value is not allowed.
            TypeError: there is no such parameter; names the nearest.
        """
        known = [one.name for one in PARAMETERS]
        for name in sorted(set(given) - set(known)):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"did you mean {close[0]!r}? There are" if close else "there are"
            raise TypeError(f"there is no option {name!r}; {advice} {', '.join(sorted(known))}")
        return section_of(InstanceOptions, given)

    @property
    def chosen_transport(self) -> str:
        """The transport between workers that are all on this machine."""
        if self.host.transport != "auto":
            return self.host.transport
        from msi.net import shm  # whoever asks for help waits for nothing

        return "shm" if shm.is_available() is None else "tcp"

    @property
    def num_threads(self) -> int:
        """Torch threads of each worker."""
        if self.host.threads_per_worker:
            return self.host.threads_per_worker
        return max(1, (os.cpu_count() or 1) // max(self.attention_workers, self.expert_workers))

    def flags(self) -> list[str]:
        """This as command-line arguments of msi-launch, for child processes."""
        model = self.source.model
        arguments = [] if model is None else [f"./{model}" if str(model).startswith("-") else str(model)]
        for one in PARAMETERS:
            value = one.of(self)
            if one.name == "model" or value == one.default:
                continue
            if isinstance(value, bool):
                arguments.append(flag_of(one) if value else flag_of(one).replace("--", "--no-", 1))
            else:
                arguments.append(f"{flag_of(one)}={value}")
        return arguments


PARAMETERS = parameters_of(InstanceOptions)


def flag_of(one: Parameter) -> str:
    """What a parameter is called on a command line: the unit of a time is left out there."""
    return "--" + one.name.removesuffix("_s").replace("_", "-")


def with_plan(given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as given, and for those left out what the plan that they name says; `InstanceOptions.of` takes them.

    Raises:
        ConfigError: the plan cannot be read or run, or a parameter contradicts it.
    """
    path = given.get("plan")
    if path is None:
        return dict(given)
    from msi.planner.plan_file import read_plan_file  # with numpy, which few command lines need

    planned = planned_options(read_plan_file(Path(path)).plan, path)
    for name, value in planned.items():
        if name in given and given[name] != value:
            told = "auto" if given[name] == 0 else given[name]
            raise ConfigError(
                f"`{name}` {told} contradicts {path}, which has {value}; leave the option out, or write another plan"
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
