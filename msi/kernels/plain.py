"""Every operation in plain torch, on whatever device: the truth, and what a device without kernels of its own runs.

No value goes back to the host: shapes follow from what the host knows before. So rows are packed by sorting, not by
counting, and every expert computes every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import NONE, SWIGLU, Activation, SigmoidRouting, fp8
from msi.kernels.experts import Places, activate, counts_at, gated_mlp, weights_at
from msi.kernels.kernels import Biases, ExpertBank, Linear, Outboxes
from msi.kernels.norm import HeadNorm, Norm, norm_heads
from msi.kernels.paged_attention import AttentionShape, paged_attention, plan_attention, write_kv
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.penalties import Penalties, add_bias, allow, penalise
from msi.kernels.quantized import Quantized
from msi.kernels.rope import apply_rope, rope_table
from msi.kernels.routing import PackedRows, RowDtypes, topk_sigmoid, topk_softmax
from msi.kernels.sampling import best, draw

RopeTable = tuple[Tensor, Tensor]


class PlainKernels:
    """Implements `msi.kernels.kernels.Kernels`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def quantisations(self) -> tuple[str, ...]:
        return ()

    @property
    def has_e4m3(self) -> bool:
        return True

    def kept_bytes(self, num_lanes: int) -> int:
        return 0

    # -- weights -------------------------------------------------------------------------------------------------------

    def linear(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> Linear:
        if isinstance(weight, Quantized):
            wide = PlainKernels.linear(self, weight.dequantized(torch.float32), None if bias is None else bias.float())
            return lambda rows: wide(rows.to(torch.float32)).to(rows.dtype)
        on_device = weight.contiguous().to(self.device)
        bias_on_device = None if bias is None else bias.to(self.device)
        return lambda rows: functional.linear(rows, on_device, bias_on_device)

    def expert_bank(
        self,
        *,
        num_layers: int,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        dtype: torch.dtype,
        quantization: str = NONE,
        activation: Activation = SWIGLU,
        has_bias: bool = False,
    ) -> ExpertBank:
        def empty(*shape: int) -> Tensor:
            return torch.empty(num_layers, num_experts, *shape, dtype=dtype, device=self.device)

        biases = (empty(2 * inner_size), empty(hidden_size)) if has_bias else None
        return PlainExpertBank(empty(2 * inner_size, hidden_size), empty(hidden_size, inner_size), biases, activation)

    # -- norms and MLPs ------------------------------------------------------------------------------------------------

    def norm(self, hidden: Tensor, norm: Norm) -> Tensor:
        return norm.apply(hidden, norm.weight, norm.eps)

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Norm) -> Tensor:
        return norm.apply(hidden.add_(added), norm.weight, norm.eps)

    def gated_mlp(self, rows: Tensor, gate_up: Linear, down: Linear) -> Tensor:
        return gated_mlp(rows, gate_up, down)

    # -- attention -----------------------------------------------------------------------------------------------------

    def rope_table(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float) -> RopeTable:
        return rope_table(positions, frequencies, dtype, scale)

    def plan_attention(
        self,
        inputs: PassTensors,
        host: PassTensors,
        shape: AttentionShape,
        dtype: torch.dtype,
        is_fixed: bool = False,
    ) -> Any:
        return plan_attention(host, shape.sliding_window, dtype, self.device, is_fixed)

    def rope_and_write(
        self, heads: Tensor, num_q: int, rope: RopeTable, layer_cache: Tensor, plan: Any, norm: HeadNorm | None = None
    ) -> None:
        if norm is not None:
            norm_heads(heads, norm)
        num_tokens, num_heads, head_dim = heads.shape
        num_kv = (num_heads - num_q) // 2
        apply_rope(heads[:, : num_q + num_kv], *rope)
        write_kv(layer_cache, heads[:, num_q:].view(num_tokens, 2, num_kv, head_dim), plan.kv_rows)

    def paged_attention(self, query: Tensor, layer_cache: Tensor, plan: Any, sinks: Tensor | None = None) -> Tensor:
        return paged_attention(query, layer_cache, plan.groups, sinks)

    # -- routing -------------------------------------------------------------------------------------------------------

    def topk_softmax(self, logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
        return topk_softmax(logits, k, renormalise)

    def topk_sigmoid(
        self, logits: Tensor, bias: Tensor, k: int, renormalise: bool, routing: SigmoidRouting
    ) -> tuple[Tensor, Tensor]:
        return topk_sigmoid(logits, bias, k, renormalise, routing)

    def pack(
        self, normed: Tensor, topk_weights: Tensor, topk_ids: Tensor, local_ids: Tensor, outboxes: Outboxes
    ) -> Any:
        """int64 [num_nodes, num_tokens]: the row of each token in each node's outbox, -1 for none."""
        num_tokens = normed.shape[0]
        local = local_ids[:, topk_ids]  # [num_nodes, num_tokens, k]
        goes = (local >= 0).any(dim=-1)
        first = torch.argsort(goes.to(torch.int32), dim=-1, descending=True, stable=True)  # those that go, in order
        normed = as_sent(normed, outboxes)
        for node, out in enumerate(outboxes.rows[: len(local_ids)]):
            order = first[node]
            out.hidden[:num_tokens] = normed[order]
            out.topk_weights[:num_tokens] = topk_weights[order]
            out.topk_ids[:num_tokens] = local[node, order]
        outboxes.counts[: len(local_ids)].copy_(goes.sum(dim=-1))
        return torch.where(goes, goes.cumsum(dim=-1) - 1, -1)

    def combine_norm(self, hidden: Tensor, answers: Tensor, sent: Any, norm: Norm) -> Tensor:
        for rows, of_token in zip(answers[: len(sent)].to(self.device), sent, strict=True):
            rows = fp8.as_computed(rows, hidden.shape[1], hidden.dtype)
            there = rows.index_select(0, of_token.clamp(min=0))
            hidden += torch.where(of_token[:, None] >= 0, there, 0.0)  # other rows may hold anything
        return self.norm(hidden, norm)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def logits(self, normed: Tensor, rows: Tensor, lm_head: Linear) -> Tensor:
        if len(rows) < len(normed):
            normed = normed.index_select(0, rows)
        return lm_head(normed).to(torch.float32)

    def allow(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        allow(logits, rows, bits)

    def add_bias(self, logits: Tensor, at: Tensor, bias: Tensor) -> None:
        add_bias(logits, at, bias)

    def penalise(self, logits: Tensor, penalties: Penalties) -> None:
        penalise(logits, penalties)

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return best(logits)

    def draw(self, logits: Tensor, numbers: Tensor) -> Tensor:
        return draw(logits, numbers)


class PlainExpertBank:
    """Implements `msi.kernels.kernels.ExpertBank`.

    Args:
        gate_up: [num_layers, num_experts, 2 h', h], gate first.
        down: [num_layers, num_experts, h, h'].
        biases: [num_layers, num_experts, 2 h'] and [num_layers, num_experts, h].
    """

    def __init__(
        self, gate_up: Tensor, down: Tensor, biases: Biases | None = None, activation: Activation = SWIGLU
    ) -> None:
        self.gate_up = gate_up
        self.down = down
        self.biases = biases
        self._activation = activation
        self.weight_bytes_read = 0
        self.num_rows = torch.zeros(gate_up.shape[:2], dtype=torch.int64, device=gate_up.device)

    def arranged(self, places: Places) -> PlainExpertBank:
        gate_up, down = weights_at(self.gate_up, places), weights_at(self.down, places)
        biases = (
            None if self.biases is None else (weights_at(self.biases[0], places), weights_at(self.biases[1], places))
        )
        bank = PlainExpertBank(gate_up, down, biases, self._activation)
        bank.num_rows = counts_at(self.num_rows, places)
        return bank

    def put(
        self,
        layer: int,
        expert: int,
        gate_up: Tensor | Quantized,
        down: Tensor | Quantized,
        biases: Biases | None = None,
    ) -> None:
        for held, given in ((self.gate_up, gate_up), (self.down, down)):
            held[layer, expert] = given.dequantized(held.dtype) if isinstance(given, Quantized) else given
        assert (biases is None) == (self.biases is None), "a bank has biases of all experts or of none"
        if biases is not None and self.biases is not None:
            for bias, given_bias in zip(self.biases, biases, strict=True):
                bias[layer, expert] = given_bias

    def warm(self, num_model_experts: int, k: int, dtypes: RowDtypes) -> None:
        """There is nothing to load."""

    def prepare(self, landed: PackedRows, answer_strides: tuple[int, int], answer_dtype: torch.dtype) -> None:
        """Memory is taken as it is needed."""

    def run(
        self, layer: int, lane: int, seats: Sequence[tuple[int, int]], landed: PackedRows, answers: Mapping[int, Tensor]
    ) -> None:
        rows = landed.gather(lane, seats).to(self.down.device)
        combined = torch.zeros(rows.hidden.shape, dtype=torch.float32, device=self.down.device)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up[layer], self.down[layer], strict=True)):
            biases = (None, None) if self.biases is None else [of_all[layer, expert] for of_all in self.biases]
            inner = activate(functional.linear(rows.hidden, gate_up, biases[0]), self._activation)
            outputs = functional.linear(inner, down, biases[1])
            chosen = rows.topk_ids == expert
            self.num_rows[layer, expert] += chosen.any(dim=-1).sum()
            weights = torch.where(chosen, rows.topk_weights, 0.0).sum(dim=-1)
            weighted = outputs.to(torch.float32) * weights[:, None]
            combined += torch.where(chosen.any(dim=-1)[:, None], weighted, 0.0)
        scatter_answers(combined, lane, seats, answers)
        self.weight_bytes_read += (self.gate_up[layer].numel() + self.down[layer].numel()) * self.down.itemsize


def as_sent(normed: Tensor, outboxes: Outboxes) -> Tensor:
    """Rows as they leave by these outboxes."""
    return fp8.pack(normed) if fp8.is_packed(outboxes.rows[0].hidden) else normed


def scatter_answers(
    combined: Tensor, lane: int, seats: Sequence[tuple[int, int]], answers: Mapping[int, Tensor]
) -> None:
    """Rows of several seats behind one another, [n, h], each to where its seat's answers leave, as they travel."""
    if seats and fp8.is_packed(answers[seats[0][0]]):
        combined = fp8.pack(combined)
    start = 0
    for seat, num_rows in seats:
        answers[seat][lane, :num_rows] = combined[start : start + num_rows]
        start += num_rows
