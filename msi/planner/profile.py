"""What stages take on one machine, as measured by `msi-profile`.

A profile is a JSON file; `read_profile` refuses one that is not whole, with a sentence. `msi.planner.profiled_costs`
says what follows for other sizes and for deployments. Knows no models and no clocks.

    {"schema_version": 1, "kind": "msi-profile", "device": "cpu", "host": "...", "num_cores": 2, "date": "2026-11-22",
     "model": "...", "config_digest": sha256 of its config.json, "dtype": "float32",
     "precision": {"weights": "float32", "kv_cache": "float32", "rows": "float32", "compute": "float32"},
     "attention": [{"threads": 1, "contention": "alone", "num_tokens": 8, "context_len": 128, "seconds": 0.002}, ...],
     "expert": [{"threads": 1, "contention": "alone", "num_experts": 8, "num_active_experts": 4, "num_expert_rows": 8,
                 "seconds": 0.012}, ...],
     "pass": [{"threads": 1, "contention": "alone", "num_seqs": 8, "seconds": 0.011}, ...],
     "comm": [{"transport": "shm", "num_bytes": 33000, "seconds": 0.0003}, ...],
     "control": {"scheduling": [{"num_seqs": 8, "seconds": 0.0005}, ...],
                 "routing": [{"num_tokens": 8, "active_experts": 6.2}, ...]}}

Contention is "alone", or "overlapped": while a worker of the other side computes all the time. `num_experts` are those
on the measured node; its times are those of any node with as many *active* experts. Sizes ascend within a list (outer
first: num_tokens, then context_len; num_active_experts, then num_expert_rows) for each setting. `precision`
(without it, everything is in `dtype`), `control` and what is in that are optional.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from msi.errors import ConfigError
from msi.planner.interpolation import Curve, Size, Surface, fit_line, like
from msi.precision import Precision

SCHEMA_VERSION = 1
KIND = "msi-profile"
CONTENTIONS = ("alone", "overlapped")
TRANSPORTS = ("inproc", "shm", "tcp", "rdma")


@dataclass(frozen=True, slots=True)
class AttentionPoint:
    """T_a of one layer: `num_tokens` sequences that decode with `context_len` tokens each in the KV cache."""

    threads: int
    contention: str
    num_tokens: int
    context_len: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ExpertPoint:
    """T_e of one layer: `num_expert_rows` (token, expert) pairs spread over `num_active_experts`."""

    threads: int
    contention: str
    num_experts: int
    num_active_experts: int
    num_expert_rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PassPoint:
    """Once per pass: embedding, LM head and sampling."""

    threads: int
    contention: str
    num_seqs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CommPoint:
    """T_c: from the end of one side's work to the start of the other's, wake-ups included."""

    transport: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SchedulingPoint:
    """Once per pass, between two micro-batches of a lane: what the scheduler takes."""

    num_seqs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RoutingPoint:
    """Of all experts of a layer, how many at least one of `num_tokens` decoding sequences chose, in the mean.

    Routers are not even: what a model leaves out, nobody reads.
    """

    num_tokens: int
    active_experts: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One machine and one model. `passes` is "pass" in the file; `scheduling` and `routing` are under "control"."""

    device: str
    host: str
    num_cores: int
    date: str
    model: str
    config_digest: str
    precision: Precision
    attention: tuple[AttentionPoint, ...]
    expert: tuple[ExpertPoint, ...]
    passes: tuple[PassPoint, ...]
    comm: tuple[CommPoint, ...]
    scheduling: tuple[SchedulingPoint, ...] = ()
    routing: tuple[RoutingPoint, ...] = ()

    @property
    def num_experts(self) -> int:
        """Of a layer of the model."""
        return max(point.num_experts for point in self.expert)

    def active_experts(self, num_experts: Size, num_tokens: Size) -> Size:
        """Of so many experts on a node, how many at least one of so many tokens chooses, as the router was seen to.

        Raises:
            ConfigError: the profile has no routing.
        """
        if not self.routing:
            raise ConfigError(f"the profile of {self.model} has no routing; measure it with msi-profile")
        total = self.num_experts
        active = Curve({point.num_tokens: point.active_experts for point in self.routing}).at(num_tokens)
        return like(np.minimum(active, total) * num_experts / total)

    def fits(self, *, threads: int, context_len: int, contention: str = "alone") -> Fits:
        """k1 to k4 of the paper, by least squares over the measured sizes.

        Args:
            context_len: of the sequences, which T_a depends on too; between measured lengths it is interpolated.

        Raises:
            ConfigError: nothing was measured with so many threads.
        """
        attention = select(self, "attention", self.attention, threads, contention)
        surface = Surface({(point.num_tokens, point.context_len): point.seconds for point in attention})
        sizes = sorted({point.num_tokens for point in attention})
        k1, k2 = fit_line((size, surface.at(size, context_len)) for size in sizes)
        expert = select(self, "expert", self.expert, threads, contention)
        most = max(point.num_active_experts for point in expert)
        busy = [point for point in expert if point.num_active_experts == most]
        k3, k4 = fit_line((point.num_expert_rows / most, point.seconds / most) for point in busy)
        return Fits(k1, k2, k3, k4)


@dataclass(frozen=True, slots=True)
class Fits:
    """The paper's T_a = k1 b + k2 and T_e = k3 b + k4, in seconds; b: tokens of an attention node, rows of an expert.

    The paper puts one expert on a node: k3 and k4 are of one of the experts that were measured together.
    """

    k1: float
    k2: float
    k3: float
    k4: float


# -- the file --------------------------------------------------------------------------------------------------------


def read_profile(source: str | Path | Mapping[str, Any]) -> Profile:
    """A profile from its file, or from what `json` made of it.

    Raises:
        ConfigError: it is not a whole profile of this version; names the file and the key.
    """
    if isinstance(source, Mapping):
        return _Reader("the profile").read(source)
    where = str(source)
    try:
        values = json.loads(Path(source).read_text())
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON, or only part of it ({error}); measure it again") from error
    return _Reader(where).read(values)


def to_json(profile: Profile) -> dict[str, Any]:
    """What `read_profile` takes; `json.dump` it."""
    values = asdict(profile)
    lists = {name: [asdict(point) for point in values_of] for name, values_of in _lists(profile).items()}
    described = {name: values[name] for name in _DESCRIPTION} | {"dtype": profile.precision.compute}
    control = {name: [asdict(point) for point in getattr(profile, name)] for name in ("scheduling", "routing")}
    return {"schema_version": SCHEMA_VERSION, "kind": KIND, **described, "precision": values["precision"],
            **lists, "control": control}  # fmt: skip


PRECISIONS = tuple(one.name for one in fields(Precision))
_DESCRIPTION = {
    "device": str, "host": str, "num_cores": int, "date": str, "model": str, "config_digest": str,
}  # fmt: skip
P = TypeVar("P", AttentionPoint, ExpertPoint, PassPoint, CommPoint, SchedulingPoint, RoutingPoint)


def _lists(profile: Profile) -> dict[str, Sequence[Any]]:
    return {
        "attention": profile.attention, "expert": profile.expert, "pass": profile.passes, "comm": profile.comm,
    }  # fmt: skip


class _Reader:
    """Checks every value that it takes; `where` begins each sentence."""

    def __init__(self, where: str) -> None:
        self._where = where

    def read(self, values: object) -> Profile:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{self._where} holds {type(values).__name__}; a profile is a JSON object")
        kind, version = values.get("kind"), values.get("schema_version")
        if kind != KIND:
            raise ConfigError(f"{self._where} has kind {kind!r}; a profile has {KIND!r}")
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"{self._where} has schema_version {version!r}, and {SCHEMA_VERSION} is read here; measure it again"
            )
        described = {name: self._value(values, name, type_) for name, type_ in _DESCRIPTION.items()}
        described["precision"] = self._precision(values)
        control = values.get("control", {})
        if not isinstance(control, Mapping):
            raise ConfigError(f"{self._where}: control is {control!r}; it must be an object")
        return Profile(
            **described,
            attention=self._points(values, "attention", AttentionPoint),
            expert=self._points(values, "expert", ExpertPoint),
            passes=self._points(values, "pass", PassPoint),
            comm=self._points(values, "comm", CommPoint),
            scheduling=self._points(control, "scheduling", SchedulingPoint) if control.get("scheduling") else (),
            routing=self._points(control, "routing", RoutingPoint) if control.get("routing") else (),
        )

    def _precision(self, values: Mapping[str, Any]) -> Precision:
        """Profiles had one dtype for everything once."""
        named = values.get("precision") or dict.fromkeys(PRECISIONS[:4], self._value(values, "dtype", str))
        if not isinstance(named, Mapping) or set(named) | {"quantization", "answers"} != set(PRECISIONS):
            raise ConfigError(f"{self._where}: precision is {named!r}; it must name {', '.join(PRECISIONS)}")
        try:
            return Precision.read(named)
        except ConfigError as error:
            raise ConfigError(f"{self._where}: {error}") from error

    def _value(self, values: Mapping[str, Any], name: str, type_: type, prefix: str = "") -> Any:
        if name not in values:
            raise ConfigError(f"{self._where} has no {prefix}{name}; is the file whole?")
        value = values[name]
        if type_ is float:
            ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            allowed = "a number above 0"
        elif type_ is int:
            ok, allowed = isinstance(value, int) and not isinstance(value, bool) and value > 0, "an integer above 0"
        else:
            ok, allowed = isinstance(value, str), "a text"
        if not ok:
            raise ConfigError(f"{self._where}: {prefix}{name} is {value!r}; it must be {allowed}")
        return value

    def _points(self, values: Mapping[str, Any], name: str, point_type: type[P]) -> tuple[P, ...]:
        listed = values.get(name)
        if name not in values:
            raise ConfigError(f"{self._where} has no {name}; is the file whole?")
        if not isinstance(listed, list) or not listed:
            raise ConfigError(f"{self._where}: {name} has no points; measure at least one")
        points: list[P] = []
        last: dict[tuple[object, ...], tuple[int, ...]] = {}
        for index, one in enumerate(listed):
            at = f"{name}[{index}]"
            if not isinstance(one, Mapping):
                raise ConfigError(f"{self._where}: {at} is {one!r}; it must be an object")
            found = {
                field.name: self._value(one, field.name, _TYPES[str(field.type)], f"{at}.")
                for field in fields(point_type)
            }
            self._check_names(found, at)
            setting = tuple(found[key] for key in found if key in _SETTINGS)
            size = tuple(value for key, value in found.items() if key not in _SETTINGS and isinstance(value, int))
            if size <= last.get(setting, ()):
                raise ConfigError(f"{self._where}: the sizes of {at} do not ascend: {size} after {last[setting]}")
            last[setting] = size
            points.append(point_type(**found))
        return tuple(points)

    def _check_names(self, found: Mapping[str, Any], at: str) -> None:
        for name, allowed in (("contention", CONTENTIONS), ("transport", TRANSPORTS)):
            if name in found and found[name] not in allowed:
                raise ConfigError(f"{self._where}: {at}.{name} is {found[name]!r}; it must be {' or '.join(allowed)}")
        if "num_active_experts" in found:
            active, most = found["num_active_experts"], min(found["num_experts"], found["num_expert_rows"])
            if active > most:
                raise ConfigError(
                    f"{self._where}: {at} has {active} active experts, more than its experts or its rows ({most})"
                )


_TYPES: dict[str, type] = {"int": int, "float": float, "str": str}
_SETTINGS = ("threads", "contention", "num_experts", "transport")


def select(profile: Profile, name: str, points: Sequence[Any], threads: int, contention: str) -> list[Any]:
    """Those of a setting. Raises ConfigError: there are none."""
    found = [point for point in points if (point.threads, point.contention) == (threads, contention)]
    if not found:
        measured = ", ".join(dict.fromkeys(f"{point.threads} {point.contention}" for point in points))
        raise ConfigError(
            f"the profile has no {name} times of {profile.model} for {threads} threads {contention}, but {measured}. "
            f"Measure them with msi-profile --threads {threads}"
        )
    return found
