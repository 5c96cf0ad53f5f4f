"""Halves of a model that compute nothing: programs take what stage costs say, rows go where a routing says."""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from msi.attention.launching import LanePrograms, LaneQueues
from msi.experts.batches import WaveBatch
from msi.meter import StageMeter
from msi.net.combine_link import CombineLink
from msi.net.dispatch_link import DispatchLink
from msi.net.landing import seat_slots
from msi.net.regions import Region
from msi.net.slots import ROW_ALIGNMENT
from msi.placement import Placement
from msi.planner.stage_costs import StageCosts
from msi.simulator.device import SimulatedDevice, SimulatedProgram
from msi.simulator.histories import Histories
from msi.simulator.popularity import Routing
from msi.types import MicroBatch, Sampled
from msi.worker.host import BlockMemory

ROW_BYTES = ROW_ALIGNMENT  # of a simulated row, either way
DRAW = struct.Struct("<III")  # lies where the first row would: the mark of the draw, tokens it was for, and the view

PACKING_S = 20e-6  # rows once more, after a loss


@dataclass(frozen=True, slots=True)
class _Launched:
    """A pass as it was launched."""

    micro_batch: MicroBatch
    num_tokens: int
    num_context_tokens: int
    first: int  # turn
    view: int


NO_PASS = _Launched(MicroBatch((), (), (), (), ()), 0, 0, 0, 0)


class SimulatedAttention:
    """An attention half whose stages take what `costs` says and whose rows go where `routing` says.

    Implements `msi.worker.host.AttentionPart`.
    """

    block_memory: BlockMemory | None = None

    def __init__(
        self,
        link: DispatchLink,
        device: SimulatedDevice,
        *,
        num_layers: int,
        placement: Placement,
        costs: StageCosts,
        routing: Routing,
        chance: random.Random,
    ) -> None:
        self.num_layers = num_layers
        self.meter = StageMeter()
        self.shared_meter = StageMeter()
        self.pass_meter = StageMeter()
        self.weight_bytes_read = 0
        self.device = device
        self._costs = costs
        self._routing = routing
        self._chance = chance
        self._placement = placement
        self._missing: tuple[int, ...] = ()
        self._view = routing.view(placement)
        self._layout = link.layout
        self._histories = Histories()
        self._slots: dict[int, Sequence[memoryview]] = {}  # by node, each lane's rows
        lanes = range(link.layout.num_lanes)
        self._launched: list[deque[_Launched]] = [deque() for _ in lanes]  # whose first layer has not opened yet
        self._lanes = [NO_PASS for _ in lanes]
        self._queues = LaneQueues(device, len(link.nodes), [self._programs(lane) for lane in lanes])
        self.counts, self.launch, self.open = self._queues.counts, self._queues.launch, self._queues.open

    def attach(self, node: int, out_rows: Region) -> None:
        self._slots[node] = self._layout.split_rows(out_rows.host())

    async def prepare(self) -> None:
        """There is nothing to be done."""

    def use_placement(self, placement: Placement) -> None:
        self._placement = placement
        self._view = self._routing.view(placement, self._missing)

    @property
    def is_whole(self) -> bool:
        return False

    @property
    def beside_s(self) -> float:
        return 0.0

    async def run_whole(self, lane: int, micro_batch: MicroBatch, within_s: float) -> Sampled:
        raise NotImplementedError("the simulator's roles meet by their links")

    def begin(self, lane: int, micro_batch: MicroBatch, first: int, link: DispatchLink) -> None:
        num_context_tokens = sum(micro_batch.context_lens)
        self._launched[lane].append(
            _Launched(micro_batch, micro_batch.num_tokens, num_context_tokens, first, self._view)
        )

    def use_nodes(self, missing: tuple[int, ...]) -> None:
        self._missing = missing
        self._view = self._routing.view(self._placement, missing)

    def pack_again(self, lane: int, turn: int) -> None:
        self._lanes[lane] = replace(self._lanes[lane], view=self._view)
        self._queues.pack_again(lane, turn)

    async def sampled(self, lane: int) -> Sampled:
        await self._queues.sampled(lane)
        return Sampled(self._histories.said(self._lanes[lane].micro_batch))

    def close(self) -> None:
        self._queues.close()

    def _programs(self, lane: int) -> LanePrograms[SimulatedProgram]:
        layers = [
            (
                SimulatedProgram(
                    partial(self._attention_s, lane, layer), partial(self._pack, lane, layer), "attention", lane
                ),
                None,
            )
            for layer in range(self.num_layers)
        ]
        return LanePrograms(
            layers,
            SimulatedProgram(partial(self._sample_s, lane), self.pass_meter.add, "sample", lane),
            SimulatedProgram(lambda: PACKING_S, partial(self._draw_again, lane), "pack again", lane),
        )

    def _draw_again(self, lane: int, duration_s: float) -> None:
        layer = self._queues.turn_again(lane) - self._lanes[lane].first
        self._draw(lane, max(0, layer))  # of a pass that was given up nobody wants its rows

    def _attention_s(self, lane: int, layer: int) -> float | None:
        if layer == 0:
            self._lanes[lane] = self._launched[lane].popleft()
            self._histories.begin(self._lanes[lane].micro_batch)
        passing = self._lanes[lane]
        if self._queues.is_given_up(lane, passing.first + layer):
            return None
        if layer == self.num_layers - 1:
            self._histories.write(passing.micro_batch)
        return self._costs.attention_s(passing.num_tokens, passing.num_context_tokens)

    def _sample_s(self, lane: int) -> float | None:
        return self._costs.pass_s(len(self._lanes[lane].micro_batch.logit_rows)) or None

    def _pack(self, lane: int, layer: int, duration_s: float) -> None:
        self.meter.add(duration_s)
        self._draw(lane, layer)

    def _draw(self, lane: int, layer: int) -> None:
        num_tokens, view = self._lanes[lane].num_tokens, self._lanes[lane].view
        mark, num_rows = self._routing.draw(num_tokens, self._chance, view, layer)
        for node, slots in self._slots.items():
            self.counts[lane, node] = num_rows[node]
            if num_rows[node]:
                DRAW.pack_into(slots[lane], 0, mark, num_tokens, view)


class SimulatedExperts:
    """The experts of one node, whose batches take what `costs` says. Implements `msi.worker.host.ExpertPart`.

    Args:
        counts_rows: by expert, which takes a while.
    """

    def __init__(
        self,
        link: CombineLink,
        device: SimulatedDevice,
        *,
        node: int,
        costs: StageCosts,
        routing: Routing,
        counts_rows: bool = False,
    ) -> None:
        self.depth = 1
        self.meter = StageMeter()
        self.weight_bytes_read = 0
        self.device = device
        self._node = node
        self._costs = costs
        self._routing = routing
        self._counts_rows = counts_rows
        self._slots = [seat_slots(link.landing, seat) for seat in range(link.landing.num_seats)]
        self._queue = device.queue("experts")
        self._done = device.words.take()
        self._spent_s = 0.0
        self._rows: dict[int, NDArray[np.float64]] = {}  # by layer and expert

    def attach(self, seat: int, out_rows: Region) -> None:
        pass

    def rows_by_layer(self) -> list[dict[int, int]]:
        layers = range(1 + max(self._rows, default=-1))
        counted = [self._rows[layer].round().astype(int).tolist() if layer in self._rows else [] for layer in layers]
        return [dict(enumerate(rows)) for rows in counted]

    def run(self, batch: WaveBatch, ticket: int) -> None:
        program = SimulatedProgram(partial(self._experts_s, batch), self._through, "experts", batch.lane)
        self._queue.run(program)
        self._queue.signal(self._done, ticket)

    def follow(self, seen: Callable[[int], None]) -> None:
        self.device.follow(self._done, seen)

    def outcome(self) -> tuple[float, None]:
        return self._spent_s, None

    def close(self) -> None:
        self.device.words.give_back(self._done)

    def _experts_s(self, batch: WaveBatch) -> float:
        lane, slots = batch.lane, self._slots
        draws = [DRAW.unpack_from(slots[seat][lane]) for seat, _, _ in batch.rows]
        if self._counts_rows:
            rows = self._routing.rows(self._node, draws, batch.layer)
            self._rows[batch.layer] = self._rows.get(batch.layer, 0.0) + rows
        return self._costs.expert_s(*self._routing.load(self._node, draws, batch.layer))

    def _through(self, duration_s: float) -> None:
        self._spent_s = duration_s
        self.meter.add(duration_s)
