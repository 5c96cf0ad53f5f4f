"""Reading tensors out of a Hugging Face directory: only those asked for, each checked by name and shape."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msi.errors import CheckpointError
from msi.models.tensor_index import Shape, TensorIndex

Rows = tuple[int, int]  # from, to


class TensorSource(Protocol):
    """Where weights come from."""

    bytes_read: int

    def first_of(self, *names: str) -> str:
        """The first of these names that exists, else the first of all: reading it then says what is missing."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor:
        """One tensor, which has this shape; of its first dimension only `rows`, where given.

        Raises:
            CheckpointError: missing, truncated or misshapen; names the tensor.
        """


class Checkpoint:
    """The safetensors files of a model directory.

    Args:
        report: called with the bytes of every tensor read, for progress bars.

    Raises:
        CheckpointError: no weights that are served, or a file is missing, truncated or damaged.
    """

    def __init__(self, model_dir: Path, report: Callable[[int], None] = lambda num_bytes: None) -> None:
        self.bytes_read = 0
        self.index = TensorIndex(model_dir)
        self._report = report
        self._files: dict[Path, Any] = {}

    def has(self, name: str) -> bool:
        return self.index.has(name)

    def first_of(self, *names: str) -> str:
        return self.index.first_of(*names)

    def read(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor:
        file = self.index.require(name, shape).file
        try:
            stored = self._open(file).get_slice(name)
            tensor: Tensor = stored[:] if rows is None else stored[rows[0] : rows[1]]
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:  # whatever the libraries make of damage
            raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
        num_bytes = tensor.numel() * tensor.element_size()
        self.bytes_read += num_bytes
        self._report(num_bytes)
        return tensor

    def fingerprint(self) -> str:
        """sha256 over the names, shapes and dtypes of all tensors."""
        entries = [[name, list(stored.shape), stored.dtype] for name, stored in sorted(self.index.tensors.items())]
        return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(file, framework="pt")
        return self._files[file]


DRAWN = 1_048_573  # of a dummy's values, a prime: rows are of lengths that it is no multiple of, and differ


class DummyCheckpoint:
    """Random weights from shapes alone, the same for the same name: for benchmarks without a checkpoint.

    A large tensor repeats what is drawn for its start: drawing all of it takes many times as long.

    Args:
        dtype: of the tensors.
    """

    def __init__(
        self, report: Callable[[int], None] = lambda num_bytes: None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.bytes_read = 0
        self._dtype = dtype
        self._report = report

    def has(self, name: str) -> bool:
        return False  # of layouts to choose from, the first

    def first_of(self, *names: str) -> str:
        return names[0]

    def read(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor:
        label = name
        if rows is not None:
            label, shape = f"{name}[{rows[0]}:{rows[1]}]", (rows[1] - rows[0], *shape[1:])
        if name.endswith(".bias"):
            tensor = torch.zeros(shape, dtype=self._dtype)
        elif len(shape) == 1:
            tensor = torch.ones(shape, dtype=self._dtype)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))
            num_values = math.prod(shape)
            drawn = torch.randn(min(num_values, DRAWN), generator=generator).mul_(0.02).to(self._dtype)
            tensor = drawn.repeat(-(-num_values // DRAWN))[:num_values].view(shape)
        num_bytes = tensor.numel() * tensor.element_size()
        self.bytes_read += num_bytes
        self._report(num_bytes)
        return tensor

    def fingerprint(self) -> str:
        return "dummy"
