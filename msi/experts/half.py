"""The expert side of a model on a device: the experts of one node, for all layers.

Owns weights, never requests. Reads rows where they landed and writes answers where they leave; knows no sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from msi.device.compute_thread import Program
from msi.device.device import Device
from msi.device.regions import slot_rows
from msi.experts.batches import WaveBatch
from msi.kernels.kernels import ExpertBank
from msi.kernels.routing import PackedRows, RowDtypes, hidden_rows
from msi.meter import StageMeter
from msi.models.config import ModelConfig
from msi.net.regions import Region
from msi.net.slots import SlotLayout
from msi.placement import HOLE, at_layer


@dataclass(slots=True)
class _Ran:
    program: Program
    error: Exception | None = None


class ExpertHalf:
    """Implements `msi.experts.server.ExpertCompute`.

    Args:
        landing: where rows land: [num_seats, stride] of `dispatch_layout` slots' rows.
        dispatch_layout, answer_layout: the slots on either side of the link.
        experts: of the bank by local id, of all layers or of each.
    """

    def __init__(
        self,
        config: ModelConfig,
        bank: ExpertBank,
        device: Device,
        row_dtypes: RowDtypes,
        *,
        dispatch_layout: SlotLayout,
        answer_layout: SlotLayout,
        landing: Region,
        num_seats: int,
        experts: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.depth = 1
        self.meter = StageMeter()  # T_e
        self._config = config
        self._bank = bank
        self._experts = experts
        self._bytes_before = 0  # that earlier banks read
        self._device = device
        self._answer_dtype = row_dtypes.answered
        self._answer_layout = answer_layout
        self._answer_strides = (answer_layout.slot_bytes, answer_layout.row_bytes)
        rows = slot_rows(landing, num_seats, dispatch_layout)
        hidden_size, k = config.hidden_size, config.top_k
        self._rows = PackedRows.view(rows, hidden_size, k, row_dtypes.sent, row_dtypes.computed)
        bank.prepare(self._rows, self._answer_strides, self._answer_dtype)
        self._outboxes: dict[int, Tensor] = {}
        self._batches: deque[WaveBatch] = deque()  # launched, not yet run
        self._programs = [
            Program(partial(self._run_next, lane), self._failed, self.meter, "experts", lane)
            for lane in range(dispatch_layout.num_lanes)
        ]
        self._ran: deque[_Ran] = deque()  # whose tickets have not been seen yet
        self._replaced: deque[tuple[_Ran, ExpertBank]] = deque()  # what is out may still read a bank, and up to which
        self._queue = device.queue("experts")
        self._done = device.words.take()

    def use_bank(self, bank: ExpertBank, experts: tuple[tuple[int, ...], ...]) -> None:
        """Computes with this one from now on: whatever rows are here, their experts have the same local ids in it."""
        bank.prepare(self._rows, self._answer_strides, self._answer_dtype)
        self._bytes_before += self._bank.weight_bytes_read
        for layer, (now, before) in enumerate(zip(bank.num_rows, self._bank.num_rows, strict=True)):
            was = at_layer(self._experts, layer) if self._experts else ()
            stay = [
                one for one, pair in enumerate(zip(at_layer(experts, layer), was, strict=False)) if len({*pair}) < 2
            ]
            now[stay] = before[stay]  # which went on while the new one was loaded
        if self._ran:
            self._replaced.append((self._ran[-1], self._bank))
        self._bank, self._experts = bank, experts

    @property
    def bank(self) -> ExpertBank:
        """Whose experts compute what is run from now on."""
        return self._bank

    @property
    def weight_bytes_read(self) -> int:
        return self._bytes_before + self._bank.weight_bytes_read

    def rows_by_layer(self) -> list[dict[int, int]]:
        if not self._experts:
            return []
        counted = [
            zip(at_layer(self._experts, layer), counts, strict=False)
            for layer, counts in enumerate(self._bank.num_rows.tolist())
        ]
        return [{expert: count for expert, count in of_layer if expert != HOLE} for of_layer in counted]

    # -- msi.experts.server.ExpertCompute -----------------------------------------------------------------------------

    def attach(self, seat: int, out_rows: Region) -> None:
        rows = slot_rows(out_rows, 1, self._answer_layout)[0]
        self._outboxes[seat] = hidden_rows(rows, self._config.hidden_size, self._answer_dtype)

    def run(self, batch: WaveBatch, ticket: int) -> None:
        self._batches.append(batch)
        self._queue.run(self._programs[batch.lane])
        self._queue.signal(self._done, ticket)

    def follow(self, seen: Callable[[int], None]) -> None:
        self._device.follow(self._done, seen)

    def outcome(self) -> tuple[float, Exception | None]:
        ran = self._ran.popleft()
        while self._replaced and self._replaced[0][0] is ran:
            self._replaced.popleft()
        return ran.program.spent_s, ran.error

    def run_here(self, layer: int, rows: PackedRows, num_rows: int, answers: Tensor) -> None:
        """A layer's experts over rows of this thread's own, in place of a batch.

        Args:
            rows: of one seat and lane.
            answers: [1, at least num_rows, hidden_size].
        """
        self._bank.run(layer, 0, ((0, num_rows),), rows, {0: answers})

    def close(self) -> None:
        self._device.words.give_back(self._done)

    # -- work --------------------------------------------------------------------------------------------------------

    def _run_next(self, lane: int) -> None:
        self._ran.append(_Ran(self._programs[lane]))
        self._run(self._batches.popleft())

    def _failed(self, error: Exception) -> None:
        self._ran[-1].error = error

    def _run(self, batch: WaveBatch) -> None:
        seats = [(seat, num_rows) for seat, _, num_rows in batch.rows]
        self._bank.run(batch.layer, batch.lane, seats, self._rows, self._outboxes)
