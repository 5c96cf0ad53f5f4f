"""What a model is, read from a Hugging Face directory's config.json as transformers 4 and 5 write it.

Families differ in data: which norms, attention, router and layers they use. `ModelConfig` states it; the code that
computes reads only this, never config.json.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from msi.errors import ConfigError, shown
from msi.kernels import NONE, SWIGLU, Activation, SigmoidRouting

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_SYNONYMS = {"float": "float32", "half": "float16"}
MAX_INTEGER = 2**31 - 1
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
MIN_NUMBER, MAX_NUMBER = 1e-30, 1e30  # float32 arithmetic on these is finite
MIN_ROPE_THETA = 1.01  # yarn divides by its logarithm
ROPE_FACTORS = (1e-3, 1e6)
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: its base, and how frequencies are stretched for long contexts (`msi.kernels.rope`).

    Attributes:
        original_len: positions of the context before it was stretched.
        scale: of cosines and sines.
        share: of each head that rotates.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    scale: float = 1.0
    share: float = 1.0

    def num_rotated(self, head_dim: int) -> int:
        """The first values of each head, which rotate; the others stay as they are."""
        return int(head_dim * self.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model, whatever its family.

    Attributes:
        architecture: as config.json names it; picks the weight names (`msi.models.families`).
        num_layers: all decoder layers, dense ones included.
        sparse_layers: those of them that have experts, ascending. Only they take turns with the expert nodes, which
            number them from 0: layer 3 of a wave is `sparse_layers[3]` of the model.
        intermediate_size: h', of one routed expert.
        shared_intermediate_size: of the shared expert that every token of a sparse layer passes; None without one.
        dense_intermediate_size: of the MLP of layers that have no experts; None where all layers have some.
        norm: of the residual stream: root mean square, or layer norm without bias.
        qkv_bias, output_bias: whether these projections have one.
        qk_norm: RMSNorm of queries and keys, over each head or over the whole projection; None without.
        clip_qkv: queries, keys and values are cut to [-clip_qkv, clip_qkv]; None for no limit.
        sliding_window: tokens that attention looks back, itself included; None for all.
        full_layers: those in which it looks back at all of them, window or not.
        has_sinks: attention of each head has a learned score of a key without a value.
        renormalise_topk: whether the weights of the chosen experts are scaled to sum to 1.
        router_bias: whether the logits of a softmax over experts have one.
        sigmoid: how experts are chosen where it is not by softmax.
        activation: of routed experts.
        expert_bias: whether routed experts' products have biases.
        has_shared_gate: whether a gate scales what the shared expert adds.
        eos_token_ids: tokens that end a sequence.
        dtype: of the checkpoint.
        stored_as: "none", or the number format that matrices of the checkpoint are quantised in: "fp8".
        has_mxfp4_experts: routed experts are stored in MXFP4, and unpacked as they are loaded.
        max_position_embeddings: the longest context the model was made for.
        remarks: sentences about what the files say and is not used.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    sparse_layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    top_k: int
    norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    max_position_embeddings: int
    renormalise_topk: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
    norm: Literal["rms", "layer"] = "rms"
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    clip_qkv: float | None = None
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    has_sinks: bool = False
    router_bias: bool = False
    sigmoid: SigmoidRouting | None = None
    activation: Activation = SWIGLU
    expert_bias: bool = False
    shared_intermediate_size: int | None = None
    has_shared_gate: bool = True
    dense_intermediate_size: int | None = None
    stored_as: str = NONE
    has_mxfp4_experts: bool = False
    remarks: tuple[str, ...] = field(default=(), compare=False)

    @property
    def num_sparse_layers(self) -> int:
        """Turns of one pass: the layers that expert nodes, waves and lanes count."""
        return len(self.sparse_layers)

    @property
    def kv_values_per_token(self) -> int:
        """Elements of KV cache per token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer's attention looks back, itself included; None for all."""
        return None if layer in self.full_layers else self.sliding_window

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of the keys, and of the values."""
        return self.num_kv_heads * self.head_dim

    @property
    def expert_values(self) -> int:
        """Elements of one routed expert's matrices in one layer."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def expert_bias_values(self) -> int:
        """Elements of one routed expert's biases in one layer."""
        return (2 * self.intermediate_size + self.hidden_size) * self.expert_bias

    @property
    def attention_values(self) -> int:
        """Elements of all that an attention worker loads: everything but the routed experts."""
        hidden, query, kv = self.hidden_size, self.query_width, self.kv_width
        every_layer = hidden * (2 * query + 2 * kv + 2)  # projections and two norms
        every_layer += (query + 2 * kv) * self.qkv_bias + hidden * self.output_bias
        every_layer += {"head": 2 * self.head_dim, "projection": query + kv, None: 0}[self.qk_norm]
        every_layer += self.num_heads * self.has_sinks
        has_router_bias = self.router_bias or self.sigmoid is not None
        sparse_layer = hidden * self.num_experts + self.num_experts * has_router_bias
        if self.shared_intermediate_size is not None:
            sparse_layer += hidden * (3 * self.shared_intermediate_size + self.has_shared_gate)
        dense_layer = 3 * hidden * (self.dense_intermediate_size or 0)
        num_sparse, num_tables = self.num_sparse_layers, 1 if self.tie_word_embeddings else 2
        layers = self.num_layers * every_layer + num_sparse * sparse_layer
        layers += (self.num_layers - num_sparse) * dense_layer
        return layers + hidden * (num_tables * self.vocab_size + 1)


class ConfigReader:
    """Typed access to a parsed config.json; every refusal names the file and the key."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def section(self, key: str) -> ConfigReader:
        """An object inside this one; an absent one is empty."""
        values = self.values.get(key)
        if values is not None and not isinstance(values, dict):
            raise self.refusal(key, values, "must be an object")
        return ConfigReader(values or {}, f"{self.source}: {key}")

    def integer(self, key: str, *, default: int | None = None, at_least: int = 1, at_most: int = MAX_INTEGER) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is not int or not at_least <= value <= at_most:
            raise self.refusal(key, value, f"must be an integer from {at_least} to {at_most}")
        return value

    def first_integer(self, *keys: str, default: int | None = None, at_most: int = MAX_INTEGER) -> int:
        """By whichever of these names is there."""
        there = [key for key in keys if self.values.get(key) is not None]
        if len({self.integer(key, at_most=at_most) for key in there}) > 1:
            values = " and ".join(f"{key} is {shown(self.values[key])}" for key in there)
            raise ConfigError(f"{self.source}: {values}, which mean the same; remove the one not meant")
        return self.integer(there[0] if there else keys[0], default=default, at_most=at_most)

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """`default` where it is absent, none where it is null."""
        return None if self.values.get(key, default) is None else self.integer(key, default=default)

    def number(self, key: str, default: float, at_least: float = MIN_NUMBER, at_most: float = MAX_NUMBER) -> float:
        return self.required_number(key, at_least, at_most) if key in self.values else default

    def required_number(self, key: str, at_least: float = MIN_NUMBER, at_most: float = MAX_NUMBER) -> float:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value <= at_most:
            raise self.refusal(key, value, f"must be a number above 0, from {at_least:g} to {at_most:g}")
        return float(value)

    def optional_number(self, key: str, at_least: float = MIN_NUMBER, at_most: float = MAX_NUMBER) -> float | None:
        return None if self.values.get(key) is None else self.required_number(key, at_least, at_most)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "must be true or false")
        return value

    def require(self, key: str, *allowed: object) -> None:
        """Refuses values that would change the result and are not implemented."""
        if key in self.values and self.values[key] not in allowed:
            supported = ", ".join(repr(value) for value in allowed)
            raise ConfigError(f"{self.source}: {key} is {shown(self.values[key])}; supported: {supported}")

    def dtype(self) -> str:
        value = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        name = value.removeprefix("torch.") if isinstance(value, str) else ""
        name = DTYPE_SYNONYMS.get(name, name)
        if name not in DTYPES:
            raise ConfigError(f"{self.source}: dtype {shown(value)} is not supported; supported: {', '.join(DTYPES)}")
        return name

    def integers(self, key: str) -> tuple[int, ...]:
        """A number or a list of them; absent is none."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(type(token) is int for token in ids):
            raise self.refusal(key, value, "must be an integer or a list of them")
        return ids

    def token_ids(self, key: str, vocab_size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Those tokens of a field that the model has, and a remark where it names others."""
        value = self.values.get(key)
        ids, others = known_token_ids(value, vocab_size)
        remark = (
            f"{self.source}: {key} is {shown(value)}; the model's tokens are 0 to {vocab_size - 1}, others do not count"
        )
        return ids, (remark,) if others else ()

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; absent is none."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.refusal(key, value, "must be a list of texts")
        return tuple(value)

    def refusal(self, key: str, value: object, rule: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key} is {shown(value)}; it {rule}")


def read_rope(
    reader: ConfigReader, default_theta: float, max_position_embeddings: int, default_share: float | None = None
) -> Rope:
    """Transformers 5 writes all of it into rope_parameters; 4 the base beside rope_scaling. Other kinds are refused.

    Args:
        default_share: of each head that rotates; None where the family rotates whole heads.
    """
    newer, older = reader.section("rope_parameters").values, reader.section("rope_scaling").values
    if newer and older:
        raise ConfigError(f"{reader.source} holds both rope_parameters and rope_scaling; remove one")
    parameters = newer or older
    rope = ConfigReader({**reader.values, **parameters}, reader.source)
    if default_share is None:
        rope.require("partial_rotary_factor", None, 1)
        share = 1.0
    else:
        share = rope.number("partial_rotary_factor", default_share, at_most=1.0)
    theta = rope.number("rope_theta", default_theta, MIN_ROPE_THETA)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        supported = ", ".join(repr(known) for known in ROPE_KINDS)
        raise ConfigError(f"{reader.source}: rope_type {shown(kind)} is not supported; supported: {supported}")
    if kind == "default":
        return Rope(theta, share=share)
    factor = ConfigReader(parameters, f"{reader.source}: {kind} rope").required_number("factor", *ROPE_FACTORS)
    if kind == "linear":
        return Rope(theta, "linear", factor, share=share)
    # as in transformers, a value outside the section goes before one inside
    original = ConfigReader({**parameters, **reader.values}, reader.source)
    original_len = original.integer("original_max_position_embeddings", default=max_position_embeddings)
    if kind == "llama3":
        low, high = (rope.required_number(key, *ROPE_FACTORS) for key in ("low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ConfigError(f"{reader.source}: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        return Rope(theta, "llama3", factor, original_len, low_freq_factor=low, high_freq_factor=high, share=share)
    scale = rope.optional_number("attention_factor", *ROPE_FACTORS)
    scales = [rope.optional_number(key, *ROPE_FACTORS) for key in ("mscale", "mscale_all_dim")]
    return Rope(
        theta,
        "yarn",
        factor,
        original_len,
        beta_fast=rope.optional_number("beta_fast", *ROPE_FACTORS) or 32.0,
        beta_slow=rope.optional_number("beta_slow", *ROPE_FACTORS) or 1.0,
        truncate=rope.flag("truncate", True),
        scale=_yarn_scale(factor, scales) if scale is None else scale,
        share=share,
    )


def _yarn_scale(factor: float, scales: list[float | None]) -> float:
    """Of cosines and sines; `scales` are mscale and mscale_all_dim, of which one alone does not count."""
    stretch = math.log(max(factor, 1.0))
    mscale, mscale_all_dim = scales
    if mscale is None or mscale_all_dim is None:
        return 0.1 * stretch + 1.0
    return (0.1 * mscale * stretch + 1.0) / (0.1 * mscale_all_dim * stretch + 1.0)


def read_common(
    reader: ConfigReader,
    architecture: str,
    *,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    norm_eps: float,
    rope_theta: float,
    num_kv_heads: int | None,
    max_position_embeddings: int,
    renormalise_topk: bool,
    rotary_share: float | None = None,
) -> ModelConfig:
    """What most families write under the same keys.

    `norm_eps` and those below are the family's defaults, used where the key is absent; no `num_kv_heads`, or one that
    cannot be, is as many as there are heads; no `rotary_share` is all of them, always.
    """
    reader.require("hidden_act", "silu", "swish")
    hidden_size, num_layers = reader.integer("hidden_size"), reader.integer("num_hidden_layers", at_most=MAX_LAYERS)
    num_heads, vocab_size = reader.integer("num_attention_heads"), reader.integer("vocab_size")
    if num_kv_heads is None or "num_key_value_heads" in reader.values or num_heads % num_kv_heads:
        num_kv_heads = num_heads
    max_position_embeddings = reader.integer("max_position_embeddings", default=max_position_embeddings)
    ends, remarks = reader.token_ids("eos_token_id", vocab_size)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        sparse_layers=tuple(range(num_layers)),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", default=num_kv_heads),
        head_dim=reader.integer("head_dim", default=hidden_size // num_heads),
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        norm_eps=reader.number("rms_norm_eps", norm_eps),
        rope=read_rope(reader, rope_theta, max_position_embeddings, rotary_share),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        max_position_embeddings=max_position_embeddings,
        renormalise_topk=renormalise_topk,
        eos_token_ids=ends,
        dtype=reader.dtype(),
        remarks=remarks,
    )


def check_config(config: ModelConfig, source: str) -> None:
    """What must hold between the numbers of any model. Raises ConfigError."""
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{source}: {config.num_heads} attention heads are not a multiple of {config.num_kv_heads} key-value heads"
        )
    rotated = config.rope.num_rotated(config.head_dim)
    if config.rope.share != 1 and (rotated < 2 or rotated % 2):
        raise ConfigError(
            f"{source}: partial_rotary_factor {config.rope.share:g} of head_dim {config.head_dim} is {rotated} values, "
            "which are not pairs"
        )
    if config.top_k > config.num_experts:
        raise ConfigError(f"{source}: each token is to choose {config.top_k} of {config.num_experts} experts")
    if not config.sparse_layers:
        raise ConfigError(f"{source}: none of the {config.num_layers} layers has experts; dense models are not served")


def known_token_ids(value: object, vocab_size: int) -> tuple[tuple[int, ...], tuple[object, ...]]:
    """The tokens of a field such as eos_token_id, an id or a list of them, that a model has; and what else it holds.

    A checkpoint may name a token that it does not have (-1 and ids beyond the vocabulary mean "none" to some).
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    known = [one for one in values if type(one) is int and 0 <= one < vocab_size]
    others = [one for one in values if not (type(one) is int and 0 <= one < vocab_size)]
    return tuple(dict.fromkeys(known)), tuple(others)


def config_digest(values: dict[str, Any]) -> str:
    """sha256 of the canonical config.json; one half of a model's fingerprint."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
