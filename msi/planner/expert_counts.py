"""How often experts were chosen, from a file: what replicas at launch are planned by."""

from __future__ import annotations

import json
import math
from pathlib import Path

from msi.errors import ConfigError

KEY = "expert_rows"  # of what msi-ctl placement --json prints


def read_counts(path: Path) -> list[float]:
    """A JSON list of numbers of at least 0, or an object that has one as `expert_rows`, by expert.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read expert popularity from {path}: {error}") from error
    counts = found.get(KEY) if isinstance(found, dict) else found
    if (
        not isinstance(counts, list)
        or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in counts)
        or not all(math.isfinite(one) and one >= 0 for one in counts)
    ):
        raise ConfigError(
            f"{path} holds no list of numbers of at least 0, nor an object with one as {KEY!r}; give a weight or count "
            "for each expert"
        )
    return [float(one) for one in counts]


def check_counts(counts: list[float], num_experts: int, source: object) -> None:
    """Raises ConfigError: they are of another model."""
    if len(counts) != num_experts or not any(counts):
        raise ConfigError(
            f"{source} has {len(counts)} counts, {sum(one > 0 for one in counts)} of them above 0; this model has "
            f"{num_experts} experts: give a count for each, not all of them 0"
        )
