"""Mixtral: every layer has experts, the weights of the chosen ones sum to 1."""

from __future__ import annotations

from dataclasses import replace

from msi.models.config import MAX_EXPERTS, ConfigReader, ModelConfig, read_common
from msi.models.family import ExpertNames, Family, MlpNames, TensorNames


def _parse(reader: ConfigReader) -> ModelConfig:
    reader.require("attention_bias", False)
    config = read_common(
        reader,
        "MixtralForCausalLM",
        intermediate_size=reader.integer("intermediate_size"),
        num_experts=reader.first_integer("num_local_experts", "num_experts", default=8, at_most=MAX_EXPERTS),
        top_k=reader.integer("num_experts_per_tok", default=2),
        norm_eps=1e-5,
        rope_theta=1e6,
        num_kv_heads=8,
        max_position_embeddings=131072,
        renormalise_topk=True,
    )
    return replace(config, sliding_window=reader.optional_integer("sliding_window"))


MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    _parse,
    TensorNames(
        router=("model.layers.{layer}.block_sparse_moe.gate.weight", "model.layers.{layer}.mlp.gate.weight"),
        experts=ExpertNames(
            each=MlpNames(
                gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
                up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
                down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
            ),
            fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
            fused_down="model.layers.{layer}.mlp.experts.down_proj",
        ),
    ),
)
