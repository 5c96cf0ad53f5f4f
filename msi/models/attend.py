"""Attention of one layer, as an object that is built when the layer is loaded: what a layer does is never asked again.

A model may have layers of several views of a pass (a sliding window here, none there); a view's plan is made once per
pass and read by all of its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from msi.kernels.kernels import Kernels, Linear
from msi.kernels.norm import HeadNorm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.pass_tensors import PassTensors


class PassView(Protocol):
    """How layers see a pass."""

    def plan(self, inputs: PassTensors, host: PassTensors, is_fixed: bool = False) -> Any:
        """What every layer of this view reads of a pass; only they know what is in it.

        Args:
            host: `inputs` there.
            is_fixed: as `msi.kernels.kernels.Kernels.plan_attention` says.
        """


class Attend(Protocol):
    """The attention of one layer."""

    @property
    def view(self) -> PassView:
        """The same object for all layers that read the same plans."""

    def __call__(self, normed: Tensor, plan: Any, layer_cache: Tensor) -> Tensor:
        """What attention adds to the residual stream: [n, h] of normed rows [n, h]; writes their keys and values."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupedQueryView:
    """Rotary positions, and how far back attention looks.

    Attributes:
        frequencies: radians per position.
        rope_scale: of cosines and sines.
        shape: of heads, with how far back they look.
    """

    kernels: Kernels
    frequencies: Tensor
    rope_scale: float
    shape: AttentionShape
    dtype: torch.dtype

    def plan(self, inputs: PassTensors, host: PassTensors, is_fixed: bool = False) -> tuple[Any, Any]:
        """The rotary table, and attention's plan."""
        rope = self.kernels.rope_table(inputs.positions, self.frequencies, self.dtype, self.rope_scale)
        return rope, self.kernels.plan_attention(inputs, host, self.shape, self.dtype, is_fixed)


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Implements `Attend` with rotary embedding and keys and values that query heads share.

    Attributes:
        qkv: normed rows [n, h] -> queries, keys and values [n, (num_heads + 2 num_kv_heads) * head_dim], ready for
            `norm`, where there is one, and rotary embedding.
        output: [n, num_heads * head_dim] -> [n, h].
        sinks: as `msi.kernels.kernels.Kernels.paged_attention` says.
    """

    kernels: Kernels
    view: GroupedQueryView
    qkv: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: HeadNorm | None = None
    sinks: Tensor | None = None

    def __call__(self, normed: Tensor, plan: tuple[Any, Any], layer_cache: Tensor) -> Tensor:
        rope, attention = plan
        heads = self.qkv(normed).view(len(normed), self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        self.kernels.rope_and_write(heads, self.num_heads, rope, layer_cache, attention, self.norm)
        attended = self.kernels.paged_attention(heads[:, : self.num_heads], layer_cache, attention, self.sinks)
        return self.output(attended.reshape(len(normed), self.num_heads * self.head_dim))
