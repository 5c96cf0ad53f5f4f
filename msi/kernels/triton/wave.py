"""A wave's plan, made on the device: which rows each expert computes, where they lie, and where their sums go.

What differs from wave to wave, the host writes into a ring of descriptors (`Descriptors`); how far the ring has been
read is counted on the device. So all launches of a wave have the same arguments every time, and one captured graph
serves every layer, lane and number of rows. Nothing here knows a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels.triton.fp8 import store_packed, unpack

RING = 32  # waves that may be launched and not yet planned
LEAST_SEATS = 8  # that a descriptor has places for, so that few kinds of kernels are compiled
LAYER, LANE, NUM_MEMBERS, NUM_ROWS, MEMBERS = 0, 1, 2, 3, 4  # of a descriptor; then four numbers of each member
WAVE_LAYER, WAVE_ROWS, WAVE_TILES = 0, 1, 2  # of what the plan tells the kernels after it


class Descriptors:
    """A ring of int64 [RING, 4 + 4 * seats] in memory that host and device see, and the device's place in it.

    layer, lane, members, rows; then of the members: seats, first rows within their slots, ends among the wave's rows,
    and addresses of the lane-0 slots that their answers leave from. Past the members, ends are those of the last.
    """

    def __init__(self, num_seats: int, device: torch.device) -> None:
        self.seats = max(LEAST_SEATS, int(triton.next_power_of_2(num_seats)))
        pinned = device.type == "cuda"
        self.ring = torch.zeros(RING, MEMBERS + 4 * self.seats, dtype=torch.int64, pin_memory=pinned)
        self.ticket = torch.zeros(1, dtype=torch.int64, device=device)  # waves whose last kernel has run
        self._rows = self.ring.numpy()
        self._num_written = 0

    def write_everywhere(self, layer: int, lane: int, members: Sequence[tuple[int, int, int, int]]) -> None:
        """This wave's, however often what was captured is replayed; while none is out that is not through."""
        for _ in range(RING):
            self.write(layer, lane, members)

    def write(self, layer: int, lane: int, members: Sequence[tuple[int, int, int, int]]) -> int:
        """The next wave's; returns its rows. Read by the launches that follow.

        Args:
            members: (seat, first row, number of rows, address) of each.
        """
        seats = self.seats
        row = self._rows[self._num_written % RING]
        self._num_written += 1
        total = 0
        for index, (seat, first, num_rows, address) in enumerate(members, MEMBERS):
            total += num_rows
            row[index] = seat
            row[index + seats] = first
            row[index + 2 * seats] = total
            row[index + 3 * seats] = address
        row[MEMBERS + 2 * seats + len(members) : MEMBERS + 3 * seats] = total
        row[:MEMBERS] = layer, lane, len(members), total
        return total


@triton.jit
def _member(rows, ends):
    """Of rows of the wave, whose they are; past the last, the last place."""
    is_behind = ends[None, :] <= rows[:, None]
    return tl.minimum(tl.sum(is_behind.to(tl.int32), 1), ends.shape[0] - 1)


@triton.jit
def plan_wave(
    ring, ticket, topk_weights, topk_ids,
    weights_seat, weights_lane, weights_row, ids_seat, ids_lane, ids_row,
    hidden_seat, hidden_lane, hidden_row, answer_lane, answer_row,
    wave, offsets, tile_expert, tile_begin, tile_end, pair_source, row_pair, row_weight, row_answer, row_source,
    total_rows, num_rows_seen, total_read, num_read_seen, source_row,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, KS: tl.constexpr, SEATS: tl.constexpr,
    ROWS: tl.constexpr, COUNTED: tl.constexpr, BLOCK_M: tl.constexpr, RING: tl.constexpr, IS_STAGED: tl.constexpr,
):  # fmt: skip
    """A stable counting sort of the wave's (row, choice) pairs by expert. Every program counts all, and sorts its own.

    Args:
        ROWS, COUNTED: that are sorted, and counted, at a time.
        *_seat, *_lane, *_row: strides, of topk_weights, topk_ids and hidden in elements, of answers in bytes.
        wave: int32 [3]: layer, rows, tiles of BLOCK_M pairs.
        offsets: int32 [experts + 1], where an expert's pairs begin.
        tile_expert, tile_begin, tile_end: int32 of each tile.
        pair_source: int64 of each pair, where its hidden row begins, in elements (IS_STAGED: of rows copied together).
        row_pair, row_weight: int32 and float32 [rows, K], the pair of each choice or -1.
        row_answer: int64 [rows], addresses; row_source: int64 [rows], in elements.
        source_row: elements from row to row of those copied together.
        total_rows, num_rows_seen: int64 [layers, experts], the device's and what the host sees.
        total_read, num_read_seen: int64 [1], of experts whose weights were read.
    """
    at = ring + (tl.load(ticket) % RING) * (4 + 4 * SEATS)
    layer = tl.load(at)
    lane = tl.load(at + 1)
    num_rows = tl.load(at + 3).to(tl.int32)
    program = tl.program_id(0)
    each = tl.cdiv(tl.cdiv(num_rows, ROWS), tl.num_programs(0)) * ROWS
    mine = program * each
    until = tl.minimum(mine + each, num_rows)
    experts = tl.arange(0, EXPERTS)
    is_expert = experts < NUM_EXPERTS
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    if (mine < num_rows) | (program == 0):
        members = tl.arange(0, SEATS)
        choices = tl.arange(0, KS)
        seats = tl.load(at + 4 + members)
        ends = tl.load(at + 4 + 2 * SEATS + members).to(tl.int32)
        begins = tl.load(at + 3 + 2 * SEATS + members, mask=members > 0, other=0)
        skipped = tl.load(at + 4 + SEATS + members) - begins  # what turns a row of the wave into one of its slot
        ids_base = seats * ids_seat + lane * ids_lane + skipped * ids_row
        for start in range(0, num_rows, COUNTED):
            rows = start + tl.arange(0, COUNTED)
            from_ids = tl.gather(ids_base, _member(rows, ends), 0) + rows * ids_row
            is_one = (rows < num_rows)[:, None] & (choices < K)[None, :]
            ids = tl.load(topk_ids + from_ids[:, None] + choices[None, :], mask=is_one, other=-1)
            ids = tl.where(ids < NUM_EXPERTS, ids, -1)
            all_ids = tl.reshape(ids, [COUNTED * KS])
            total += tl.histogram(all_ids, EXPERTS, mask=all_ids >= 0)
            if start < mine:
                ids_before = tl.reshape(tl.where((rows < mine)[:, None], ids, -1), [COUNTED * KS])
                before += tl.histogram(ids_before, EXPERTS, mask=ids_before >= 0)
        first = tl.cumsum(total, 0) - total
        begin = first + before

        tiles = tl.cdiv(total, BLOCK_M)
        first_tile = tl.cumsum(tiles, 0) - tiles
        num_busy = tl.maximum(tl.cdiv(num_rows, tl.maximum(each, 1)), 1)  # programs with rows
        for tile in range(program, tl.max(tiles, 0), num_busy):
            to = first_tile + tile
            there = tile < tiles
            tl.store(tile_expert + to, experts, mask=there)
            tl.store(tile_begin + to, first + tile * BLOCK_M, mask=there)
            tl.store(tile_end + to, first + total, mask=there)
        if program == 0:
            tl.store(wave, layer.to(tl.int32))
            tl.store(wave + 1, num_rows)
            tl.store(wave + 2, tl.sum(tiles, 0))
            tl.store(offsets + experts, first, mask=is_expert)
            tl.store(offsets + NUM_EXPERTS, tl.sum(total, 0))
            of_layer = layer * NUM_EXPERTS + experts
            rows_now = tl.load(total_rows + of_layer, mask=is_expert, other=0) + total
            tl.store(total_rows + of_layer, rows_now, mask=is_expert)
            tl.store(num_rows_seen + of_layer, rows_now, mask=is_expert)
            read_now = tl.load(total_read) + tl.sum((total > 0).to(tl.int64), 0)
            tl.store(total_read, read_now)
            tl.store(num_read_seen, read_now)

        weights_base = seats * weights_seat + lane * weights_lane + skipped * weights_row
        hidden_base = seats * hidden_seat + lane * hidden_lane + skipped * hidden_row
        answer_base = tl.load(at + 4 + 3 * SEATS + members) + lane * answer_lane + skipped * answer_row
        pairs = tl.arange(0, ROWS * KS)
        choice = pairs % KS
        for start in range(mine, until, ROWS):
            rows = start + pairs // KS
            alive = (rows < num_rows) & (choice < K)
            is_first = alive & (choice == 0)
            member = _member(rows, ends)
            source = tl.gather(hidden_base, member, 0) + rows * hidden_row
            tl.store(row_source + rows, source, mask=is_first)
            if IS_STAGED:
                source = rows.to(tl.int64) * source_row
            answer = tl.gather(answer_base, member, 0) + rows * answer_row
            tl.store(row_answer + rows, answer, mask=is_first)
            from_weights = tl.gather(weights_base, member, 0) + rows * weights_row + choice
            weights = tl.load(topk_weights + from_weights, mask=alive, other=0.0)
            tl.store(row_weight + rows * K + choice, weights, mask=alive)
            from_ids = tl.gather(ids_base, member, 0) + rows * ids_row + choice
            ids = tl.load(topk_ids + from_ids, mask=alive, other=-1)
            here = (ids >= 0) & (ids < NUM_EXPERTS)
            ids = tl.where(here, ids, -1)
            is_earlier = (ids[:, None] == ids[None, :]) & (pairs[None, :] < pairs[:, None])
            hot = ids[:, None] == experts[None, :]
            to = tl.sum(is_earlier.to(tl.int32), 1) + tl.sum(tl.where(hot, begin[None, :], 0), 1)
            tl.store(pair_source + to, source, mask=here)
            tl.store(row_pair + rows * K + choice, tl.where(here, to, -1), mask=alive)
            begin += tl.sum(hot.to(tl.int32), 0)


@triton.jit
def stage_rows(hidden, row_source, wave, staged, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, SCALES_AT: tl.constexpr):
    """Rows behind one another: those that landed in host memory, so that each crosses the bus once, not per tile; and
    those in e4m3, so that each is unpacked once (SCALES_AT: behind so many bytes of `hidden`'s rows; else 0).
    """
    num_rows = tl.load(wave + 1)
    blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    for unit in range(tl.program_id(0), num_rows * blocks, tl.num_programs(0)):
        row = unit // blocks
        cols = (unit % blocks) * BLOCK + tl.arange(0, BLOCK)
        source = tl.multiple_of(hidden + tl.load(row_source + row), 16)
        to = staged + row.to(tl.int64) * HIDDEN
        if SCALES_AT > 0:
            rows = unpack(source, cols, cols < HIDDEN, SCALES_AT).to(staged.dtype.element_ty)
        else:
            rows = tl.load(source + cols, mask=cols < HIDDEN)
        tl.store(to + cols, rows, mask=cols < HIDDEN)


@triton.jit
def answer_rows(
    partial, wave, ticket, row_pair, row_weight, row_answer, num_pairs,
    HIDDEN: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    SCALES_AT: tl.constexpr,
):  # fmt: skip
    """Each row's experts added up by their weights, in the order of its choices, to where its answer leaves.

    Args:
        partial: [SPLITS, num_pairs, HIDDEN], as `msi.kernels.triton.experts.down` left it.
        DTYPE: of answers, unless they leave in e4m3.
        SCALES_AT: in e4m3, with scales behind so many bytes; else 0.
    """
    num_rows = tl.load(wave + 1)
    if tl.program_id(0) == 0:
        tl.store(ticket, tl.load(ticket) + 1)
    blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    for unit in range(tl.program_id(0), num_rows * blocks, tl.num_programs(0)):
        row = unit // blocks
        cols = (unit % blocks) * BLOCK + tl.arange(0, BLOCK)
        combined = tl.zeros([BLOCK], tl.float32)
        for choice in tl.static_range(K):
            pair = tl.load(row_pair + row * K + choice)
            weight = tl.load(row_weight + row * K + choice)
            here = cols < tl.where(pair >= 0, HIDDEN, 0)
            output = tl.zeros([BLOCK], tl.float32)
            for split in tl.static_range(SPLITS):
                part = (tl.maximum(pair, 0) + split * num_pairs).to(tl.int64) * HIDDEN + cols
                output += tl.load(partial + part, mask=here, other=0.0).to(tl.float32)
            combined += tl.where(here, output * weight, 0.0)
        at = tl.load(row_answer + row)
        if SCALES_AT > 0:
            store_packed(at, combined, (unit % blocks) * BLOCK, HIDDEN, SCALES_AT, BLOCK)
        else:
            to = tl.multiple_of(at.to(tl.pointer_type(DTYPE)), 16)
            tl.store(to + cols, combined.to(DTYPE), mask=cols < HIDDEN)


def new_plan(
    num_pairs: int, num_rows: int, num_tiles: int, num_experts: int, device: torch.device
) -> dict[str, Tensor]:
    """Memory that `plan_wave` writes, by the names of its parameters."""

    def empty(length: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(length, dtype=dtype, device=device)

    return {
        "wave": empty(4, torch.int32),
        "offsets": empty(num_experts + 1, torch.int32),
        "tile_expert": empty(num_tiles, torch.int32),
        "tile_begin": empty(num_tiles, torch.int32),
        "tile_end": empty(num_tiles, torch.int32),
        "pair_source": empty(num_pairs, torch.int64),
        "row_pair": empty(num_pairs, torch.int32),
        "row_weight": empty(num_pairs, torch.float32),
        "row_answer": empty(num_rows, torch.int64),
        "row_source": empty(num_rows, torch.int64),
    }
