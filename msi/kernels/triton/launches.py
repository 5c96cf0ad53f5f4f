"""What is launched for a wave: five kernels over memory that is taken once, with the same arguments for every wave.

So a launch can be captured as a graph, and replayed with whatever the ring of descriptors says next.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels import SWIGLU, Activation, fp8
from msi.kernels.routing import PackedRows
from msi.kernels.triton import experts
from msi.kernels.triton.rounded import Products, RoundedWave
from msi.kernels.triton.tiles import Product, Tiles
from msi.kernels.triton.wave import RING, Descriptors, answer_rows, new_plan, plan_wave, stage_rows

PLAN_PAIRS, PLAN_VALUES = 64, 4096  # of rows and choices, that a program sorts at a time; the same times experts
COUNTED_PAIRS, COUNTED_VALUES = 2048, 8192  # that it counts at a time; rows of them times seats, which lie in registers
ANSWER_BLOCK = 1024
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Of all layers and experts of a node.

    Attributes:
        w13: [layers, experts, 2 h', h], gate first.
        w2: [layers, experts, h, h'].
        bias13, bias2: [layers, experts, 2 h'] and [layers, experts, h].
        scale13, scale2: float32, of blocks of `scale_block` rows and columns (of either half of w13 by itself), or of
            rows where that is 1.
    """

    w13: Tensor
    w2: Tensor
    bias13: Tensor | None = None
    bias2: Tensor | None = None
    scale13: Tensor | None = None
    scale2: Tensor | None = None
    scale_block: int = 0
    activation: Activation = SWIGLU


@dataclass(frozen=True, slots=True)
class Counts:
    """int64 [layers, experts] rows and [1] experts read, on the device, and what the host sees of them."""

    rows: Tensor
    rows_seen: Tensor
    read: Tensor
    read_seen: Tensor


def answer_warps(scales_at: int) -> int:
    """Of `answer_rows`: where answers are packed in eight bits, four spill."""
    return 8 if scales_at else 4


class WaveLaunches:
    """Launches for rows that land in one place.

    Args:
        landed: [seats, lanes, slot_rows], in memory that the device can read.
        answer_strides: of a lane and of a row where answers leave, in bytes.
        answer_dtype: in which they leave.
        max_rows: of a wave.
        is_staged: rows land in the host's memory, and are copied together before they are multiplied, as those in
            eight bits always are.
        products: a library's; and of the tiles, which are left to it.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        counts: Counts,
        landed: PackedRows,
        answer_strides: tuple[int, int],
        answer_dtype: torch.dtype,
        *,
        max_rows: int,
        tiles: tuple[Tiles, ...],
        num_sms: int,
        is_staged: bool = False,
        products: Products | None = None,
        by_library: Collection[Tiles] = (),
    ) -> None:
        num_seats, self._hidden, dtype = landed.hidden.shape[0], weights.w2.shape[2], landed.dtype
        is_packed = fp8.is_packed(landed.hidden)
        self._k = landed.topk_ids.shape[-1]
        self._weights, self._counts, self._landed = weights, counts, landed
        self._num_experts, self._inner = weights.w2.shape[1], weights.w2.shape[3]
        self._answer_strides, self._dtype = answer_strides, dtype
        at = fp8.scales_at(self._hidden)
        self._scales_at, self._answer_scales_at = at * is_packed, at * (answer_dtype is fp8.E4M3)
        self._num_sms, self._tiles = num_sms, tiles
        self.max_rows = max_rows
        device = weights.w2.device
        self.descriptors = Descriptors(num_seats, device)
        self._num_pairs = max_rows * self._k
        heights = [*(one.block_m for one in tiles), *([] if products is None else [products.tile_rows])]
        num_tiles = self._num_experts + self._num_pairs // min(heights)
        self.planned = new_plan(self._num_pairs, max_rows, num_tiles, self._num_experts, device)
        self.act = torch.empty(self._num_pairs, self._inner, dtype=dtype, device=device)
        splits = max(one.down.splits for one in tiles)
        self._partial = torch.empty(splits, self._num_pairs, self._hidden, dtype=torch.float32, device=device)
        self._staged: Tensor | None = None
        if is_staged or is_packed:
            self._staged = torch.empty(max_rows, self._hidden, dtype=dtype, device=device)
        self._upcast = dtype is torch.bfloat16 and device.type == "cpu"
        self._by_library = frozenset(map(id, by_library))
        self.rounded: RoundedWave | None = None
        if self._by_library:
            assert products is not None
            assert weights.scale13 is not None
            assert weights.scale2 is not None
            matrices = (weights.w13, weights.scale13), (weights.w2, weights.scale2)
            self.rounded = RoundedWave(
                matrices, weights.activation, products, max_rows=max_rows, k=self._k, num_sms=num_sms
            )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def way(self, tiles: Tiles, num_rows: int) -> Tiles | int:
        """How a wave of so many rows is computed: by our own products, or by a library's, in so many places."""
        if self.rounded is None or id(tiles) not in self._by_library:
            return tiles
        return self.rounded.size_of(num_rows)

    def ways(self) -> list[Tiles | int]:
        sizes = () if self.rounded is None else self.rounded.sizes
        return [*(one for one in self._tiles if id(one) not in self._by_library), *sizes]

    def launch(self, way: Tiles | int) -> None:
        """A wave whose descriptor is the next in the ring."""
        if (graph := self._graphs.get(_key(way))) is not None:
            graph.replay()
        else:
            self.launch_eagerly(way)

    def capture(self) -> None:
        """Makes graphs, one of each way, before the first wave; waits for nothing but its own stream.

        Each is launched for a wave of no rows before, which loads what it needs, and replayed for another.
        """
        stream = torch.cuda.Stream(self._weights.w2.device)
        stream.wait_stream(torch.cuda.current_stream(self._weights.w2.device))
        with torch.cuda.stream(stream):
            for way in self.ways():
                self.descriptors.write(0, 0, [])
                self.launch_eagerly(way)
            stream.synchronize()
            for way in self.ways():
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.launch_eagerly(way)
                finally:
                    graph.capture_end()
                self.descriptors.write(0, 0, [])
                graph.replay()  # what a first replay sets up may wait for all streams
                self._graphs[_key(way)] = graph
            stream.synchronize()

    def forget_graphs(self) -> None:
        self._graphs = {}

    def launch_eagerly(self, way: Tiles | int) -> None:
        """The same, and never a graph."""
        if isinstance(way, Tiles):
            self.plan(way.block_m)
            self.gate_up(way)
            self.down_and_answer(way)
            return
        rounded = self.rounded
        assert rounded is not None
        hidden = self._rows()
        self.plan(rounded.tile_rows)
        rounded.launch(way, hidden, _alignment(hidden), self.planned)
        self._answer(rounded.down, 1, len(rounded.down), rounded.row_place)

    def plan(self, block_m: int) -> None:
        plan, landed, counts = self.planned, self._landed, self._counts
        descriptors = self.descriptors
        source = self._rows()
        rows = plan_rows(self._k, self._num_experts)
        chunks = triton.cdiv(self.max_rows, rows)
        plan_wave[(min(chunks, self._num_sms),)](
            descriptors.ring, descriptors.ticket, landed.topk_weights, landed.topk_ids,
            *landed.topk_weights.stride()[:3], *landed.topk_ids.stride()[:3], *landed.hidden.stride()[:3],
            *self._answer_strides,
            *(plan[name] for name in (
                "wave", "offsets", "tile_expert", "tile_begin", "tile_end", "pair_source", "row_pair", "row_weight",
                "row_answer", "row_source",
            )),
            counts.rows, counts.rows_seen, counts.read, counts.read_seen, source.stride(-2),
            NUM_EXPERTS=self._num_experts, EXPERTS=padded(self._num_experts), K=self._k,
            KS=triton.next_power_of_2(self._k), SEATS=descriptors.seats, ROWS=rows,
            COUNTED=counted_rows(self._k, descriptors.seats), BLOCK_M=block_m, RING=RING,
            IS_STAGED=self._staged is not None, num_warps=8,
        )  # fmt: skip
        if self._staged is not None:
            stage_rows[(self._num_sms,)](
                landed.hidden, plan["row_source"], plan["wave"], self._staged, HIDDEN=self._hidden, BLOCK=ANSWER_BLOCK,
                SCALES_AT=self._scales_at,
            )  # fmt: skip

    def gate_up(self, tiles: Tiles) -> None:
        plan, weights, product = self.planned, self._weights, tiles.gate_up
        hidden = self._rows()
        activation = weights.activation
        w13 = self._descriptor(weights.w13, product) if product.is_tma else weights.w13
        experts.gate_up[(self._num_sms * product.per_sm,)](
            hidden, w13, weights.scale13, weights.bias13, self.act, plan["wave"],
            plan["tile_expert"], plan["tile_begin"], plan["tile_end"], plan["pair_source"],
            HIDDEN=self._hidden, INNER=self._inner, NUM_EXPERTS=self._num_experts, BLOCK_M=tiles.block_m,
            BLOCK_N=product.block_n, BLOCK_K=product.block_k, ALIGN=_alignment(hidden), IS_TMA=product.is_tma,
            IS_SWAPPED=product.is_swapped, IS_FLAT=product.is_flat,
            SCALE_BLOCK=weights.scale_block, HAS_BIAS=weights.bias13 is not None,
            ALPHA=activation.alpha, LIMIT=activation.limit, UP_OFFSET=activation.up_offset, UPCAST=self._upcast,
            num_warps=product.num_warps, num_stages=product.num_stages,
        )  # fmt: skip

    def down(self, tiles: Tiles) -> None:
        plan, weights, product = self.planned, self._weights, tiles.down
        w2 = self._descriptor(weights.w2, product) if product.is_tma else weights.w2
        experts.down[(self._num_sms * product.per_sm,)](
            self.act, w2, weights.scale2, weights.bias2, self.partial_of(tiles), plan["wave"],
            plan["tile_expert"], plan["tile_begin"], plan["tile_end"], self._num_pairs,
            HIDDEN=self._hidden, INNER=self._inner, NUM_EXPERTS=self._num_experts, SPLITS=product.splits,
            BLOCK_M=tiles.block_m, BLOCK_N=product.block_n, BLOCK_K=product.block_k, IS_TMA=product.is_tma,
            IS_SWAPPED=product.is_swapped, IS_FLAT=product.is_flat,
            SCALE_BLOCK=weights.scale_block, HAS_BIAS=weights.bias2 is not None,
            UPCAST=self._upcast, num_warps=product.num_warps, num_stages=product.num_stages,
        )  # fmt: skip

    def down_and_answer(self, tiles: Tiles) -> None:
        self.down(tiles)
        self.answer(tiles)

    def partial_of(self, tiles: Tiles) -> Tensor:
        """Outputs of pairs in the rows' dtype, or, where several are added up, in float32."""
        if tiles.down.splits > 1:
            return self._partial
        return (
            self._partial.flatten()
            .view(self._dtype)[: self._num_pairs * self._hidden]
            .view(1, self._num_pairs, self._hidden)
        )

    def answer(self, tiles: Tiles) -> None:
        self._answer(self.partial_of(tiles), tiles.down.splits, self._num_pairs, self.planned["row_pair"])

    def _answer(self, partial: Tensor, splits: int, num_pairs: int, row_pair: Tensor) -> None:
        plan = self.planned
        answer_rows[(self._num_sms * 2,)](
            partial, plan["wave"], self.descriptors.ticket, row_pair, plan["row_weight"], plan["row_answer"], num_pairs,
            HIDDEN=self._hidden, K=self._k, SPLITS=splits,
            BLOCK=min(ANSWER_BLOCK, triton.next_power_of_2(max(fp8.GROUP, self._hidden))), DTYPE=TYPES[self._dtype],
            SCALES_AT=self._answer_scales_at, num_warps=answer_warps(self._answer_scales_at),
        )  # fmt: skip

    def _rows(self) -> Tensor:
        return self._landed.hidden if self._staged is None else self._staged

    def _descriptor(self, stack: Tensor, product: Product) -> object:
        from triton.tools.tensor_descriptor import TensorDescriptor

        rows = stack.view(-1, stack.shape[-1])
        return TensorDescriptor.from_tensor(rows, [product.block_n, product.block_k])


def _key(way: Tiles | int) -> int:
    return -way if isinstance(way, int) else id(way)


def padded(num_experts: int) -> int:
    """To a power of two."""
    return max(2, int(triton.next_power_of_2(num_experts)))


def plan_rows(k: int, num_experts: int) -> int:
    return max(1, min(PLAN_PAIRS, PLAN_VALUES // padded(num_experts)) // int(triton.next_power_of_2(k)))


def counted_rows(k: int, seats: int) -> int:
    return max(1, min(COUNTED_PAIRS // int(triton.next_power_of_2(k)), COUNTED_VALUES // seats))


def _alignment(rows: Tensor) -> int:
    """Elements that every row's beginning is a multiple of: 16 bytes' worth, or what there is."""
    wanted = 16 // rows.element_size()
    fits = rows.data_ptr() % 16 == 0 and all(stride % wanted == 0 for stride in rows.stride()[:-1])
    return wanted if fits else 1
