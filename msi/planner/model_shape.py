"""A model as the planner sees it: how many values each stage reads, keeps and multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from msi.errors import ConfigError
from msi.precision import NONE, Precision

OF_VALUE_BYTES = {2: "bfloat16", 4: "float32"}  # in plans that do not name a precision


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): one latent row per token stands for its keys and values.

    A `q_lora_rank` of 0 is a query projection of one matrix (DeepSeek-V2-Lite).
    """

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of one model.

    Attributes:
        num_layers: all decoder layers.
        num_dense_layers: those of them without experts.
        intermediate_size: h' of one routed expert.
        shared_intermediate_size: of the shared expert of each sparse layer; 0 without one.
        dense_intermediate_size: of the layers without experts.
        precision: of weights, KV cache, rows between nodes and activations, without "auto".
        sliding_window: tokens that attention looks back; 0 for all.
        num_full_layers: those in which it looks back at all of them, window or not.
        config_digest: of the config.json that it was read from; "" for one known by name.
    """

    name: str
    num_layers: int
    num_dense_layers: int = 0
    hidden_size: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    dense_intermediate_size: int = 0
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool = False
    precision: Precision = Precision.of("bfloat16")
    sliding_window: int = 0
    num_full_layers: int = 0
    latent: LatentAttention | None = None
    config_digest: str = ""

    @property
    def num_sparse_layers(self) -> int:
        """L of the pipeline's equations: the layers that take turns with expert nodes."""
        return self.num_layers - self.num_dense_layers

    @property
    def projection_values(self) -> int:
        """Values of one layer's attention projections."""
        h, heads = self.hidden_size, self.num_heads
        if (mla := self.latent) is not None:
            query_dim = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
            query = mla.q_lora_rank * (h + query_dim) if mla.q_lora_rank else h * query_dim
            down = h * (mla.kv_lora_rank + mla.qk_rope_head_dim)
            up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            return query + down + up + heads * mla.v_head_dim * h
        return h * self.head_dim * (2 * heads + 2 * self.num_kv_heads)

    @property
    def kv_values(self) -> int:
        """Values that one token keeps in the cache of one layer."""
        if self.latent is not None:
            return self.latent.kv_lora_rank + self.latent.qk_rope_head_dim
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers."""
        return self.num_layers * self.kv_values * self.precision.kv_cache_bytes

    @property
    def attention_flops(self) -> int:
        """Per query token, per token of its context, in one layer: scores and weighted sum."""
        if self.latent is not None:  # against the latent row, with the up-projections absorbed
            return 2 * self.num_heads * (2 * self.latent.kv_lora_rank + self.latent.qk_rope_head_dim)
        return 4 * self.num_heads * self.head_dim

    @property
    def queries_per_kv_head(self) -> float:
        """g."""
        return self.num_heads / self.num_kv_heads

    @property
    def shared_values(self) -> int:
        """Router and shared expert of one sparse layer."""
        return self.hidden_size * (self.num_experts + 3 * self.shared_intermediate_size)

    @property
    def dense_values(self) -> int:
        """The MLP of one layer without experts."""
        return 3 * self.hidden_size * self.dense_intermediate_size

    @property
    def expert_values(self) -> int:
        """One routed expert in one layer: three matrices (defect 2: the paper's table counts two)."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def head_values(self) -> int:
        """The LM head."""
        return self.hidden_size * self.vocab_size

    @property
    def attention_bytes(self) -> int:
        """P_a in bytes: all that an attention node holds, embedding and LM head included."""
        precision, routers = self.precision, self.num_sparse_layers * self.hidden_size * self.num_experts
        tables = (1 if self.is_tied else 2) * self.head_values
        matrices = self.attention_values - tables - routers
        is_head_apart = precision.head_format != NONE or not self.is_tied
        whole = (routers + self.head_values) * precision.weight_bytes
        return round(
            whole + matrices * precision.matrix_bytes + is_head_apart * self.head_values * precision.head_bytes
        )

    @property
    def attention_values(self) -> int:
        """All that an attention node loads."""
        values = self.num_layers * self.projection_values + self.num_sparse_layers * self.shared_values
        return values + self.num_dense_layers * self.dense_values + (1 if self.is_tied else 2) * self.head_values

    @property
    def row_bytes(self) -> int:
        """One hidden state on its way between nodes, in the mean of there and back."""
        return (self.sent_row_bytes + self.answer_row_bytes) // 2

    @property
    def sent_row_bytes(self) -> int:
        """On its way to the experts."""
        return round(self.hidden_size * self.precision.row_bytes)

    @property
    def answer_row_bytes(self) -> int:
        """On its way back."""
        return round(self.hidden_size * self.precision.answer_bytes)

    @property
    def expert_bytes(self) -> int:
        """P_e in bytes: one routed expert, all layers."""
        return round(self.num_sparse_layers * self.expert_values * self.precision.matrix_bytes)

    @property
    def total_values(self) -> int:
        """Parameters."""
        return self.attention_values + self.num_experts * self.num_sparse_layers * self.expert_values

    def to_json(self) -> dict[str, Any]:
        """With `value_bytes`, which is all that plans said of their precision once."""
        return {**asdict(self), "value_bytes": self.precision.weight_bytes}


def model_shape_from_json(values: Mapping[str, Any]) -> ModelShape:
    """The inverse of `ModelShape.to_json`. Raises ConfigError."""
    try:
        values = dict(values)
        latent, value_bytes, precision = (values.pop(name, None) for name in ("latent", "value_bytes", "precision"))
        return ModelShape(
            **values,
            latent=LatentAttention(**latent) if latent else None,
            precision=Precision.read(precision) if precision else Precision.of(OF_VALUE_BYTES[value_bytes]),
        )
    except (TypeError, KeyError) as error:
        raise ConfigError(f"the plan's model cannot be read: {error}") from error


def _precision(values: Mapping[str, Any]) -> Precision:
    """Plans did not name a quantisation once."""
    return Precision(**{"quantization": NONE, **values})


LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
NEEDED_KEYS = ("layers", "hidden", "intermediate", "experts", "top_k", "heads", "kv_heads", "head_dim", "vocab")
OPTIONAL_KEYS = ("dense_layers", "dense_intermediate", "shared_intermediate", "sliding_window", "full_layers")


def model_shape_from_table(name: str, table: Mapping[str, Any], source: str) -> ModelShape:
    """A model of a catalogue file.

    Raises:
        ConfigError: names the file, the model and the key that is missing, unknown or out of range.
    """
    where = f"{source}: model {name}"
    for key in NEEDED_KEYS:
        if key not in table:
            raise ConfigError(f"{where}: {key} is missing; needed: {', '.join(NEEDED_KEYS)}")
    for key, value in table.items():
        if key not in (*NEEDED_KEYS, *OPTIONAL_KEYS, *LATENT_KEYS):
            allowed = ", ".join((*NEEDED_KEYS, *OPTIONAL_KEYS, *LATENT_KEYS))
            raise ConfigError(f"{where}: unknown key {key!r}; allowed: {allowed}")
        least = 0 if key in (*OPTIONAL_KEYS, "q_lora_rank") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{where}: {key} is {value!r}; it must be an integer of at least {least}")
    has_latent = any(key in table for key in LATENT_KEYS)
    if has_latent and (missing := [key for key in LATENT_KEYS if key not in table]):
        raise ConfigError(f"{where}: latent attention needs {', '.join(missing)} too")
    shape = ModelShape(
        name=name,
        num_layers=table["layers"],
        num_dense_layers=table.get("dense_layers", 0),
        hidden_size=table["hidden"],
        intermediate_size=table["intermediate"],
        shared_intermediate_size=table.get("shared_intermediate", 0),
        dense_intermediate_size=table.get("dense_intermediate", 0),
        num_experts=table["experts"],
        top_k=table["top_k"],
        num_heads=table["heads"],
        num_kv_heads=table["kv_heads"],
        head_dim=table["head_dim"],
        vocab_size=table["vocab"],
        sliding_window=table.get("sliding_window", 0),
        num_full_layers=table.get("full_layers", 0),
        latent=LatentAttention(**{key: table[key] for key in LATENT_KEYS}) if has_latent else None,
    )
    if shape.top_k > shape.num_experts or shape.num_dense_layers >= shape.num_layers:
        raise ConfigError(f"{where}: top_k must not exceed experts, and one layer at least must have experts")
    if shape.num_full_layers > shape.num_layers:
        raise ConfigError(f"{where}: full_layers is {shape.num_full_layers}, and there are {shape.num_layers} layers")
    if shape.num_dense_layers and not shape.dense_intermediate_size:
        raise ConfigError(f"{where}: dense_layers is {shape.num_dense_layers}; give dense_intermediate, too")
    return shape
