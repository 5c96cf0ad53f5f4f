"""The attention side of a model on a device: what lanes ask for becomes ordered work.

A lane takes one turn with the expert nodes per sparse layer; turns are numbered from 0 on both sides. A shared expert
is computed once the turn is posted, while the routed ones are away.

Owns what each lane has in flight and the slots' memory as typed rows. Methods named with a leading underscore run as
work on the device; the others only enqueue. Knows no arithmetic, sockets or requests.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch
from torch import Tensor

from msi.attention.forward import Forward, PassState
from msi.attention.kv_cache import KvCache
from msi.attention.pass_inputs import PassInputs
from msi.device.device import Device
from msi.kernels.kernels import Outboxes
from msi.kernels.routing import PackedRows
from msi.meter import StageMeter
from msi.models.attention_weights import AttentionWeights
from msi.models.config import ModelConfig
from msi.net.dispatch_link import Turn
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.types import MicroBatch, Placement, Sampled


@dataclass(slots=True)
class _InFlight:
    """What one lane has in flight; touched by the device's work alone."""

    state: PassState
    error: Exception | None = None  # of a computation whose turn may have been over before


class AttentionHalf:
    """Implements `msi.attention.lanes.AttentionCompute`.

    Args:
        row_dtype: of rows on their way to the experts and back.
        landing: where combined rows land: uint8 [num_nodes, stride] of `answer_layout` slots.
        dispatch_layout, answer_layout: the slots on either side of the link.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        kv_cache: KvCache,
        placement: Placement,
        device: Device,
        row_dtype: torch.dtype,
        *,
        dispatch_layout: SlotLayout,
        answer_layout: SlotLayout,
        landing: memoryview,
        landing_stride: int,
    ) -> None:
        self.num_layers = config.num_sparse_layers
        self.meter = StageMeter()  # T_a, without shared experts
        self.shared_meter = StageMeter()
        self.pass_meter = StageMeter()  # head and sampling, once per pass
        self.weight_bytes_read = 0
        self.kv_cache = kv_cache
        self.forward = Forward(config, weights, kv_cache, placement, device)
        self._config = config
        self._dtype = row_dtype
        self._device = device
        self._layout = dispatch_layout
        self._tables = [self.forward.tables] * dispatch_layout.num_lanes  # of each lane's pass
        self._fresh: dict[int, MicroBatch] = {}  # by lane, until its first layer is enqueued
        self._inputs = [PassInputs(device.upload) for _ in range(dispatch_layout.num_lanes)]
        self._lanes: list[_InFlight | None] = [None] * dispatch_layout.num_lanes
        nowhere = PackedRows.view(
            torch.empty(0, dispatch_layout.row_bytes, dtype=torch.uint8), config.hidden_size, config.top_k, self._dtype
        )
        counts = torch.zeros(dispatch_layout.num_lanes, placement.num_nodes, dtype=torch.int32)
        self._outboxes = [Outboxes([nowhere] * placement.num_nodes, of_lane) for of_lane in counts]
        self._counts = counts.numpy()
        answers = slot_rows_view(landing, placement.num_nodes, landing_stride, answer_layout)
        answers = answers[..., : config.hidden_size * self._dtype.itemsize].view(self._dtype)
        self._answers = answers.unbind(1)  # by lane: [num_nodes, slot_rows, hidden_size]

    def attach(self, node: int, outbox: memoryview) -> None:
        """Rows for this expert node go into `outbox` from now on."""
        slots = slot_rows_view(outbox, 1, len(outbox), self._layout)[0]
        config = self._config
        for lane, outboxes in enumerate(self._outboxes):
            outboxes.rows[node] = PackedRows.view(slots[lane], config.hidden_size, config.top_k, self._dtype)

    def use_placement(self, placement: Placement) -> None:
        """Passes that begin from now on send rows where it says."""
        self.forward.use_placement(placement)

    # -- msi.attention.lanes.AttentionCompute --------------------------------------------------------------------------

    def begin(self, lane: int, micro_batch: MicroBatch) -> None:
        """The embedding is looked up at the start of the first layer's work."""
        self._fresh[lane] = micro_batch
        self._tables[lane] = self.forward.tables

    def attention_route_pack(self, lane: int, layer: int, turn: Turn) -> None:
        fresh = self._fresh.pop(lane, None)

        def work() -> None:
            if fresh is not None:
                self._begin(lane, fresh)
            turn.post(self._turn(lane, layer))

        self._device.enqueue(work, turn.fail, self.meter, "attention", lane)
        if self.forward.has_shared:

            def failed(error: Exception) -> None:
                if (in_flight := self._lanes[lane]) is not None:
                    in_flight.error = error
                turn.fail(error)

            self._device.enqueue(lambda: self._shared(lane, layer), failed, self.shared_meter, "shared experts", lane)

    def combine(self, lane: int, layer: int) -> None:
        """The answers are added at the start of the lane's next work, which reads them in any case."""

    def sample(self, lane: int) -> asyncio.Future[Sampled]:
        return self._device.submit(lambda: self._sample(lane), self.pass_meter, "sample", lane)

    # -- work --------------------------------------------------------------------------------------------------------

    def _begin(self, lane: int, batch: MicroBatch) -> None:
        inputs, host_inputs = self._inputs[lane].lay_out(batch)
        self._lanes[lane] = _InFlight(self.forward.begin(batch, inputs, host_inputs, self._tables[lane]))

    def _turn(self, lane: int, layer: int) -> list[int]:
        """The number of rows that lie in each node's outbox."""
        self.forward.route_and_pack(self._state(lane), layer, self._answers[lane], self._outboxes[lane])
        counts: list[int] = self._counts[lane].tolist()
        return counts

    def _shared(self, lane: int, layer: int) -> None:
        in_flight = self._lanes[lane]
        assert in_flight is not None, f"lane {lane} has not begun"
        self.forward.shared_experts(in_flight.state, layer)

    def _state(self, lane: int) -> PassState:
        in_flight = self._lanes[lane]
        assert in_flight is not None, f"lane {lane} has not begun"
        if in_flight.error is not None:
            raise in_flight.error
        return in_flight.state

    def _sample(self, lane: int) -> Sampled:
        state, self._lanes[lane] = self._state(lane), None
        self.weight_bytes_read += self.forward.weight_bytes
        return self.forward.sample(state, self._answers[lane])


def slot_rows_view(memory: memoryview, num_seats: int, stride: int, layout: SlotLayout) -> Tensor:
    """The rows of a region's slots: uint8 [num_seats, num_lanes, slot_rows, row_bytes], sharing its memory."""
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.as_strided(
        (num_seats, layout.num_lanes, layout.slot_rows, layout.row_bytes),
        (stride, layout.slot_bytes, layout.row_bytes, 1),
        HEADER_BYTES,
    )
