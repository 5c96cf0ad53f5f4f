"""What a fake device computes with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import SWIGLU, Activation
from msi.kernels.kernels import ExpertBank, Linear
from msi.kernels.plain import PlainExpertBank, PlainKernels
from msi.kernels.quantized import Quantized
from msi.precision import NONE

Upload = Callable[[Tensor], Tensor]
Zeros = Callable[[tuple[int, ...], torch.dtype], Tensor]


class FakeKernels(PlainKernels):
    """The plain ones, over weights in the device's memory."""

    def __init__(self, upload: Upload, zeros: Zeros) -> None:
        super().__init__(torch.device("cpu"))
        self._upload = upload
        self._zeros = zeros

    @property
    def quantisations(self) -> tuple[str, ...]:
        return ("fp8",)

    def linear(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> Linear:
        if isinstance(weight, Quantized):
            wide = self.linear(weight.dequantized(torch.float32), None if bias is None else bias.float())
            return lambda rows: wide(rows.to(torch.float32)).to(rows.dtype)
        on_device = self._upload(weight)
        bias_on_device = None if bias is None else self._upload(bias)
        return lambda rows: functional.linear(rows, on_device, bias_on_device)

    def expert_bank(
        self,
        *,
        num_layers: int,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        dtype: torch.dtype,
        quantization: str = NONE,
        activation: Activation = SWIGLU,
        has_bias: bool = False,
    ) -> ExpertBank:
        def zeros(*shape: int) -> Tensor:
            return self._zeros((num_layers, num_experts, *shape), dtype)

        biases = (zeros(2 * inner_size), zeros(hidden_size)) if has_bias else None
        return PlainExpertBank(zeros(2 * inner_size, hidden_size), zeros(hidden_size, inner_size), biases, activation)
