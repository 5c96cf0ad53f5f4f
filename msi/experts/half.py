"""The expert side of a model on a device: the experts of one node, for all layers.

Owns weights, never requests. Reads rows where they landed and writes answers where they leave; knows no sockets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msi.attention.half import slot_rows_view
from msi.device.device import Device
from msi.experts.waves import Finished, WaveBatch
from msi.kernels.experts import moe_experts
from msi.kernels.routing import PackedRows
from msi.meter import StageMeter
from msi.models.checkpoint import TensorSource
from msi.models.config import ModelConfig
from msi.models.families import family_of
from msi.models.family import StackedExpertNames
from msi.net.slots import SlotLayout

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Per sparse layer and local expert, in the device's layout; `expert_bytes` is the size of one in one layer."""

    gate_up: tuple[tuple[Linear, ...], ...]
    down: tuple[tuple[Linear, ...], ...]
    expert_bytes: int


def load_expert_weights(
    config: ModelConfig, experts: tuple[int, ...], source: TensorSource, device: Device, dtype: torch.dtype
) -> ExpertWeights:
    """Reads the matrices of these experts, and no others, however they lie on disk.

    Raises:
        CheckpointError: a tensor is missing, truncated or misshapen.
    """
    gate_up_layers, down_layers = [], []
    for layer in config.sparse_layers:
        matrices = [_read_expert(config, source, layer, expert) for expert in experts]
        gate_up_layers.append(tuple(device.linear(gate_up.to(dtype)) for gate_up, _ in matrices))
        down_layers.append(tuple(device.linear(down.to(dtype)) for _, down in matrices))
    return ExpertWeights(tuple(gate_up_layers), tuple(down_layers), config.expert_values * dtype.itemsize)


def _read_expert(config: ModelConfig, source: TensorSource, layer: int, expert: int) -> tuple[Tensor, Tensor]:
    """gate_up [2 h', h] (gate first) and down [h, h']."""
    names = family_of(config).names.experts
    num_experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    if isinstance(names, StackedExpertNames):
        rows = (expert * inner, (expert + 1) * inner)
        gate, up, down = (
            source.read(name.format(layer=layer), (num_experts * inner, hidden), rows)
            for name in (names.gate, names.up, names.down)
        )
        return torch.cat([gate, up]), down.T.contiguous()
    fused = names.fused_gate_up.format(layer=layer)
    if source.has(fused):
        rows = (expert, expert + 1)
        gate_up = source.read(fused, (num_experts, 2 * inner, hidden), rows)
        return gate_up[0], source.read(names.fused_down.format(layer=layer), (num_experts, hidden, inner), rows)[0]
    gate_name, up_name, down_name = (
        name.format(layer=layer, expert=expert) for name in (names.each.gate, names.each.up, names.each.down)
    )
    gate, up = source.read(gate_name, (inner, hidden)), source.read(up_name, (inner, hidden))
    return torch.cat([gate, up]), source.read(down_name, (hidden, inner))


class ExpertHalf:
    """Implements `msi.experts.server.ExpertCompute`.

    Args:
        landing: where rows land: uint8 [num_seats, stride] of `dispatch_layout` slots.
        dispatch_layout, answer_layout: the slots on either side of the link.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ExpertWeights,
        device: Device,
        dtype: torch.dtype,
        *,
        dispatch_layout: SlotLayout,
        answer_layout: SlotLayout,
        landing: memoryview,
        landing_stride: int,
        num_seats: int,
    ) -> None:
        self.meter = StageMeter()  # T_e
        self.weight_bytes_read = 0
        self._config = config
        self._weights = weights
        self._device = device
        self._dtype = dtype
        self._answer_layout = answer_layout
        rows = slot_rows_view(landing, num_seats, landing_stride, dispatch_layout)
        self._rows = PackedRows.view(rows, config.hidden_size, config.top_k, dtype)
        self._outboxes: dict[int, Tensor] = {}

    # -- msi.experts.server.ExpertCompute -----------------------------------------------------------------------------

    def attach(self, seat: int, outbox: memoryview) -> None:
        rows = slot_rows_view(outbox, 1, len(outbox), self._answer_layout)[0]
        self._outboxes[seat] = rows[..., : self._config.hidden_size * self._dtype.itemsize].view(self._dtype)

    def run(self, batch: WaveBatch, finished: Finished) -> None:
        def work() -> None:
            finished(batch, self._run(batch), None)

        def failed(error: Exception) -> None:
            finished(batch, 0.0, error)

        self._device.enqueue(work, failed, self.meter, "experts", batch.lane)

    # -- work --------------------------------------------------------------------------------------------------------

    def _run(self, batch: WaveBatch) -> float:
        started = time.perf_counter()
        lane, landed, upload = batch.lane, self._rows, self._device.upload
        at = [(rows.seat, lane, slice(0, rows.num_rows)) for rows in batch.rows]
        combined, num_hit = moe_experts(
            upload(torch.cat([landed.hidden[index] for index in at])),
            upload(torch.cat([landed.topk_ids[index] for index in at])),
            upload(torch.cat([landed.topk_weights[index] for index in at])),
            self._weights.gate_up[batch.layer],
            self._weights.down[batch.layer],
        )
        self.weight_bytes_read += num_hit * self._weights.expert_bytes
        start = 0
        for rows in batch.rows:
            self._outboxes[rows.seat][lane, : rows.num_rows] = combined[start : start + rows.num_rows]
            start += rows.num_rows
        return time.perf_counter() - started
