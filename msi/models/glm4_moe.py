"""GLM-4.5: a sigmoid router with a bias and groups, partly rotated heads, dense layers first, a shared expert."""

from __future__ import annotations

from dataclasses import replace

from msi.errors import ConfigError, shown
from msi.kernels import SigmoidRouting
from msi.models.config import MAX_EXPERTS, ConfigReader, ModelConfig, read_common
from msi.models.family import Family, MlpNames, TensorNames


def _parse(reader: ConfigReader) -> ModelConfig:
    intermediate_size = reader.integer("moe_intermediate_size")
    config = read_common(
        reader,
        "Glm4MoeForCausalLM",
        intermediate_size=intermediate_size,
        num_experts=reader.first_integer("n_routed_experts", "num_local_experts", default=128, at_most=MAX_EXPERTS),
        top_k=reader.integer("num_experts_per_tok", default=8),
        norm_eps=1e-5,
        rope_theta=1e4,
        num_kv_heads=8,
        max_position_embeddings=131072,
        renormalise_topk=reader.flag("norm_topk_prob", True),
        rotary_share=0.5,
    )
    num_dense = reader.integer("first_k_dense_replace", default=1, at_least=0)
    return replace(
        config,
        sparse_layers=tuple(range(num_dense, config.num_layers)),
        dense_intermediate_size=reader.integer("intermediate_size") if num_dense else None,
        shared_intermediate_size=intermediate_size * reader.integer("n_shared_experts", default=1),
        has_shared_gate=False,
        qkv_bias=reader.flag("attention_bias", False),
        qk_norm="head" if reader.flag("use_qk_norm", False) else None,
        sigmoid=_routing(reader, config),
        remarks=config.remarks + _unread(reader, config),
    )


def _routing(reader: ConfigReader, config: ModelConfig) -> SigmoidRouting:
    routing = SigmoidRouting(
        num_groups=reader.integer("n_group", default=1),
        num_chosen_groups=reader.integer("topk_group", default=1),
        scale=reader.number("routed_scaling_factor", 1.0),
    )
    size = config.num_experts // routing.num_groups
    if config.num_experts % routing.num_groups or size < 2:
        raise ConfigError(
            f"{reader.source}: n_group is {routing.num_groups}; {config.num_experts} experts must fall into that many "
            "equal groups of at least 2"
        )
    if not config.top_k <= routing.num_chosen_groups * size <= config.num_experts:
        raise ConfigError(
            f"{reader.source}: topk_group is {routing.num_chosen_groups}; a token chooses {config.top_k} experts of "
            f"that many groups of {size}, of which there are {routing.num_groups}"
        )
    return routing


def _unread(reader: ConfigReader, config: ModelConfig) -> tuple[str, ...]:
    """Layers that guess further tokens lie behind the last; they are not used."""
    number = reader.values.get("num_nextn_predict_layers")
    if not number:
        return ()
    return (
        f"{reader.source}: num_nextn_predict_layers is {shown(number)}; what guesses further tokens "
        f"(model.layers.{config.num_layers}.* and on) is not read",
    )


_MLP = "model.layers.{layer}.mlp."

GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    _parse,
    TensorNames(
        router_bias=_MLP + "gate.e_score_correction_bias",
        shared_mlp=MlpNames(
            gate=_MLP + "shared_experts.gate_proj.weight",
            up=_MLP + "shared_experts.up_proj.weight",
            down=_MLP + "shared_experts.down_proj.weight",
        ),
    ),
)
