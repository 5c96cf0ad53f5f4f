"""DBRX: layer norms, clipped projections in one tensor, experts stacked in three; config.json in nested sections."""

from __future__ import annotations

from msi.errors import ConfigError
from msi.models.config import MAX_EXPERTS, MAX_LAYERS, MIN_ROPE_THETA, ConfigReader, ModelConfig, Rope, read_rope
from msi.models.family import Family, StackedExpertNames, TensorNames

LAYER_NORM_EPS = 1e-5  # torch's default; config.json does not say


def _parse(reader: ConfigReader) -> ModelConfig:
    attention, ffn = reader.section("attn_config"), reader.section("ffn_config")
    reader.require("tie_word_embeddings", False)
    ffn.section("ffn_act_fn").require("name", "silu")
    ffn.require("uniform_expert_assignment", False)
    ffn.require("moe_normalize_expert_weights", None, 1)
    hidden_size = reader.first_integer("d_model", "hidden_size")
    num_heads = reader.first_integer("n_heads", "num_attention_heads")
    num_layers = reader.first_integer("n_layers", "num_hidden_layers", at_most=MAX_LAYERS)
    max_position_embeddings = reader.first_integer("max_seq_len", "max_position_embeddings", default=2048)
    vocab_size = reader.integer("vocab_size")
    ends, remarks = reader.token_ids("eos_token_id", vocab_size)
    return ModelConfig(
        architecture="DbrxForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        sparse_layers=tuple(range(num_layers)),
        num_heads=num_heads,
        num_kv_heads=attention.integer("kv_n_heads", default=1),
        head_dim=hidden_size // num_heads,
        intermediate_size=ffn.integer("ffn_hidden_size"),
        num_experts=ffn.integer("moe_num_experts", at_most=MAX_EXPERTS),
        top_k=ffn.integer("moe_top_k", default=1),
        norm="layer",
        norm_eps=LAYER_NORM_EPS,
        rope=_rope(reader, attention, max_position_embeddings),
        clip_qkv=attention.optional_number("clip_qkv"),
        tie_word_embeddings=False,
        max_position_embeddings=max_position_embeddings,
        renormalise_topk=ffn.values.get("moe_normalize_expert_weights", 1) is not None,
        eos_token_ids=ends,
        dtype=reader.dtype(),
        remarks=remarks,
    )


def _rope(reader: ConfigReader, attention: ConfigReader, max_position_embeddings: int) -> Rope:
    """Base in attn_config as transformers 4 writes it, in rope_parameters as 5 does; if it is in both they must agree.

    Transformers 5 would use rope_parameters and keep silent.
    """
    inner = attention.optional_number("rope_theta", MIN_ROPE_THETA)
    rope = read_rope(reader, 1e4 if inner is None else inner, max_position_embeddings)
    if inner is not None and rope.theta != inner:
        raise ConfigError(
            f"{reader.source}: rope_theta is {rope.theta:g} in rope_parameters and {inner:g} in attn_config; remove one"
        )
    return rope


_BLOCK = "transformer.blocks.{layer}."

DBRX = Family(
    "DbrxForCausalLM",
    "dbrx",
    _parse,
    TensorNames(
        embed="transformer.wte.weight",
        final_norm="transformer.norm_f.weight",
        attention_norm=_BLOCK + "norm_attn_norm.norm_1.weight",
        qkv=(_BLOCK + "norm_attn_norm.attn.Wqkv.weight",),
        output=_BLOCK + "norm_attn_norm.attn.out_proj.weight",
        mlp_norm=_BLOCK + "norm_attn_norm.norm_2.weight",
        router=(_BLOCK + "ffn.router.layer.weight",),
        experts=StackedExpertNames(
            gate=_BLOCK + "ffn.experts.mlp.w1",
            up=_BLOCK + "ffn.experts.mlp.v1",
            down=_BLOCK + "ffn.experts.mlp.w2",
        ),
    ),
)
