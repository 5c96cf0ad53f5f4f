"""What the planner wants to know of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msi.errors import ConfigError
from msi.models.config import ConfigReader, ModelConfig, config_digest
from msi.models.families import FAMILIES, load_config
from msi.models.files import read_json
from msi.planner.model_shape import LatentAttention, ModelShape
from msi.precision import Precision

LATENT_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM")  # planned for, not served


def shape_of(config: ModelConfig, *, name: str, digest: str, precision: Precision = Precision()) -> ModelShape:
    """The sizes of a configuration that the runtime serves; what `precision` leaves open is the checkpoint's."""
    return ModelShape(
        name=name,
        num_layers=config.num_layers,
        num_dense_layers=config.num_layers - config.num_sparse_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        shared_intermediate_size=config.shared_intermediate_size or 0,
        dense_intermediate_size=config.dense_intermediate_size or 0,
        num_experts=config.num_experts,
        top_k=config.top_k,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        is_tied=config.tie_word_embeddings,
        precision=precision.resolved(config.dtype, config.stored_as),
        sliding_window=config.sliding_window or 0,
        num_full_layers=len(config.full_layers) if config.sliding_window else 0,
        config_digest=digest,
    )


def read_shape(model_dir: Path) -> ModelShape:
    """The model of a directory, or of a config.json: one that the runtime serves, or DeepSeek's.

    Raises:
        ConfigError: no such file, or an architecture that is not known.
    """
    if model_dir.is_file():
        model_dir = model_dir.parent
    values = read_json(model_dir / "config.json")
    name, digest = model_dir.resolve().name, config_digest(values)
    architectures = values.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if architecture in LATENT_ARCHITECTURES:
        return _latent_shape(ConfigReader(values, str(model_dir / "config.json")), name, digest)
    if architecture in FAMILIES:
        config, _ = load_config(model_dir)
        return shape_of(config, name=name, digest=digest)
    known = ", ".join((*FAMILIES, *LATENT_ARCHITECTURES))
    raise ConfigError(f"{model_dir}/config.json: architecture {architecture!r} cannot be planned for; known: {known}")


def _latent_shape(reader: ConfigReader, name: str, digest: str) -> ModelShape:
    shared = reader.integer("n_shared_experts", default=0, at_least=0)
    intermediate = reader.integer("moe_intermediate_size")
    heads, value_dim = reader.integer("num_attention_heads"), reader.integer("v_head_dim")
    sizes: dict[str, Any] = {
        key: reader.integer(key) for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
    }
    return ModelShape(
        name=name,
        num_layers=reader.integer("num_hidden_layers"),
        num_dense_layers=reader.integer("first_k_dense_replace", default=0, at_least=0),
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=intermediate,
        shared_intermediate_size=shared * intermediate,
        dense_intermediate_size=reader.integer("intermediate_size"),
        num_experts=reader.integer("n_routed_experts"),
        top_k=reader.integer("num_experts_per_tok"),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", default=heads),
        head_dim=value_dim,
        vocab_size=reader.integer("vocab_size"),
        is_tied=reader.flag("tie_word_embeddings", False),
        latent=LatentAttention(q_lora_rank=reader.integer("q_lora_rank"), v_head_dim=value_dim, **sizes),
        config_digest=digest,
    )
