"""Packages that tests compare with and nothing else needs: where one is missing, the test that asks is skipped."""

from __future__ import annotations

from typing import Any

import pytest


def transformers(module: str = "transformers") -> Any:
    """The package, or one of its modules."""
    pytest.importorskip("transformers", reason="transformers is not installed, and this compares with it")
    pytest.importorskip("transformers.utils.logging").disable_progress_bar()
    return pytest.importorskip(module)
