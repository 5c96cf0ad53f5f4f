"""The attention side of a model on a device: what lanes ask for becomes ordered work.

A lane takes one turn with the expert nodes per sparse layer; turns are numbered from 0 on both sides. A shared expert
is computed once the turn is posted, while the routed ones are away.

Owns what each lane has in flight and the slots' memory as typed rows. Methods named with a leading underscore run as
programs on the device; the others only enqueue. Knows no arithmetic, sockets or requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

from msi.attention.capturing import capture_all
from msi.attention.forward import Forward, PassState
from msi.attention.graphs import AlikePasses, Bucket, LaneGraphs, filled_up
from msi.attention.kv_cache import KvCache
from msi.attention.launching import LanePrograms, LaneQueues
from msi.attention.layers_at_once import layers_at_once
from msi.attention.masks import MaskMaker, Masks
from msi.attention.pass_inputs import PassInputs
from msi.attention.whole import WholeQueues
from msi.device.compute_thread import Program
from msi.device.device import Device
from msi.device.regions import slot_rows
from msi.experts.half import ExpertHalf
from msi.kernels.kernels import Outboxes
from msi.kernels.native.bank import NativeExpertBank
from msi.kernels.native.layers import MOST_ROWS, NativeLayers
from msi.kernels.replicas import PlacementTables
from msi.kernels.routing import PackedRows, RowDtypes, hidden_rows
from msi.meter import StageMeter
from msi.models.attention_weights import AttentionWeights
from msi.models.config import ModelConfig
from msi.net.dispatch_link import DispatchLink
from msi.net.regions import Region
from msi.net.slots import SlotLayout
from msi.placement import Placement
from msi.types import MicroBatch, Sampled
from msi.worker.host import BlockMemory

NOBODY = MicroBatch((), (), (), (), ())  # a pass of fillers alone


@dataclass(slots=True)
class _InFlight:
    """What one lane has in flight; touched by the device's work alone."""

    state: PassState
    alike: AlikePasses | None = None  # where it runs as graphs
    error: Exception | None = None  # of a computation whose turn may have been over before


@dataclass(slots=True, eq=False)
class _Launched:
    """A pass as it was launched."""

    micro_batch: MicroBatch
    tables: PlacementTables
    first: int  # turn
    link: DispatchLink | None  # None where its experts are beside it
    masks: Future[Masks] | None  # None where no row is held to a grammar
    is_given_up: bool = False


class AttentionHalf:
    """Implements `msi.attention.lanes.AttentionCompute`.

    Args:
        row_dtypes: of rows on their way to the experts and back.
        landing: where combined rows land: [num_nodes, stride] of `answer_layout` slots' rows.
        beside: all experts, on the device's one thread: a pass then goes through both halves as they lie, and posts
            nothing. Rows do not travel in eight bits.
        buckets: sizes of decode passes that are captured, on a device that has graphs; None for all, as they come.
        dispatch_layout, answer_layout: the slots on either side of the link.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        kv_cache: KvCache,
        placement: Placement,
        device: Device,
        row_dtypes: RowDtypes,
        *,
        dispatch_layout: SlotLayout,
        answer_layout: SlotLayout,
        landing: Region,
        beside: ExpertHalf | None = None,
        buckets: Collection[Bucket] | None = None,
        block_memory: BlockMemory | None = None,
    ) -> None:
        self.num_layers = config.num_sparse_layers
        self.meter = StageMeter()  # T_a, without shared experts
        self.shared_meter = StageMeter()
        self.pass_meter = StageMeter()  # head and sampling, once per pass
        self.again_meter = StageMeter()  # rows packed again after a loss
        self.weight_bytes_read = 0
        self.kv_cache = kv_cache
        self.block_memory = block_memory
        self.forward = Forward(config, weights, kv_cache, placement, device)
        self._config = config
        self._sent_dtype = row_dtypes.sent
        self._device = device
        self._layout = dispatch_layout
        lanes = range(dispatch_layout.num_lanes)
        self._masks = MaskMaker(config.vocab_size)
        self._inputs = [PassInputs(device.upload) for _ in lanes]
        graphs, max_rows = device.graphs, dispatch_layout.slot_rows
        self._buckets = tuple(buckets or ())
        self._graphs = [None if graphs is None else LaneGraphs(graphs, max_rows, buckets) for _ in lanes]
        self._launched: list[deque[_Launched]] = [deque() for _ in lanes]  # passes whose first layer has not run yet
        self._current: list[_Launched | None] = [None for _ in lanes]
        self._lanes: list[_InFlight | None] = [None for _ in lanes]
        self._sampled: list[Sampled | Exception | None] = [None for _ in lanes]
        self._placement = placement
        self._missing: tuple[int, ...] = ()
        self._tables_again = [self.forward.tables for _ in lanes]  # that rows are packed again by
        counts = device.host_region(4 * len(lanes) * placement.num_nodes)
        programs = [self._programs(lane) for lane in lanes]
        self._queues = LaneQueues(device, placement.num_nodes, programs, counts.host())
        self.counts, self.launch, self.open = self._queues.counts, self._queues.launch, self._queues.open
        nowhere = PackedRows.view(
            torch.empty(0, dispatch_layout.row_bytes, dtype=torch.uint8), config.hidden_size, config.top_k,
            self._sent_dtype,
        )  # fmt: skip
        of_lanes = counts.tensor().view(torch.int32).view(len(lanes), placement.num_nodes)
        self._outboxes = [Outboxes([nowhere] * placement.num_nodes, of_lane) for of_lane in of_lanes]
        answers = slot_rows(landing, placement.num_nodes, answer_layout)
        answers = hidden_rows(answers, config.hidden_size, row_dtypes.answered)
        self._answers = answers.unbind(1)  # by lane: [num_nodes, slot_rows, hidden_size]
        self._beside = beside
        self._whole: WholeQueues[Program] | None = None
        self._at_once: NativeLayers | None = None
        if beside is not None:
            self._whole = WholeQueues(device, len(lanes), lambda: device.busy_s)
            self._by_layer = [self._whole_programs(lane, beside) for lane in lanes]
            if answers.dtype is weights.final_norm.weight.dtype:
                self._at_once = layers_at_once(config, weights, kv_cache, self.forward.view_of)
            self._in_one_call = [self._programs_at_once(lane, beside) for lane in lanes]

    def attach(self, node: int, out_rows: Region) -> None:
        """Rows for this expert node go into `out_rows` from now on."""
        slots = slot_rows(out_rows, 1, self._layout)[0]
        config = self._config
        for lane, outboxes in enumerate(self._outboxes):
            outboxes.rows[node] = PackedRows.view(slots[lane], config.hidden_size, config.top_k, self._sent_dtype)

    def use_placement(self, placement: Placement) -> None:
        """Passes that begin from now on send rows where it says."""
        self._placement = placement
        self.forward.use_placement(placement, self._missing)

    def use_nodes(self, missing: tuple[int, ...]) -> None:
        """These expert nodes are not there: rows that others can compute do not go to them."""
        if missing != self._missing:
            self._missing = missing
            self.forward.use_placement(self._placement, missing)

    async def prepare(self) -> None:
        """What decoding is captured as is there, before the first pass; all nodes are attached."""
        await capture_all(self._graphs, self._buckets, self._capture, self._device.free_memory_bytes)

    # -- msi.attention.lanes.AttentionCompute --------------------------------------------------------------------------

    def begin(self, lane: int, micro_batch: MicroBatch, first: int, link: DispatchLink) -> None:
        masks = self._masks.begin(micro_batch.constrained) if micro_batch.constrained else None
        self._launched[lane].append(_Launched(micro_batch, self.forward.tables, first, link, masks))

    def pack_again(self, lane: int, turn: int) -> None:
        self._tables_again[lane] = self.forward.tables
        self._queues.pack_again(lane, turn)

    async def sampled(self, lane: int) -> Sampled:
        await self._queues.sampled(lane)
        return self._taken(lane)

    def _taken(self, lane: int) -> Sampled:
        """What its pass has sampled, or raised."""
        sampled, self._sampled[lane] = self._sampled[lane], None
        if isinstance(sampled, Exception):
            raise sampled
        assert sampled is not None, f"lane {lane} has sampled nothing"
        return sampled

    @property
    def is_whole(self) -> bool:
        return self._whole is not None

    @property
    def beside_s(self) -> float:
        return 0.0 if self._beside is None else self._beside.meter.median_s

    async def run_whole(self, lane: int, micro_batch: MicroBatch, within_s: float) -> Sampled:
        assert self._whole is not None, "the experts are elsewhere"
        masks = self._masks.begin(micro_batch.constrained) if micro_batch.constrained else None
        launched = _Launched(micro_batch, self.forward.tables, 0, None, masks)
        self._launched[lane].append(launched)
        try:
            await self._whole.run(lane, self._programs_of(lane, launched), within_s)
        except BaseException:
            launched.is_given_up = True
            raise
        return self._taken(lane)

    def close(self) -> None:
        if self._whole is not None:
            self._whole.close()
        self._queues.close()
        self._masks.close()

    async def _capture(self, lane: int, bucket: Bucket) -> None:
        graphs = self._graphs[lane]
        assert graphs is not None, f"lane {lane} has no graphs"
        run = partial(self._run_fillers, lane, bucket)
        await self._queues.alone(lane, Program(run, graphs.give_up, StageMeter(), "capture", lane))
        self._lanes[lane] = None

    # -- programs ----------------------------------------------------------------------------------------------------

    def _programs(self, lane: int) -> LanePrograms[Program]:
        failed = partial(self._failed, lane)
        layers: list[tuple[Program, Program | None]] = []
        for layer in range(self.num_layers):
            attention = Program(partial(self._layer, lane, layer), failed, self.meter, "attention", lane)
            shared = None
            if self.forward.has_shared:
                run = partial(self._shared_layer, lane, layer)
                shared = Program(run, failed, self.shared_meter, "shared experts", lane)
            layers.append((attention, shared))
        return LanePrograms(
            layers,
            Program(partial(self._end, lane), failed, self.pass_meter, "sample", lane, reads=True),
            Program(partial(self._again, lane), failed, self.again_meter, "pack again", lane),
        )

    def _layer(self, lane: int, layer: int) -> None:
        """One turn; the embedding is looked up at the start of the first."""
        if layer == 0:
            self._current[lane], self._lanes[lane] = self._launched[lane].popleft(), None
        launched = self._current[lane]
        assert launched is not None, f"lane {lane} was not launched"
        if self._queues.is_given_up(lane, launched.first + layer):
            self._lanes[lane] = None
            return
        if layer == 0:
            self._begin(lane, launched)
        self._turn(lane, layer)

    def _shared_layer(self, lane: int, layer: int) -> None:
        in_flight = self._lanes[lane]
        if in_flight is not None and in_flight.error is None:  # else there was no turn
            self._shared(lane, layer)

    def _again(self, lane: int) -> None:
        launched, in_flight = self._current[lane], self._lanes[lane]
        if launched is None or in_flight is None or in_flight.error is not None:
            return  # the pass was given up
        state, turn = in_flight.state, self._queues.turn_again(lane)
        if launched.first + state.turn == turn:
            self.forward.pack_again(state, self._tables_again[lane], self._outboxes[lane])
        elif turn >= launched.first:  # else the pass was given up, and another has begun
            raise RuntimeError("layers behind a closed gate are launched already, so rows cannot be packed again")

    def _end(self, lane: int) -> None:
        self._sampled[lane] = None
        if self._lanes[lane] is not None:  # else the pass was given up
            self._sampled[lane] = self._sample(lane)

    def _failed(self, lane: int, error: Exception) -> None:
        """The pass of a program that raised ends with what it raised."""
        launched, in_flight = self._current[lane], self._lanes[lane]
        assert launched is not None, f"lane {lane} was not launched"
        if in_flight is not None:
            in_flight.error = error
        self._sampled[lane] = error
        if launched.link is not None:
            launched.link.failed(lane, launched.first, error)

    # -- programs of a pass whose experts are beside it: each does nothing once one has raised -----------------------

    def _whole_programs(self, lane: int, beside: ExpertHalf) -> list[Program]:
        failed = partial(self._failed, lane)
        programs: list[Program] = []
        for layer in range(self.num_layers):
            routes = partial(self._whole_layer, lane, layer)
            computes = partial(self._experts, lane, layer, beside)
            programs.append(Program(routes, failed, self.meter, "attention", lane))
            programs.append(Program(computes, failed, beside.meter, "experts", lane))
            if self.forward.has_shared:
                shared = partial(self._shared_layer, lane, layer)
                programs.append(Program(shared, failed, self.shared_meter, "shared experts", lane))
        end = partial(self._whole_end, lane)
        return [*programs, Program(end, failed, self.pass_meter, "sample", lane, reads=True)]

    def _programs_at_once(self, lane: int, beside: ExpertHalf) -> list[Program]:
        run, failed = partial(self._all_layers, lane, beside), partial(self._failed, lane)
        return [Program(run, failed, StageMeter(), "layers", lane), self._by_layer[lane][-1]]

    def _programs_of(self, lane: int, launched: _Launched) -> list[Program]:
        """Layer by layer, or one for all layers, which meters both halves itself."""
        batch, beside = launched.micro_batch, self._beside
        is_at_once = (
            self._at_once is not None
            and batch.num_tokens == len(batch.query_lens) <= MOST_ROWS
            and launched.tables.most_replicas == 1
            and beside is not None
            and isinstance(beside.bank, NativeExpertBank)
        )
        return self._in_one_call[lane] if is_at_once else self._by_layer[lane]

    def _all_layers(self, lane: int, beside: ExpertHalf) -> None:
        self._whole_begin(lane)
        if (state := self._wanted(lane)) is None:
            return
        bank, layers = beside.bank, self._at_once
        assert layers is not None, "this pass goes layer by layer"
        assert isinstance(bank, NativeExpertBank), bank
        attention_s, experts_s = self.forward.all_layers(state, layers, bank, self._answers[lane])
        for _ in range(self.num_layers):
            self.meter.add(attention_s / self.num_layers)
            beside.meter.add(experts_s / self.num_layers)

    def _whole_begin(self, lane: int) -> None:
        launched = self._launched[lane].popleft()
        self._current[lane], self._lanes[lane], self._sampled[lane] = launched, None, None
        self._begin(lane, launched)

    def _whole_layer(self, lane: int, layer: int) -> None:
        if layer == 0:
            self._whole_begin(lane)
        if (state := self._wanted(lane)) is not None:
            self.forward.route(state, layer, self._answers[lane])

    def _experts(self, lane: int, layer: int, beside: ExpertHalf) -> None:
        if (state := self._wanted(lane)) is not None:
            beside.run_here(layer, self.forward.packed_here(state), len(state.hidden), self._answers[lane])

    def _whole_end(self, lane: int) -> None:
        if self._wanted(lane) is not None:
            self._sampled[lane] = self._sample(lane)
        self._lanes[lane] = None

    def _wanted(self, lane: int) -> PassState | None:
        launched, in_flight = self._current[lane], self._lanes[lane]
        if launched is None or launched.is_given_up or in_flight is None or in_flight.error is not None:
            return None
        return in_flight.state

    # -- work --------------------------------------------------------------------------------------------------------

    def _begin(self, lane: int, launched: _Launched) -> None:
        batch, tables, graphs = launched.micro_batch, launched.tables, self._graphs[lane]
        bucket = None if graphs is None else graphs.bucket_of(batch)
        if graphs is None or bucket is None:
            in_flight = _InFlight(self.forward.begin(batch, *self._inputs[lane].lay_out(batch), tables))
        else:
            in_flight = self._begin_alike(lane, batch, bucket, tables, graphs)
        in_flight.state.masks = launched.masks
        self._lanes[lane] = in_flight

    def _begin_alike(
        self, lane: int, batch: MicroBatch, bucket: Bucket, tables: PlacementTables, graphs: LaneGraphs
    ) -> _InFlight:
        inputs = self._inputs[lane].lay_out(filled_up(batch, bucket), bucket.num_blocks)
        begun = self.forward.begin(batch, *inputs, tables, bucket.num_seqs - batch.num_tokens)
        alike = graphs.begin(bucket, begun)
        return _InFlight(alike.state, alike)

    def _run_fillers(self, lane: int, bucket: Bucket) -> None:
        """Twice: so that what is loaded is, and so that it is captured."""
        graphs = self._graphs[lane]
        assert graphs is not None, f"lane {lane} has no graphs"
        for _ in range(2):
            self._lanes[lane] = self._begin_alike(lane, NOBODY, bucket, self.forward.tables, graphs)
            for layer in range(self.num_layers):
                self._turn(lane, layer)
                if self.forward.has_shared:
                    self._shared(lane, layer)

    def _turn(self, lane: int, layer: int) -> None:
        state, outboxes = self._state(lane), self._outboxes[lane]
        work = partial(self.forward.route_and_pack, state, layer, self._answers[lane], outboxes)
        self._run(lane, ("layer", layer), (*outboxes.rows, state.tables), work)

    def _run(self, lane: int, part: object, outside: tuple[object, ...], work: Callable[[], None]) -> None:
        in_flight, graphs = self._lanes[lane], self._graphs[lane]
        assert in_flight is not None, f"lane {lane} has not begun"
        if graphs is None or in_flight.alike is None:
            work()
        else:
            graphs.run(in_flight.alike, part, outside, work)

    def _shared(self, lane: int, layer: int) -> None:
        in_flight = self._lanes[lane]
        assert in_flight is not None, f"lane {lane} has not begun"
        work = partial(self.forward.shared_experts, in_flight.state, layer)
        self._run(lane, ("shared", layer), (), work)

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
