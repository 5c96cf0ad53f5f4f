"""The experts of one node on a GPU: their weights stacked, and a wave of rows through them without a host wait."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from msi.kernels import SCALE_BLOCK, SWIGLU, Activation, fp8
from msi.kernels.blocks import num_blocks
from msi.kernels.experts import Places, counts_at, weights_at
from msi.kernels.kernels import Biases
from msi.kernels.quantized import Quantized, quantize
from msi.kernels.routing import PackedRows, RowDtypes, answer_row_bytes, row_bytes
from msi.kernels.triton import host_rows
from msi.kernels.triton.host_rows import HostRows
from msi.kernels.triton.launches import Counts, ExpertWeights, WaveLaunches
from msi.kernels.triton.rounded import Library
from msi.kernels.triton.tiles import TINY, Tiles, choose, expected_rows, tiles_for

log = logging.getLogger(__name__)
MAX_ROWS = 4096  # of what is computed at a time: longer waves go in parts, so memory between the products has a bound
INTERPRETED_SMS = 3  # programs that an interpreter is asked to play
WARM_ROWS = 16  # of a slot
SHARED_BYTES = 227 * 1024  # where no device says it
TRIED_ROWS = 512  # of an expert, where any number of them is cut the same way


class TritonExpertBank:
    """Implements `msi.kernels.kernels.ExpertBank`.

    No more than `wave.RING` waves may be launched that are not through.

    Args:
        num_model_experts: of a layer of the whole model; how many rows an expert here can expect follows from it.
        tiles: to compute with, in place of what this device is known to like.
        uses_graphs: on a GPU, waves are replays of graphs that `prepare` captures.
        library: whose products are taken of matrices in float8, where it can and is better.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        *,
        num_model_experts: int | None = None,
        tiles: tuple[Tiles, ...] | None = None,
        uses_graphs: bool = True,
        library: Library | None = None,
    ) -> None:
        _, _, hidden, inner = weights.w2.shape
        self.weights = weights
        self._device = weights.w2.device
        self._num_model_experts = num_model_experts
        self._wanted_tiles = tiles
        self._uses_graphs = uses_graphs and self._device.type == "cuda"
        self._library = library
        self._by_library: tuple[Tiles, ...] = ()  # which of the tiles are left to it
        dtype = weights.w2.dtype
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            self._num_sms = properties.multi_processor_count
            shared = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)
            self.tiles = tiles or tiles_for(properties.name, hidden, inner, dtype, shared)
        else:
            self._num_sms = INTERPRETED_SMS
            self.tiles = tiles or tiles_for("", hidden, inner, dtype, SHARED_BYTES)
        self._expert_bytes = 3 * hidden * inner * dtype.itemsize
        self._counts = _new_counts(weights)
        self.num_rows = self._counts.rows_seen
        self._launches: WaveLaunches | None = None
        self._landed: PackedRows | None = None
        self._has_scaled = False  # matrices whose scales say how all others are scaled
        self._host_rows: HostRows | None = None
        self._addresses: dict[int, tuple[Tensor, int]] = {}  # of where each seat's answers leave

    @property
    def weight_bytes_read(self) -> int:
        return int(self._counts.read_seen[0]) * self._expert_bytes

    def arranged(self, places: Places) -> TritonExpertBank:
        def moved(old: Tensor | None) -> Tensor | None:
            return None if old is None else weights_at(old, places)

        had = self.weights
        new = replace(
            had, w13=weights_at(had.w13, places), w2=weights_at(had.w2, places), bias13=moved(had.bias13),
            bias2=moved(had.bias2), scale13=moved(had.scale13), scale2=moved(had.scale2),
        )  # fmt: skip
        bank = TritonExpertBank(
            new, num_model_experts=self._num_model_experts, tiles=self._wanted_tiles, uses_graphs=self._uses_graphs,
            library=self._library,
        )  # fmt: skip
        bank._has_scaled = self._has_scaled
        bank.num_rows.copy_(counts_at(self.num_rows, places))
        bank._counts.rows.copy_(bank.num_rows)
        return bank

    def put(
        self,
        layer: int,
        expert: int,
        gate_up: Tensor | Quantized,
        down: Tensor | Quantized,
        biases: Biases | None = None,
    ) -> None:
        weights = self.weights
        assert (biases is None) == (weights.bias13 is None), "a bank has biases of all experts or of none"
        if biases is not None and weights.bias13 is not None and weights.bias2 is not None:
            weights.bias13[layer, expert], weights.bias2[layer, expert] = biases
        if weights.scale_block == 0:
            assert isinstance(gate_up, Tensor), gate_up.format
            assert isinstance(down, Tensor), down.format
            weights.w13[layer, expert] = gate_up
            weights.w2[layer, expert] = down
            return
        gates, ups, down = (_in_float8(one) for one in (*_halves(gate_up), down))
        assert gates.grain == ups.grain == down.grain, "matrices of an expert are scaled alike"
        if down.grain == "row" and not self._has_scaled:
            weights = self.weights = _with_scales_of_rows(weights)
        self._has_scaled = True
        is_of_rows = weights.scale_block == 1
        assert is_of_rows == (down.grain == "row"), "experts of a bank are scaled alike"
        assert weights.scale13 is not None
        assert weights.scale2 is not None
        inner, height = weights.w2.shape[3], weights.scale13.shape[2] // 2
        for half, one in enumerate((gates, ups)):
            weights.w13[layer, expert, half * inner : (half + 1) * inner] = one.values
            weights.scale13[layer, expert, half * height : (half + 1) * height] = _scales(one)
        weights.w2[layer, expert], weights.scale2[layer, expert] = down.values, _scales(down)

    def warm(self, num_model_experts: int, k: int, dtypes: RowDtypes) -> None:
        """With waves of no rows, through memory of their own."""
        self._num_model_experts = num_model_experts
        hidden = self.weights.w2.shape[2]
        if dtypes.computed is torch.float32 and self._wanted_tiles is None:  # wider than weights in float8
            self.tiles = TINY
        memory = torch.zeros(2, 2, WARM_ROWS, row_bytes(hidden, k, dtypes.sent), dtype=torch.uint8, device=self._device)
        landed = PackedRows.view(memory, hidden, k, dtypes.sent, dtypes.computed)
        answer_bytes = answer_row_bytes(hidden, dtypes.answered)
        is_gpu = self._device.type == "cuda"
        with torch.cuda.device_of(self.weights.w2):
            for is_staged in (False, True) if is_gpu else (False,):
                launches = self._new_launches(
                    landed, (WARM_ROWS * answer_bytes, answer_bytes), dtypes.answered, is_staged
                )
                for tiles in self.tiles:
                    launches.descriptors.write(0, 0, [])
                    launches.launch_eagerly(tiles)
            if self._library is not None:
                self._by_library = self._better_by(self._library, k, dtypes)
            if is_gpu:
                torch.cuda.current_stream().synchronize()

    def prepare(self, landed: PackedRows, answer_strides: tuple[int, int], answer_dtype: torch.dtype) -> None:
        is_reached = host_rows.can_reach(self._device, landed.hidden)
        hidden = self.weights.w2.shape[2]
        self._host_rows = None if is_reached else HostRows(landed, self._device, hidden, answer_dtype)
        if self._host_rows is not None:
            landed, answer_strides = self._host_rows.landed, self._host_rows.answer_strides
        self._landed, self._addresses = landed, {}
        is_far = host_rows.is_far(self._device, landed.hidden)
        self._launches = self._new_launches(landed, answer_strides, answer_dtype, is_far)
        self._capture(self._launches)

    def _capture(self, launches: WaveLaunches) -> None:
        if self._uses_graphs:
            try:
                launches.capture()
            except RuntimeError as error:
                log.warning(
                    "waves of experts are launched kernel by kernel: no graph of them could be captured: %s", error
                )
                launches.forget_graphs()

    def _new_launches(
        self,
        landed: PackedRows,
        answer_strides: tuple[int, int],
        answer_dtype: torch.dtype,
        is_staged: bool,
        by_library: Sequence[Tiles] | None = None,
        counts: Counts | None = None,
    ) -> WaveLaunches:
        num_seats, _, slot_rows, _ = landed.hidden.shape
        return WaveLaunches(
            self.weights, counts or self._counts, landed, answer_strides, answer_dtype,
            max_rows=min(num_seats * slot_rows, MAX_ROWS), tiles=self.tiles, num_sms=self._num_sms, is_staged=is_staged,
            products=self._library, by_library=self._by_library if by_library is None else by_library,
        )  # fmt: skip

    def _better_by(self, library: Library, k: int, dtypes: RowDtypes) -> tuple[Tiles, ...]:
        """For how many rows of an expert a library's products are taken: tried on waves through memory of their own."""
        weights = self.weights
        if (reason := _why_not_by_a_library(weights, dtypes)) is not None:
            log.info("experts are multiplied by Triton's kernels alone: %s", reason)
            return ()
        _, num_experts, hidden, inner = weights.w2.shape
        sizes = [
            min(MAX_ROWS, -(-min(one.rows, TRIED_ROWS) * num_experts // min(k, num_experts))) for one in self.tiles
        ]
        shape = (1, 1, max(sizes), row_bytes(hidden, k, dtypes.sent))
        landed = PackedRows.view(
            torch.zeros(shape, dtype=torch.uint8, device=self._device), hidden, k, dtypes.sent, dtypes.computed
        )
        generator = torch.Generator(self._device).manual_seed(0)
        rows = torch.randn(max(sizes), hidden, generator=generator, device=self._device).to(dtypes.computed)
        landed.hidden[0, 0] = rows if landed.unpacked is None else fp8.pack(rows)
        choices = torch.rand(max(sizes), num_experts, generator=generator, device=self._device).topk(
            min(k, num_experts)
        )
        landed.topk_ids[:] = -1
        landed.topk_ids[0, 0, :, : choices.indices.shape[1]] = choices.indices
        landed.topk_weights[:] = 1 / k
        answers = torch.zeros(max(sizes), hidden, dtype=dtypes.computed, device=self._device)
        strides = (answers.nbytes, hidden * answers.itemsize)
        nobodys = _new_counts(weights)
        own, theirs = (
            self._new_launches(landed, strides, dtypes.computed, False, taken, nobodys) for taken in ((), self.tiles)
        )
        fresh = [own, theirs]

        def run(launches: WaveLaunches, tiles: Tiles, size: int) -> Tensor:
            if launches in fresh:
                fresh.remove(launches)
                self._capture(launches)
                launches.descriptors.write_everywhere(0, 0, [(0, 0, size, answers.data_ptr())])
            launches.launch(launches.way(tiles, size))
            return answers[:size].clone()

        better = []
        for tiles, size in zip(self.tiles, sizes, strict=True):
            for launches in (own, theirs):
                launches.descriptors.write_everywhere(0, 0, [(0, 0, size, answers.data_ptr())])
            what = f"{num_experts} experts in float8, {hidden} x {inner}, of up to {tiles.rows} rows each"
            if library.is_better(what, partial(run, own, tiles, size), partial(run, theirs, tiles, size)):
                better.append(tiles)
        return tuple(better)

    def run(
        self, layer: int, lane: int, seats: Sequence[tuple[int, int]], landed: PackedRows, answers: Mapping[int, Tensor]
    ) -> None:
        if not seats:
            return
        if self._landed is not landed and not (self._host_rows is not None and self._host_rows.is_of(landed)):
            first = answers[seats[0][0]]
            strides = (first.stride(0) * first.element_size(), first.stride(1) * first.element_size())
            self.prepare(landed, strides, fp8.E4M3 if fp8.is_packed(first) else first.dtype)
        if self._host_rows is None:
            self._launch(layer, lane, seats, landed, answers)
        else:
            self._host_rows.take_up(lane, seats)
            self._launch(layer, lane, seats, self._host_rows.landed, self._host_rows.answers)
            self._host_rows.bring_down(lane, seats, answers)

    def _launch(
        self, layer: int, lane: int, seats: Sequence[tuple[int, int]], landed: PackedRows, answers: Mapping[int, Tensor]
    ) -> None:
        launches = self._launches
        assert launches is not None
        k = landed.topk_ids.shape[-1]
        num_experts = self.weights.w2.shape[1]
        in_all = max(num_experts, self._num_model_experts or 0)
        members = [(seat, num_rows, self._address(seat, answers[seat])) for seat, num_rows in seats]
        for part in _parts(members, launches.max_rows):
            num_rows = launches.descriptors.write(layer, lane, part)
            tiles = choose(self.tiles, expected_rows(num_rows, k, num_experts, in_all))
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                launches.descriptors.write_everywhere(layer, lane, part)  # whoever replays this, means this wave
                launches.launch_eagerly(launches.way(tiles, num_rows))
            else:
                launches.launch(launches.way(tiles, num_rows))

    def _address(self, seat: int, answers: Tensor) -> int:
        known = self._addresses.get(seat)
        if known is None or known[0] is not answers:
            known = self._addresses[seat] = (answers, answers.data_ptr())
        return known[1]


def new_expert_bank(
    *,
    num_layers: int,
    num_experts: int,
    hidden_size: int,
    inner_size: int,
    dtype: torch.dtype,
    device: torch.device,
    num_model_experts: int | None = None,
    activation: Activation = SWIGLU,
    has_bias: bool = False,
    library: Library | None = None,
) -> TritonExpertBank:
    """Without weights yet. Biases are float32, whatever the rest is.

    Args:
        dtype: that weights are kept in; with float8_e4m3fn, in blocks that have a scale each, unless what is put first
            has scales of rows.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(num_layers, num_experts, *shape, dtype=dtype, device=device)

    weights = ExpertWeights(empty(2 * inner_size, hidden_size), empty(hidden_size, inner_size), activation=activation)
    if has_bias:
        biases = (empty(size, dtype=torch.float32) for size in (2 * inner_size, hidden_size))
        weights = replace(weights, bias13=next(biases), bias2=next(biases))
    if dtype is torch.float8_e4m3fn:
        across, along = num_blocks(hidden_size), num_blocks(inner_size)
        scales = empty(2 * along, across, dtype=torch.float32), empty(across, along, dtype=torch.float32)
        weights = replace(weights, scale13=scales[0], scale2=scales[1], scale_block=SCALE_BLOCK)
    return TritonExpertBank(weights, num_model_experts=num_model_experts, library=library)


def _why_not_by_a_library(weights: ExpertWeights, dtypes: RowDtypes) -> str | None:
    if weights.scale_block != SCALE_BLOCK:
        return "their scales are not of 128 x 128 values"
    if weights.bias13 is not None:
        return "they have biases"
    if any(size % SCALE_BLOCK for size in weights.w2.shape[2:]):
        return f"their sides, {' and '.join(map(str, weights.w2.shape[2:]))}, are no multiples of {SCALE_BLOCK}"
    if dtypes.computed is not torch.bfloat16:
        return f"rows are computed in {str(dtypes.computed).removeprefix('torch.')}"
    return None


def _halves(gate_up: Tensor | Quantized) -> Sequence[Tensor | Quantized]:
    if isinstance(gate_up, Tensor):
        return gate_up.chunk(2)
    pairs = zip(gate_up.values.chunk(2), gate_up.scales.chunk(2), strict=True)
    return [replace(gate_up, values=values, scales=scales) for values, scales in pairs]


def _in_float8(matrix: Tensor | Quantized) -> Quantized:
    return matrix if isinstance(matrix, Quantized) else quantize(matrix, "fp8")


def _scales(matrix: Quantized) -> Tensor:
    """Those that differ: of blocks [blocks, blocks], or of rows [n]."""
    return matrix.scales[:, 0] if matrix.grain == "row" else matrix.scales[::SCALE_BLOCK]


def _with_scales_of_rows(weights: ExpertWeights) -> ExpertWeights:
    num_layers, num_experts, hidden, inner = weights.w2.shape

    def ones(num_rows: int) -> Tensor:
        return torch.ones(num_layers, num_experts, num_rows, device=weights.w2.device)

    return replace(weights, scale13=ones(2 * inner), scale2=ones(hidden), scale_block=1)


def _new_counts(weights: ExpertWeights) -> Counts:
    device = weights.w2.device
    rows = torch.zeros(weights.w2.shape[:2], dtype=torch.int64)
    read = torch.zeros(1, dtype=torch.int64)
    seen = [one.pin_memory() if device.type == "cuda" else one for one in (rows, read)]
    return Counts(torch.zeros_like(rows, device=device), seen[0], torch.zeros_like(read, device=device), seen[1])


def _parts(members: Sequence[tuple[int, int, int]], max_rows: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """(seat, first row, number of rows, address) of as many rows at a time as there is memory for."""
    part: list[tuple[int, int, int, int]] = []
    left = max_rows
    for seat, num_rows, address in members:
        first = 0
        while first < num_rows:
            taken = min(num_rows - first, left)
            part.append((seat, first, taken, address))
            first += taken
            left -= taken
            if not left:
                yield part
                part, left = [], max_rows
    if part:
        yield part
