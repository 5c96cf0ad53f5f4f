"""What a device computes with: one object that has every operation of both halves of a model.

`PlainKernels` (`plain.py`) has all of them in plain torch, on any device, without a value that the host would have to
wait for; it is the truth that others are tested against. A device's own object may do better: `CpuKernels` packs
matrices and leaves out what no row needs. Nothing here is told what a model, a lane or a request is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from msi.kernels import NONE, SWIGLU, Activation, SigmoidRouting
from msi.kernels.experts import Places
from msi.kernels.norm import HeadNorm, Norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.penalties import Penalties
from msi.kernels.quantized import Quantized
from msi.kernels.routing import PackedRows, RowDtypes

Linear = Callable[[Tensor], Tensor]  # [rows, in] -> [rows, out]
Biases = tuple[Tensor, Tensor]  # of an expert: [2 h'] (gate first) and [h]


@dataclass(frozen=True, slots=True)
class Outboxes:
    """Where the rows of one micro-batch leave.

    Attributes:
        rows: one for each expert node, of at least as many rows as the micro-batch has.
        counts: int32 [num_nodes], in memory that the host sees: how many of each are filled.
    """

    rows: list[PackedRows]
    counts: Tensor


class ExpertBank(Protocol):
    """Stacked weights of the experts of one node, in the device's layout: [layer, expert].

    Attributes:
        num_rows: int64 [num_layers, num_experts], rows that each expert has computed; as of the last wave whose end the
            host has seen, or later.
    """

    num_rows: Tensor

    @property
    def weight_bytes_read(self) -> int:
        """Of all waves together, as of the same time."""

    def arranged(self, places: Places) -> ExpertBank:
        """A bank whose experts are these of this one's, as many in each layer, None for one without weights yet; this
        one stays as it is."""

    def put(
        self,
        layer: int,
        expert: int,
        gate_up: Tensor | Quantized,
        down: Tensor | Quantized,
        biases: Biases | None = None,
    ) -> None:
        """One expert's matrices, gate_up [2 h', h] (gate first) and down [h, h'], and biases where the bank has any."""

    def warm(self, num_model_experts: int, k: int, dtypes: RowDtypes) -> None:
        """Loads what `run` needs for rows of these dtypes that chose k of the experts of a layer. Slow; called once all
        experts are put, in whatever thread.
        """

    def prepare(self, landed: PackedRows, answer_strides: tuple[int, int], answer_dtype: torch.dtype) -> None:
        """Takes the memory that `run` needs for rows that land here, before the first.

        Args:
            answer_strides: bytes from lane to lane and from row to row where answers leave.
            answer_dtype: in which they travel.
        """

    def run(
        self, layer: int, lane: int, seats: Sequence[tuple[int, int]], landed: PackedRows, answers: Mapping[int, Tensor]
    ) -> None:
        """The weighted sum over each row's experts here, of a lane's rows from several seats together.

        Args:
            seats: (seat, num_rows) of the lane's slot.
            landed: [seats, lanes, slot_rows].
            answers: of each seat, [lanes, slot_rows, h], in eight bits as `fp8.pack` has them; as many rows are
                written as landed.
        """


class TokenKernels(Protocol):
    """From logits float32 [n, vocab_size] to tokens; the first three change them in place."""

    def allow(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """As `msi.kernels.penalties.allow` says."""

    def add_bias(self, logits: Tensor, at: Tensor, bias: Tensor) -> None:
        """As `msi.kernels.penalties.add_bias` says."""

    def penalise(self, logits: Tensor, penalties: Penalties) -> None:
        """As `msi.kernels.penalties.penalise` says."""

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's best token and its logit, as `msi.kernels.sampling.best` says."""

    def draw(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """One token per row, as `msi.kernels.sampling.draw` says."""


class Kernels(TokenKernels, Protocol):
    """`hidden` is the residual stream, [num_tokens, h]; `normed` the rows that come out of a norm of it.

    Attributes:
        quantisations: formats of matrices that save memory here.
        has_e4m3: whether its device has instructions for numbers in e4m3, or needs none.
    """

    device: torch.device

    @property
    def quantisations(self) -> tuple[str, ...]: ...

    @property
    def has_e4m3(self) -> bool: ...

    def kept_bytes(self, num_lanes: int) -> int:
        """Of the device's memory, that lanes will take and keep beside what their passes take while they run, and have
        not taken yet; known once a pass has run.
        """

    # -- weights -------------------------------------------------------------------------------------------------------

    def linear(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> Linear:
        """x [rows, in] -> [rows, out] for weight [out, in] and bias [out], kept in the device's own layout."""

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
        """Without weights yet; they will all be of this dtype, or quantised so, and with biases or without."""

    # -- norms and MLPs ------------------------------------------------------------------------------------------------

    def norm(self, hidden: Tensor, norm: Norm) -> Tensor: ...

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Norm) -> Tensor:
        """Adds to the residual stream in place, and norms it."""

    def gated_mlp(self, rows: Tensor, gate_up: Linear, down: Linear) -> Tensor:
        """SwiGLU, of a dense layer or a shared expert: [n, h] -> [n, h]."""

    # -- attention -----------------------------------------------------------------------------------------------------

    def rope_table(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float) -> Any:
        """What `rope_and_write` wants of a pass's positions."""

    def plan_attention(
        self,
        inputs: PassTensors,
        host: PassTensors,
        shape: AttentionShape,
        dtype: torch.dtype,
        is_fixed: bool = False,
    ) -> Any:
        """What every layer's attention reads of a pass, from what the host knows of it.

        Args:
            inputs: on the device.
            is_fixed: all but the tensors' values follows from the inputs' shapes; of sequences with one token each.
        """

    def rope_and_write(
        self, heads: Tensor, num_q: int, rope: Any, layer_cache: Tensor, plan: Any, norm: HeadNorm | None = None
    ) -> None:
        """Of heads [num_tokens, num_q + 2 num_kv, head_dim], rotates queries in place; rotated keys, and values, go to
        the cache, and whether they stay in `heads` too is not said.

        Args:
            norm: of queries and keys before they are rotated.
        """

    def paged_attention(self, query: Tensor, layer_cache: Tensor, plan: Any, sinks: Tensor | None = None) -> Tensor:
        """Attention of query [num_tokens, num_heads, head_dim] to its sequences' cache; same shape.

        Args:
            sinks: float32 [num_heads], of each head the score of a key that all queries see, and that has no value.
        """

    # -- routing -------------------------------------------------------------------------------------------------------

    def topk_softmax(self, logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
        """topk_weights float32 and topk_ids int64, both [num_tokens, k]."""

    def topk_sigmoid(
        self, logits: Tensor, bias: Tensor, k: int, renormalise: bool, routing: SigmoidRouting
    ) -> tuple[Tensor, Tensor]:
        """The same, as `msi.kernels.routing.topk_sigmoid` says."""

    def pack(
        self, normed: Tensor, topk_weights: Tensor, topk_ids: Tensor, local_ids: Tensor, outboxes: Outboxes
    ) -> Any:
        """Counts and writes the rows for every node; returns what `combine_norm` wants to find their answers.

        Args:
            local_ids: int32 [n, num_experts], -1 where a node lacks the expert; of the first n nodes, and the counts
                of others stay as they are.
        """

    def combine_norm(self, hidden: Tensor, answers: Tensor, sent: Any, norm: Norm) -> Tensor:
        """Adds the answers [num_nodes, slot_rows, h] to what was sent to the residual stream in place, and norms it.

        Args:
            answers: in eight bits as `fp8.pack` has them.
        """

    # -- tokens --------------------------------------------------------------------------------------------------------

    def logits(self, normed: Tensor, rows: Tensor, lm_head: Linear) -> Tensor:
        """float32 [num_logits, vocab_size] of these rows."""
