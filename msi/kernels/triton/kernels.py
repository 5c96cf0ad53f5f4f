"""What a GPU computes with: our kernels where memory is what costs, torch's matrix products where those are.

Nothing waits for the device, and no shape depends on a value. On a CPU, Triton interprets: for tests. Memory that a
kernel could not reach, which is host memory that the driver was not told of, is left to the plain kernels, which copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msi.kernels import NONE, SWIGLU, Activation, SigmoidRouting, fp8
from msi.kernels.kernels import ExpertBank, Linear, Outboxes
from msi.kernels.norm import HeadNorm, Norm, layer_norm, rms_norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.penalties import Penalties
from msi.kernels.plain import PlainKernels
from msi.kernels.quantized import Quantized
from msi.kernels.routing import PackedRows
from msi.kernels.triton import attention, attention_plan, penalties, rope, routing, rows, sampling
from msi.kernels.triton.attention_plan import PagedPlan
from msi.kernels.triton.expert_bank import new_expert_bank
from msi.kernels.triton.linear import Float8Linear
from msi.kernels.triton.rounded import Library

INTERPRETED_PROCESSORS = 3  # so that little is split
FLOAT8_ARCHITECTURE = 89  # the first that unpacks float8


class TritonKernels(PlainKernels):
    """Implements `msi.kernels.kernels.Kernels`.

    Args:
        library: whose products are taken of matrices in float8, where it can and is better.
    """

    def __init__(self, device: torch.device, library: Library | None = None) -> None:
        super().__init__(device)
        self.library = library
        self._is_interpreted = device.type == "cpu"
        self._addresses: dict[tuple[int, ...], Tensor] = {}  # of outboxes; never dropped, as graphs hold them
        self._num_processors = INTERPRETED_PROCESSORS
        self._architecture = 90
        if not self._is_interpreted:
            properties = torch.cuda.get_device_properties(device)
            self._num_processors = properties.multi_processor_count
            self._architecture = 10 * properties.major + properties.minor

    @property
    def has_e4m3(self) -> bool:
        return self._architecture >= FLOAT8_ARCHITECTURE

    @property
    def quantisations(self) -> tuple[str, ...]:
        return ("fp8",) if self.has_e4m3 else ()

    # -- weights -------------------------------------------------------------------------------------------------------

    def linear(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> Linear:
        if isinstance(weight, Quantized):
            own = Float8Linear(weight, bias, self.device)
            return own if self.library is None else self.library.linear(weight, bias, own)
        return super().linear(weight, bias)

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
        assert quantization in (NONE, *self.quantisations), quantization
        return new_expert_bank(
            num_layers=num_layers, num_experts=num_experts, hidden_size=hidden_size, inner_size=inner_size,
            dtype=dtype if quantization == NONE else torch.float8_e4m3fn, device=self.device, activation=activation,
            has_bias=has_bias, library=self.library,
        )  # fmt: skip

    # -- norms and MLPs ------------------------------------------------------------------------------------------------

    def norm(self, hidden: Tensor, norm: Norm) -> Tensor:
        return rows.norm(hidden, norm.weight, norm.eps, _is_layer_norm(norm))

    def add_norm(self, hidden: Tensor, added: Tensor, norm: Norm) -> Tensor:
        return rows.add_norm(hidden, added, norm.weight, norm.eps, _is_layer_norm(norm))

    def gated_mlp(self, rows_: Tensor, gate_up: Linear, down: Linear) -> Tensor:
        return down(rows.silu_and_mul(gate_up(rows_)))

    # -- attention -----------------------------------------------------------------------------------------------------

    def rope_table(
        self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float
    ) -> tuple[Tensor, Tensor]:
        return rope.rope_table(positions, frequencies, scale)

    def plan_attention(
        self,
        inputs: PassTensors,
        host: PassTensors,
        shape: AttentionShape,
        dtype: torch.dtype,
        is_fixed: bool = False,
    ) -> PagedPlan:
        return attention_plan.plan_attention(
            inputs,
            host,
            shape,
            num_processors=self._num_processors,
            upload=self._upload,
            split=attention_plan.split_tiles(shape, dtype.itemsize),
            chunks=attention_plan.chunk_tiles(shape, dtype.itemsize, self._architecture),
            is_fixed=is_fixed,
            upcast=self._is_interpreted and dtype is torch.bfloat16,  # whose products the interpreter gets wrong
        )

    def rope_and_write(
        self,
        heads: Tensor,
        num_q: int,
        rope_table: tuple[Tensor, Tensor],
        layer_cache: Tensor,
        plan: PagedPlan,
        norm: HeadNorm | None = None,
    ) -> None:
        rope.rope_and_write(heads, num_q, rope_table, layer_cache, plan.slots, norm)

    def paged_attention(
        self, query: Tensor, layer_cache: Tensor, plan: PagedPlan, sinks: Tensor | None = None
    ) -> Tensor:
        return attention.paged_attention(query, layer_cache, plan, sinks)

    # -- routing -------------------------------------------------------------------------------------------------------

    def topk_softmax(self, logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
        return routing.topk_softmax(logits, k, renormalise)

    def topk_sigmoid(
        self, logits: Tensor, bias: Tensor, k: int, renormalise: bool, routing_: SigmoidRouting
    ) -> tuple[Tensor, Tensor]:
        return routing.topk_sigmoid(logits, bias, k, renormalise, routing_)

    def pack(
        self, normed: Tensor, topk_weights: Tensor, topk_ids: Tensor, local_ids: Tensor, outboxes: Outboxes
    ) -> Tensor:
        """int32 [num_nodes, num_tokens]: the row of each token in each node's outbox, -1 for none."""
        num_nodes = len(local_ids)
        if not all(self._is_reached(out.hidden) for out in outboxes.rows[:num_nodes]):
            positions: Tensor = super().pack(normed, topk_weights, topk_ids, local_ids, outboxes)
            return positions
        counts = outboxes.counts[:num_nodes]
        is_written = self._is_reached(counts)
        at = counts if is_written else torch.empty(counts.shape, dtype=counts.dtype, device=self.device)
        positions = routing.count(topk_ids, local_ids, at)
        if not is_written:
            counts.copy_(at)
        first = outboxes.rows[0].hidden
        row_bytes = first.stride(0) * first.itemsize
        is_packed = fp8.is_packed(first)
        routing.pack(
            normed if is_packed else normed.to(first.dtype),
            topk_weights,
            topk_ids,
            local_ids,
            positions,
            self._addresses_of(outboxes.rows[:num_nodes]),
            row_bytes,
            is_packed,
        )
        return positions

    def combine_norm(self, hidden: Tensor, answers: Tensor, sent: Tensor, norm: Norm) -> Tensor:
        if not self._is_reached(answers):
            answers = answers[: len(sent)].to(self.device)
        return rows.combine_norm(hidden, answers, sent, norm.weight, norm.eps, _is_layer_norm(norm))

    # -- tokens --------------------------------------------------------------------------------------------------------

    def allow(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        penalties.allow(logits, rows, bits)

    def add_bias(self, logits: Tensor, at: Tensor, bias: Tensor) -> None:
        penalties.add_bias(logits, at, bias)

    def penalise(self, logits: Tensor, penalties_: Penalties) -> None:
        penalties.penalise(logits, penalties_)

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return sampling.best(logits)

    def draw(self, logits: Tensor, numbers: Tensor) -> Tensor:
        return sampling.draw(logits, numbers.to(logits.device))

    # ------------------------------------------------------------------------------------------------------------------

    def _is_reached(self, tensor: Tensor) -> bool:
        return self._is_interpreted or tensor.is_cuda or tensor.is_pinned()

    def _addresses_of(self, outboxes: Sequence[PackedRows]) -> Tensor:
        at = tuple(out.hidden.data_ptr() for out in outboxes)
        found = self._addresses.get(at)
        if found is None:
            for out in outboxes:
                ends = out.hidden.data_ptr() + out.hidden.shape[-1] * out.hidden.itemsize
                assert out.topk_weights.data_ptr() == ends, "a row is `hidden | weights | ids`"
            found = self._addresses[at] = self._upload(np.array(at, np.int64))
        return found

    def _upload(self, numbers: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(numbers)
        return tensor if self._is_interpreted else tensor.pin_memory().to(self.device, non_blocking=True)


def _is_layer_norm(norm: Norm) -> bool:
    assert norm.apply in (rms_norm, layer_norm), f"no kernel for {norm.apply}"
    return norm.apply is layer_norm
