"""Tiny models: their configurations, and a random Mixtral for tests that compare with nothing."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

torch.set_num_threads(1)  # models are tiny, and the threads of the workers under test want the cores

VOCAB_SIZE = 199
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.35,
    "rope_theta": 1e4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MIXTRAL = {**COMMON, "intermediate_size": 48, "head_dim": 16, "num_local_experts": 7, "num_experts_per_tok": 2}


def save_tiny(path: Path, seed: int = 0, **changes) -> None:
    """A random Mixtral in float32: as transformers makes it where it is installed, since texts hang on the seed."""
    if find_spec("transformers") is not None:
        from tests import reference

        reference.save_tiny(path, seed, **changes)
    else:
        save_plainly(path, seed, **changes)


def save_plainly(path: Path, seed: int = 0, **changes) -> None:
    """As transformers would save it, weights of the same distribution."""
    values = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "sliding_window": None, "torch_dtype": "float32", **MIXTRAL, **changes,
    }  # fmt: skip
    hidden, vocab, inner = values["hidden_size"], values["vocab_size"], values["intermediate_size"]
    queries = values["num_attention_heads"] * values["head_dim"]
    keys = values["num_key_value_heads"] * values["head_dim"]
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}
    for layer in range(values["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {
            f"{prefix}.self_attn.q_proj": (queries, hidden),
            f"{prefix}.self_attn.k_proj": (keys, hidden),
            f"{prefix}.self_attn.v_proj": (keys, hidden),
            f"{prefix}.self_attn.o_proj": (hidden, queries),
            f"{prefix}.block_sparse_moe.gate": (values["num_local_experts"], hidden),
        }
        for expert in range(values["num_local_experts"]):
            of = f"{prefix}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{of}.w1": (inner, hidden), f"{of}.w2": (hidden, inner), f"{of}.w3": (inner, hidden)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.empty(shape).normal_(0, values["initializer_range"], generator=generator)
        for name, shape in shapes.items()
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(values))
