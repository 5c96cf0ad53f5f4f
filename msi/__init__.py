"""Mixture-of-Experts serving with attention and experts on different workers.

from msi import Engine, SamplingParams
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msi.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    InvalidRequest,
    ProtocolError,
    RequestFailed,
    TransportError,
    Unavailable,
)
from msi.types import Output, SamplingParams

if TYPE_CHECKING:
    from msi.engine import Engine

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Engine",
    "EngineError",
    "InvalidRequest",
    "Output",
    "ProtocolError",
    "RequestFailed",
    "SamplingParams",
    "TransportError",
    "Unavailable",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """The engine is imported when it is first asked for: msi-plan and the command lines do without."""
    if name == "Engine":
        from msi.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
