"""The arithmetic of the attention side: a micro-batch's residual stream through embedding, layers, head and sampler.

The sparse layers' turns are numbered from 0. Dense layers are computed before the sparse layer that follows them, or
before the head. Works on the state that it is given; knows no lanes, queues, slots or meters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from msi.attention.kv_cache import KvCache
from msi.attention.sampler import sample, sample_each
from msi.complaints import Complaints
from msi.device.device import Device
from msi.kernels.norm import layer_norm, rms_norm
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.routing import PackedRows, PlacementTables, pack_rows, rows_for_node
from msi.models.attend import PassView
from msi.models.attention_weights import AttentionLayer, AttentionWeights
from msi.models.config import ModelConfig
from msi.types import MicroBatch, Placement, Sampled

log = logging.getLogger(__name__)

NOT_FINITE = "the model computed values for it that are not finite (NaN or infinity)"


@dataclass(slots=True)
class PassState:
    """A micro-batch on its way.

    Attributes:
        hidden: the residual stream, [num_tokens, hidden_size].
        plans: of each of the model's views of a pass.
        sent: (node, token_index, count) of the rows that are away.
        normed: what a shared expert is still to see.
    """

    micro_batch: MicroBatch
    inputs: PassTensors
    hidden: Tensor
    plans: list[Any]
    sent: list[tuple[int, Tensor | None, int]] = field(default_factory=list)
    normed: Tensor | None = None


class Forward:
    """One model's attention side; its calls are work on the device.

    Attributes:
        weight_bytes: what a pass reads of the weights.
    """

    def __init__(
        self, config: ModelConfig, weights: AttentionWeights, kv_cache: KvCache, placement: Placement, device: Device
    ) -> None:
        self.num_turns = config.num_sparse_layers
        self.has_shared = config.shared_intermediate_size is not None
        self.weight_bytes = weights.num_bytes
        self._config = config
        self._weights = weights
        self._kv_cache = kv_cache
        self._upload = device.upload
        self._norm = rms_norm if config.norm == "rms" else layer_norm
        self._views: list[PassView] = list(dict.fromkeys(layer.attend.view for layer in weights.layers))
        self._view_of = [self._views.index(layer.attend.view) for layer in weights.layers]
        ends = (*config.sparse_layers, config.num_layers)
        starts = (0, *(layer + 1 for layer in config.sparse_layers))
        self._dense_before = [range(start, end) for start, end in zip(starts, ends, strict=True)]
        local_ids = torch.full((placement.num_nodes, config.num_experts), -1, dtype=torch.int32)
        for node in range(placement.num_nodes):
            for local, expert in enumerate(placement.experts_of(node)):
                local_ids[node, expert] = local
        self._placement = PlacementTables(device.upload(local_ids))
        self._complaints = Complaints(log)

    def begin(self, micro_batch: MicroBatch, inputs: PassTensors) -> PassState:
        """Embeds the tokens and makes ready what all layers read."""
        self._kv_cache.clear(inputs.begun_blocks)
        return PassState(
            micro_batch,
            inputs,
            hidden=self._weights.embed.index_select(0, inputs.token_ids),
            plans=[view.plan(inputs) for view in self._views],
        )

    def route_and_pack(self, state: PassState, turn: int, outboxes: Sequence[PackedRows]) -> list[int]:
        """Layers up to the turn's, whose rows go into the outbox of each node; how many these are."""
        self._dense_layers(state, turn)
        layer = self._config.sparse_layers[turn]
        weights = self._weights.layers[layer]
        normed = self._attention(state, weights, layer)
        assert weights.route is not None, f"layer {layer} has no router"
        topk_weights, topk_ids = weights.route(normed)
        counts = []
        for node, outbox in enumerate(outboxes):
            token_index, local_ids = rows_for_node(topk_ids, self._placement, node)
            count = pack_rows(normed, topk_weights, local_ids, token_index, outbox) if len(local_ids) else 0
            counts.append(count)
            if count:
                state.sent.append((node, token_index, count))
        if self.has_shared:
            state.normed = normed
        return counts

    def shared_experts(self, state: PassState, turn: int) -> None:
        """Added to the residual stream at once: the rows that are away are copies, and nothing else reads it now."""
        layer = self._config.sparse_layers[turn]
        shared = self._weights.layers[layer].shared
        assert shared is not None, f"layer {layer} has no shared expert"
        assert state.normed is not None, f"layer {layer} was not computed"
        normed, state.normed = state.normed, None
        state.hidden.add_(shared(normed))

    def combine(self, state: PassState, answers: Tensor) -> None:
        """Adds what the expert nodes sent back, [num_nodes, rows, h], to the residual stream."""
        for node, token_index, count in state.sent:
            rows = self._upload(answers[node, :count])
            if token_index is None:
                state.hidden.add_(rows)
            else:
                state.hidden.index_add_(0, token_index, rows)
        state.sent = []

    def sample(self, state: PassState) -> Sampled:
        """What follows the last turn: layers, head and sampler."""
        self.finish_layers(state)
        sampling = state.micro_batch.sampling
        try:
            sampled = sample(self.logits(state), sampling)
        except Exception as error:
            self._complaints.say(error, "choosing tokens failed; each sequence's is chosen alone")
            sampled = sample_each(self.logits(state), sampling)
        # a row's NaN or infinity stays in its residual stream, whichever layer, expert or cached key it came from
        if not sampled.failures and math.isfinite(state.hidden.sum(dtype=torch.float32).item()):
            return sampled
        return replace(sampled, failures=self._failures(state, sampled.failures))

    def finish_layers(self, state: PassState) -> None:
        """The layers after the last turn's."""
        self._dense_layers(state, self.num_turns)

    def logits(self, state: PassState) -> Tensor:
        """float32 [len(logit_rows), vocab_size], once the last layer is through."""
        hidden = state.hidden
        if len(state.inputs.logit_rows) < len(hidden):
            hidden = hidden.index_select(0, state.inputs.logit_rows)
        normed = self._norm(hidden, self._weights.final_norm, self._config.norm_eps)
        return self._weights.lm_head(normed).to(torch.float32)

    def _dense_layers(self, state: PassState, turn: int) -> None:
        """Those between this turn's layer and that of the turn before."""
        for layer in self._dense_before[turn]:
            weights = self._weights.layers[layer]
            assert weights.mlp is not None, f"layer {layer} has no MLP"
            state.hidden.add_(weights.mlp(self._attention(state, weights, layer)))

    def _attention(self, state: PassState, weights: AttentionLayer, layer: int) -> Tensor:
        """Attention is added to the residual stream; returns that normed, for the layer's MLP or experts."""
        eps, hidden = self._config.norm_eps, state.hidden
        normed = self._norm(hidden, weights.attention_norm, eps)
        hidden.add_(weights.attend(normed, state.plans[self._view_of[layer]], self._kv_cache.layers[layer]))
        return self._norm(hidden, weights.mlp_norm, eps)

    def _failures(self, state: PassState, by_logit_row: Mapping[int, str]) -> dict[int, str]:
        """Why sequences of the micro-batch cannot go on, by index; those whose values are not finite, too."""
        batch = state.micro_batch
        sequence_of = state.inputs.sequence_of.tolist()
        failures = {sequence_of[batch.logit_rows[row]]: reason for row, reason in by_logit_row.items()}
        damaged = ~self._weights.embed.index_select(0, state.inputs.token_ids).isfinite().all(dim=-1)
        for row in (~state.hidden.isfinite().all(dim=-1)).nonzero().flatten().tolist():
            failures[sequence_of[row]] = NOT_FINITE
        for row in damaged.nonzero().flatten().tolist():
            failures[sequence_of[row]] = f"{NOT_FINITE}: the weights of token {batch.token_ids[row]} are damaged"
        return failures
