"""What attention works off in a pass: laid out by the host from lengths, in one run of int32, for all layers.

Sequences with few queries have their contexts split evenly over as many programs as the device runs at once, whatever
the lengths are. Of the others, each block of queries is an item with all the context that it sees, longest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msi.kernels import BLOCK_TOKENS
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.pass_tensors import PassTensors

ITEM = 8  # numbers of an item, one of them unused: lines of 32 bytes
FEWEST_TOKENS = 256  # of a part: less is not worth merging

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a launch computes.

    Attributes:
        rows, keys: of a tile: queries times the heads that share a KV head, and tokens of context.
        num_stages: of the loop over the context; a tile in flight takes two, as its blocks are looked up first.
        per_processor: programs that run on one processor at a time; 0 where nothing is split.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    per_processor: int = 0


@dataclass(frozen=True, slots=True)
class SplitItems:
    """Sequences with few queries.

    Attributes:
        items: int32 [n, ITEM].
        item_starts: int32 [num_programs + 1].
        part_starts: int32 [num_sequences + 1], items of each sequence.
        num_parts: rows of partial results.
    """

    items: Tensor
    item_starts: Tensor
    part_starts: Tensor
    num_programs: int
    num_sequences: int
    num_parts: int
    tiles: Tiles


@dataclass(frozen=True, slots=True)
class ChunkItems:
    """Blocks of queries of the others: int32 [num_items, ITEM]."""

    items: Tensor
    num_items: int
    tiles: Tiles


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """What every layer's attention reads of a pass.

    Attributes:
        slots: int32 [num_tokens], where their keys and values go.
        block_tables: int32 [num_seqs, max_blocks].
        upcast: whether products are computed in float32 whatever the rows are.
    """

    slots: Tensor
    block_tables: Tensor
    sliding_window: int | None
    split: SplitItems | None
    chunks: ChunkItems | None
    upcast: bool = False


def split_tiles(shape: AttentionShape, itemsize: int) -> Tiles:
    """Small tiles, and several programs on a processor: while one begins a sequence, and has nothing in flight, the
    others have.
    """
    rows = max(16, _power_of_2(shape.num_heads // shape.num_kv_heads))
    return Tiles(
        rows, _keys(shape, itemsize, 8 << 10), 4, 5, per_processor=3 if rows == 16 else 2
    )  # whose registers fit


def chunk_tiles(shape: AttentionShape, itemsize: int, architecture: int = 90) -> Tiles:
    """Of 16-bit rows for tensor cores, which keep less in registers before `architecture` 90; float32 is for tests."""
    rows, num_bytes, num_warps = (128, 16 << 10, 8) if architecture >= 90 else (64, 8 << 10, 4)
    if itemsize == 4:
        rows, num_bytes, num_warps = 32, 8 << 10, 8
    rows = max(rows, _power_of_2(shape.num_heads // shape.num_kv_heads))
    return Tiles(rows, _keys(shape, itemsize, num_bytes), num_warps, 2)


MOST_STAGES_UNPACKED = 4


def warps_and_stages(tiles: Tiles, is_unpacked: bool) -> tuple[int, int]:
    """With which a kernel is launched: what a cache in eight bits takes more of registers, it has from more warps in
    chunks of prompts, and from fewer tiles in flight in decoding."""
    if not is_unpacked:
        return tiles.num_warps, tiles.num_stages
    num_warps = tiles.num_warps if tiles.per_processor else max(tiles.num_warps, 8)
    return num_warps, min(tiles.num_stages, MOST_STAGES_UNPACKED)


def _keys(shape: AttentionShape, itemsize: int, num_bytes: int) -> int:
    return min(64, max(16, num_bytes // (_power_of_2(max(16, shape.head_dim)) * itemsize)))


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def plan_attention(
    inputs: PassTensors,
    host: PassTensors,
    shape: AttentionShape,
    *,
    num_processors: int,
    upload: Callable[[npt.NDArray[np.int32]], Tensor],
    split: Tiles,
    chunks: Tiles,
    upcast: bool = False,
    is_fixed: bool = False,
) -> PagedPlan:
    """
    Args:
        inputs: on the device; `host` is the same in host memory.
        upload: numbers to the device; they are not touched any more.
        is_fixed: as many items as there could be; the last belong to nobody.
    """
    query_lens, context_lens = (tensor.numpy().astype(np.int64) for tensor in (host.query_lens, host.context_lens))
    group = shape.num_heads // shape.num_kv_heads
    num_programs = max(1, num_processors * split.per_processor // shape.num_kv_heads)
    starts = np.cumsum(query_lens) - query_lens
    is_short = query_lens * group <= split.rows
    short, long = np.flatnonzero(is_short), np.flatnonzero(~is_short)
    items, item_starts, part_starts, num_parts = _split(
        short, starts[short], query_lens[short], context_lens[short], shape, num_programs, split.keys
    )
    if is_fixed:
        assert not len(long), "sequences with many queries are not cut alike whatever their lengths"
        items = np.pad(items, ((0, len(short) + num_programs - len(items)), (0, 0)))
    queries = chunks.rows // group
    chunk_items = _chunks(long, starts[long], query_lens[long], context_lens[long], shape, queries)
    block = np.concatenate((items.ravel(), chunk_items.ravel(), item_starts, part_starts)).astype(np.int32)
    of_items, of_chunks, of_starts, of_parts = torch.split(
        upload(block), [items.size, chunk_items.size, len(item_starts), len(part_starts)]
    )
    return PagedPlan(
        inputs.slot_mapping,
        inputs.block_tables,
        shape.sliding_window,
        SplitItems(of_items, of_starts, of_parts, len(item_starts) - 1, len(short), num_parts, split)
        if len(short)
        else None,
        ChunkItems(of_chunks, len(chunk_items), chunks) if len(long) else None,
        upcast,
    )


def _split(
    sequences: Ints, starts: Ints, query_lens: Ints, context_lens: Ints, shape: AttentionShape, num_programs: int,
    keys: int,
) -> tuple[Ints, Ints, Ints, int]:  # fmt: skip
    """Items, where each program's begin, where each sequence's begin, and the rows of partial results.

    The contexts' tiles, behind one another, are cut where a sequence ends and where a program has its share.
    """
    if not len(sequences):
        nothing = np.zeros(1, np.int64)
        return np.zeros((0, ITEM), np.int64), nothing, nothing, 0
    positions = context_lens - query_lens
    since = _first_seen(positions, shape.sliding_window)
    tiles = -(-(context_lens - since) // keys)
    ends = np.cumsum(tiles)
    share = max(-(-FEWEST_TOKENS // keys), -(-int(ends[-1]) // num_programs))
    shares = np.arange(0, num_programs + 1) * share
    cuts = np.unique(np.concatenate((ends - tiles, shares[shares < ends[-1]])))
    of_sequence = np.searchsorted(ends, cuts, side="right")
    upto = np.append(cuts[1:], ends[-1])
    begun = (ends - tiles)[of_sequence]
    part_starts = np.searchsorted(cuts, np.append(ends - tiles, ends[-1]))
    is_part = np.diff(part_starts)[of_sequence] > 1
    items = np.zeros((len(cuts), ITEM), np.int64)
    items[:, 0] = sequences[of_sequence]
    items[:, 1] = starts[of_sequence]
    items[:, 2] = query_lens[of_sequence]
    items[:, 3] = positions[of_sequence]
    items[:, 4] = since[of_sequence] + (cuts - begun) * keys
    items[:, 5] = np.minimum(context_lens[of_sequence], since[of_sequence] + (upto - begun) * keys)
    items[:, 6] = np.where(is_part, np.arange(len(cuts)), -1)
    return items, np.searchsorted(cuts, shares), part_starts, len(sequences) + num_programs


def _chunks(
    sequences: Ints, starts: Ints, query_lens: Ints, context_lens: Ints, shape: AttentionShape, queries: int
) -> Ints:
    blocks = -(-query_lens // queries)
    of_sequence = np.repeat(np.arange(len(sequences)), blocks)
    block = np.arange(len(of_sequence)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    items = np.zeros((len(of_sequence), ITEM), np.int64)
    items[:, 0] = sequences[of_sequence]
    items[:, 1] = starts[of_sequence] + block * queries
    items[:, 2] = np.minimum(queries, query_lens[of_sequence] - block * queries)
    items[:, 3] = (context_lens - query_lens)[of_sequence] + block * queries
    items[:, 4] = _first_seen(items[:, 3], shape.sliding_window)
    items[:, 5] = items[:, 3] + items[:, 2]
    items[:, 6] = -1
    return items[np.argsort(items[:, 4] - items[:, 5], kind="stable")]


def _first_seen(positions: Ints, sliding_window: int | None) -> Ints:
    """Where the context begins that a query at a position sees, or a little before: at the start of a block."""
    if sliding_window is None:
        return np.zeros_like(positions)
    return np.maximum(0, positions + 1 - sliding_window) // BLOCK_TOKENS * BLOCK_TOKENS
