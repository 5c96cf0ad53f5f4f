"""plan.json: one plan, what it was chosen for, and everything that a later choice needs to be made the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from msi.errors import ConfigError
from msi.planner.assumptions import Assumptions
from msi.planner.hardware import Gpu
from msi.planner.model_shape import model_shape_from_json
from msi.planner.plan import Plan, Workload, plan_from_json
from msi.planner.profile import read_profile
from msi.planner.profile import to_json as profile_to_json
from msi.planner.task import Limits, Pool, Task

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class PlanFile:
    """What `msi-plan -o` writes and `msi-launch --plan` runs.

    Attributes:
        fingerprint: sha256 of the model's canonical config.json; "" for a model known by name only.
        task: what the plan answers, so that the coordinator can ask again.
    """

    plan: Plan
    task: Task
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        entry = {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint}
        return entry | self.plan.to_json() | {"task": task_to_json(self.task)}


def task_to_json(task: Task) -> dict[str, Any]:
    return {
        "model": task.model.to_json(),
        "workload": asdict(task.workload),
        "attention": [{"gpu": pool.gpu.to_json(), "count": pool.count} for pool in task.attention],
        "expert": [{"gpu": pool.gpu.to_json(), "count": pool.count} for pool in task.expert],
        "objective": task.objective,
        "assumptions": task.given.to_json(),
        "limits": asdict(task.limits),
        "profile": None if task.profile is None else profile_to_json(task.profile),
    }


def read_plan_file(path: Path) -> PlanFile:
    """Raises ConfigError: it cannot be read, is of another schema version, or is not whole; names the key."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a whole JSON file ({error}); write it anew with msi-plan -o") from error
    if not isinstance(values, dict) or "schema_version" not in values:
        raise ConfigError(f"{path} is no plan: it has no schema_version; write one with msi-plan -o")
    if values["schema_version"] != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema version {values['schema_version']!r}, this msi reads {SCHEMA_VERSION}; "
            "write it anew with msi-plan -o"
        )
    plan = plan_from_json(values, str(path))
    fingerprint = values.get("fingerprint")
    if not isinstance(fingerprint, str):
        raise ConfigError(f"{path}: fingerprint is {fingerprint!r}; it must be text")
    try:
        task = task_from_json(values["task"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: its task is not whole ({error}); write it anew with msi-plan -o") from error
    return PlanFile(plan, task, fingerprint)


def task_from_json(values: Mapping[str, Any]) -> Task:
    """The inverse of `task_to_json`. Raises KeyError, TypeError, ValueError or ConfigError."""
    return Task(
        model=model_shape_from_json(values["model"]),
        workload=Workload(**values["workload"]),
        attention=tuple(_pool(pool) for pool in values["attention"]),
        expert=tuple(_pool(pool) for pool in values["expert"]),
        objective=values["objective"],
        given=_assumptions(values["assumptions"]),
        limits=Limits(**{name: _tuples(value) for name, value in values["limits"].items()}),
        profile=None if values["profile"] is None else read_profile(values["profile"]),
    )


def _pool(values: Mapping[str, Any]) -> Pool:
    return Pool(Gpu(**values["gpu"]), values["count"])


def _assumptions(values: Mapping[str, Any]) -> Assumptions:
    return Assumptions(**{one.name: _tuples(values[one.name]) for one in fields(Assumptions)})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def check_model(file: PlanFile, name: str, digest: str, source: str) -> None:
    """Raises ConfigError: the plan is for another model than the one of this name and config digest."""
    if file.fingerprint and file.fingerprint != digest:
        raise ConfigError(
            f"{source} is for {file.task.model.name} (config.json {file.fingerprint[:12]}), and this model is {name} "
            f"({digest[:12]}); plan again with msi-plan"
        )
    if not file.fingerprint:
        raise ConfigError(
            f"{source} is for {file.task.model.name}, known by name only; plan with the model's directory to run it"
        )
