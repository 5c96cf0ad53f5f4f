"""Mixture-of-Experts serving with attention and experts on different workers.

from msi import Engine, SamplingParams
"""

from msi.engine import Engine
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
