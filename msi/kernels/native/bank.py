"""Experts whose weights are unpacked in registers: one call computes all experts of a layer."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msi.kernels import SWIGLU, Activation
from msi.kernels.experts import Places, at_places, counts_at
from msi.kernels.kernels import Biases
from msi.kernels.native.compiled import FORMATS, Packed, pack, row_dtype
from msi.kernels.native.rows import native_rows, scatter
from msi.kernels.plain import scatter_answers
from msi.kernels.quantized import Quantized
from msi.kernels.routing import PackedRows, RowDtypes

Matrices = list[list[Packed | None]]  # [layer][expert]
Pointers = ctypes.Array[ctypes.c_void_p]  # of each expert
Addresses = tuple[Pointers | None, ...]  # of matrices and of biases, for gate and up, and for down


class NativeExpertBank:
    """Implements `msi.kernels.kernels.ExpertBank`.

    Args:
        library: of `native_library`.
        format: of `FORMATS`, in which all weights are held.
        has_bias: all experts have biases; else none has.

    Attributes:
        number: of the format.
        activation: three floats, as `products.cpp` wants them.
        expert_bytes: of one expert's weights.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        num_layers: int,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        format: str = "bfloat16",
        activation: Activation = SWIGLU,
        has_bias: bool = False,
    ) -> None:
        self.weight_bytes_read = 0
        self.num_rows = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._library = library
        self.num_experts, self.inner_size = num_experts, inner_size
        self._hidden_size = hidden_size
        self._format = format
        self.number, bytes_of = FORMATS[format], library.msi_packed_bytes
        self.expert_bytes = bytes_of(self.number, 2 * inner_size, hidden_size)
        self.expert_bytes += bytes_of(self.number, hidden_size, inner_size)
        self._gate_up: Matrices = [[None] * num_experts for _ in range(num_layers)]
        self._down: Matrices = [[None] * num_experts for _ in range(num_layers)]
        self._biases: list[list[Biases | None]] = [[None] * num_experts for _ in range(num_layers)]
        self._addresses: list[Addresses | None] = [None] * num_layers
        self._kind = (activation, has_bias)
        numbers = (activation.alpha, activation.limit, activation.up_offset)
        self.activation = None if self._kind == (SWIGLU, False) else (ctypes.c_float * 3)(*numbers)
        self._work = torch.empty(0)

    def arranged(self, places: Places) -> NativeExpertBank:
        bank = NativeExpertBank(
            self._library,
            len(places),
            len(places[0]),
            self._hidden_size,
            self.inner_size,
            self._format,
            *self._kind,
        )
        bank.num_rows = counts_at(self.num_rows, places)
        bank._gate_up = at_places(self._gate_up, places, None)
        bank._down = at_places(self._down, places, None)
        bank._biases = at_places(self._biases, places, None)
        return bank

    def put(
        self,
        layer: int,
        expert: int,
        gate_up: Tensor | Quantized,
        down: Tensor | Quantized,
        biases: Biases | None = None,
    ) -> None:
        self._gate_up[layer][expert] = pack(self._library, gate_up)
        self._down[layer][expert] = pack(self._library, down)
        assert (biases is not None) == self._kind[1], "a bank has biases of all experts or of none"
        if biases is not None:
            of_gate_up, of_down = (bias.to(torch.float32).contiguous() for bias in biases)
            self._biases[layer][expert] = of_gate_up, of_down
        self._addresses[layer] = None

    def warm(self, num_model_experts: int, k: int, dtypes: RowDtypes) -> None:
        """There is nothing to load."""

    def prepare(self, landed: PackedRows, answer_strides: tuple[int, int], answer_dtype: torch.dtype) -> None:
        """Memory is taken as it is needed."""

    def run(
        self, layer: int, lane: int, seats: Sequence[tuple[int, int]], landed: PackedRows, answers: Mapping[int, Tensor]
    ) -> None:
        rows = landed.gather(lane, seats)
        dtype, weights = row_dtype(self._library, rows.hidden), rows.topk_weights
        hidden = rows.hidden.to(dtype)
        num_experts, hidden_size, inner_size = self.num_experts, self._hidden_size, self.inner_size
        num_rows, k = rows.topk_ids.shape
        combined = torch.empty(num_rows, hidden_size, dtype=torch.float32)
        work = self._work_of(self._library.msi_work_values(num_rows, k, hidden_size, inner_size), dtype)
        num_active = self._library.msi_experts(
            self.number, dtype is torch.bfloat16, num_rows, k, num_experts, hidden_size, inner_size,
            hidden.data_ptr(), hidden.stride(0), rows.topk_ids.data_ptr(), rows.topk_ids.stride(0),
            weights.data_ptr(), weights.stride(0), *self.addresses(layer), self.activation, work.data_ptr(),
            combined.data_ptr(), self.num_rows[layer].data_ptr(),
        )  # fmt: skip
        if num_active < 0:
            raise AssertionError(
                f"of the experts {sorted(set(rows.topk_ids.flatten().tolist()))} one has no weights here"
            )
        made = native_rows()
        if made is None or not scatter(made, combined, lane, seats, answers):
            scatter_answers(combined, lane, seats, answers)
        self.weight_bytes_read += num_active * self.expert_bytes

    def _work_of(self, num_values: int, dtype: torch.dtype) -> Tensor:
        """Memory for so many, kept for the next wave."""
        if self._work.numel() < num_values or self._work.dtype is not dtype:
            self._work = torch.empty(num_values, dtype=dtype)
        return self._work

    def addresses(self, layer: int) -> Addresses:
        """Of its experts' weights, where they lie now."""
        return self._addresses[layer] or self._found(layer)

    def _found(self, layer: int) -> Addresses:
        of_experts = [
            [None if one is None else one.panels for one in matrices]
            for matrices in (self._gate_up[layer], self._down[layer])
        ] + [[None if one is None else one[which] for one in self._biases[layer]] for which in range(2)]
        found = [
            (ctypes.c_void_p * self.num_experts)(*(None if one is None else one.data_ptr() for one in tensors))
            for tensors in of_experts
        ]
        self._addresses[layer] = addresses = tuple(found) if self._kind[1] else (*found[:2], None, None)
        return addresses
