"""One side of a model without the other: the runtime's own halves on the runtime's own device, and made-up input.

`AttentionHalf` runs under `run_pass`, `ExpertHalf` on wave batches; times are those of their meters. Knows nothing of
processes and profiles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from msi.attention.half import AttentionHalf
from msi.attention.kv_cache import KvCache
from msi.attention.lanes import run_pass
from msi.device.choice import OpenedDevice
from msi.device.regions import slot_rows
from msi.errors import ConfigError
from msi.experts.batches import WaveBatch
from msi.experts.half import ExpertHalf
from msi.kernels import BLOCK_TOKENS, fp8
from msi.kernels.routing import PackedRows, RowDtypes, answer_row_bytes, row_bytes
from msi.models.config import ModelConfig
from msi.net.dispatch_link import DispatchLink
from msi.net.passes import Gates
from msi.net.slots import SlotLayout
from msi.placement import Placement
from msi.types import MicroBatch, TokenSampling
from msi.worker.loading import LoadedPart

SLOT_ROWS = 512
GREEDY = TokenSampling(0.0, 1.0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class AttentionSize:
    num_tokens: int
    context_len: int


@dataclass(frozen=True, slots=True)
class ExpertSize:
    num_active_experts: int
    num_expert_rows: int


@dataclass(frozen=True, slots=True)
class Timed:
    """One pass: the mean time of a layer, and what comes once (embedding, head and sampling; 0 for experts)."""

    layer_s: float
    once_s: float = 0.0


# -- attention -------------------------------------------------------------------------------------------------------


class AttentionSide:
    """The attention half of a model without experts to talk to: every turn is answered at once, with zeros.

    Args:
        num_blocks: KV blocks of each sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        loaded: LoadedPart,
        kv_cache: KvCache,
        num_blocks: int,
        device: OpenedDevice,
        placement: Placement,
        dtypes: RowDtypes,
    ) -> None:
        assert loaded.attention is not None
        layout = SlotLayout(1, SLOT_ROWS, row_bytes(config.hidden_size, config.top_k, dtypes.sent))
        answers = SlotLayout(1, SLOT_ROWS, answer_row_bytes(config.hidden_size, dtypes.answered))
        self._config = config
        self._num_blocks = num_blocks
        self._link = _NoExperts()
        self._half = AttentionHalf(
            config,
            loaded.attention,
            kv_cache,
            placement,
            device,
            dtypes,
            dispatch_layout=layout,
            answer_layout=answers,
            landing=device.region(answers.rows_bytes),
        )
        self._half.attach(0, device.region(layout.rows_bytes))

    async def one_pass(self, size: AttentionSize) -> Timed:
        half, num_layers = self._half, self._half.num_layers
        shared_s, once_s = half.shared_meter.total_s, half.pass_meter.total_s
        half.meter.clear_recent()
        await run_pass(0, self._micro_batch(size), half, cast(DispatchLink, self._link), lambda lane: True)
        first, *others = half.meter.recent  # the first layer's work looks up embeddings and lays out the pass as well
        layer_s = sum(others) / len(others) if others else first
        return Timed(
            layer_s=layer_s + (half.shared_meter.total_s - shared_s) / num_layers,
            once_s=half.pass_meter.total_s - once_s + max(0.0, first - layer_s),
        )

    def _micro_batch(self, size: AttentionSize) -> MicroBatch:
        """Decoding sequences, each with KV blocks of its own."""
        count, used = size.num_tokens, -(-size.context_len // BLOCK_TOKENS)
        firsts = [1 + self._num_blocks * sequence for sequence in range(count)]
        return MicroBatch(
            token_ids=tuple(7919 * sequence % self._config.vocab_size for sequence in range(1, count + 1)),
            positions=(size.context_len - 1,) * count,
            query_lens=(1,) * count,
            context_lens=(size.context_len,) * count,
            block_tables=tuple(tuple(range(first, first + used)) for first in firsts),
            logit_rows=tuple(range(count)),
            sampling=(GREEDY,) * count,
        )


class _NoExperts:
    """What `run_pass` needs of a link, with nobody at the other end: a turn is answered as soon as it is packed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._next = 1

    def begin(self, lane: int, gates: Gates, may_continue: Callable[[int], bool]) -> int:
        self._gates, self._done = gates, self._loop.create_future()
        first, self._next = self._next, self._next + gates.num_layers
        return first

    async def passed(self, lane: int) -> None:
        await self._done

    def packed(self, lane: int, turn: int) -> None:
        self._gates.open(lane, turn)
        if turn == self._next - 1:
            self._loop.call_soon_threadsafe(_resolve, self._done, None)

    def packed_again(self, lane: int, turn: int) -> None:
        """Nobody is ever lost."""

    def failed(self, lane: int, turn: int, error: Exception) -> None:
        self._loop.call_soon_threadsafe(_resolve, self._done, error)

    def end(self, lane: int) -> None:
        """Nobody is ever lost."""

    def give_up(self, lane: int) -> None:
        self._gates.open(lane, self._next - 1)


def _resolve(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


# -- experts ---------------------------------------------------------------------------------------------------------


class ExpertSide:
    """The expert half of a model with all experts on one node, and rows made up to hit as many as are asked for."""

    def __init__(self, config: ModelConfig, loaded: LoadedPart, device: OpenedDevice, dtypes: RowDtypes) -> None:
        assert loaded.experts is not None
        layout = SlotLayout(1, SLOT_ROWS, row_bytes(config.hidden_size, config.top_k, dtypes.sent))
        answers = SlotLayout(1, SLOT_ROWS, answer_row_bytes(config.hidden_size, dtypes.answered))
        landing = device.region(layout.rows_bytes)
        rows = PackedRows.view(slot_rows(landing, 1, layout), config.hidden_size, config.top_k, dtypes.sent)
        self._rows = PackedRows(rows.hidden[0, 0], rows.topk_weights[0, 0], rows.topk_ids[0, 0])
        made_up = torch.randn(SLOT_ROWS, config.hidden_size, generator=torch.Generator().manual_seed(0))
        self._rows.hidden.copy_(fp8.pack(made_up) if dtypes.sent is fp8.E4M3 else made_up)
        self._rows.topk_weights.fill_(1 / config.top_k)
        self._config = config
        self._num_layers = config.num_sparse_layers
        self._half = ExpertHalf(
            config,
            loaded.experts,
            device,
            dtypes,
            dispatch_layout=layout,
            answer_layout=answers,
            landing=landing,
            num_seats=1,
        )
        self._half.attach(0, device.region(answers.rows_bytes))
        self._half.follow(self._seen)
        self._loop = asyncio.get_running_loop()
        self._num_batches = 0

    async def one_pass(self, size: ExpertSize) -> Timed:
        num_rows = self._route(size)
        before_s = self._half.meter.total_s
        for layer in range(self._num_layers):
            self._num_batches += 1
            self._finished = self._loop.create_future()
            self._half.run(WaveBatch(0, layer, ((0, layer, num_rows),)), self._num_batches)
            await self._finished
        return Timed((self._half.meter.total_s - before_s) / self._num_layers)

    def _seen(self, ticket: int) -> None:
        _, error = self._half.outcome()
        self._loop.call_soon_threadsafe(_resolve, self._finished, error)

    def _route(self, size: ExpertSize) -> int:
        """Deals the pairs out to tokens, each active expert in turn; how many tokens that makes."""
        active, k = size.num_active_experts, self._config.top_k
        each = min(active, k)  # a token meets an expert once
        num_rows = -(-size.num_expert_rows // each)
        if num_rows > SLOT_ROWS:
            raise ConfigError(f"{size.num_expert_rows} rows of {active} experts do not fit a slot of {SLOT_ROWS} rows")
        ids = torch.full((num_rows, k), -1, dtype=torch.int32)
        pairs = torch.arange(num_rows * each)
        dealt = torch.where(pairs < size.num_expert_rows, pairs % active, -1)
        ids[:, :each] = dealt.view(num_rows, each).to(torch.int32)
        self._rows.topk_ids[:num_rows] = ids
        return num_rows
