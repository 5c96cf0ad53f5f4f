"""How decode attention is cut best: each way on the same contexts, right and timed beside its floor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msi.attention.pass_inputs import PassInputs
from msi.kernels import BLOCK_TOKENS
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.plain import PlainKernels
from msi.kernels.triton import why_unavailable
from msi.kernels.triton.attention_plan import Tiles, chunk_tiles, plan_attention, split_tiles
from msi.types import MicroBatch
from tools.gpu.report import Add, Row
from tools.gpu.runner import NotHere, Place
from tools.gpu.timing import device_seconds

WAYS = (  # keys of a tile, warps, stages, programs on a processor; the likeliest first, as each has to be compiled
    (32, 4, 5, 3), (32, 4, 7, 3), (64, 4, 5, 2), (64, 4, 7, 2), (32, 2, 7, 4), (64, 2, 5, 3), (64, 8, 5, 2),
    (32, 4, 5, 4), (128, 4, 4, 2), (64, 4, 3, 2),
)  # fmt: skip
FEW = 4  # of them, for shapes after the first
DRY_WAYS = ((32, 4, 5, 4), (64, 2, 3, 2))
ALLOWED = 1.5e-2
CHUNK_WAYS = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3))


def run(place: Place, add: Add) -> None:
    if (reason := why_unavailable()) is not None:
        raise NotHere(reason)
    device = torch.device(place.device)
    dtype = torch.float32 if place.is_dry else torch.bfloat16
    shapes = {"Mixtral-8x22B": AttentionShape(48, 8, 128), "Qwen3-30B-A3B": AttentionShape(32, 4, 128)}
    contexts, chunk = [593 + 300 * index // 128 for index in range(128)], 2048  # 743 on average
    if place.is_dry:
        shapes, contexts, chunk = {"small": AttentionShape(6, 2, 16)}, [17, 90, 300], 40
    with torch.inference_mode():
        for index, (name, shape) in enumerate(shapes.items()):
            work = Attention(shape, [1] * len(contexts), contexts, device, dtype)
            for keys, warps, stages, programs in DRY_WAYS if place.is_dry else WAYS[: FEW if index else None]:
                tiles = Tiles(16, keys, warps, stages, per_processor=programs)
                way = f"{keys} keys, {warps} warps, {stages} stages, {programs} a processor"
                _look(place, add, f"decode attention, {name}, {way}", work, tiles, chunk_tiles(shape, 2))
            work = Attention(shape, [chunk] * 2, [chunk, chunk * 2], device, dtype)
            for rows, keys, warps, stages in CHUNK_WAYS[: 1 if place.is_dry or index else None]:
                way = f"{rows} rows, {keys} keys, {warps} warps, {stages} stages"
                tiles = Tiles(rows, keys, warps, stages)
                _look(place, add, f"attention of chunks of {chunk}, {name}, {way}", work, split_tiles(shape, 2), tiles)


class Attention:
    """One launch of queries against contexts of random values."""

    def __init__(
        self, shape: AttentionShape, queries: list[int], contexts: list[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shape, self.device = shape, device
        counts = [-(-length // BLOCK_TOKENS) for length in contexts]
        blocks = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1).tolist()
        tables = []
        for number in counts:
            tables.append(tuple(blocks[:number]))
            blocks = blocks[number:]
        positions = [
            at for query, length in zip(queries, contexts, strict=True) for at in range(length - query, length)
        ]
        batch = MicroBatch((5,) * len(positions), tuple(positions), tuple(queries), tuple(contexts), tuple(tables))
        self.inputs, self.host = PassInputs(lambda block: block.to(device)).lay_out(batch)
        cache = (sum(counts) + 1, 2, BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim)
        self.cache = torch.randn(cache, device=device, dtype=dtype)
        self.query = torch.randn(len(positions), shape.num_heads, shape.head_dim, device=device, dtype=dtype)
        plain = PlainKernels(device)
        plan = plain.plan_attention(self.inputs, self.host, shape, dtype)
        self.truth = plain.paged_attention(self.query, self.cache, plan)
        pairs = sum(query * (2 * length - query + 1) // 2 for query, length in zip(queries, contexts, strict=True))
        self.flop = 4.0 * pairs * shape.num_heads * shape.head_dim
        kv_bytes = sum(contexts) * 2 * shape.num_kv_heads * shape.head_dim * self.cache.itemsize
        self.num_bytes = kv_bytes + 2 * self.query.nbytes

    def launch(self, split: Tiles, chunks: Tiles) -> Callable[[], Tensor]:
        from msi.kernels.triton.attention import paged_attention

        def upload(numbers: npt.NDArray[np.int32]) -> Tensor:
            return torch.from_numpy(numbers).to(self.device)

        is_cuda = self.device.type == "cuda"
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if is_cuda else 2
        plan = plan_attention(
            self.inputs, self.host, self.shape, num_processors=processors, upload=upload, split=split, chunks=chunks
        )
        return lambda: paged_attention(self.query, self.cache, plan)


def _look(place: Place, add: Add, name: str, work: Attention, split: Tiles, chunks: Tiles) -> None:
    try:
        launch = work.launch(split, chunks)
        found, truth = launch().double(), work.truth.double()
        error = float((found - truth).norm() / truth.norm())
        if error > ALLOWED:
            add(Row(name, "WRONG", note=f"relative error {error:.1e}"))
            return
        took_s, how = device_seconds(place, launch)
    except Exception as problem:
        add(Row(name, "failed", note=f"{type(problem).__name__}: {str(problem)[:160]}"))
        return
    floor, asked = None, None
    if "bytes_per_s" in place.ceilings and "flop_per_s" in place.ceilings:
        moved, calculated = work.num_bytes / place.ceilings["bytes_per_s"], work.flop / place.ceilings["flop_per_s"]
        floor, asked = max(moved, calculated) * 1e6, 0.85 if moved >= calculated else 0.65
    add(Row(name, took_s * 1e6, "us", floor, asked, note=f"{how}; relative error {error:.1e}"))
