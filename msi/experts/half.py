"""The expert side of a model on a device: the experts of one node, for all layers.

Owns weights, never requests. Reads rows where they landed and writes answers where they leave; knows no sockets.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from msi.attention.half import slot_rows_view
from msi.device.device import Device
from msi.experts.waves import Finished, WaveBatch
from msi.kernels.kernels import ExpertBank
from msi.kernels.routing import PackedRows
from msi.meter import StageMeter
from msi.models.config import ModelConfig
from msi.net.slots import SlotLayout


class ExpertHalf:
    """Implements `msi.experts.server.ExpertCompute`.

    Args:
        landing: where rows land: uint8 [num_seats, stride] of `dispatch_layout` slots.
        dispatch_layout, answer_layout: the slots on either side of the link.
        experts: of the bank, by local id.
    """

    def __init__(
        self,
        config: ModelConfig,
        bank: ExpertBank,
        device: Device,
        dtype: torch.dtype,
        *,
        dispatch_layout: SlotLayout,
        answer_layout: SlotLayout,
        landing: memoryview,
        landing_stride: int,
        num_seats: int,
        experts: tuple[int, ...] = (),
    ) -> None:
        self.meter = StageMeter()  # T_e
        self.weight_bytes_read = 0
        self._config = config
        self._bank = bank
        self._experts = experts
        self._device = device
        self._dtype = dtype
        self._answer_layout = answer_layout
        rows = slot_rows_view(landing, num_seats, landing_stride, dispatch_layout)
        self._rows = PackedRows.view(rows, config.hidden_size, config.top_k, dtype)
        self._outboxes: dict[int, Tensor] = {}

    def use_bank(self, bank: ExpertBank, experts: tuple[int, ...]) -> None:
        """Computes with this one from now on: its experts are those of before, by the same local ids, and others."""
        had = self._experts
        assert experts[: len(had)] == had, f"{experts} do not begin with {had}"
        self._bank, self._experts = bank, experts

    def expert_rows(self) -> dict[int, int]:
        return dict(zip(self._experts, self._bank.num_rows.tolist(), strict=False))

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
        seats = [(rows.seat, rows.num_rows) for rows in batch.rows]
        self.weight_bytes_read += self._bank.run(batch.layer, batch.lane, seats, self._rows, self._outboxes)
        return time.perf_counter() - started
