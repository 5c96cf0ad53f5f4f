"""Attention of one layer, as an object that is built when the layer is loaded: what a layer does is never asked again.

A model may have layers of several views of a pass (a sliding window here, none there); a view's plan is made once per
pass and read by all of its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from msi.kernels.paged_attention import SequenceGroup, group_sequences, kv_rows, paged_attention, write_kv
from msi.kernels.pass_tensors import PassTensors
from msi.kernels.rope import apply_rope, rope_table

Linear = Callable[[Tensor], Tensor]


class PassView(Protocol):
    """How layers see a pass."""

    def plan(self, inputs: PassTensors) -> Any:
        """What every layer of this view reads of a pass; only they know what is in it."""


class Attend(Protocol):
    """The attention of one layer."""

    @property
    def view(self) -> PassView:
        """The same object for all layers that read the same plans."""

    def __call__(self, normed: Tensor, plan: Any, layer_cache: Tensor) -> Tensor:
        """What attention adds to the residual stream: [n, h] of normed rows [n, h]; writes their keys and values."""


@dataclass(frozen=True, slots=True)
class GroupedQueryPlan:
    """What a pass is to layers of grouped-query attention.

    Attributes:
        cos, sin: of `msi.kernels.rope.rope_table`.
        kv_rows: rows of the cache that keys and values go to.
    """

    cos: Tensor
    sin: Tensor
    kv_rows: Tensor
    groups: list[SequenceGroup]


@dataclass(frozen=True, slots=True, eq=False)
class GroupedQueryView:
    """Rotary positions, and how far back attention looks.

    Attributes:
        frequencies: radians per position.
        rope_scale: of cosines and sines.
        sliding_window: tokens, itself included; None for all.
    """

    frequencies: Tensor
    rope_scale: float
    sliding_window: int | None
    dtype: torch.dtype

    def plan(self, inputs: PassTensors) -> GroupedQueryPlan:
        cos, sin = rope_table(inputs.positions, self.frequencies, self.dtype, self.rope_scale)
        groups = group_sequences(inputs, self.sliding_window, self.dtype)
        return GroupedQueryPlan(cos, sin, kv_rows(inputs.slot_mapping), groups)


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Implements `Attend` with rotary embedding and keys and values that query heads share.

    Attributes:
        qkv: normed rows [n, h] -> queries, keys and values [n, (num_heads + 2 num_kv_heads) * head_dim], ready for
            rotary embedding.
        output: [n, num_heads * head_dim] -> [n, h].
    """

    view: GroupedQueryView
    qkv: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __call__(self, normed: Tensor, plan: GroupedQueryPlan, layer_cache: Tensor) -> Tensor:
        num_tokens, num_q, num_kv, head_dim = len(normed), self.num_heads, self.num_kv_heads, self.head_dim
        heads = self.qkv(normed).view(num_tokens, num_q + 2 * num_kv, head_dim)
        apply_rope(heads[:, : num_q + num_kv], plan.cos, plan.sin)
        write_kv(layer_cache, heads[:, num_q:].view(num_tokens, 2, num_kv, head_dim), plan.kv_rows)
        attended = paged_attention(heads[:, :num_q], layer_cache, plan.groups)
        return self.output(attended.reshape(num_tokens, num_q * head_dim))
