"""Mixture-of-Experts serving with attention and experts on different workers.

from msi import LLM, Engine, SamplingParams
"""

from __future__ import annotations

import importlib
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
from msi.structured_outputs import StructuredOutputs
from msi.types import Output, SamplingParams

if TYPE_CHECKING:
    from msi.engine import Engine
    from msi.offline.llm import LLM
    from msi.offline.outputs import CompletionOutput, RequestOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineError",
    "InvalidRequest",
    "Output",
    "ProtocolError",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "TransportError",
    "Unavailable",
    "__version__",
]


_LATER = {
    "Engine": "msi.engine",
    "LLM": "msi.offline.llm",
    "CompletionOutput": "msi.offline.outputs",
    "RequestOutput": "msi.offline.outputs",
}


def __getattr__(name: str) -> Any:
    """The engine is imported when it is first asked for: msi-plan and the command lines do without."""
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
