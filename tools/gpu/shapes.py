"""Models whose shapes are measured, with random weights: what config.json says of them, and floors that follow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VALUE_BYTES = 2  # of bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of which some layers are measured, as all do not fit one GPU, or take long to make up.

    Attributes:
        num_layers: measured; of `all_layers`.
        changes: to the rest of config.json.
    """

    name: str
    architecture: str
    model_type: str
    num_layers: int
    all_layers: int
    hidden: int
    inner: int
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    changes: tuple[tuple[str, Any], ...]

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [self.architecture], "model_type": self.model_type, "hidden_act": "silu",
            "hidden_size": self.hidden, "num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocab_size,
            "num_experts_per_tok": self.top_k, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 1,
            "eos_token_id": 2, **dict(self.changes),
        }  # fmt: skip

    def save(self, folder: Path) -> Path:
        """A model directory that holds config.json alone."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        return folder

    @property
    def label(self) -> str:
        return f"{self.name}, {self.num_layers} of {self.all_layers} layers"

    def expert_layer_bytes(self) -> int:
        """Weights of a layer's experts, all of them."""
        return self.num_experts * 3 * self.hidden * self.inner * VALUE_BYTES

    def expert_row_flop(self) -> int:
        """Of one row at one expert."""
        return 6 * self.hidden * self.inner

    def attention_layer_bytes(self, num_seqs: int, context_len: int) -> int:
        """Weights of a layer's attention, and the keys and values that decoding sequences read."""
        heads = 2 * (self.num_heads + self.num_kv_heads)  # queries and output; keys and values
        cached = num_seqs * context_len * 2 * self.num_kv_heads * self.head_dim
        return (self.hidden * heads * self.head_dim + cached) * VALUE_BYTES


MIXTRAL = Shape(
    "Mixtral-8x7B", "MixtralForCausalLM", "mixtral", 4, 32, 4096, 14336, 8, 2, 32, 8, 128, 32000,
    (("intermediate_size", 14336), ("num_local_experts", 8), ("sliding_window", None)),
)  # fmt: skip
QWEN3 = Shape(
    "Qwen3-30B-A3B", "Qwen3MoeForCausalLM", "qwen3_moe", 8, 48, 2048, 768, 128, 8, 32, 4, 128, 151936,
    (
        ("intermediate_size", 6144), ("moe_intermediate_size", 768), ("num_experts", 128), ("norm_topk_prob", True),
        ("decoder_sparse_step", 1), ("mlp_only_layers", []),
    ),
)  # fmt: skip
SMALL = Shape(  # of dry runs
    "small", "MixtralForCausalLM", "mixtral", 2, 2, 32, 48, 4, 2, 4, 2, 16, 199,
    (("intermediate_size", 48), ("num_local_experts", 4), ("sliding_window", None)),
)  # fmt: skip
SMALL_QWEN3 = Shape(
    "small", "Qwen3MoeForCausalLM", "qwen3_moe", 2, 2, 32, 24, 6, 3, 4, 2, 16, 199,
    (
        ("intermediate_size", 48), ("moe_intermediate_size", 24), ("num_experts", 6), ("norm_topk_prob", True),
        ("decoder_sparse_step", 1), ("mlp_only_layers", []),
    ),
)  # fmt: skip
