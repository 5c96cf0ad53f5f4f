"""Reading tensors out of a Hugging Face directory: only those asked for, each checked by name and shape."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msi.errors import CheckpointError
from msi.models.files import read_json

Shape = tuple[int, ...]
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
    """One or many safetensors files.

    Args:
        report: called with the bytes of every tensor read, for progress bars.

    Raises:
        CheckpointError: no weights, or a file that the index names is missing or truncated.
    """

    def __init__(self, model_dir: Path, report: Callable[[int], None] = lambda num_bytes: None) -> None:
        self.bytes_read = 0
        self._model_dir = model_dir
        self._report = report
        self._files: dict[str, Any] = {}
        index_path = model_dir / "model.safetensors.index.json"
        if index_path.exists():
            weight_map = read_json(index_path).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index_path} has no weight_map")
            self._file_of = {str(name): str(file) for name, file in weight_map.items()}
        else:
            files = sorted(path.name for path in model_dir.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{model_dir} holds no safetensors weights; --load-format dummy invents some")
            self._file_of = {name: file for file in files for name in self._open(file, "its header").keys()}

    def has(self, name: str) -> bool:
        return name in self._file_of

    def first_of(self, *names: str) -> str:
        return next((name for name in names if name in self._file_of), names[0])

    def read(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(f"{self._model_dir} has no tensor {name}; expected one of shape {list(shape)}")
        try:
            stored = self._open(file, name).get_slice(name)
            found = tuple(stored.get_shape())
            if found != shape:
                raise CheckpointError(f"{self._model_dir / file}: {name} is {list(found)}; expected {list(shape)}")
            tensor: Tensor = stored[:] if rows is None else stored[rows[0] : rows[1]]
        except SafetensorError as error:
            raise CheckpointError(f"{self._model_dir / file}: {name} cannot be read: {error}") from error
        num_bytes = tensor.numel() * tensor.element_size()
        self.bytes_read += num_bytes
        self._report(num_bytes)
        return tensor

    def fingerprint(self) -> str:
        """sha256 over the names, shapes and dtypes of all tensors."""
        entries = []
        for name, file in sorted(self._file_of.items()):
            stored = self._open(file, name).get_slice(name)
            entries.append([name, list(stored.get_shape()), str(stored.get_dtype())])
        return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()

    def _open(self, file: str, wanted: str) -> Any:
        if file not in self._files:
            path = self._model_dir / file
            try:
                self._files[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} does not exist; {wanted} should be in it") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or not safetensors ({wanted}): {error}") from error
        return self._files[file]


class DummyCheckpoint:
    """Random weights from shapes alone, the same for the same name: for benchmarks without a checkpoint."""

    def __init__(self, report: Callable[[int], None] = lambda num_bytes: None) -> None:
        self.bytes_read = 0
        self._report = report

    def has(self, name: str) -> bool:
        return not name.endswith("_proj")  # the fused layout has no ".weight"

    def first_of(self, *names: str) -> str:
        return names[0]

    def read(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor:
        label = name
        if rows is not None:
            label, shape = f"{name}[{rows[0]}:{rows[1]}]", (rows[1] - rows[0], *shape[1:])
        if name.endswith(".bias"):
            tensor = torch.zeros(shape)
        elif len(shape) == 1:
            tensor = torch.ones(shape)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))
            tensor = torch.randn(shape, generator=generator) * 0.02
        num_bytes = tensor.numel() * tensor.element_size()
        self.bytes_read += num_bytes
        self._report(num_bytes)
        return tensor

    def fingerprint(self) -> str:
        return "dummy"
