"""The experts' matrix products over a wave as `msi.kernels.triton.wave` has planned it: rows where they landed, and no
product of a row with an expert that it did not choose.

Programs stride over units: some rows of one expert times some columns. Units of the same columns are next to one
another, so programs that run at the same time share weights in the cache; while the rows of an expert fit one tile,
weights come from memory once, which is what a decode pass costs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(
    base, matrix, row, column,
    NUM_ROWS: tl.constexpr, NUM_COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PART: tl.constexpr, IS_TMA: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_N, BLOCK_K] of a stack of matrices [NUM_ROWS, NUM_COLUMNS]; anything lies past the last row, and 0
    past the last column.

    Args:
        PART: rows that belong together; a tile begins in one of them.
    """
    if IS_TMA:
        tile = base.load([(matrix * NUM_ROWS + row).to(tl.int32), column])
    else:
        rows = row + tl.arange(0, BLOCK_N)
        if PART % BLOCK_N != 0:
            rows = tl.minimum(rows, (row // PART) * PART + PART - 1)
        columns = column + tl.arange(0, BLOCK_K)
        at = base + matrix * (NUM_ROWS * NUM_COLUMNS) + rows[:, None].to(tl.int64) * NUM_COLUMNS + columns[None, :]
        if NUM_COLUMNS % BLOCK_K == 0:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(columns < NUM_COLUMNS)[None, :], other=0.0)
    return tile


@triton.jit
def _rows(base, begins, column, NUM_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of rows that begin at these elements; 0 past the last column."""
    columns = column + tl.arange(0, BLOCK_K)
    at = base + begins[:, None] + columns[None, :]
    if NUM_COLUMNS % BLOCK_K == 0:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(columns < NUM_COLUMNS)[None, :], other=0.0)
    return tile


@triton.jit
def _dot(rows, weights, sums, scale, IS_SWAPPED: tl.constexpr, IS_SCALED: tl.constexpr, UPCAST: tl.constexpr):
    """sums + rows @ weights.T, [BLOCK_M, BLOCK_N], or its transpose: then weights are the tall operand.

    Args:
        UPCAST: multiplies in float32, for an interpreter that cannot in bfloat16.
    """
    if UPCAST:
        rows, weights = rows.to(tl.float32), weights.to(tl.float32)
    else:
        weights = weights.to(rows.dtype)  # of float8; else nothing
    if IS_SWAPPED:
        left, right = weights, tl.trans(rows)
    else:
        left, right = rows, tl.trans(weights)
    if IS_SCALED:
        sums += tl.dot(left, right, input_precision="ieee") * scale
    else:
        sums = tl.dot(left, right, sums, input_precision="ieee")
    return sums


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_SWAPPED: tl.constexpr):
    if IS_SWAPPED:
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return sums


@triton.jit
def gate_up(
    hidden, w13, scale13, bias13, act, wave, tile_expert, tile_begin, tile_end, pair_source,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
    IS_TMA: tl.constexpr, IS_SWAPPED: tl.constexpr, IS_FLAT: tl.constexpr, SCALE_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """act [pairs, INNER] = gate * sigmoid(ALPHA * gate) * (up + UP_OFFSET) of each pair's hidden row.

    Args:
        w13: [layers, experts, 2 * INNER, HIDDEN], gate first, or a descriptor of [all rows, HIDDEN] (IS_TMA).
        scale13: float32 [layers, experts, 2 * INNER / SCALE_BLOCK, HIDDEN / SCALE_BLOCK] (SCALE_BLOCK > 1), or
            [layers, experts, 2 * INNER], of rows (SCALE_BLOCK 1).
        bias13: [layers, experts, 2 * INNER] (HAS_BIAS).
        ALIGN: elements that every row's beginning is a multiple of.
        IS_FLAT: loops over units and along rows are one, so that a unit's loads begin before the unit before it ends.
        LIMIT: gate is at most this, and up within both signs of it; 0 for none.
    """
    layer = tl.load(wave).to(tl.int64)
    num_tiles = tl.load(wave + 2)
    column_tiles: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    IS_SCALED: tl.constexpr = SCALE_BLOCK > 1
    for unit in tl.range(tl.program_id(0), num_tiles * column_tiles, tl.num_programs(0), flatten=IS_FLAT):
        tile = unit % num_tiles
        column = (unit // num_tiles) * BLOCK_N
        matrix = layer * NUM_EXPERTS + tl.load(tile_expert + tile)
        end = tl.load(tile_end + tile)
        pairs = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_M)
        begins = tl.multiple_of(tl.load(pair_source + tl.minimum(pairs, end - 1)), ALIGN)
        gate = _zeros(BLOCK_M, BLOCK_N, IS_SWAPPED)
        up = _zeros(BLOCK_M, BLOCK_N, IS_SWAPPED)
        gate_scale = 1.0
        up_scale = 1.0
        for k in range(0, HIDDEN, BLOCK_K):
            rows = _rows(hidden, begins, k, HIDDEN, BLOCK_K)
            gates = _weights(w13, matrix, column, k, 2 * INNER, HIDDEN, BLOCK_N, BLOCK_K, INNER, IS_TMA)
            ups = _weights(w13, matrix, column + INNER, k, 2 * INNER, HIDDEN, BLOCK_N, BLOCK_K, INNER, IS_TMA)
            if IS_SCALED:
                across: tl.constexpr = (HIDDEN + SCALE_BLOCK - 1) // SCALE_BLOCK
                down: tl.constexpr = (INNER + SCALE_BLOCK - 1) // SCALE_BLOCK
                scales = scale13 + (matrix * 2 * down + column // SCALE_BLOCK) * across + k // SCALE_BLOCK
                gate_scale = tl.load(scales)
                up_scale = tl.load(scales + down * across)
            gate = _dot(rows, gates, gate, gate_scale, IS_SWAPPED, IS_SCALED, UPCAST)
            up = _dot(rows, ups, up, up_scale, IS_SWAPPED, IS_SCALED, UPCAST)
        if IS_SWAPPED:
            gate, up = tl.trans(gate), tl.trans(up)
        columns = column + tl.arange(0, BLOCK_N)
        if SCALE_BLOCK == 1:
            of_rows = scale13 + matrix * 2 * INNER + columns
            gate *= tl.load(of_rows, mask=columns < INNER, other=0.0)[None, :]
            up *= tl.load(of_rows + INNER, mask=columns < INNER, other=0.0)[None, :]
        if HAS_BIAS:
            biases = bias13 + matrix * 2 * INNER + columns
            gate += tl.load(biases, mask=columns < INNER, other=0.0).to(tl.float32)[None, :]
            up += tl.load(biases + INNER, mask=columns < INNER, other=0.0).to(tl.float32)[None, :]
        if LIMIT > 0:
            gate = tl.where(gate > LIMIT, LIMIT, gate)  # a NaN stays one
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        product = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + UP_OFFSET)
        to = act + pairs.to(tl.int64)[:, None] * INNER + columns[None, :]
        tl.store(to, product.to(act.dtype.element_ty), mask=(pairs < end)[:, None] & (columns < INNER)[None, :])


@triton.jit
def down(
    act, w2, scale2, bias2, partial, wave, tile_expert, tile_begin, tile_end, num_pairs,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, NUM_EXPERTS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_TMA: tl.constexpr, IS_SWAPPED: tl.constexpr, IS_FLAT: tl.constexpr, SCALE_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial [SPLITS, num_pairs, HIDDEN], sums of act [pairs, INNER] @ down.T over parts of INNER.

    A few rows have too few columns to keep a GPU busy: its programs share the long way along INNER, too, and
    `answer_rows` adds up what they found, always in the same order.

    Args:
        w2: [layers, experts, HIDDEN, INNER]; the rest as in `gate_up`.
    """
    layer = tl.load(wave).to(tl.int64)
    num_tiles = tl.load(wave + 2)
    column_tiles: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    each: tl.constexpr = ((INNER + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    IS_SCALED: tl.constexpr = SCALE_BLOCK > 1
    for unit in tl.range(tl.program_id(0), num_tiles * column_tiles * SPLITS, tl.num_programs(0), flatten=IS_FLAT):
        tile = unit % num_tiles
        column = (unit // num_tiles) % column_tiles * BLOCK_N
        split = unit // num_tiles // column_tiles
        matrix = layer * NUM_EXPERTS + tl.load(tile_expert + tile)
        end = tl.load(tile_end + tile)
        pairs = tl.load(tile_begin + tile) + tl.arange(0, BLOCK_M)
        begins = tl.minimum(pairs, end - 1).to(tl.int64) * INNER
        sums = _zeros(BLOCK_M, BLOCK_N, IS_SWAPPED)
        scale = 1.0
        for k in range(split * each, tl.minimum(split * each + each, INNER), BLOCK_K):
            rows = _rows(act, begins, k, INNER, BLOCK_K)
            weights = _weights(w2, matrix, column, k, HIDDEN, INNER, BLOCK_N, BLOCK_K, HIDDEN, IS_TMA)
            if IS_SCALED:
                across: tl.constexpr = (INNER + SCALE_BLOCK - 1) // SCALE_BLOCK
                scales: tl.constexpr = (HIDDEN + SCALE_BLOCK - 1) // SCALE_BLOCK * across
                scale = tl.load(scale2 + matrix * scales + column // SCALE_BLOCK * across + k // SCALE_BLOCK)
            sums = _dot(rows, weights, sums, scale, IS_SWAPPED, IS_SCALED, UPCAST)
        if IS_SWAPPED:
            sums = tl.trans(sums)
        columns = column + tl.arange(0, BLOCK_N)
        if SCALE_BLOCK == 1:
            sums *= tl.load(scale2 + matrix * HIDDEN + columns, mask=columns < HIDDEN, other=0.0)[None, :]
        if HAS_BIAS:
            bias = tl.load(bias2 + matrix * HIDDEN + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32)
            sums += tl.where(split == 0, bias, 0.0)[None, :]
        to = partial + (split * num_pairs + pairs).to(tl.int64)[:, None] * HIDDEN + columns[None, :]
        tl.store(to, sums.to(partial.dtype.element_ty), mask=(pairs < end)[:, None] & (columns < HIDDEN)[None, :])
