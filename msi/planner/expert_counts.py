"""How often experts were chosen, from a file: what replicas at launch are planned by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from msi.errors import ConfigError

KEY, LAYERS_KEY = "expert_rows", "layer_rows"  # of what msi-ctl placement --json prints


def read_counts(path: Path) -> list[list[float]]:
    """A JSON list of numbers of at least 0, by expert, of all layers, or a list of such lists, one for each layer; or
    an object that has either as `layer_rows` or `expert_rows`.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read expert popularity from {path}: {error}") from error
    counts: Any = (found.get(LAYERS_KEY) or found.get(KEY)) if isinstance(found, dict) else found
    layers = counts if isinstance(counts, list) and counts and isinstance(counts[0], list) else [counts]
    if not all(map(_is_counts, layers)):
        raise ConfigError(
            f"{path} holds no list of numbers of at least 0, nor one of such lists by layer, nor an object with either "
            f"as {KEY!r} or {LAYERS_KEY!r}; give a weight or count for each expert"
        )
    return [[float(one) for one in of_layer] for of_layer in layers]


def _is_counts(counts: object) -> bool:
    return isinstance(counts, list) and all(
        isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) and one >= 0 for one in counts
    )


def check_counts(counts: list[list[float]], num_experts: int, num_layers: int, source: object) -> None:
    """Raises ConfigError: they are of another model."""
    if len(counts) not in (1, num_layers):
        raise ConfigError(f"{source} has counts of {len(counts)} layers; this model has {num_layers} with experts")
    for of_layer in counts:
        if len(of_layer) != num_experts or not any(of_layer):
            raise ConfigError(
                f"{source} has {len(of_layer)} counts, {sum(one > 0 for one in of_layer)} of them above 0; this model "
                f"has {num_experts} experts: give a count for each, not all of them 0"
            )
