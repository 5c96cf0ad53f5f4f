"""Supported model families: how each reads its config.json and names its tensors.

A family is two functions and a table of names. To add one: read its config into a ModelConfig, name its tensors, and
add it to FAMILIES; a new kind of norm, router or attention goes into `msi.kernels` as a function that ModelConfig
selects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msi.errors import ConfigError
from msi.models.config import ConfigReader, ModelConfig, read_json


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where one expert's matrices are: names of their own, or a row of a tensor that holds all experts.

    `gate_up` is [2 h', h] (gate first) in the fused layout, or two tensors [h', h]; `down` is [h, h'].
    """

    gate: str
    up: str
    down: str
    fused_gate_up: str
    fused_down: str


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names of one family's tensors; layer and expert numbers are filled in with str.format."""

    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    attention_norm: str = "model.layers.{layer}.input_layernorm.weight"
    query: str = "model.layers.{layer}.self_attn.q_proj.weight"
    key: str = "model.layers.{layer}.self_attn.k_proj.weight"
    value: str = "model.layers.{layer}.self_attn.v_proj.weight"
    output: str = "model.layers.{layer}.self_attn.o_proj.weight"
    expert_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    router: tuple[str, ...] = ("model.layers.{layer}.mlp.gate.weight",)  # the first that exists
    experts: ExpertNames = ExpertNames(
        gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
        fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
        fused_down="model.layers.{layer}.mlp.experts.down_proj",
    )


@dataclass(frozen=True, slots=True)
class Family:
    """How to read a family's config.json, and what its tensors are called."""

    parse: Callable[[ConfigReader], ModelConfig]
    names: TensorNames


def _parse_mixtral(reader: ConfigReader) -> ModelConfig:
    reader.require("hidden_act", "silu")
    reader.require("attention_bias", False)
    num_heads = reader.integer("num_attention_heads")
    hidden_size = reader.integer("hidden_size")
    num_experts = reader.integer("num_local_experts", default=8)
    window = reader.values.get("sliding_window")
    bos = reader.token_ids("bos_token_id")
    config = ModelConfig(
        architecture="MixtralForCausalLM",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", default=num_heads),
        head_dim=reader.integer("head_dim", default=hidden_size // num_heads),
        intermediate_size=reader.integer("intermediate_size"),
        num_experts=num_experts,
        top_k=reader.integer("num_experts_per_tok", default=2),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-5),
        rope_theta=reader.rope_theta(1e6),
        sliding_window=None if window is None else reader.integer("sliding_window"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        max_position_embeddings=reader.integer("max_position_embeddings", default=4096 * 32),
        renormalise_topk=True,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=reader.token_ids("eos_token_id"),
        dtype=reader.dtype(),
    )
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{reader.source}: num_attention_heads {config.num_heads} is not a multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )
    if config.top_k > config.num_experts:
        raise ConfigError(f"{reader.source}: num_experts_per_tok {config.top_k} of {config.num_experts} experts")
    return config


MIXTRAL_NAMES = TensorNames(
    router=("model.layers.{layer}.block_sparse_moe.gate.weight", "model.layers.{layer}.mlp.gate.weight"),
    experts=ExpertNames(
        gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
        fused_down="model.layers.{layer}.mlp.experts.down_proj",
    ),
)

FAMILIES: dict[str, Family] = {"MixtralForCausalLM": Family(_parse_mixtral, MIXTRAL_NAMES)}


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.architecture]


def parse_config(values: dict[str, Any], source: str) -> ModelConfig:
    """Raises ConfigError: an unsupported architecture is named, with the supported list."""
    reader = ConfigReader(values, source)
    architectures = values.get("architectures") or []
    supported = ", ".join(FAMILIES)
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(f"{source} names no architecture; supported: {supported}")
    family = FAMILIES.get(str(architectures[0]))
    if family is None:
        raise ConfigError(f"{source}: architecture {architectures[0]!r} is not supported; supported: {supported}")
    return family.parse(reader)


def load_config(model_dir: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a directory, and its config.json as parsed.

    End-of-sequence tokens are generation_config.json's where it names some, as in transformers.

    Raises:
        ConfigError: no such directory, no config.json, or a config that is not supported.
    """
    if not model_dir.is_dir():
        raise ConfigError(f"{model_dir} is not a directory; give a Hugging Face model directory with a config.json")
    path = model_dir / "config.json"
    if not path.exists():
        raise ConfigError(f"{model_dir} holds no config.json; give a Hugging Face model directory")
    values = read_json(path)
    config = parse_config(values, str(path))
    generation_path = model_dir / "generation_config.json"
    if generation_path.exists():
        ids = ConfigReader(read_json(generation_path), str(generation_path)).token_ids("eos_token_id")
        config = replace(config, eos_token_ids=ids or config.eos_token_ids)
    return config, values
