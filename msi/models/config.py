"""What a model is, read from a Hugging Face directory's config.json as transformers 4 and 5 write it.

Families differ in data: which norms, router and attention they use. `ModelConfig` states it; the code that computes
reads only this, never config.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msi.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model, whatever its family.

    Attributes:
        architecture: as config.json names it; picks the weight names (`msi.models.families`).
        intermediate_size: h', of one expert.
        sliding_window: tokens that attention looks back, itself included; None for all.
        renormalise_topk: whether the weights of the chosen experts are scaled to sum to 1.
        eos_token_ids: tokens that end a sequence.
        dtype: of the checkpoint.
        max_position_embeddings: the longest context the model was made for.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    top_k: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    renormalise_topk: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @property
    def kv_values_per_token(self) -> int:
        """Elements of KV cache per token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


class ConfigReader:
    """Typed access to a parsed config.json; every refusal names the file and the key."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def integer(self, key: str, *, default: int | None = None, at_least: int = 1) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ConfigError(f"{self.source}: {key} is {value!r}; it must be an integer >= {at_least}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError(f"{self.source}: {key} is {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {key} is {value!r}; it must be true or false")
        return value

    def require(self, key: str, *allowed: object) -> None:
        """Refuses values that would change the result and are not implemented."""
        if key in self.values and self.values[key] not in allowed:
            shown = ", ".join(repr(value) for value in allowed)
            raise ConfigError(f"{self.source}: {key} is {self.values[key]!r}; supported: {shown}")

    def rope_theta(self, default: float) -> float:
        """The rotary base: top level in transformers 4, inside rope_parameters in 5. Scaled kinds are refused."""
        parameters = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise ConfigError(f"{self.source}: rope_parameters is {parameters!r}; it must be an object")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{self.source}: rope_type {kind!r} is not supported; supported: 'default'")
        return ConfigReader({**self.values, **parameters}, self.source).number("rope_theta", default)

    def dtype(self) -> str:
        value = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        value = str(value).removeprefix("torch.")
        if value not in DTYPES:
            raise ConfigError(f"{self.source}: dtype {value!r} is not supported; supported: {', '.join(DTYPES)}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        if value is None:
            return ()
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ConfigError(f"{self.source}: {key} is {value!r}; it must be a token id or a list of them")
        return ids


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; it must be a JSON object")
    return values


def config_digest(values: dict[str, Any]) -> str:
    """sha256 of the canonical config.json; one half of a model's fingerprint."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
