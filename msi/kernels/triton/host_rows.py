"""Rows in the host's memory: what of it a device can reach, and copies for what it cannot."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msi.kernels import fp8
from msi.kernels.routing import PackedRows, answer_row_bytes, hidden_rows

MEMORY_TYPE, HOST_MEMORY = 2, 1  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE and CU_MEMORYTYPE_HOST of the driver


def can_reach(device: torch.device, memory: Tensor) -> bool:
    """Whether a kernel there can read and write it: the device's own, or the host's that the driver was told of."""
    return memory.device == device or (device.type == "cuda" and memory.device.type == "cpu" and memory.is_pinned())


def is_far(device: torch.device, memory: Tensor) -> bool:
    """Whether reading it twice crosses a bus twice: also of the host behind a tensor of the device."""
    if memory.device != device:
        return True
    if device.type != "cuda":
        return False
    kind = ctypes.c_uint(0)
    asked = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(kind), MEMORY_TYPE, ctypes.c_uint64(memory.data_ptr())
    )
    return asked == 0 and kind.value == HOST_MEMORY


class HostRows:
    """A twin, on the device, of landed rows and of where answers leave. The host waits for every copy.

    Args:
        answer_dtype: in which answers of so many values leave.
    """

    def __init__(self, landed: PackedRows, device: torch.device, hidden_size: int, answer_dtype: torch.dtype) -> None:
        self._source = landed

        def twin(dtype: torch.dtype) -> Tensor:
            shape = (*landed.hidden.shape[:-1], answer_row_bytes(hidden_size, dtype))
            return hidden_rows(torch.empty(shape, dtype=torch.uint8, device=device), hidden_size, dtype)

        self.landed = PackedRows(
            twin(landed.dtype if landed.unpacked is None else fp8.E4M3),
            torch.empty_like(landed.topk_weights, device=device),
            torch.empty_like(landed.topk_ids, device=device),
            landed.unpacked,
        )
        answers = twin(answer_dtype)
        self.answers: dict[int, Tensor] = dict(enumerate(answers))
        self.answer_strides = (answers.stride(1) * answers.element_size(), answers.stride(2) * answers.element_size())

    def is_of(self, landed: PackedRows) -> bool:
        return self._source is landed

    def take_up(self, lane: int, seats: Sequence[tuple[int, int]]) -> None:
        ours, theirs = self.landed, self._source
        for seat, num_rows in seats:
            ours.hidden[seat, lane, :num_rows] = theirs.hidden[seat, lane, :num_rows]
            ours.topk_weights[seat, lane, :num_rows] = theirs.topk_weights[seat, lane, :num_rows]
            ours.topk_ids[seat, lane, :num_rows] = theirs.topk_ids[seat, lane, :num_rows]

    def bring_down(self, lane: int, seats: Sequence[tuple[int, int]], answers: Mapping[int, Tensor]) -> None:
        for seat, num_rows in seats:
            answers[seat][lane, :num_rows] = self.answers[seat][lane, :num_rows]
