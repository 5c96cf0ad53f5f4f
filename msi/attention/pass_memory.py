"""What the passes of a GPU's lanes take beside weights and KV cache, so that the cache leaves room for it.

A pass of the largest micro-batch is run through a small cache of its own, with slots' rows as if they lay on the
device, which is asked what it had at the most; what captured graphs keep is counted, and what kernels keep for each
lane. Each lane has as much.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch

from msi.attention.forward import Forward
from msi.attention.graphs import Bucket, buckets_of
from msi.attention.kv_cache import KvCache
from msi.attention.warming import run_alone
from msi.device.device import Device
from msi.errors import ConfigError
from msi.kernels import BLOCK_TOKENS
from msi.kernels.routing import RowDtypes
from msi.kernels.turns import TURNS
from msi.models.attention_weights import AttentionWeights
from msi.models.config import ModelConfig
from msi.placement import Placement
from msi.settings import LinkShape, SchedulerLimits
from msi.types import MicroBatch, TokenSampling

log = logging.getLogger(__name__)

GRAPH_BYTES = 128 << 10  # of a layer's graph: some 20 kernels, of which 60 took 315 KB on an H100
TABLES = 3  # of blocks, of each size of pass: its own, and a library's for two windows of attention
GRAPHS_SHARE = 1 / 8  # of the memory for KV cache, that graphs may take
SAMPLING = TokenSampling(0.7, 0.9, 5, 0, 0)


class PassBytes(NamedTuple):
    """Of all lanes together.

    Attributes:
        running: while passes run.
        kept: by kernels, for lanes.
        graphs: that are captured.
    """

    running: int = 0
    kept: int = 0
    graphs: int = 0

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        running, kept, graphs = (f"{num_bytes / 1e6:.0f} MB" for num_bytes in self)
        return f"{running} while they run, {kept} that kernels keep for lanes, {graphs} in graphs"


def bytes_of_passes(
    config: ModelConfig,
    weights: AttentionWeights,
    placement: Placement,
    device: Device,
    row_dtypes: RowDtypes,
    kv_dtype: torch.dtype,
    *,
    limits: SchedulerLimits,
    link: LinkShape,
    peak_bytes: Callable[[torch.device, Callable[[], object]], int] | None = None,
) -> PassBytes:
    """Without graphs. Waits for the device; nothing else may run on it.

    Args:
        peak_bytes: that the device had at the most while something ran, beyond what it had before.

    Raises:
        ConfigError: not even one such pass fits.
    """
    num_tokens = limits.max_num_batched_tokens or link.slot_rows
    batch = largest_batch(num_tokens, limits.max_num_seqs)
    try:
        cache = KvCache(config, 1 + sum(map(len, batch.block_tables)), device, kv_dtype)
        forward = Forward(config, weights, cache, placement, device)
        work = partial(run_alone, forward, config, batch, placement.num_nodes, device, row_dtypes)
        work()  # what is compiled, tried, or kept for later takes its memory once
        of_pass = (peak_bytes or cuda_peak_bytes)(device.kernels.device, work)
    except RuntimeError as error:
        raise ConfigError(
            f"a pass of {num_tokens} tokens does not fit beside the weights ({error}); give a smaller "
            "`max_num_batched_tokens`, or fewer `slot_rows`"
        ) from error
    return PassBytes(link.num_lanes * of_pass, device.kernels.kept_bytes(link.num_lanes))


def largest_batch(num_tokens: int, max_num_seqs: int) -> MicroBatch:
    """Whole prompts of so many tokens together, of as many sequences as can be, each of which is sampled."""
    count = min(max_num_seqs, num_tokens)
    lens = tuple(num_tokens // count + (index < num_tokens % count) for index in range(count))
    ends = [sum(lens[: index + 1]) for index in range(count)]
    blocks = iter(range(1, 1 + num_tokens + count))
    return MicroBatch(
        token_ids=(0,) * num_tokens,
        positions=tuple(at for length in lens for at in range(length)),
        query_lens=lens,
        context_lens=lens,
        block_tables=tuple(tuple(next(blocks) for _ in range(-(-length // BLOCK_TOKENS))) for length in lens),
        logit_rows=tuple(end - 1 for end in ends),
        sampling=(SAMPLING,) * count,
    )


class Graphed(NamedTuple):
    """What is captured, and what that may take of the memory, of all lanes together."""

    buckets: tuple[Bucket, ...]
    num_bytes: int


def graphed(
    config: ModelConfig,
    dtype: torch.dtype,
    limits: SchedulerLimits,
    link: LinkShape,
    free_bytes: float,
    placement: Placement,
) -> Graphed:
    """As many sizes of decode passes as fit, those of short contexts first; the log says what is left out."""
    tables = placement_bytes(placement, config.num_sparse_layers)
    wanted = buckets_of(limits.max_num_seqs, link.slot_rows, limits.max_model_len)
    buckets: list[Bucket] = []
    num_bytes = 0
    for bucket in wanted:
        more = link.num_lanes * (graph_bytes(config, dtype, bucket) + tables)
        if num_bytes + more > GRAPHS_SHARE * free_bytes:
            log.warning(
                "of %d sizes of decode passes %d are captured, for which %.0f MB are set aside; from %d sequences of "
                "up to %d tokens on they are launched piece by piece, of which a smaller `max_model_len` leaves fewer",
                len(wanted), len(buckets), num_bytes / 1e6, bucket.num_seqs, bucket.num_blocks * BLOCK_TOKENS,
            )  # fmt: skip
            break
        buckets.append(bucket)
        num_bytes += more
    return Graphed(tuple(buckets), num_bytes)


def graph_bytes(config: ModelConfig, dtype: torch.dtype, bucket: Bucket) -> int:
    """That one lane's graphs keep: of each layer the graph, the rows that it sent, and those it was given; and where
    blocks lie.
    """
    rows = 2 * bucket.num_seqs * config.hidden_size * dtype.itemsize
    num_parts = 1 if config.shared_intermediate_size is None else 2
    tables = TABLES * 4 * bucket.num_seqs * bucket.num_blocks
    return config.num_layers * (rows + num_parts * GRAPH_BYTES) + tables


def placement_bytes(placement: Placement, num_layers: int) -> int:
    """That one lane's graphs of a bucket keep of where experts are, were each on as many nodes as now and layers to
    differ, as they may later.
    """
    most = max(max(Counter(chain.from_iterable(layer.experts)).values()) for layer in placement.layers)
    return num_layers * placement.num_experts * (4 * placement.num_nodes * most + TURNS)


def cuda_peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # what torch keeps for later would not be counted as free
    return int(peak)
