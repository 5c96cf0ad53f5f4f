"""Experts whose weights are unpacked in registers: one call computes all experts of a layer."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msi.kernels.native.compiled import FORMATS, Packed, pack, row_dtype
from msi.kernels.plain import scatter_answers
from msi.kernels.quantized import Quantized
from msi.kernels.routing import PackedRows

Matrices = list[list[Packed | None]]  # [layer][expert]


class NativeExpertBank:
    """Implements `msi.kernels.kernels.ExpertBank`.

    Args:
        library: of `native_library`.
        format: of `FORMATS`, in which all weights are held.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        num_layers: int,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        format: str = "bfloat16",
    ) -> None:
        self.weight_bytes_read = 0
        self.num_rows = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._library = library
        self._sizes = (num_experts, hidden_size, inner_size)
        self._format = format
        number, bytes_of = FORMATS[format], library.msi_packed_bytes
        self._expert_bytes = bytes_of(number, 2 * inner_size, hidden_size) + bytes_of(number, hidden_size, inner_size)
        self._gate_up: Matrices = [[None] * num_experts for _ in range(num_layers)]
        self._down: Matrices = [[None] * num_experts for _ in range(num_layers)]
        self._addresses: list[tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]] | None]
        self._addresses = [None] * num_layers
        self._work = torch.empty(0)

    def arranged(self, places: Sequence[int | None]) -> NativeExpertBank:
        _, hidden_size, inner_size = self._sizes
        bank = NativeExpertBank(self._library, len(self._gate_up), len(places), hidden_size, inner_size, self._format)
        for local, place in enumerate(places):
            if place is not None:
                bank.num_rows[:, local] = self.num_rows[:, place]
                for layer in range(len(self._gate_up)):
                    bank._gate_up[layer][local] = self._gate_up[layer][place]
                    bank._down[layer][local] = self._down[layer][place]
        return bank

    def put(self, layer: int, expert: int, gate_up: Tensor | Quantized, down: Tensor | Quantized) -> None:
        self._gate_up[layer][expert] = pack(self._library, gate_up)
        self._down[layer][expert] = pack(self._library, down)
        self._addresses[layer] = None

    def warm(self, num_model_experts: int, k: int, dtype: torch.dtype) -> None:
        """There is nothing to load."""

    def prepare(self, landed: PackedRows, answer_strides: tuple[int, int]) -> None:
        """Memory is taken as it is needed."""

    def run(
        self, layer: int, lane: int, seats: Sequence[tuple[int, int]], landed: PackedRows, answers: Mapping[int, Tensor]
    ) -> None:
        rows = landed.gather(lane, seats)
        dtype, weights = row_dtype(self._library, rows.hidden), rows.topk_weights
        hidden = rows.hidden.to(dtype)
        num_experts, hidden_size, inner_size = self._sizes
        num_rows, k = rows.topk_ids.shape
        combined = torch.empty(num_rows, hidden_size, dtype=torch.float32)
        work = self._work_of(self._library.msi_work_values(num_rows, k, hidden_size, inner_size), dtype)
        gate_up, down = self._addresses[layer] or self._addresses_of(layer)
        num_active = self._library.msi_experts(
            FORMATS[self._format], dtype is torch.bfloat16, num_rows, k, num_experts, hidden_size, inner_size,
            hidden.data_ptr(), hidden.stride(0), rows.topk_ids.data_ptr(), rows.topk_ids.stride(0),
            weights.data_ptr(), weights.stride(0), gate_up, down, work.data_ptr(), combined.data_ptr(),
            self.num_rows[layer].data_ptr(),
        )  # fmt: skip
        if num_active < 0:
            raise AssertionError(
                f"of the experts {sorted(set(rows.topk_ids.flatten().tolist()))} one has no weights here"
            )
        scatter_answers(combined, lane, seats, answers)
        self.weight_bytes_read += num_active * self._expert_bytes

    def _work_of(self, num_values: int, dtype: torch.dtype) -> Tensor:
        """Memory for so many, kept for the next wave."""
        if self._work.numel() < num_values or self._work.dtype is not dtype:
            self._work = torch.empty(num_values, dtype=dtype)
        return self._work

    def _addresses_of(self, layer: int) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_void_p]]:
        found = []
        for experts in (self._gate_up[layer], self._down[layer]):
            addresses = [None if one is None else one.panels.data_ptr() for one in experts]
            found.append((ctypes.c_void_p * len(experts))(*addresses))
        self._addresses[layer] = pair = (found[0], found[1])
        return pair
