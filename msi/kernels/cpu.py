"""The CPU's own: matrices packed for oneDNN, and nothing computed that no row needs, since reading a value is free."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from msi.kernels import NONE, SWIGLU, Activation, fp8
from msi.kernels.experts import Places, at_places, counts_at, moe_experts
from msi.kernels.kernels import Biases, ExpertBank, Linear, Outboxes
from msi.kernels.native import rows
from msi.kernels.native.bank import NativeExpertBank
from msi.kernels.native.compiled import WIDTH, NativeLinear, native_library, pack
from msi.kernels.native.rows import DecodePlan, native_rows
from msi.kernels.norm import HeadNorm, Norm
from msi.kernels.paged_attention import AttentionPlan, AttentionShape
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.plain import PlainKernels, RopeTable, as_sent, scatter_answers
from msi.kernels.quantized import Quantized, num_bytes
from msi.kernels.routing import PackedRows, RowDtypes, pack_rows, rows_for_node

log = logging.getLogger(__name__)
PACKED_BYTES = 1 << 20  # a call of oneDNN costs 80 us before it computes, one of MKL 14: smaller weights are not packed
EXACT_ROWS = 32  # up to so many rows a product has exactly those; above, a multiple of a power of 2
PACKING_ROWS = 32  # a hint of how many rows a product will have; the packed layout does not depend on it much


class CpuKernels(PlainKernels):
    """Implements `msi.kernels.kernels.Kernels`.

    bfloat16 weights meet rows in the kernels of `msi/kernels/native`, if those can be compiled; else in oneDNN's where
    the processor multiplies bfloat16 itself, and as float32 where it does not.

    Args:
        has_bf16_units: the processor multiplies bfloat16 itself.
    """

    def __init__(self, *, has_bf16_units: bool = True) -> None:
        super().__init__(torch.device("cpu"))
        self._has_bf16_units = has_bf16_units
        self._rows: ctypes.PyDLL | None = None  # with the first matrix that is packed: others stay torch's altogether

    @property
    def quantisations(self) -> tuple[str, ...]:
        return ("int8", "int4", "fp8")

    @property
    def can_widen(self) -> bool:
        """Whether bfloat16 weights cost their own bytes beside a computation in float32."""
        return not self._has_bf16_units and native_library() is not None

    def linear(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> Linear:
        is_packed = isinstance(weight, Quantized) or weight.dtype is torch.bfloat16
        if is_packed and weight.shape[1] % 2 == 0 and (library := native_library()) is not None:
            self._rows = native_rows()
            return _native(library, weight, bias)
        if isinstance(weight, Quantized):
            return super().linear(weight, bias)
        if weight.dtype is torch.bfloat16 and not self._has_bf16_units:
            wide = self.linear(weight.to(torch.float32), None if bias is None else bias.to(torch.float32))
            return lambda rows: wide(rows.to(torch.float32)).to(rows.dtype)
        is_small = weight.numel() * weight.element_size() < PACKED_BYTES
        packing = None if is_small or weight.dtype is torch.float16 else _packing(weight.dtype)
        if packing is None:
            kept = weight.contiguous()
            if weight.dtype is torch.float32:  # which MKL computes
                return lambda rows: functional.linear(rows, kept, bias)
            return partial(_of_few_sizes, lambda rows: functional.linear(rows, kept, bias))
        pack, apply = packing
        with torch.inference_mode():
            packed = pack(weight, PACKING_ROWS)
        return partial(_of_few_sizes, lambda rows: apply(rows, packed, bias, "none", [], ""))

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
        is_packed = dtype is torch.bfloat16 or quantization != NONE
        library = native_library() if is_packed else None
        if library is not None and hidden_size % WIDTH == inner_size % WIDTH == 0:
            format = "bfloat16" if quantization == NONE else quantization
            return NativeExpertBank(
                library, num_layers, num_experts, hidden_size, inner_size, format, activation, has_bias
            )
        return CpuExpertBank(self.linear, num_layers, num_experts, dtype, activation)

    def norm(self, hidden: Tensor, norm: Norm) -> Tensor:
        normed = None if self._rows is None else rows.norm(self._rows, hidden, norm)
        return super().norm(hidden, norm) if normed is None else normed

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Norm) -> Tensor:
        normed = None if self._rows is None else rows.norm(self._rows, hidden, norm, added)
        return super().add_norm(hidden, added, norm) if normed is None else normed

    def plan_attention(
        self,
        inputs: PassTensors,
        host: PassTensors,
        shape: AttentionShape,
        dtype: torch.dtype,
        is_fixed: bool = False,
    ) -> AttentionPlan | DecodePlan:
        plan = None if self._rows is None else rows.decode_plan(host, shape, dtype)
        return super().plan_attention(inputs, host, shape, dtype, is_fixed) if plan is None else plan

    def rope_and_write(
        self,
        heads: Tensor,
        num_q: int,
        rope: RopeTable,
        layer_cache: Tensor,
        plan: AttentionPlan | DecodePlan,
        norm: HeadNorm | None = None,
    ) -> None:
        rows_ = self._rows
        if rows_ is None or not rows.rope_and_write(rows_, heads, num_q, rope, layer_cache, plan.kv_rows, norm):
            super().rope_and_write(heads, num_q, rope, layer_cache, plan, norm)

    def paged_attention(
        self, query: Tensor, layer_cache: Tensor, plan: AttentionPlan | DecodePlan, sinks: Tensor | None = None
    ) -> Tensor:
        if isinstance(plan, DecodePlan):
            return rows.decode(query, layer_cache, plan, sinks)
        return super().paged_attention(query, layer_cache, plan, sinks)

    def topk_softmax(self, logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
        chosen = None if self._rows is None else rows.topk_softmax(self._rows, logits, k, renormalise)
        return super().topk_softmax(logits, k, renormalise) if chosen is None else chosen

    def pack(
        self, normed: Tensor, topk_weights: Tensor, topk_ids: Tensor, local_ids: Tensor, outboxes: Outboxes
    ) -> Any:
        """(node, token_index or None for all tokens in order, count) of each node that gets rows."""
        sent: list[tuple[int, Tensor | None, int]] = []
        counts, normed, rows_ = outboxes.counts.numpy(), as_sent(normed, outboxes), self._rows
        goes_to_one = len(local_ids) == 1 and len(normed) > 0
        if (
            rows_ is not None
            and goes_to_one
            and rows.pack(rows_, normed, topk_weights, topk_ids, local_ids[0], outboxes.rows[0])
        ):
            counts[0] = len(normed)
            return [(0, None, len(normed))]
        for node, out in enumerate(outboxes.rows[: len(local_ids)]):
            token_index, local = rows_for_node(topk_ids, local_ids, node)
            counts[node] = count = len(local)
            if count:
                pack_rows(normed, topk_weights, local, token_index, out)
                sent.append((node, token_index, count))
        return sent

    def combine_norm(self, hidden: Tensor, answers: Tensor, sent: Any, norm: Norm) -> Tensor:
        if len(sent) == 1 and sent[0][1] is None:  # all rows went to one node
            node, _, count = sent[0]
            return self.add_norm(hidden, fp8.as_computed(answers[node, :count], hidden.shape[1], hidden.dtype), norm)
        for node, token_index, count in sent:
            added = fp8.as_computed(answers[node, :count], hidden.shape[1], hidden.dtype)
            if token_index is None:
                hidden.add_(added)
            else:
                hidden.index_add_(0, token_index, added)
        return self.norm(hidden, norm)


class CpuExpertBank:
    """Implements `msi.kernels.kernels.ExpertBank` with a packed matrix product for each expert that has rows.

    Args:
        linear: packs a matrix, with its bias where there is one.
        dtype: of biases.
    """

    def __init__(
        self,
        linear: Callable[[Tensor | Quantized, Tensor | None], Linear],
        num_layers: int,
        num_experts: int,
        dtype: torch.dtype = torch.float32,
        activation: Activation = SWIGLU,
    ) -> None:
        self._linear = linear
        self._dtype = dtype
        self._activation = activation
        self._expert_bytes = 0
        self.weight_bytes_read = 0
        self.num_rows = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._gate_up: list[list[Linear]] = [[_no_weights] * num_experts for _ in range(num_layers)]
        self._down: list[list[Linear]] = [[_no_weights] * num_experts for _ in range(num_layers)]

    def arranged(self, places: Places) -> CpuExpertBank:
        bank = CpuExpertBank(self._linear, len(places), len(places[0]), self._dtype, self._activation)
        bank._expert_bytes = self._expert_bytes
        bank.num_rows = counts_at(self.num_rows, places)
        bank._gate_up = at_places(self._gate_up, places, _no_weights)
        bank._down = at_places(self._down, places, _no_weights)
        return bank

    def put(
        self,
        layer: int,
        expert: int,
        gate_up: Tensor | Quantized,
        down: Tensor | Quantized,
        biases: Biases | None = None,
    ) -> None:
        of_gate_up, of_down = (None, None) if biases is None else (bias.to(self._dtype) for bias in biases)
        self._gate_up[layer][expert] = self._linear(gate_up, of_gate_up)
        self._down[layer][expert] = self._linear(down, of_down)
        self._expert_bytes = num_bytes(gate_up) + num_bytes(down)

    def warm(self, num_model_experts: int, k: int, dtypes: RowDtypes) -> None:
        """There is nothing to load."""

    def prepare(self, landed: PackedRows, answer_strides: tuple[int, int], answer_dtype: torch.dtype) -> None:
        """Memory is taken as it is needed."""

    def run(
        self, layer: int, lane: int, seats: Sequence[tuple[int, int]], landed: PackedRows, answers: Mapping[int, Tensor]
    ) -> None:
        rows = landed.gather(lane, seats)
        combined, num_rows = moe_experts(
            rows.hidden, rows.topk_ids, rows.topk_weights, self._gate_up[layer], self._down[layer], self._activation
        )
        scatter_answers(combined, lane, seats, answers)
        self.num_rows[layer] += num_rows
        self.weight_bytes_read += int(num_rows.count_nonzero()) * self._expert_bytes


def rows_computed(num_rows: int) -> int:
    """How many rows a product of oneDNN is made to have: it compiles a kernel for each number and shape of weights,
    and keeps it, half a megabyte. 4 % more rows at the mean above 32, and 64 kernels up to 512 rows, not 512.
    """
    if num_rows <= EXACT_ROWS:
        return num_rows
    step = 1 << (num_rows - 1).bit_length() - 4
    return -(-num_rows // step) * step


def _of_few_sizes(product: Linear, rows: Tensor) -> Tensor:
    """The product of as many rows as `rows_computed` says, without those that were added."""
    num_rows = rows.shape[0]
    missing = rows_computed(num_rows) - num_rows
    return product(functional.pad(rows, (0, 0, 0, missing)))[:num_rows] if missing else product(rows)


def _native(library: ctypes.CDLL, weight: Tensor | Quantized, bias: Tensor | None) -> Linear:
    num_outputs = weight.shape[0]
    missing = -num_outputs % WIDTH  # of a router, a gate
    if isinstance(weight, Quantized):
        weight = weight.with_rows_below(missing)
    else:
        weight = functional.pad(weight, (0, 0, 0, missing))
    if bias is not None:
        bias = functional.pad(bias.to(torch.float32), (0, missing))
    return NativeLinear(library, pack(library, weight), bias, num_outputs)


def _no_weights(rows: Tensor) -> Tensor:
    raise AssertionError("an expert has no weights yet")


@functools.cache
def _packing(dtype: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """oneDNN's packed linear as torch's own CPU compiler calls it (private names, and not every processor can every
    type, so checked by use).
    """
    try:
        pack, apply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        weight, rows = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
        with torch.inference_mode():
            if torch.equal(apply(rows, pack(weight, 2), None, "none", [], ""), rows):
                return pack, apply
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("weights in %s are not packed: no linear of oneDNN for them here (%s)", dtype, error)
    return None
