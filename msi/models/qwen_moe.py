"""Qwen2-MoE (biased projections, a gated shared expert) and Qwen3-MoE (norms over each query and key head).

In both, some layers may have a plain MLP in place of experts.
"""

from __future__ import annotations

from dataclasses import replace

from msi.errors import ConfigError
from msi.models.config import MAX_EXPERTS, ConfigReader, ModelConfig, read_common
from msi.models.family import Family


def _parse_qwen2(reader: ConfigReader) -> ModelConfig:
    reader.require("use_sliding_window", False)
    if "sliding_attention" in reader.texts("layer_types"):
        raise ConfigError(f"{reader.source}: layer_types holds 'sliding_attention'; supported: 'full_attention'")
    return replace(
        _parse_either(reader, "Qwen2MoeForCausalLM", top_k=4, num_kv_heads=16),
        qkv_bias=reader.flag("qkv_bias", True),
        shared_intermediate_size=reader.integer("shared_expert_intermediate_size"),
    )


def _parse_qwen3(reader: ConfigReader) -> ModelConfig:
    has_bias, has_window = reader.flag("attention_bias", False), reader.flag("use_sliding_window", False)
    return replace(
        _parse_either(reader, "Qwen3MoeForCausalLM", top_k=8, num_kv_heads=4),
        qkv_bias=has_bias,
        output_bias=has_bias,
        qk_norm="head",
        sliding_window=reader.optional_integer("sliding_window", 4096) if has_window else None,
    )


def _parse_either(reader: ConfigReader, architecture: str, *, top_k: int, num_kv_heads: int) -> ModelConfig:
    """`top_k` and `num_kv_heads` are the family's defaults."""
    config = read_common(
        reader,
        architecture,
        intermediate_size=reader.integer("moe_intermediate_size"),
        num_experts=reader.first_integer("num_experts", "num_local_experts", at_most=MAX_EXPERTS),
        top_k=reader.integer("num_experts_per_tok", default=top_k),
        norm_eps=1e-6,
        rope_theta=1e4,
        num_kv_heads=num_kv_heads,
        max_position_embeddings=32768,
        renormalise_topk=reader.flag("norm_topk_prob", False),
    )
    step, dense = reader.integer("decoder_sparse_step", default=1), frozenset(reader.integers("mlp_only_layers"))
    sparse = tuple(layer for layer in range(config.num_layers) if (layer + 1) % step == 0 and layer not in dense)
    has_dense = len(sparse) < config.num_layers
    return replace(
        config,
        sparse_layers=sparse,
        dense_intermediate_size=reader.integer("intermediate_size") if has_dense else None,
    )


QWEN2_MOE = Family("Qwen2MoeForCausalLM", "qwen2_moe", _parse_qwen2)
QWEN3_MOE = Family("Qwen3MoeForCausalLM", "qwen3_moe", _parse_qwen3)
