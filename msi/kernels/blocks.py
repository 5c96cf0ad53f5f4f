"""Weights as float8 with a scale for each block of 128 rows and columns, as DeepSeek's checkpoints have them."""

from __future__ import annotations

import torch
from torch import Tensor

from msi.kernels import SCALE_BLOCK as BLOCK

LARGEST = 448.0  # of float8 e4m3
LEAST_SCALE = 1e-12  # of a block of zeros


def num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def to_blocks(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [rows, columns] and float32 scales [num_blocks(rows), num_blocks(columns)] of a matrix."""
    tiles = _tiles(matrix.to(torch.float32))
    scales = (tiles.abs().amax((1, 3)) / LARGEST).clamp(min=LEAST_SCALE)
    packed = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    rows, columns = matrix.shape
    return packed.view(scales.shape[0] * BLOCK, -1)[:rows, :columns].contiguous(), scales


def from_blocks(packed: Tensor, scales: Tensor) -> Tensor:
    """The float32 matrix that they stand for."""
    rows, columns = packed.shape
    values = _tiles(packed.to(torch.float32)) * scales[:, None, :, None]
    return values.view(scales.shape[0] * BLOCK, -1)[:rows, :columns].contiguous()


def _tiles(matrix: Tensor) -> Tensor:
    """[blocks, BLOCK, blocks, BLOCK], with zeros past the edges."""
    rows, columns = matrix.shape
    missing = (0, -columns % BLOCK, 0, -rows % BLOCK)
    padded = torch.nn.functional.pad(matrix, missing)
    return padded.view(num_blocks(rows), BLOCK, num_blocks(columns), BLOCK)
