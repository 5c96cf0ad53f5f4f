"""The tensors that a model's configuration asks of its checkpoint: checked as a whole before anything is started.

The loaders (`attention_weights`, `expert_half`) read the same names and shapes, each worker its own part of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from msi.errors import CheckpointError
from msi.kernels import MXFP4_GROUP, NONE, SCALE_BLOCK
from msi.models.config import ModelConfig
from msi.models.families import family_of
from msi.models.family import ExpertNames, InterleavedExpertNames, MlpNames, StackedExpertNames, bias_of
from msi.models.tensor_index import Shape, TensorIndex


def check_weights(model_dir: Path, config: ModelConfig) -> None:
    """Looks into the headers of a directory's weights. Raises CheckpointError: what is there cannot be served."""
    check_tensors(config, TensorIndex(model_dir, config.stored_as, config.has_mxfp4_experts))


def check_tensors(config: ModelConfig, index: TensorIndex) -> None:
    """Raises CheckpointError: a tensor is missing, misshapen or of a type that no weight has."""
    for name, shape in required_tensors(config, index):
        index.require(name, shape)
    if config.stored_as != NONE:
        _check_quantised_experts(config, index)


def required_tensors(config: ModelConfig, index: TensorIndex) -> Iterator[tuple[str, Shape]]:
    """Names and shapes, by the layout that the checkpoint has."""
    names, hidden = family_of(config).names, config.hidden_size
    table = (config.vocab_size, hidden)
    if config.tie_word_embeddings:
        yield from ((name, table) for name in tied_names(names.embed, names.lm_head, index))
    else:
        yield names.embed, table
        yield names.lm_head, table
    yield names.final_norm, (hidden,)
    for layer in range(config.num_layers):
        yield names.attention_norm.format(layer=layer), (hidden,)
        yield names.mlp_norm.format(layer=layer), (hidden,)
        yield from _attention(config, layer)
        if layer not in config.sparse_layers:
            yield from _mlp(names.dense_mlp, layer, config.dense_intermediate_size or 0, hidden)
            continue
        yield index.first_of(*(name.format(layer=layer) for name in names.router)), (config.num_experts, hidden)
        if config.router_bias or config.sigmoid is not None:
            yield names.router_bias.format(layer=layer), (config.num_experts,)
        if config.shared_intermediate_size is not None:
            if config.has_shared_gate:
                yield names.shared_gate.format(layer=layer), (1, hidden)
            yield from _mlp(names.shared_mlp, layer, config.shared_intermediate_size, hidden)
        yield from _experts(config, names.experts, index, layer)


class _Names(Protocol):
    def has(self, name: str) -> bool: ...


def tied_names(embed: str, lm_head: str, source: _Names) -> list[str]:
    """Of a model whose head is its embedding, those that its checkpoint holds: one of them is enough."""
    return [name for name in (embed, lm_head) if source.has(name)] or [embed]


def _attention(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    names, query, kv = family_of(config).names, config.query_width, config.kv_width
    widths = (query, kv, kv) if len(names.qkv) == 3 else (query + 2 * kv,)
    for name, width in zip(names.qkv, widths, strict=True):
        yield name.format(layer=layer), (width, config.hidden_size)
        if config.qkv_bias:
            yield bias_of(name.format(layer=layer)), (width,)
    output = names.output.format(layer=layer)
    yield output, (config.hidden_size, query)
    if config.output_bias:
        yield bias_of(output), (config.hidden_size,)
    if config.qk_norm is not None:
        is_per_head = config.qk_norm == "head"
        yield names.query_norm.format(layer=layer), (config.head_dim if is_per_head else query,)
        yield names.key_norm.format(layer=layer), (config.head_dim if is_per_head else kv,)
    if config.has_sinks:
        yield names.sinks.format(layer=layer), (config.num_heads,)


def _mlp(names: MlpNames, layer: int, inner: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    yield names.gate.format(layer=layer), (inner, hidden)
    yield names.up.format(layer=layer), (inner, hidden)
    yield names.down.format(layer=layer), (hidden, inner)


def _experts(
    config: ModelConfig,
    names: ExpertNames | StackedExpertNames | InterleavedExpertNames,
    index: TensorIndex,
    layer: int,
) -> Iterator[tuple[str, Shape]]:
    num_experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    if isinstance(names, InterleavedExpertNames):
        for name, rows, depth in ((names.gate_up, 2 * inner, hidden), (names.down, hidden, inner)):
            matrix = name.format(layer=layer)
            if config.has_mxfp4_experts:
                yield matrix + "_blocks", (num_experts, rows, depth // MXFP4_GROUP, MXFP4_GROUP // 2)
                yield matrix + "_scales", (num_experts, rows, depth // MXFP4_GROUP)
            else:
                yield matrix, (num_experts, depth, rows)
        yield names.gate_up_bias.format(layer=layer), (num_experts, 2 * inner)
        yield names.down_bias.format(layer=layer), (num_experts, hidden)
        return
    if isinstance(names, StackedExpertNames):
        for name in (names.gate, names.up, names.down):
            yield name.format(layer=layer), (num_experts * inner, hidden)
        return
    each = [name.format(layer=layer, expert="{expert}") for name in (names.each.gate, names.each.up, names.each.down)]
    fused = names.fused_gate_up.format(layer=layer)
    if index.has(fused):
        index.first_of(fused, each[0].format(expert=0))  # refuses both
        yield fused, (num_experts, 2 * inner, hidden)
        yield names.fused_down.format(layer=layer), (num_experts, hidden, inner)
        return
    if index.has(one_more := each[0].format(expert=num_experts)):
        raise CheckpointError(f"{index.model_dir} holds {one_more}, but config.json names {num_experts} experts")
    for expert in range(num_experts):
        for name, shape in zip(each, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
            yield name.format(expert=expert), shape


def _check_quantised_experts(config: ModelConfig, index: TensorIndex) -> None:
    """A bank has one format, and a matrix that is cut out of a tensor takes whole scales with it."""
    names = family_of(config).names.experts
    if isinstance(names, InterleavedExpertNames):
        raise CheckpointError(
            f"{index.model_dir}: experts of {config.architecture} have rows of gate and up by turns, and in "
            f"{config.stored_as} they are not supported; give the checkpoint in bfloat16"
        )
    for layer in config.sparse_layers:
        for name, shape in _experts(config, names, index, layer):
            stored = index.tensors[name]
            if not index.is_quantised(name):
                raise CheckpointError(
                    f"{stored.file}: {name} is stored as {stored.dtype}, and config.json says that matrices are in "
                    f"{config.stored_as}; experts that are not, beside others that are, are not supported"
                )
            scales_name, scales = index.scales_of(name)
            blocks = tuple(-(-size // SCALE_BLOCK) for size in shape[-2:])
            is_in_blocks = scales.shape[-2:] == blocks and blocks[0] > 1
            if isinstance(names, StackedExpertNames):
                is_cut = is_in_blocks and config.intermediate_size % SCALE_BLOCK > 0
                is_cut |= name == names.down.format(layer=layer) and scales.shape[:1] == shape[:1]
            else:
                is_gate_up = name == names.fused_gate_up.format(layer=layer)
                is_cut = is_gate_up and is_in_blocks and config.intermediate_size % SCALE_BLOCK > 0
            if is_cut:
                raise CheckpointError(
                    f"{scales.file}: {scales_name} {list(scales.shape)} has numbers that are of more than one expert's "
                    f"matrix, or of its columns alone; such scales are not supported"
                )
