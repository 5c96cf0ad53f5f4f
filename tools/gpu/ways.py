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


DEFAULT = Way()  # streams and Triton's kernels
PLAIN = Way("-plain", ", threads and torch's operators", {"cuda_queues": "threads", "cuda_kernels": "plain"})
THREADS = Way("-threads", ", threads", {"cuda_queues": "threads"})
OPERATORS = Way("-operators", ", torch's operators", {"cuda_kernels": "plain"})
GRAPHS = Way("-graphs", ", captured graphs", {"enforce_eager": False})
WAYS = (DEFAULT, PLAIN, THREADS, OPERATORS, GRAPHS)
