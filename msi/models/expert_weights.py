"""Reading the routed experts of one node, expert by expert: no more than one lies here beside those in the bank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msi.errors import CheckpointError
from msi.kernels import MXFP4_GROUP
from msi.kernels.kernels import Biases, ExpertBank, Kernels
from msi.kernels.mxfp4 import NO_NUMBER, unpacked
from msi.kernels.quantized import Quantized, held, joined
from msi.kernels.routing import RowDtypes
from msi.models.checkpoint import TensorSource
from msi.models.config import ModelConfig
from msi.models.families import family_of
from msi.models.family import InterleavedExpertNames, StackedExpertNames
from msi.placement import HOLE, at_layer
from msi.precision import NONE


def load_expert_bank(
    config: ModelConfig,
    experts: Sequence[tuple[int, ...]],
    source: TensorSource,
    kernels: Kernels,
    dtype: torch.dtype,
    had: tuple[ExpertBank, Sequence[tuple[int, ...]]] | None = None,
    *,
    row_dtypes: RowDtypes | None = None,
    quantization: str = NONE,
) -> ExpertBank:
    """Reads the matrices of these experts, and no others, however they lie on disk.

    Args:
        row_dtypes: of what will be computed; None for that of the weights.
        quantization: of the matrices, or "none".
        experts: of all layers, or of each, by local id; a `HOLE` gets no weights.
        had: a bank of these kernels and this dtype, and its experts: what is wanted of them is not read again.

    Raises:
        CheckpointError: a tensor is missing, truncated or misshapen.
    """
    layers = range(config.num_sparse_layers)
    num_experts, known = max(map(len, experts)), [dict[int, int]()] * len(layers)
    if had is None:
        bank = kernels.expert_bank(
            num_layers=len(layers),
            num_experts=num_experts,
            hidden_size=config.hidden_size,
            inner_size=config.intermediate_size,
            dtype=dtype,
            quantization=quantization,
            activation=config.activation,
            has_bias=config.expert_bias,
        )
    else:
        known = [_places(at_layer(had[1], index)) for index in layers]
        wanted = [at_layer(experts, index) for index in layers]
        places = [[at.get(one) for one in of_layer] for at, of_layer in zip(known, wanted, strict=True)]
        bank = had[0].arranged([of_layer + [None] * (num_experts - len(of_layer)) for of_layer in places])
    for index, layer in enumerate(config.sparse_layers):
        for local, expert in enumerate(at_layer(experts, index)):
            if expert == HOLE or expert in known[index]:
                continue
            gate_up, down, biases = _read_expert(config, source, layer, expert)
            parts = [held(one, dtype, quantization) for one in gate_up]
            bank.put(index, local, joined(parts), held(down, dtype, quantization), biases)
    bank.warm(config.num_experts, config.top_k, row_dtypes or RowDtypes.of(dtype))
    return bank


def _places(experts: Sequence[int]) -> dict[int, int]:
    return {expert: local for local, expert in enumerate(experts) if expert != HOLE}


def _read_expert(
    config: ModelConfig, source: TensorSource, layer: int, expert: int
) -> tuple[list[Tensor | Quantized], Tensor | Quantized, Biases | None]:
    """gate_up [2 h', h] (gate first), in parts that are quantised apart, and down [h, h']."""
    names = family_of(config).names.experts
    num_experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    if isinstance(names, StackedExpertNames):
        rows = (expert * inner, (expert + 1) * inner)
        gate, up, down = (
            source.read_matrix(name.format(layer=layer), (num_experts * inner, hidden), rows)
            for name in (names.gate, names.up, names.down)
        )
        return [gate, up], down.transposed() if isinstance(down, Quantized) else down.T.contiguous(), None
    if isinstance(names, InterleavedExpertNames):
        return _read_interleaved(config, names, source, layer, expert)
    fused = names.fused_gate_up.format(layer=layer)
    if source.has(fused):
        rows = (expert, expert + 1)
        gate_up = source.read_matrix(fused, (num_experts, 2 * inner, hidden), rows)
        down = source.read_matrix(names.fused_down.format(layer=layer), (num_experts, hidden, inner), rows)
        return [gate_up] if isinstance(gate_up, Quantized) else [*gate_up.chunk(2)], down, None
    gate_name, up_name, down_name = (
        name.format(layer=layer, expert=expert) for name in (names.each.gate, names.each.up, names.each.down)
    )
    parts = [source.read_matrix(name, (inner, hidden)) for name in (gate_name, up_name)]
    return parts, source.read_matrix(down_name, (hidden, inner)), None


def _read_interleaved(
    config: ModelConfig, names: InterleavedExpertNames, source: TensorSource, layer: int, expert: int
) -> tuple[list[Tensor | Quantized], Tensor, Biases]:
    def read(name: str, *shape: int) -> Tensor:
        return source.read(name.format(layer=layer), (config.num_experts, *shape), (expert, expert + 1))[0]

    def matrix(name: str, rows: int, depth: int) -> Tensor:
        scales_name = name.format(layer=layer) + "_scales"
        if not source.has(scales_name):  # invented ones are not packed, whatever config.json says
            return read(name, depth, rows).T
        groups = depth // MXFP4_GROUP
        scales = read(name + "_scales", rows, groups)
        if bool((scales == NO_NUMBER).any()):
            raise CheckpointError(f"{scales_name} holds what is no number; download it again")
        return unpacked(read(name + "_blocks", rows, groups, MXFP4_GROUP // 2), scales)

    hidden, inner = config.hidden_size, config.intermediate_size
    gate_up, down = matrix(names.gate_up, 2 * inner, hidden), matrix(names.down, hidden, inner)
    bias = read(names.gate_up_bias, 2 * inner)
    biases = torch.cat([bias[::2], bias[1::2]]), read(names.down_bias, hidden)
    return [gate_up[::2], gate_up[1::2]], down.contiguous(), biases
