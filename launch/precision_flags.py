"""What msi-plan and msi-profile are told of what may be in eight bits, by msi-launch's flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from msi.precision import AUTO, FP8, FP8_FIELDS, Precision

from .command_line import one_of


def add_eight_bits(add: Callable[..., Any]) -> None:
    """Args: add: of a group of a command line, `add_argument`."""
    what = {
        "kv_cache": "keys and values",
        "rows": "rows on their way to the experts",
        "answers": "the experts' answers",
    }
    for name, field in FP8_FIELDS.items():
        add(f"--{name.replace('_', '-')}", type=one_of(AUTO, FP8), metavar="D", default=AUTO,
            help=f"of {what[field]}: auto, which is --dtype, or fp8")  # fmt: skip


def with_eight_bits(precision: Precision, values: argparse.Namespace) -> Precision:
    """As told by those flags."""
    return replace(precision, **{field: FP8 for name, field in FP8_FIELDS.items() if getattr(values, name) == FP8})
