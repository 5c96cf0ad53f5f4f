"""What of a table of cases runs every day; `tools/check --fast` leaves out the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], keep: int = 1) -> list[Any]:
    """For `parametrize`: all but the first `keep` are marked slow. A tuple is a case's several values."""
    return [
        value
        if index < keep
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for index, value in enumerate(values)
    ]
