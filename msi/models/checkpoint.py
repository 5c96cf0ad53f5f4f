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
from msi.kernels import NONE, SCALE_BLOCK
from msi.kernels.quantized import Quantized, in_float8, quantize
from msi.models.tensor_index import Shape, TensorIndex

Rows = tuple[int, int]  # from, to


class TensorSource(Protocol):
    """Where weights come from."""

    bytes_read: int

    def first_of(self, *names: str) -> str:
        """The first of these names that exists, else the first of all: reading it then says what is missing."""

    def has(self, name: str) -> bool: ...

    def read(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor:
        """One tensor, which has this shape; of its first dimension only `rows`, where given. Unpacked to float32, where
        it is quantised.

        Raises:
            CheckpointError: missing, truncated or misshapen; names the tensor.
        """

    def read_matrix(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor | Quantized:
        """A matrix, or of a stack [experts, n, depth] the one that `rows` are of, as it is stored. Raises as `read`."""


class Checkpoint:
    """The safetensors files of a model directory.

    Args:
        report: called with the bytes of every tensor read, for progress bars.
        stored_as, has_mxfp4: as `ModelConfig` has it, of matrices and of experts.

    Raises:
        CheckpointError: no weights that are served, or a file is missing, truncated or damaged.
    """

    def __init__(
        self,
        model_dir: Path,
        report: Callable[[int], None] = lambda num_bytes: None,
        stored_as: str = NONE,
        has_mxfp4: bool = False,
    ) -> None:
        self.bytes_read = 0
        self.index = TensorIndex(model_dir, stored_as, has_mxfp4)
        self._report = report
        self._files: dict[Path, Any] = {}

    def has(self, name: str) -> bool:
        return self.index.has(name)

    def first_of(self, *names: str) -> str:
        return self.index.first_of(*names)

    def read(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor:
        stored = self.index.require(name, shape)
        if self.index.is_quantised(name):
            matrix = self.read_matrix(name, shape, rows)
            assert isinstance(matrix, Quantized), name
            return matrix.dequantized(torch.float32)
        return self._read(stored.file, name, rows)

    def read_matrix(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor | Quantized:
        stored = self.index.require(name, shape)
        if not self.index.is_quantised(name):
            matrix = self.read(name, shape, rows)
            return matrix if matrix.dim() == 2 else matrix[0]
        values = self._read(stored.file, name, rows)
        scales_name, of_scales = self.index.scales_of(name)
        scales = self._read(of_scales.file, scales_name, _scale_rows(of_scales.shape, shape, rows))
        if values.dim() == 3:
            values = values[0]
            scales = scales[0] if len(of_scales.shape) > 0 else scales
        bits = values.view(torch.uint8)
        if bool(((bits & 0x7F) == 0x7F).any()) or not bool(torch.isfinite(scales.to(torch.float32)).all()):
            raise CheckpointError(f"{stored.file}: {name} or its scales hold what is no number; download it again")
        return in_float8(values, scales)

    def _read(self, file: Path, name: str, rows: Rows | None) -> Tensor:
        try:
            opened = self._open(file)
            tensor: Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows[0] : rows[1]]
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


def _scale_rows(scales: Shape, matrix: Shape, rows: Rows | None) -> Rows | None:
    """Of the scales of a matrix, or of a stack, those of these of its rows; all for None."""
    if rows is None or (math.prod(scales) == 1 and len(matrix) == 2):
        return None
    if scales[0] == matrix[0]:
        return rows
    assert rows[0] % SCALE_BLOCK == 0 or scales[0] == 1, (scales, matrix, rows)  # `check_tensors` refuses others
    return rows[0] // SCALE_BLOCK, -(-rows[1] // SCALE_BLOCK)


DRAWN = 1_048_573  # of a dummy's values, a prime: rows are of lengths that it is no multiple of, and differ


class DummyCheckpoint:
    """Random weights from shapes alone, the same for the same name: for benchmarks without a checkpoint.

    A large tensor repeats what is drawn for its start: drawing all of it takes many times as long.

    Args:
        dtype: of the tensors.
        stored_as: as `ModelConfig` has it; then matrices are quantised.
    """

    def __init__(
        self,
        report: Callable[[int], None] = lambda num_bytes: None,
        dtype: torch.dtype = torch.float32,
        stored_as: str = NONE,
    ) -> None:
        self.bytes_read = 0
        self._dtype = dtype
        self._stored_as = stored_as
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

    def read_matrix(self, name: str, shape: Shape, rows: Rows | None = None) -> Tensor | Quantized:
        matrix = self.read(name, shape, rows)
        matrix = matrix if matrix.dim() == 2 else matrix[0]
        return matrix if self._stored_as == NONE else quantize(matrix, self._stored_as)

    def fingerprint(self) -> str:
        return "dummy"
