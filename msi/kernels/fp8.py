"""Numbers in eight bits, as float8 e4m3: what becomes of one that does not fit, and of what is none.

Hidden rows travel with a float32 scale for each 128 values. A row is one run of bytes, its values and, from a multiple
of 4 on, its scales; tensors of such rows are uint8, so whatever only moves rows need not know.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels.blocks import LARGEST, LEAST_SCALE

E4M3 = torch.float8_e4m3fn
GROUP = 128  # values of a row that share a scale
EVERY_NUMBER = torch.arange(256, dtype=torch.uint8).view(E4M3).to(torch.float32)


def to_e4m3(values: Tensor) -> Tensor:
    """Rounded to the nearest, ties to even; beyond 448 either way 448, and a NaN stays one."""
    return values.to(torch.float32).clamp(-LARGEST, LARGEST).to(E4M3)


def from_e4m3(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Exactly; on a CPU they are looked up, for which torch takes 7 ns each in place of 18."""
    if values.device.type != "cpu":
        return values.to(dtype)
    numbers = EVERY_NUMBER.to(dtype)
    return numbers.index_select(0, values.view(torch.uint8).flatten().to(torch.int32)).view(values.shape)


def scales_at(hidden_size: int) -> int:
    """Bytes of a row before its scales."""
    return -(-hidden_size // 4) * 4


def packed_bytes(hidden_size: int) -> int:
    """Of a row of so many values."""
    return scales_at(hidden_size) + 4 * -(-hidden_size // GROUP)


def is_packed(rows: Tensor) -> bool:
    return rows.dtype is torch.uint8


def pack(rows: Tensor) -> Tensor:
    """uint8 [n, packed_bytes(h)] of rows [n, h] in any dtype; the largest of a group becomes 448.

    A group with an infinity or a NaN has a NaN.
    """
    num_rows, hidden_size = rows.shape
    padded = functional.pad(rows.to(torch.float32), (0, -hidden_size % GROUP))
    groups = padded.view(num_rows, padded.shape[1] // GROUP, GROUP)
    scales = (groups.abs().amax(dim=-1) / LARGEST).clamp(min=LEAST_SCALE)
    values = to_e4m3(groups / scales[..., None]).view(torch.uint8).view(padded.shape)
    packed = rows.new_zeros((num_rows, packed_bytes(hidden_size)), dtype=torch.uint8)
    packed[:, :hidden_size] = values[:, :hidden_size]
    packed[:, scales_at(hidden_size) :] = scales.view(torch.uint8)
    return packed


def unpack(packed: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Rows [n, hidden_size] in a dtype."""
    at = scales_at(hidden_size)
    scales = packed[:, at : packed_bytes(hidden_size)].view(torch.float32).repeat_interleave(GROUP, dim=1)
    values = from_e4m3(packed[:, :hidden_size].view(E4M3), torch.float32)
    return values.mul_(scales[:, :hidden_size]).to(dtype)


def as_computed(rows: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Rows [n, ...] as they are, or unpacked to a dtype."""
    return unpack(rows, hidden_size, dtype) if is_packed(rows) else rows
