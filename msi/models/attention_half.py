"""The attention side of a model on a device: embedding, attention and router of every layer, head and sampler.

Owns the weights, the KV cache and what each lane has in flight. Methods named with a leading underscore run as work
on the device; the others only enqueue. Knows slots as memory to write rows into; knows no sockets or requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msi.device.device import Device
from msi.kernels.norm_rope import apply_rope, rms_norm, rope_table
from msi.kernels.paged_attention import BLOCK_TOKENS, SequenceGroup, group_sequences, paged_attention, write_kv
from msi.kernels.routing import PackedRows, PlacementTables, pack_rows, rows_for_node, topk_softmax
from msi.meter import StageMeter
from msi.models.checkpoint import TensorSource
from msi.models.config import ModelConfig
from msi.models.families import family_of
from msi.net.dispatch_link import Turn
from msi.net.slots import HEADER_BYTES, SlotLayout
from msi.sampler import sample
from msi.types import MicroBatch, Placement, Sampled

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Weights of one layer's attention half, in the device's layout."""

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    expert_norm: Tensor
    router: Linear


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """All weights of the attention side. `num_bytes` is what one pass reads of them."""

    embed: Tensor
    layers: tuple[AttentionLayer, ...]
    final_norm: Tensor
    lm_head: Linear
    num_bytes: int


def load_attention_weights(
    config: ModelConfig, source: TensorSource, device: Device, dtype: torch.dtype
) -> AttentionWeights:
    """Reads the attention side's tensors, and no others. Raises CheckpointError."""
    names = family_of(config).names
    hidden, head_dim = config.hidden_size, config.head_dim
    num_bytes = 0

    def read(name: str, *shape: int) -> Tensor:
        nonlocal num_bytes
        tensor = source.read(name, shape).to(dtype)
        num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    layers = []
    for index in range(config.num_layers):

        def at(name: str, layer: int = index) -> str:
            return name.format(layer=layer)

        qkv = torch.cat(
            [
                read(at(names.query), config.num_heads * head_dim, hidden),
                read(at(names.key), config.num_kv_heads * head_dim, hidden),
                read(at(names.value), config.num_kv_heads * head_dim, hidden),
            ]
        )
        router = source.first_of(*(at(name) for name in names.router))
        layers.append(
            AttentionLayer(
                attention_norm=read(at(names.attention_norm), hidden),
                qkv=device.linear(qkv),
                output=device.linear(read(at(names.output), hidden, config.num_heads * head_dim)),
                expert_norm=read(at(names.expert_norm), hidden),
                router=device.linear(read(router, config.num_experts, hidden)),
            )
        )
    final_norm = read(names.final_norm, hidden)
    embed = source.read(names.embed, (config.vocab_size, hidden)).to(dtype)
    head = embed if config.tie_word_embeddings else source.read(names.lm_head, (config.vocab_size, hidden)).to(dtype)
    num_bytes += head.numel() * head.element_size()
    return AttentionWeights(embed, tuple(layers), final_norm, device.linear(head), num_bytes)


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


class AttentionHalf:
    """Implements `msi.lanes.AttentionCompute`.

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
        self.num_layers = config.num_layers
        self.meter = StageMeter()  # T_a
        self.pass_meter = StageMeter()  # head and sampling, once per pass
        self.weight_bytes_read = 0
        self._config = config
        self._weights = weights
        self._kv_cache = kv_cache
        self._device = device
        self._dtype = kv_cache.dtype
        self._layout = dispatch_layout
        local_ids = torch.full((placement.num_nodes, config.num_experts), -1, dtype=torch.int32)
        for node in range(placement.num_nodes):
            for local, expert in enumerate(placement.experts_of(node)):
                local_ids[node, expert] = local
        self._placement = PlacementTables(local_ids)
        self._fresh: dict[int, MicroBatch] = {}  # by lane, until the first layer's work takes it up
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

    # -- msi.lanes.AttentionCompute ----------------------------------------------------------------------------------

    def begin(self, lane: int, micro_batch: MicroBatch) -> None:
        """The embedding is looked up at the start of the first layer's work."""
        self._fresh[lane] = micro_batch

    def attention_route_pack(self, lane: int, layer: int, turn: Turn) -> None:
        def work() -> None:
            if layer == 0:
                self._begin(lane, self._fresh[lane])
            turn.post(self._attention_route_pack(lane, layer))

        self._device.enqueue(work, turn.fail, self.meter, "attention", lane)

    def combine(self, lane: int, layer: int) -> None:
        """The answers are added at the start of the lane's next work, which reads them in any case."""

    def sample(self, lane: int) -> asyncio.Future[Sampled]:
        return self._device.submit(lambda: self._sample(lane), self.pass_meter, "sample", lane)

    # -- work --------------------------------------------------------------------------------------------------------

    def _begin(self, lane: int, batch: MicroBatch) -> None:
        config = self._config
        positions = torch.tensor(batch.positions)
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta, self._dtype)
        slots = []
        row = 0
        for query_len, table in zip(batch.query_lens, batch.block_tables, strict=True):
            for position in batch.positions[row : row + query_len]:
                slots.append(table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS)
            row += query_len
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

    def _attention_route_pack(self, lane: int, layer: int) -> list[int]:
        """The number of rows that lie in each node's outbox."""
        state, weights, config = self._combined(lane), self._weights.layers[layer], self._config
        hidden = state.hidden
        num_tokens = hidden.shape[0]
        num_q, num_kv, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

        qkv = weights.qkv(rms_norm(hidden, weights.attention_norm, config.rms_norm_eps))
        heads = qkv.view(num_tokens, num_q + 2 * num_kv, head_dim)
        apply_rope(heads[:, : num_q + num_kv], state.cos, state.sin)
        write_kv(self._kv_cache[layer], heads[:, num_q:].view(num_tokens, 2, num_kv, head_dim), state.slot_mapping)
        attended = paged_attention(heads[:, :num_q], self._kv_cache[layer], state.groups)
        hidden.add_(weights.output(attended.reshape(num_tokens, num_q * head_dim)))

        normed = rms_norm(hidden, weights.expert_norm, config.rms_norm_eps)
        topk_weights, topk_ids = topk_softmax(weights.router(normed), config.top_k, config.renormalise_topk)
        counts = []
        for node, outbox in enumerate(self._outboxes):
            token_index, local_ids = rows_for_node(topk_ids, self._placement, node)
            count = pack_rows(normed, topk_weights, local_ids, token_index, outbox[lane]) if len(local_ids) else 0
            counts.append(count)
            if count:
                state.sent.append((node, token_index, count))
        return counts

    def _combined(self, lane: int) -> _LaneState:
        """The lane's state, with what the expert nodes sent back added to the residual stream."""
        state = self._lanes[lane]
        assert state is not None, f"lane {lane} has not begun"
        for node, token_index, count in state.sent:
            rows = self._answers[node, lane, :count]
            if token_index is None:
                state.hidden.add_(rows)
            else:
                state.hidden.index_add_(0, token_index, rows)
        state.sent = []
        return state

    def _sample(self, lane: int) -> Sampled:
        state = self._combined(lane)
        self._lanes[lane] = None
        self.weight_bytes_read += self._weights.num_bytes
        return sample(self._logits(state), state.micro_batch.sampling)

    def _logits(self, state: _LaneState) -> Tensor:
        """float32 [len(logit_rows), vocab_size]."""
        batch = state.micro_batch
        hidden = state.hidden
        if len(batch.logit_rows) < batch.num_tokens:
            hidden = hidden.index_select(0, torch.tensor(batch.logit_rows, dtype=torch.int64))
        normed = rms_norm(hidden, self._weights.final_norm, self._config.rms_norm_eps)
        return self._weights.lm_head(normed).to(torch.float32)


def slot_rows_view(memory: memoryview, num_seats: int, stride: int, layout: SlotLayout) -> Tensor:
    """The rows of a region's slots: uint8 [num_seats, num_lanes, slot_rows, row_bytes], sharing its memory."""
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.as_strided(
        (num_seats, layout.num_lanes, layout.slot_rows, layout.row_bytes),
        (stride, layout.slot_bytes, layout.row_bytes, 1),
        HEADER_BYTES,
    )
