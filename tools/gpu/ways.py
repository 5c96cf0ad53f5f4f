"""The ways in which an instance uses a GPU, as options of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Way:
    """By the end of a section's name.

    Attributes:
        label: in the names of rows.
        is_rounded: rows, keys and values are, so tokens are those of a CPU that is told the same, and not those of
            transformers.
    """

    ending: str = ""
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    is_rounded: bool = False


DEFAULT = Way()  # streams and Triton's kernels
PLAIN = Way("-plain", ", threads and torch's operators", {"cuda_queues": "threads", "cuda_kernels": "plain"})
THREADS = Way("-threads", ", threads", {"cuda_queues": "threads"})
OPERATORS = Way("-operators", ", torch's operators", {"cuda_kernels": "plain"})
GRAPHS = Way("-graphs", ", captured graphs", {"enforce_eager": False})
EIGHT_BITS = Way(
    "-eight-bits", ", all in eight bits",
    {"rows_dtype": "fp8", "answers_dtype": "fp8", "kv_cache_dtype": "fp8", "quantization": "fp8"}, is_rounded=True,
)  # fmt: skip
WAYS = (DEFAULT, PLAIN, THREADS, OPERATORS, GRAPHS, EIGHT_BITS)
