"""Kernels for GPUs, in Triton; each is told memory and sizes, and held to the plain torch of `msi.kernels` by tests.

Nothing here is imported before a device asks for it: Triton decides at its import whether it compiles or interprets.
"""

from __future__ import annotations

import importlib.util


def why_unavailable() -> str | None:
    """A sentence where there is no Triton, else None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install 'msi[cuda]'` brings it"
    return None
