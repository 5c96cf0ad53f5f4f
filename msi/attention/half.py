"""The attention side of a model on a device: embedding, attention and router, dense and shared MLPs, head, sampler.

A lane takes one turn with the expert nodes per sparse layer; turns are numbered from 0 on both sides. Dense layers are
computed before the sparse layer that follows them, or before the head. A shared expert is computed once the turn is
posted, while the routed ones are away.

Owns the weights, the KV cache and what each lane has in flight. Methods named with a leading underscore run as work
on the device; the others only enqueue. Knows slots as memory to write rows into; knows no sockets or requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from msi.attention.sampler import sample, sample_each
from msi.complaints import Complaints
from msi.device.device import Device
from msi.kernels import BLOCK_TOKENS
from msi.kernels.norm import layer_norm, rms_norm
from msi.kernels.paged_attention import SequenceGroup, group_sequences, paged_attention, write_kv
from msi.kernels.rope import apply_rope, llama3_frequencies, rope_frequencies, rope_table, yarn_frequencies
from msi.kernels.routing import PackedRows, PlacementTables, pack_rows, rows_for_node, topk_softmax
from msi.meter import StageMeter
from msi.models.attention_weights import AttentionLayer, AttentionWeights
from msi.models.config import ModelConfig, Rope
from msi.net.dispatch_link import Turn
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.types import MicroBatch, Placement, Sampled

log = logging.getLogger(__name__)

NOT_FINITE = "the model computed values for it that are not finite (NaN or infinity)"


def kv_cache_shape(config: ModelConfig, num_blocks: int) -> tuple[int, ...]:
    """[num_layers, num_blocks, BLOCK_TOKENS, 2, num_kv_heads, head_dim]; it starts as zeros."""
    return (config.num_layers, num_blocks, BLOCK_TOKENS, 2, config.num_kv_heads, config.head_dim)


@dataclass(slots=True)
class _LaneState:
    """What one lane has in flight; touched by the device's work alone."""

    hidden: Tensor  # residual stream [num_tokens, hidden_size]
    micro_batch: MicroBatch
    cos: Tensor
    sin: Tensor
    slot_mapping: Tensor
    groups: list[SequenceGroup]
    sent: list[tuple[int, Tensor | None, int]] = field(default_factory=list)  # (node, token_index, count)
    normed: Tensor | None = None  # what a shared expert is still to see
    error: Exception | None = None  # of a computation whose turn may have been over before


class AttentionHalf:
    """Implements `msi.attention.lanes.AttentionCompute`.

    Args:
        landing: where combined rows land: uint8 [num_nodes, stride] of `answer_layout` slots.
        dispatch_layout, answer_layout: the slots on either side of the link.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        kv_cache: Tensor,
        placement: Placement,
        device: Device,
        *,
        dispatch_layout: SlotLayout,
        answer_layout: SlotLayout,
        landing: memoryview,
        landing_stride: int,
    ) -> None:
        self.num_layers = config.num_sparse_layers
        self.meter = StageMeter()  # T_a, without shared experts
        self.shared_meter = StageMeter()
        self.pass_meter = StageMeter()  # head and sampling, once per pass
        self.weight_bytes_read = 0
        self._complaints = Complaints(log)
        self._config = config
        self._weights = weights
        self._kv_cache = kv_cache
        self._device = device
        self._upload = device.upload
        self._dtype = kv_cache.dtype
        self._norm = rms_norm if config.norm == "rms" else layer_norm
        self._rope_frequencies = device.upload(frequencies_of(config.rope, config.head_dim))
        self._has_shared = config.shared_intermediate_size is not None
        ends = (*config.sparse_layers, config.num_layers)
        starts = (0, *(layer + 1 for layer in config.sparse_layers))
        self._dense_before = [range(start, end) for start, end in zip(starts, ends, strict=True)]
        self._layout = dispatch_layout
        local_ids = torch.full((placement.num_nodes, config.num_experts), -1, dtype=torch.int32)
        for node in range(placement.num_nodes):
            for local, expert in enumerate(placement.experts_of(node)):
                local_ids[node, expert] = local
        self._placement = PlacementTables(device.upload(local_ids))
        self._fresh: dict[int, MicroBatch] = {}  # by lane, until its first layer is enqueued
        self._lanes: list[_LaneState | None] = [None] * dispatch_layout.num_lanes
        self._outboxes: list[list[PackedRows]] = [[] for _ in range(placement.num_nodes)]
        answers = slot_rows_view(landing, placement.num_nodes, landing_stride, answer_layout)
        self._answers = answers[..., : config.hidden_size * self._dtype.itemsize].view(self._dtype)

    def attach(self, node: int, outbox: memoryview) -> None:
        """Rows for this expert node go into `outbox` from now on."""
        slots = slot_rows_view(outbox, 1, len(outbox), self._layout)[0]
        config = self._config
        self._outboxes[node] = [
            PackedRows.view(slots[lane], config.hidden_size, config.top_k, self._dtype)
            for lane in range(self._layout.num_lanes)
        ]

    # -- msi.attention.lanes.AttentionCompute --------------------------------------------------------------------------

    def begin(self, lane: int, micro_batch: MicroBatch) -> None:
        """The embedding is looked up at the start of the first layer's work."""
        self._fresh[lane] = micro_batch

    def attention_route_pack(self, lane: int, layer: int, turn: Turn) -> None:
        fresh = self._fresh.pop(lane, None)

        def work() -> None:
            if fresh is not None:
                self._begin(lane, fresh)
            turn.post(self._attention_route_pack(lane, layer))

        self._device.enqueue(work, turn.fail, self.meter, "attention", lane)
        if self._has_shared:

            def failed(error: Exception) -> None:
                if (state := self._lanes[lane]) is not None:
                    state.error = error
                turn.fail(error)

            self._device.enqueue(
                lambda: self._shared_experts(lane, layer), failed, self.shared_meter, "shared experts", lane
            )

    def combine(self, lane: int, layer: int) -> None:
        """The answers are added at the start of the lane's next work, which reads them in any case."""

    def sample(self, lane: int) -> asyncio.Future[Sampled]:
        return self._device.submit(lambda: self._sample(lane), self.pass_meter, "sample", lane)

    # -- work --------------------------------------------------------------------------------------------------------

    def _begin(self, lane: int, batch: MicroBatch) -> None:
        config = self._config
        positions = torch.tensor(batch.positions)
        cos, sin = rope_table(positions, self._rope_frequencies, self._dtype, config.rope.scale)
        slots = []
        row = 0
        for query_len, table in zip(batch.query_lens, batch.block_tables, strict=True):
            for position in batch.positions[row : row + query_len]:
                slots.append(table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS)
            row += query_len
        self._clear_new_blocks(batch)
        self._lanes[lane] = _LaneState(
            hidden=self._weights.embed.index_select(0, torch.tensor(batch.token_ids)),
            micro_batch=batch,
            cos=cos,
            sin=sin,
            slot_mapping=torch.tensor(slots),
            groups=group_sequences(
                batch.query_lens, batch.context_lens, batch.block_tables, config.sliding_window, self._dtype
            ),
        )

    def _clear_new_blocks(self, batch: MicroBatch) -> None:
        """Of the blocks that this pass begins and does not fill: what lies in their rest may be a NaN of whoever had
        them before, which no mask of attention hides.
        """
        begun = []
        for query_len, context_len, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
            if 0 < context_len % BLOCK_TOKENS <= query_len:
                begun.append(table[context_len // BLOCK_TOKENS])
        if begun:
            self._kv_cache.index_fill_(1, torch.tensor(begun), 0.0)

    def _attention_route_pack(self, lane: int, sparse_index: int) -> list[int]:
        """The number of rows that lie in each node's outbox."""
        state, config = self._combined(lane), self._config
        self._dense_layers(state, sparse_index)
        layer = config.sparse_layers[sparse_index]
        weights = self._weights.layers[layer]
        normed = self._attention(state, weights, layer)
        assert weights.router is not None, f"layer {layer} has no router"
        topk_weights, topk_ids = topk_softmax(weights.router(normed), config.top_k, config.renormalise_topk)
        counts = []
        for node, outbox in enumerate(self._outboxes):
            token_index, local_ids = rows_for_node(topk_ids, self._placement, node)
            count = pack_rows(normed, topk_weights, local_ids, token_index, outbox[lane]) if len(local_ids) else 0
            counts.append(count)
            if count:
                state.sent.append((node, token_index, count))
        if self._has_shared:
            state.normed = normed
        return counts

    def _attention(self, state: _LaneState, weights: AttentionLayer, layer: int) -> Tensor:
        """Attention is added to the residual stream; returns that normed, for the layer's MLP or experts."""
        config, hidden = self._config, state.hidden
        num_tokens = hidden.shape[0]
        num_q, num_kv, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = weights.qkv(self._norm(hidden, weights.attention_norm, config.norm_eps))
        heads = qkv.view(num_tokens, num_q + 2 * num_kv, head_dim)
        apply_rope(heads[:, : num_q + num_kv], state.cos, state.sin)
        write_kv(self._kv_cache[layer], heads[:, num_q:].view(num_tokens, 2, num_kv, head_dim), state.slot_mapping)
        attended = paged_attention(heads[:, :num_q], self._kv_cache[layer], state.groups)
        hidden.add_(weights.output(attended.reshape(num_tokens, num_q * head_dim)))
        return self._norm(hidden, weights.mlp_norm, config.norm_eps)

    def _dense_layers(self, state: _LaneState, sparse_index: int) -> None:
        """Those between this sparse layer and the one before it."""
        for layer in self._dense_before[sparse_index]:
            weights = self._weights.layers[layer]
            assert weights.mlp is not None, f"layer {layer} has no MLP"
            state.hidden.add_(weights.mlp(self._attention(state, weights, layer)))

    def _shared_experts(self, lane: int, sparse_index: int) -> None:
        """Added to the residual stream at once: the rows that are away are copies, and nothing else reads it now."""
        state, layer = self._lanes[lane], self._config.sparse_layers[sparse_index]
        shared = self._weights.layers[layer].shared
        assert state is not None, f"lane {lane} has not begun"
        assert shared is not None, f"layer {layer} has no shared expert"
        assert state.normed is not None, f"layer {layer} of lane {lane} was not computed"
        normed, state.normed = state.normed, None
        state.hidden.add_(shared(normed))

    def _combined(self, lane: int) -> _LaneState:
        """The lane's state, with what the expert nodes sent back added to the residual stream."""
        state = self._lanes[lane]
        assert state is not None, f"lane {lane} has not begun"
        if state.error is not None:
            raise state.error
        for node, token_index, count in state.sent:
            rows = self._upload(self._answers[node, lane, :count])
            if token_index is None:
                state.hidden.add_(rows)
            else:
                state.hidden.index_add_(0, token_index, rows)
        state.sent = []
        return state

    def _sample(self, lane: int) -> Sampled:
        state = self._combined(lane)
        self._dense_layers(state, self.num_layers)
        self._lanes[lane] = None
        self.weight_bytes_read += self._weights.num_bytes
        sampling = state.micro_batch.sampling
        try:
            sampled = sample(self._logits(state), sampling)
        except Exception as error:
            self._complaints.say(error, "choosing tokens failed; each sequence's is chosen alone")
            sampled = sample_each(self._logits(state), sampling)
        # a row's NaN or infinity stays in its residual stream, whichever layer, expert or cached key it came from
        if not sampled.failures and math.isfinite(state.hidden.sum(dtype=torch.float32).item()):
            return sampled
        return replace(sampled, failures=self._failures(state, sampled.failures))

    def _failures(self, state: _LaneState, by_logit_row: Mapping[int, str]) -> dict[int, str]:
        """Why sequences of the micro-batch cannot go on, by index; those whose values are not finite, too."""
        batch = state.micro_batch
        sequence_of = [index for index, length in enumerate(batch.query_lens) for _ in range(length)]
        failures = {sequence_of[batch.logit_rows[row]]: reason for row, reason in by_logit_row.items()}
        damaged = ~self._weights.embed.index_select(0, torch.tensor(batch.token_ids)).isfinite().all(dim=-1)
        for row in (~state.hidden.isfinite().all(dim=-1)).nonzero().flatten().tolist():
            failures[sequence_of[row]] = NOT_FINITE
        for row in damaged.nonzero().flatten().tolist():
            failures[sequence_of[row]] = f"{NOT_FINITE}: the weights of token {batch.token_ids[row]} are damaged"
        return failures

    def _logits(self, state: _LaneState) -> Tensor:
        """float32 [len(logit_rows), vocab_size]."""
        batch = state.micro_batch
        hidden = state.hidden
        if len(batch.logit_rows) < batch.num_tokens:
            hidden = hidden.index_select(0, torch.tensor(batch.logit_rows, dtype=torch.int64))
        normed = self._norm(hidden, self._weights.final_norm, self._config.norm_eps)
        return self._weights.lm_head(normed).to(torch.float32)


def frequencies_of(rope: Rope, head_dim: int) -> Tensor:
    """float32 [head_dim / 2] radians per position."""
    frequencies = rope_frequencies(head_dim, rope.theta)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return llama3_frequencies(
            frequencies,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_len=rope.original_len,
        )
    if rope.kind == "yarn":
        return yarn_frequencies(
            frequencies,
            theta=rope.theta,
            factor=rope.factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            original_len=rope.original_len,
            truncate=rope.truncate,
        )
    return frequencies


def slot_rows_view(memory: memoryview, num_seats: int, stride: int, layout: SlotLayout) -> Tensor:
    """The rows of a region's slots: uint8 [num_seats, num_lanes, slot_rows, row_bytes], sharing its memory."""
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.as_strided(
        (num_seats, layout.num_lanes, layout.slot_rows, layout.row_bytes),
        (stride, layout.slot_bytes, layout.row_bytes, 1),
        HEADER_BYTES,
    )
