"""What of a table of cases runs every day; `tools/check --fast` leaves out the rest.

With MSI_THOROUGH=1 more seeds and layouts are tried than the full check has time for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

IS_THOROUGH = os.environ.get("MSI_THOROUGH") == "1"
NUM_SEEDS = 100 if IS_THOROUGH else 8


only_thorough = pytest.mark.skipif(not IS_THOROUGH, reason="MSI_THOROUGH=1 tries it")


def mostly_slow(values: Iterable[Any], keep: int = 1) -> list[Any]:
    """For `parametrize`: all but the first `keep` are marked slow. A tuple is a case's several values."""
    return [
        value
        if index < keep
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for index, value in enumerate(values)
    ]


def mostly_thorough(values: Iterable[Any], keep: int = 1) -> list[Any]:
    """For `parametrize`: only MSI_THOROUGH=1 tries all but the first `keep`. A tuple is a case's several values."""
    return [
        value if index < keep else thorough(*(value if isinstance(value, tuple) else (value,)))
        for index, value in enumerate(values)
    ]


def thorough(*value: Any) -> Any:
    """A case that only MSI_THOROUGH=1 tries."""
    return pytest.param(*value, marks=[pytest.mark.slow, only_thorough])


SOME_FAMILIES = ["mixtral", *map(thorough, ["glm4", "qwen2", "qwen3", "olmoe", "dbrx", "gpt_oss"])]
