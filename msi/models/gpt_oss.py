"""gpt-oss: layers that look back at a window and at all take turns; attention sinks; experts with biases, clamped."""

from __future__ import annotations

from dataclasses import replace

from msi.errors import ConfigError
from msi.kernels import Activation
from msi.models.config import MAX_EXPERTS, ConfigReader, ModelConfig, read_common
from msi.models.family import Family, InterleavedExpertNames, TensorNames

WINDOWED, FULL = "sliding_attention", "full_attention"
ROPE = {  # where config.json says nothing of it
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def _parse(reader: ConfigReader) -> ModelConfig:
    if reader.values.get("rope_parameters") is None and reader.values.get("rope_scaling") is None:
        reader = ConfigReader({**reader.values, "rope_parameters": ROPE}, reader.source)
    config = read_common(
        reader,
        "GptOssForCausalLM",
        intermediate_size=reader.integer("intermediate_size", default=2880),
        num_experts=reader.first_integer("num_local_experts", "num_experts", default=128, at_most=MAX_EXPERTS),
        top_k=reader.integer("num_experts_per_tok", default=4),
        norm_eps=1e-5,
        rope_theta=1.5e5,
        num_kv_heads=8,
        max_position_embeddings=131072,
        renormalise_topk=True,  # a softmax over the chosen
    )
    has_bias = reader.flag("attention_bias", True)
    return replace(
        config,
        head_dim=reader.integer("head_dim", default=64),
        qkv_bias=has_bias,
        output_bias=has_bias,
        sliding_window=reader.optional_integer("sliding_window", 128),
        full_layers=_full_layers(reader, config.num_layers),
        has_sinks=True,
        router_bias=True,
        activation=Activation(
            alpha=reader.number("swiglu_alpha", 1.702), limit=reader.number("swiglu_limit", 7.0), up_offset=1.0
        ),
        expert_bias=True,
    )


def _full_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Every second one where config.json does not say."""
    kinds = reader.texts("layer_types")
    if not kinds:
        return tuple(range(1, num_layers, 2))
    for kind in kinds:
        if kind not in (WINDOWED, FULL):
            raise ConfigError(f"{reader.source}: layer_types holds {kind!r}; supported: {WINDOWED!r}, {FULL!r}")
    if len(kinds) != num_layers:
        raise ConfigError(f"{reader.source}: layer_types names {len(kinds)} layers, and there are {num_layers}")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == FULL)


_MLP = "model.layers.{layer}.mlp."

GPT_OSS = Family(
    "GptOssForCausalLM",
    "gpt_oss",
    _parse,
    TensorNames(
        router=(_MLP + "router.weight",),
        router_bias=_MLP + "router.bias",
        experts=InterleavedExpertNames(
            gate_up=_MLP + "experts.gate_up_proj",
            gate_up_bias=_MLP + "experts.gate_up_proj_bias",
            down=_MLP + "experts.down_proj",
            down_bias=_MLP + "experts.down_proj_bias",
        ),
    ),
)
