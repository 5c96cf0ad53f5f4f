"""The hardware catalogue: GPUs and models by name, from catalogue.toml and a user's own file of the same form."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from msi.errors import ConfigError, shown
from msi.planner.model_shape import ModelShape, model_shape_from_table

T = TypeVar("T")
BUILT_IN = Path(__file__).parent / "catalogue.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device, nominal figures.

    Attributes:
        price: in units of an L20 (Table 3 of the paper).
        network_bytes_per_s: of one GPU to other nodes, one way.
        intra_node_bytes_per_s: of one GPU to those of its node, one way.
        gpus_per_node: limit of a tensor-parallel group.
    """

    name: str
    price: float
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float
    power_w: float
    network_bytes_per_s: float
    intra_node_bytes_per_s: float
    gpus_per_node: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# catalogue key -> (field, its unit)
UNITS = {
    "price": ("price", 1.0),
    "memory_gb": ("memory_bytes", 1e9),
    "memory_gb_per_s": ("memory_bytes_per_s", 1e9),
    "bf16_tflops": ("flops_per_s", 1e12),
    "power_w": ("power_w", 1.0),
    "network_gbit_per_s": ("network_bytes_per_s", 1e9 / 8),
    "intra_node_gb_per_s": ("intra_node_bytes_per_s", 1e9),
    "gpus_per_node": ("gpus_per_node", 1),
}


def gpu_from_table(name: str, table: Mapping[str, Any], source: str) -> Gpu:
    """Raises ConfigError: names the file, the GPU and the key that is missing, unknown or not above 0."""
    where = f"{source}: GPU {name}"
    for key, value in table.items():
        if key not in UNITS:
            raise ConfigError(f"{where}: unknown key {key!r}; allowed: {', '.join(UNITS)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value <= 0 or (key == "gpus_per_node" and not isinstance(value, int)):
            kind = "an integer" if key == "gpus_per_node" else "a number"
            raise ConfigError(f"{where}: {key} is {value!r}; it must be {kind} above 0")
    if missing := [key for key in UNITS if key not in table]:
        raise ConfigError(f"{where}: {', '.join(missing)} missing")
    return Gpu(name=name, **{field: table[key] * unit for key, (field, unit) in UNITS.items()})


@dataclass(frozen=True, slots=True)
class Catalogue:
    gpus: Mapping[str, Gpu]
    models: Mapping[str, ModelShape]

    def gpu(self, name: str) -> Gpu:
        """Raises ConfigError: unknown; offers the nearest names."""
        return _known(self.gpus, name, "GPU")

    def model(self, name: str) -> ModelShape:
        """Raises ConfigError: unknown; offers the nearest names."""
        return _known(self.models, name, "model")


def read_catalogue(extra: Path | None = None) -> Catalogue:
    """The built-in catalogue, and what a file adds to it or replaces.

    Raises:
        ConfigError: names the file, and the entry and key where one is wrong.
    """
    gpus: dict[str, Gpu] = {}
    models: dict[str, ModelShape] = {}
    for path in (BUILT_IN, extra):
        if path is None:
            continue
        tables = _tables(path)
        gpus |= {name.lower(): gpu_from_table(name, table, str(path)) for name, table in tables["gpus"].items()}
        models |= {
            name.lower(): model_shape_from_table(name, table, str(path)) for name, table in tables["models"].items()
        }
    return Catalogue(gpus, models)


def _tables(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for section, entries in values.items():
        if section not in ("gpus", "models"):
            raise ConfigError(f"{path}: unknown section [{section}]; allowed: [gpus.NAME], [models.NAME]")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ConfigError(f"{path}: [{section}] must hold tables: [{section}.NAME]")
    return {"gpus": values.get("gpus", {}), "models": values.get("models", {})}


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence's end: the names that look like this one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def _known(entries: Mapping[str, T], name: str, kind: str) -> T:
    entry = entries.get(name.lower())
    if entry is None:
        raise ConfigError(f"no {kind} is called {shown(name)}; {nearest(name, entries)} (`catalogue` FILE adds others)")
    return entry
