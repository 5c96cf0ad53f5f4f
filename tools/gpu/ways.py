"""The ways in which an instance uses a GPU, as options of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Way:
    """By the end of a section's name.

    Attributes:
        label: in the names of rows.
    """

    ending: str = ""
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)


DEFAULT = Way()
KERNELS = Way("-triton", ", Triton's kernels", {"cuda_kernels": "triton"})
STREAMS = Way("-streams", ", streams", {"cuda_queues": "streams"})
BOTH = Way("-fast", ", streams and Triton's kernels", {"cuda_queues": "streams", "cuda_kernels": "triton"})
WAYS = (DEFAULT, BOTH, KERNELS, STREAMS)
