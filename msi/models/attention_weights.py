"""Reading the attention side's weights: embedding, attention, routers, dense and shared MLPs, head; no routed experts.

What differs between families inside a projection (bias, norm of queries and keys, clipping) is put around it here, so
that the half that computes calls one function and asks no questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msi.device.device import Device
from msi.kernels.experts import sigmoid_gated
from msi.kernels.norm import HeadNorm, Norm, layer_norm, norm_projections, rms_norm
from msi.kernels.paged_attention import AttentionShape
from msi.kernels.quantized import Quantized, held, joined, num_bytes
from msi.models.attend import Attend, GroupedQueryAttention, GroupedQueryView
from msi.models.checkpoint import TensorSource
from msi.models.config import ModelConfig
from msi.models.families import family_of
from msi.models.family import MlpNames, bias_of
from msi.models.required import tied_names
from msi.models.rotary import frequencies_of
from msi.models.route import Route, SigmoidRoute, SoftmaxRoute
from msi.precision import NONE, Precision

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Weights of one layer's attention half, in the device's layout.

    Attributes:
        route: of a sparse layer; None in a dense one.
        shared: the shared expert of a sparse layer, its gate applied; None where the model has none.
        mlp: of a dense layer; None in a sparse one.
    """

    attention_norm: Norm
    attend: Attend
    mlp_norm: Norm
    route: Route | None = None
    shared: Linear | None = None
    mlp: Linear | None = None


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """All weights of the attention side. `num_bytes` is what one pass reads of them."""

    embed: Tensor
    layers: tuple[AttentionLayer, ...]
    final_norm: Norm
    lm_head: Linear
    num_bytes: int


def load_attention_weights(
    config: ModelConfig,
    source: TensorSource,
    device: Device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None = None,
    precision: Precision | None = None,
) -> AttentionWeights:
    """Reads the attention side's tensors, and no others, to be held in `dtype`, and computed with in that or another.

    Args:
        precision: which matrices are quantised; None for none.

    Raises:
        CheckpointError: a tensor is missing, truncated or misshapen.
    """
    quantization, head_format = (NONE, NONE) if precision is None else (precision.quantization, precision.head_format)
    reader = _Reader(config, source, device, dtype, compute_dtype or dtype, quantization, head_format)
    names = reader.names
    layers = tuple(reader.layer(layer) for layer in range(config.num_layers))
    final_norm = reader.norm(names.final_norm)
    table = (config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        embed, head = reader.tied_tables(*table)
    else:
        embed = device.upload(source.read(names.embed, table).to(dtype))  # a pass reads only some of its rows
        head = reader.read(names.lm_head, *table)
    lm_head = reader.linear(held(head, dtype, head_format))
    return AttentionWeights(embed, layers, final_norm, lm_head, reader.num_bytes)


class _Reader:
    """Reads what belongs together, and counts the bytes that a pass reads of it."""

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        device: Device,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        quantization: str,
        head_format: str,
    ) -> None:
        self.names = family_of(config).names
        self.num_bytes = 0
        self._config = config
        self._source = source
        self._device = device
        self._kernels = device.kernels
        self._apply_norm = rms_norm if config.norm == "rms" else layer_norm
        self._dtype = dtype
        self._compute_dtype = compute_dtype
        self._quantization = quantization
        self._head_format = head_format
        self._made_as = quantization if config.stored_as == NONE else NONE  # what is not quantised in the checkpoint
        frequencies = device.upload(frequencies_of(config.rope, config.rope.num_rotated(config.head_dim)))
        self._views = {
            window: GroupedQueryView(
                device.kernels, frequencies, config.rope.scale,
                AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, window), compute_dtype,
            )
            for window in map(config.window_of, range(config.num_layers))
        }  # fmt: skip

    def read(self, name: str, *shape: int) -> Tensor:
        """As it is in the checkpoint, unpacked."""
        return self._source.read(name, shape)

    def matrix(self, name: str, *shape: int) -> Tensor | Quantized:
        """As it will be held."""
        weight = self._source.read_matrix(name, shape)
        return held(weight, self._dtype, self._quantization if isinstance(weight, Quantized) else self._made_as)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self._device.upload(self.read(name, *shape).to(dtype or self._dtype))
        self.num_bytes += num_bytes(tensor)
        return tensor

    def linear(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> Linear:
        """The product with a matrix as it is held; it counts."""
        self.num_bytes += num_bytes(weight)
        if not isinstance(weight, Quantized):
            weight = self._device.upload(weight)
        return self._kernels.linear(weight, bias)

    def norm(self, name: str) -> Norm:
        weight = self.vector(name, self._config.hidden_size)
        return Norm(self._apply_norm, weight, self._config.norm_eps)

    def vector(self, name: str, width: int) -> Tensor:
        """What is added or multiplied number by number, in the dtype of the computation."""
        return self.tensor(name, width, dtype=self._compute_dtype)

    def tied_tables(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Embedding and head where the configuration calls them one: two after all if the checkpoint holds two that
        differ, and whichever there is if it holds one. So does transformers."""
        tables = [self.read(name, *shape) for name in tied_names(self.names.embed, self.names.lm_head, self._source)]
        embed = self._device.upload(tables[0].to(self._dtype))
        if len(tables) == 1 or torch.equal(*tables):
            return embed, embed if self._head_format == NONE else tables[0]
        return embed, tables[1]

    def layer(self, layer: int) -> AttentionLayer:
        config, names = self._config, self.names
        hidden = config.hidden_size
        route = shared = mlp = None
        if layer in config.sparse_layers:
            route = self._route(layer)
            if config.shared_intermediate_size is not None:
                shared = self._mlp(names.shared_mlp, layer, config.shared_intermediate_size)
                if config.has_shared_gate:
                    gate = self._kernels.linear(self.tensor(names.shared_gate.format(layer=layer), 1, hidden))
                    shared = partial(sigmoid_gated, gate=gate, mlp=shared)
        else:
            assert config.dense_intermediate_size is not None, f"layer {layer} has neither experts nor an MLP"
            mlp = self._mlp(names.dense_mlp, layer, config.dense_intermediate_size)
        return AttentionLayer(
            attention_norm=self.norm(names.attention_norm.format(layer=layer)),
            attend=self._attend(layer),
            mlp_norm=self.norm(names.mlp_norm.format(layer=layer)),
            route=route,
            shared=shared,
            mlp=mlp,
        )

    def _route(self, layer: int) -> Route:
        config, kernels = self._config, self._kernels
        name = self._source.first_of(*(name.format(layer=layer) for name in self.names.router))
        weight = self.tensor(name, config.num_experts, config.hidden_size)
        if config.sigmoid is None:
            bias = (
                self.vector(self.names.router_bias.format(layer=layer), config.num_experts)
                if config.router_bias
                else None
            )
            return SoftmaxRoute(kernels, kernels.linear(weight, bias), config.top_k, config.renormalise_topk)
        bias = self.tensor(self.names.router_bias.format(layer=layer), config.num_experts, dtype=torch.float32)
        router = kernels.linear(weight.to(torch.float32))
        return SigmoidRoute(kernels, router, bias, config.top_k, config.renormalise_topk, config.sigmoid)

    def _attend(self, layer: int) -> GroupedQueryAttention:
        config, output = self._config, self.names.output.format(layer=layer)
        bias = self.vector(bias_of(output), config.hidden_size) if config.output_bias else None
        return GroupedQueryAttention(
            self._kernels,
            self._views[config.window_of(layer)],
            qkv=self._qkv(layer),
            output=self.linear(self.matrix(output, config.hidden_size, config.query_width), bias),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm=self._head_norm(layer),
            sinks=self.tensor(self.names.sinks.format(layer=layer), config.num_heads, dtype=torch.float32)
            if config.has_sinks
            else None,
        )

    def _qkv(self, layer: int) -> Linear:
        """One product for all three, and after it what the family does to them before rotary embedding."""
        config, names = self._config, [name.format(layer=layer) for name in self.names.qkv]
        query, kv = config.query_width, config.kv_width
        widths = [query, kv, kv] if len(names) == 3 else [query + 2 * kv]
        weight = joined(
            [self.matrix(name, width, config.hidden_size) for name, width in zip(names, widths, strict=True)]
        )
        bias = None
        if config.qkv_bias:
            bias = torch.cat([self.vector(bias_of(name), width) for name, width in zip(names, widths, strict=True)])
        project = self.linear(weight, bias)
        if config.qk_norm == "projection":
            query_norm = self.vector(self.names.query_norm.format(layer=layer), query)
            key_norm = self.vector(self.names.key_norm.format(layer=layer), kv)
            project = _then(project, partial(norm_projections, query=query_norm, key=key_norm, eps=config.norm_eps))
        if config.clip_qkv is not None:
            project = _then(project, partial(Tensor.clamp_, min=-config.clip_qkv, max=config.clip_qkv))
        return project

    def _head_norm(self, layer: int) -> HeadNorm | None:
        config = self._config
        if config.qk_norm != "head":
            return None
        assert config.clip_qkv is None, "clipped after heads are normed, and that is done later"
        names = ((self.names.query_norm, config.num_heads), (self.names.key_norm, config.num_kv_heads))
        weights = [self.vector(name.format(layer=layer), config.head_dim).expand(count, -1) for name, count in names]
        return HeadNorm(torch.cat(weights), config.norm_eps)

    def _mlp(self, names: MlpNames, layer: int, inner: int) -> Linear:
        gate, up, down = (name.format(layer=layer) for name in (names.gate, names.up, names.down))
        hidden = self._config.hidden_size
        gate_up = joined([self.matrix(gate, inner, hidden), self.matrix(up, inner, hidden)])
        down_weight = self.matrix(down, hidden, inner)
        return partial(self._kernels.gated_mlp, gate_up=self.linear(gate_up), down=self.linear(down_weight))


def _then(project: Linear, in_place: Callable[[Tensor], object]) -> Linear:
    def apply(rows: Tensor) -> Tensor:
        projected = project(rows)
        in_place(projected)
        return projected

    return apply
