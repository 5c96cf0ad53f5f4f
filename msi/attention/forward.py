"""The arithmetic of the attention side: a micro-batch's residual stream through embedding, layers, head and sampler.

The sparse layers' turns are numbered from 0. Dense layers are computed before the sparse layer that follows them, or
before the head. Works on the state that it is given; knows no lanes, queues, slots or meters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msi.attention.kv_cache import KvCache
from msi.attention.masks import WITHIN_S, Masks, followed
from msi.attention.prompt_scores import score
from msi.attention.sampler import sample, sample_each
from msi.complaints import Complaints
from msi.device.device import Device
from msi.kernels.kernels import Outboxes
from msi.kernels.native.bank import NativeExpertBank
from msi.kernels.native.layers import NativeLayers
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.replicas import PlacementTables, choose_replicas
from msi.kernels.routing import PackedRows
from msi.models.attend import PassView
from msi.models.attention_weights import AttentionLayer, AttentionWeights
from msi.models.config import ModelConfig
from msi.placement import Placement
from msi.types import Cause, MicroBatch, Sampled

log = logging.getLogger(__name__)

NOT_FINITE = "the model computed values for it that are not finite (NaN or infinity)"


@dataclass(slots=True)
class PassState:
    """A micro-batch on its way.

    Attributes:
        hidden: the residual stream, [num_tokens, hidden_size].
        plans: of each of the model's views of a pass.
        sent: what the kernels say of the rows that are away; None before the first turn.
        normed: what a shared expert is still to see.
        turn: whose rows were packed last; -1 before the first.
        routed: those rows' hidden states, weights and ids of experts, to pack them again from.
        masks: of rows that are held to a grammar; None where there are none.
        is_filler: bool [num_tokens], of rows that are nobody's and go to no expert; None where there are none.
        is_here: the experts were computed on this thread, and their sums are the first node's answers.
    """

    micro_batch: MicroBatch
    inputs: PassTensors
    host_inputs: PassTensors
    tables: PlacementTables
    hidden: Tensor
    plans: list[Any]
    sent: Any = None
    normed: Tensor | None = None
    turn: int = -1
    routed: tuple[Tensor, Tensor, Tensor] | None = None
    masks: Future[Masks] | None = None
    is_filler: Tensor | None = None
    is_here: bool = False


class Forward:
    """One model's attention side; its calls are work on the device.

    Attributes:
        weight_bytes: what a pass reads of the weights.
        tables: of the placement that is used now.
        view_of: each layer's, by the number of its plan among a pass's.
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
        self._kernels = device.kernels
        self._views: list[PassView] = list(dict.fromkeys(layer.attend.view for layer in weights.layers))
        self.view_of = [self._views.index(layer.attend.view) for layer in weights.layers]
        ends = (*config.sparse_layers, config.num_layers)
        starts = (0, *(layer + 1 for layer in config.sparse_layers))
        self._dense_before = [range(start, end) for start, end in zip(starts, ends, strict=True)]
        self._entry_norms = [*(layer.attention_norm for layer in weights.layers), weights.final_norm]
        self._complaints = Complaints(log)
        self._upload = device.upload
        self.use_placement(placement)

    def use_placement(self, placement: Placement, missing: Collection[int] = ()) -> None:
        """For passes that begin from now on with `tables`; no rows go to nodes that are missing."""
        layers = [(layer.experts, layer.shares) for layer in placement.layers]
        self.tables = PlacementTables.of_layers(layers, placement.num_experts, self._upload, missing)

    def begin(
        self,
        micro_batch: MicroBatch,
        inputs: PassTensors,
        host_inputs: PassTensors,
        tables: PlacementTables | None = None,
        num_fillers: int | None = None,
    ) -> PassState:
        """Embeds the tokens and makes ready what all layers read.

        Args:
            host_inputs: `inputs` in host memory.
            tables: where the pass's rows go; by default as is used now.
            num_fillers: how many of the last rows are nobody's, of a pass that graphs are captured of: all but its
                tensors' values follows from its inputs' shapes.
        """
        self._kv_cache.clear(inputs.begun_blocks)
        tables, is_filler = tables or self.tables, None
        # the residual stream is in what is computed in, which the table may not be held in
        hidden = self._weights.embed.index_select(0, inputs.token_ids).to(self._weights.final_norm.weight.dtype)
        if num_fillers is not None:
            tables = tables.with_nobody()
            num_rows = len(inputs.token_ids)
            is_filler = self._upload(torch.from_numpy(np.arange(num_rows) >= num_rows - num_fillers))
            hidden.masked_fill_(is_filler[:, None], 0.0)  # so nothing of theirs is ever broken
        return PassState(
            micro_batch,
            inputs,
            host_inputs,
            tables,
            hidden=hidden,
            plans=[view.plan(inputs, host_inputs, num_fillers is not None) for view in self._views],
            is_filler=is_filler,
        )

    def route_and_pack(self, state: PassState, turn: int, answers: Tensor, outboxes: Outboxes) -> None:
        """From the answers [num_nodes, slot_rows, h] of the turn before to the rows of this one, in its outboxes."""
        self.route(state, turn, answers)
        self._pack(state, state.tables, outboxes)

    def route(self, state: PassState, turn: int, answers: Tensor) -> None:
        """From the answers of the turn before to which experts each row of this one goes to."""
        layer = self._config.sparse_layers[turn]
        weights = self._weights.layers[layer]
        normed = self._attention(state, self._enter(state, turn, answers), weights, layer)
        assert weights.route is not None, f"layer {layer} has no router"
        topk_weights, topk_ids = weights.route(normed)
        state.turn, state.routed = turn, (normed, topk_weights, topk_ids)
        if self.has_shared:
            state.normed = normed

    def packed_here(self, state: PassState) -> PackedRows:
        """The rows of this turn as they lie, of one seat and lane, for the only expert node."""
        assert state.routed is not None, "no turn was computed"
        normed, topk_weights, topk_ids = state.routed
        local_ids = state.tables.of_layer(state.turn).local_ids[0][topk_ids]
        state.is_here = True
        return PackedRows(normed[None, None], topk_weights[None, None], local_ids[None, None])

    def all_layers(
        self, state: PassState, layers: NativeLayers, bank: NativeExpertBank, answers: Tensor
    ) -> tuple[float, float]:
        """All turns over the experts beside it, as `NativeLayers.run` says; they are there alike in all layers."""
        state.is_here = True
        return layers.run(state.hidden, state.plans, state.tables.of_layer(0).local_ids[0], bank, answers[0])

    def pack_again(self, state: PassState, tables: PlacementTables, outboxes: Outboxes) -> None:
        """The rows of the turn that is away, and those of later turns, go where `tables` say."""
        if state.is_filler is None:
            state.tables = tables
            self._pack(state, tables, outboxes)
            return
        state.tables = tables.with_nobody()  # which graphs do not know: they are captured anew
        self._pack(state, state.tables, outboxes)

    def _pack(self, state: PassState, tables: PlacementTables, outboxes: Outboxes) -> None:
        assert state.routed is not None, "no turn was computed"
        normed, topk_weights, topk_ids = state.routed
        tables = tables.of_layer(state.turn)
        replicas = topk_ids if tables.most_replicas == 1 else choose_replicas(topk_ids, tables)
        if state.is_filler is not None:
            nobody = tables.local_ids.shape[1] - 1
            replicas = torch.where(state.is_filler[:, None], nobody, replicas)
        state.sent = self._kernels.pack(normed, topk_weights, replicas, tables.local_ids, outboxes)

    def shared_experts(self, state: PassState, turn: int) -> None:
        """Added to the residual stream at once: the rows that are away are copies, and nothing else reads it now."""
        layer = self._config.sparse_layers[turn]
        shared = self._weights.layers[layer].shared
        assert shared is not None, f"layer {layer} has no shared expert"
        assert state.normed is not None, f"layer {layer} was not computed"
        normed, state.normed = state.normed, None
        state.hidden.add_(shared(normed))

    def sample(self, state: PassState, answers: Tensor) -> Sampled:
        """What follows the last turn: layers, head and sampler."""
        normed = self._enter(state, self.num_turns, answers)
        sampling, kernels = state.micro_batch.sampling, self._kernels
        masks = None if state.masks is None else state.masks.result(WITHIN_S)
        try:
            sampled = sample(self._head(state, normed), sampling, masks, kernels)
        except Exception as error:
            self._complaints.say(error, "choosing tokens failed; each sequence's is chosen alone")
            sampled = sample_each(self._head(state, normed), sampling, masks, kernels)
        if masks is not None:
            sampled = followed(state.micro_batch.constrained, sampled)
        # a row's NaN or infinity stays in its residual stream, whichever layer, expert or cached key it came from
        if sampled.failures or not math.isfinite(state.hidden.sum(dtype=torch.float32).item()):
            sampled = replace(sampled, failures=self._failures(state, sampled.failures))
        return self._scored(state, normed, sampled) if state.micro_batch.prompt_rows else sampled

    def logits(self, state: PassState, answers: Tensor) -> Tensor:
        """float32 [num_logits, vocab_size], once the last turn is over."""
        return self._head(state, self._enter(state, self.num_turns, answers))

    def _scored(self, state: PassState, normed: Tensor, sampled: Sampled) -> Sampled:
        """With what is wanted of prompts' tokens; sequences that have failed are scored in vain."""
        weights = self._weights
        scored, broken = score(
            lambda rows: self._kernels.logits(normed, rows, weights.lm_head), state.micro_batch.prompt_rows,
            self._config.vocab_size, normed.device,
        )  # fmt: skip
        failures = dict.fromkeys(broken, NOT_FINITE) | sampled.failures
        return replace(sampled, failures=failures, prompt_logprobs=scored)

    def _head(self, state: PassState, normed: Tensor) -> Tensor:
        return self._kernels.logits(normed, state.inputs.logit_rows, self._weights.lm_head)

    def _enter(self, state: PassState, turn: int, answers: Tensor) -> Tensor:
        """Combines what came back, computes the dense layers that precede this turn's, and norms for what follows."""
        kernels, hidden, dense = self._kernels, state.hidden, self._dense_before[turn]
        norm = self._entry_norms[dense.start]
        if state.is_here:
            normed = kernels.add_norm(hidden, answers[0, : len(hidden)], norm)
        elif state.sent is None:
            normed = kernels.norm(hidden, norm)
        else:
            normed = kernels.combine_norm(hidden, answers, state.sent, norm)
        for layer in dense:
            weights = self._weights.layers[layer]
            assert weights.mlp is not None, f"layer {layer} has no MLP"
            added = weights.mlp(self._attention(state, normed, weights, layer))
            normed = kernels.add_norm(hidden, added, self._entry_norms[layer + 1])
        return normed

    def _attention(self, state: PassState, normed: Tensor, weights: AttentionLayer, layer: int) -> Tensor:
        """Attention is added to the residual stream; returns that normed, for the layer's MLP or experts."""
        added = weights.attend(normed, state.plans[self.view_of[layer]], self._kv_cache.layers[layer])
        return self._kernels.add_norm(state.hidden, added, weights.mlp_norm)

    def _failures(self, state: PassState, by_logit_row: Mapping[int, Cause]) -> dict[int, Cause]:
        """Why sequences of the micro-batch cannot go on, by index; those whose values are not finite, too."""
        batch = state.micro_batch
        sequence_of = state.host_inputs.sequence_of.tolist()
        num_rows = batch.num_tokens  # and fillers behind them
        failures = {sequence_of[batch.logit_rows[row]]: reason for row, reason in by_logit_row.items()}
        damaged = ~self._weights.embed.index_select(0, state.inputs.token_ids).isfinite().all(dim=-1)
        for row in (~state.hidden[:num_rows].isfinite().all(dim=-1)).nonzero().flatten().tolist():
            failures[sequence_of[row]] = NOT_FINITE
        for row in damaged[:num_rows].nonzero().flatten().tolist():
            failures[sequence_of[row]] = f"{NOT_FINITE}: the weights of token {batch.token_ids[row]} are damaged"
        return failures
