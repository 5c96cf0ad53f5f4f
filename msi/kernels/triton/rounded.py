"""Rows rounded to e4m3, with a float32 scale for each 128 values of a row, for a library that multiplies such rows by
matrices in float8: before a product of all rows, and around the two products of a wave's experts.

The library is told which matrix each row is for, in tiles of rows that share one; that is found out on the device, as
`plan_wave` has it, so that a wave is the same launches with the same arguments as any other of its size. Nothing here
knows which library that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels import SCALE_BLOCK, Activation
from msi.kernels.fp8 import E4M3
from msi.kernels.quantized import Quantized
from msi.kernels.triton.fp8 import pack
from msi.kernels.triton.linear import Float8Linear

BLOCK = 1024  # values that a program rounds at a time
Linear = Callable[[Tensor], Tensor]
Rounded = tuple[Tensor, Tensor]  # e4m3 [rows, depth], and scales [rows, depth / 128] that lie column by column
Matrices = tuple[Tensor, Tensor]  # e4m3 [(many,) outputs, depth], and a scale for each 128 x 128 of them


class Products(Protocol):
    """A library's products, in bfloat16, of rounded rows.

    Attributes:
        tile_rows: from a multiple of which on rows are for another matrix.
    """

    tile_rows: int

    def grouped(self, rows: Rounded, matrices: Matrices, out: Tensor, matrix_of: Tensor) -> None:
        """Each row by its own matrix.

        Args:
            matrix_of: int32 [rows], the same throughout a tile but for -1, behind them, of rows that are none.
        """


class Library(Products, Protocol):
    """Which products are taken, besides."""

    def is_better(self, what: str, own: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> bool:
        """Whether the library's way is to be taken; whichever it is, it has run by then.

        Args:
            what: is computed, for the log.
        """

    def linear(self, matrix: Quantized, bias: Tensor | None, own: Float8Linear) -> Linear:
        """`own`, or a product that takes the better for as many rows as it is given."""


@triton.jit
def _store(values, scales, place, num_places, x, first, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [first, first + BLOCK) of a row that is rounded to a place; x is float32, 0 past SIZE."""
    numbers, of_groups = pack(x, BLOCK)
    tl.store(values + place.to(tl.int64) * SIZE + first + tl.arange(0, BLOCK), numbers, mask=inside)
    groups = first // 128 + tl.arange(0, BLOCK // 128)
    is_there = tl.max(tl.reshape(inside.to(tl.int32), [BLOCK // 128, 128]), 1) > 0
    tl.store(scales + groups.to(tl.int64) * num_places + place, of_groups, mask=is_there)


@triton.jit
def round_rows(rows, row_stride, values, scales, num_places, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """values [num_places, DEPTH] and scales [DEPTH / 128, num_places] of so many rows as there are programs for."""
    blocks: tl.constexpr = (DEPTH + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    x = tl.load(rows + row.to(tl.int64) * row_stride + columns, mask=columns < DEPTH, other=0.0).to(tl.float32)
    _store(values, scales, row, num_places, x, first, columns < DEPTH, DEPTH, BLOCK)


@triton.jit
def gather_rounded(
    hidden, pair_source, wave, tile_expert, tile_begin, tile_end, values, scales, matrix_of, pair_place, num_places,
    HIDDEN: tl.constexpr, NUM_EXPERTS: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of a wave's pairs, rounded, each tile's from a multiple of TILE on; whatever lies between stays.

    Args:
        pair_source: elements from `hidden` to each pair's row, a multiple of ALIGN.
        matrix_of: int32 [num_places], among the matrices of all layers; -1 where no row is.
        pair_place: int32, where each pair's row has come to lie.
    """
    layer = tl.load(wave)
    num_tiles = tl.load(wave + 2)
    blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    for unit in range(tl.program_id(0), num_places * blocks, tl.num_programs(0)):
        place = unit // blocks
        tile = place // TILE
        is_tile = tile < num_tiles
        begin = tl.load(tile_begin + tile, mask=is_tile, other=0)
        end = tl.load(tile_end + tile, mask=is_tile, other=0)
        pair = begin + place % TILE
        is_row = pair < end
        expert = tl.load(tile_expert + tile, mask=is_row, other=0)
        source = tl.multiple_of(tl.load(pair_source + pair, mask=is_row, other=0), ALIGN)
        first = (unit % blocks) * BLOCK
        if first == 0:
            tl.store(matrix_of + place, tl.where(is_row, layer * NUM_EXPERTS + expert, -1))
            tl.store(pair_place + pair, place, mask=is_row)
        columns = first + tl.arange(0, BLOCK)
        inside = columns < tl.where(is_row, HIDDEN, 0)
        x = tl.load(hidden + source + columns, mask=inside, other=0.0).to(tl.float32)
        _store(values, scales, place, num_places, x, first, inside, HIDDEN, BLOCK)


@triton.jit
def activate_rounded(
    gate_up, matrix_of, values, scales, num_places, wave, row_pair, pair_place, row_place,
    INNER: tl.constexpr, K: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What `msi.kernels.triton.experts.gate_up` makes of its sums, of gate_up [num_places, 2 * INNER] and rounded; and
    row_place: where the products of each row's choices lie, in place of row_pair's numbers.
    """
    blocks: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    for unit in range(tl.program_id(0), num_places * blocks, tl.num_programs(0)):
        place = unit // blocks
        is_row = tl.load(matrix_of + place) >= 0
        first = (unit % blocks) * BLOCK
        columns = first + tl.arange(0, BLOCK)
        inside = columns < tl.where(is_row, INNER, 0)
        at = gate_up + place.to(tl.int64) * (2 * INNER) + columns
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + INNER, mask=inside, other=0.0).to(tl.float32)
        if LIMIT > 0:
            gate = tl.where(gate > LIMIT, LIMIT, gate)  # a NaN stays one
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        x = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + UP_OFFSET)
        _store(values, scales, place, num_places, x, first, inside, INNER, BLOCK)
    num_choices = tl.load(wave + 1) * K
    for choice in range(tl.program_id(0) * BLOCK, num_choices, tl.num_programs(0) * BLOCK):
        choices = choice + tl.arange(0, BLOCK)
        pairs = tl.load(row_pair + choices, mask=choices < num_choices, other=-1)
        places = tl.load(pair_place + pairs, mask=pairs >= 0, other=-1)
        tl.store(row_place + choices, places, mask=choices < num_choices)


def rounded(rows: Tensor, num_places: int) -> Rounded:
    """Of rows [n, depth], in memory for `num_places`; past the n-th they are anything."""
    num_rows, depth = rows.shape
    values = torch.empty(num_places, depth, dtype=E4M3, device=rows.device)
    scales = torch.empty(depth // SCALE_BLOCK, num_places, device=rows.device)
    block = block_of(depth)
    round_rows[(num_rows * triton.cdiv(depth, block),)](
        rows, rows.stride(0), values, scales, num_places, DEPTH=depth, BLOCK=block
    )
    return values, scales.T


def block_of(size: int) -> int:
    return min(BLOCK, int(triton.next_power_of_2(size)))


class RoundedWave:
    """The two products of a wave by a library, over memory that is taken once.

    Args:
        matrices: w13 [layers, experts, 2 h', h] and w2 [layers, experts, h, h'], with their scales.
        max_rows: of a wave, each of which has chosen `k` experts at most.
    """

    def __init__(
        self,
        matrices: tuple[Matrices, Matrices],
        activation: Activation,
        products: Products,
        *,
        max_rows: int,
        k: int,
        num_sms: int,
    ) -> None:
        (w13, scale13), (w2, scale2) = matrices
        _, self._num_experts, self._hidden, self._inner = w2.shape
        self._w13, self._w2 = (
            (one.flatten(0, 1), scale.flatten(0, 1)) for one, scale in ((w13, scale13), (w2, scale2))
        )
        self._activation, self._products, self._k = activation, products, k
        self._num_programs = 4 * num_sms
        self.tile_rows = products.tile_rows
        most = self._places(max_rows)
        sizes = [self.tile_rows]
        while sizes[-1] < most:
            sizes.append(min(2 * sizes[-1], most))
        self.sizes = tuple(sizes)
        device = w2.device

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._rows = empty(most, self._hidden, dtype=E4M3)
        self._row_scales = empty(most * self._hidden // SCALE_BLOCK, dtype=torch.float32)
        self._gate_up = empty(most, 2 * self._inner, dtype=torch.bfloat16)
        self._act = empty(most, self._inner, dtype=E4M3)
        self._act_scales = empty(most * self._inner // SCALE_BLOCK, dtype=torch.float32)
        self.down = empty(most, self._hidden, dtype=torch.bfloat16)
        self._matrix_of = empty(most, dtype=torch.int32)
        self._pair_place = empty(max_rows * k, dtype=torch.int32)
        self.row_place = empty(max_rows * k, dtype=torch.int32)

    def size_of(self, num_rows: int) -> int:
        """Places that so many rows' pairs fit, however they have chosen: one of `sizes`."""
        wanted = self._places(num_rows)
        return next(size for size in self.sizes if size >= wanted)

    def launch(self, num_places: int, hidden: Tensor, align: int, planned: Mapping[str, Tensor]) -> None:
        """After `plan_wave` with tiles of `tile_rows`; leaves `down`, of places, and `row_place`.

        Args:
            align: elements that every row of `hidden` begins at a multiple of.
        """
        activation, grid = self._activation, (self._num_programs,)
        rows, row_scales = self._cut(self._rows, self._row_scales, num_places)
        act, act_scales = self._cut(self._act, self._act_scales, num_places)
        matrix_of = self._matrix_of[:num_places]
        gather_rounded[grid](
            hidden, planned["pair_source"], planned["wave"], planned["tile_expert"], planned["tile_begin"],
            planned["tile_end"], rows, row_scales, matrix_of, self._pair_place, num_places,
            HIDDEN=self._hidden, NUM_EXPERTS=self._num_experts, TILE=self.tile_rows, ALIGN=align,
            BLOCK=block_of(self._hidden),
        )  # fmt: skip
        self._products.grouped((rows, row_scales.T), self._w13, self._gate_up[:num_places], matrix_of)
        activate_rounded[grid](
            self._gate_up, matrix_of, act, act_scales, num_places, planned["wave"], planned["row_pair"],
            self._pair_place, self.row_place, INNER=self._inner, K=self._k, ALPHA=activation.alpha,
            LIMIT=activation.limit, UP_OFFSET=activation.up_offset, BLOCK=block_of(self._inner),
        )  # fmt: skip
        self._products.grouped((act, act_scales.T), self._w2, self.down[:num_places], matrix_of)

    def _places(self, num_rows: int) -> int:
        pairs = num_rows * self._k
        begun = min(pairs, self._num_experts)  # tiles that may lack rows
        tiles = begun + (pairs - begun) // self.tile_rows
        return max(1, tiles) * self.tile_rows

    def _cut(self, values: Tensor, scales: Tensor, num_places: int) -> Rounded:
        depth = values.shape[1]
        return values[:num_places], scales[: num_places * depth // SCALE_BLOCK].view(depth // SCALE_BLOCK, num_places)
