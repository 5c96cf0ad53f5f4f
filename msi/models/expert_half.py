"""The expert side of a model on a device: the experts of one node, for all layers.

Owns weights, never requests. Reads rows where they landed and writes answers where they leave; knows no sockets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msi.device.device import Device
from msi.kernels.experts import moe_experts
from msi.kernels.routing import PackedRows
from msi.meter import StageMeter
from msi.models.attention_half import slot_rows_view
from msi.models.checkpoint import TensorSource
from msi.models.config import ModelConfig
from msi.models.families import family_of
from msi.net.slots import SlotLayout
from msi.waves import Finished, WaveBatch

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Per layer and local expert, in the device's layout; `expert_bytes` is the size of one expert of one layer."""

    gate_up: tuple[tuple[Linear, ...], ...]
    down: tuple[tuple[Linear, ...], ...]
    expert_bytes: int


def load_expert_weights(
    config: ModelConfig, experts: tuple[int, ...], source: TensorSource, device: Device, dtype: torch.dtype
) -> ExpertWeights:
    """Reads the matrices of these experts, and no others, in the classic or the fused layout.

    Raises:
        CheckpointError: a tensor is missing, truncated or misshapen.
    """
    names = family_of(config).names.experts
    hidden, inner = config.hidden_size, config.intermediate_size
    gate_up_layers, down_layers = [], []
    for layer in range(config.num_layers):
        gate_ups, downs = [], []
        for expert in experts:
            fused = names.fused_gate_up.format(layer=layer)
            if source.has(fused):
                gate_up = source.read(fused, (2 * inner, hidden), index=expert)
                down = source.read(names.fused_down.format(layer=layer), (hidden, inner), index=expert)
            else:
                gate = source.read(names.gate.format(layer=layer, expert=expert), (inner, hidden))
                up = source.read(names.up.format(layer=layer, expert=expert), (inner, hidden))
                gate_up = torch.cat([gate, up])
                down = source.read(names.down.format(layer=layer, expert=expert), (hidden, inner))
            gate_ups.append(device.linear(gate_up.to(dtype)))
            downs.append(device.linear(down.to(dtype)))
        gate_up_layers.append(tuple(gate_ups))
        down_layers.append(tuple(downs))
    return ExpertWeights(tuple(gate_up_layers), tuple(down_layers), 3 * inner * hidden * dtype.itemsize)


class ExpertHalf:
    """Implements `msi.expert_server.ExpertCompute`.

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

    # -- msi.expert_server.ExpertCompute -----------------------------------------------------------------------------

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
        lane, landed = batch.lane, self._rows
        at = [(rows.seat, lane, slice(0, rows.num_rows)) for rows in batch.rows]
        combined, num_hit = moe_experts(
            torch.cat([landed.hidden[index] for index in at]),
            torch.cat([landed.topk_ids[index] for index in at]),
            torch.cat([landed.topk_weights[index] for index in at]),
            self._weights.gate_up[batch.layer],
            self._weights.down[batch.layer],
        )
        self.weight_bytes_read += num_hit * self._weights.expert_bytes
        start = 0
        for rows in batch.rows:
            self._outboxes[rows.seat][lane, : rows.num_rows] = combined[start : start + rows.num_rows]
            start += rows.num_rows
        return time.perf_counter() - started
