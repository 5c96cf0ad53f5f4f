"""OLMoE: norms over the whole query and key projections, which may be clipped."""

from __future__ import annotations

from dataclasses import replace

from msi.models.config import MAX_EXPERTS, ConfigReader, ModelConfig, read_common
from msi.models.family import Family


def _parse(reader: ConfigReader) -> ModelConfig:
    reader.require("sliding_window", None)
    config = read_common(
        reader,
        "OlmoeForCausalLM",
        intermediate_size=reader.integer("intermediate_size"),
        num_experts=reader.first_integer("num_experts", "num_local_experts", at_most=MAX_EXPERTS),
        top_k=reader.integer("num_experts_per_tok", default=8),
        norm_eps=1e-5,
        rope_theta=1e4,
        num_kv_heads=None,
        max_position_embeddings=4096,
        renormalise_topk=reader.flag("norm_topk_prob", False),
    )
    reader.require("head_dim", None, config.hidden_size // config.num_heads)  # the norms are as wide as the model
    has_bias = reader.flag("attention_bias", False)
    return replace(
        config,
        qkv_bias=has_bias,
        output_bias=has_bias,
        qk_norm="projection",
        clip_qkv=reader.optional_number("clip_qkv"),
    )


OLMOE = Family("OlmoeForCausalLM", "olmoe", _parse)
