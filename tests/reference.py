"""What is true: transformers on the same checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.installed import transformers
from tests.tiny import COMMON, MIXTRAL, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


QWEN = {
    **COMMON,
    "num_hidden_layers": 6,
    "mlp_only_layers": [0, 3, 5],
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 7,
    "num_experts_per_tok": 3,
}
FAMILIES = {
    "mixtral": (
        "MixtralConfig",
        MIXTRAL,
    ),
    "qwen3": ("Qwen3MoeConfig", {**QWEN, "head_dim": 16, "norm_topk_prob": True}),
    "qwen2": ("Qwen2MoeConfig", {**QWEN, "shared_expert_intermediate_size": 56}),
    "olmoe": (
        "OlmoeConfig",
        {**COMMON, "intermediate_size": 24, "num_experts": 7, "num_experts_per_tok": 3, "clip_qkv": 1.5},
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 32,
            "n_layers": 3,
            "n_heads": 4,
            "max_seq_len": 512,
            "attn_config": {"clip_qkv": 1.5, "kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 7, "moe_top_k": 3},
            "initializer_range": 0.35,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "glm4": (
        "Glm4MoeConfig",
        {
            **COMMON,
            "head_dim": 16,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 7,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **COMMON,
            "head_dim": 16,
            "intermediate_size": 24,
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "sliding_window": 24,
            "swiglu_limit": 0.7,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}


def tiny_config(family: str = "mixtral", **changes) -> PreTrainedConfig:
    kind, values = FAMILIES[family]
    config: PreTrainedConfig = getattr(transformers(), kind)(**{**values, **changes})
    return config


def save_tiny(
    path: Path, seed: int = 0, *, family="mixtral", dtype=torch.float32, max_shard_size="1GB", is_fused=False, **changes
) -> PreTrainedModel:
    """Saves a random checkpoint and returns the model in float32.

    Args:
        is_fused: whether experts are saved as tensors that hold all of them, where the family knows both layouts.
    """
    torch.manual_seed(seed)
    model = transformers().AutoModelForCausalLM.from_config(tiny_config(family, **changes)).to(dtype)
    if family != "mixtral":  # whose fixture is older than families that have biases
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):  # ones and zeros at first: nothing would be noticed
                parameter.data += torch.empty_like(parameter).uniform_(-0.5, 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.5, 0.5)
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=not is_fused)
    return load_reference(path)


def load_reference(path: Path, dtype=torch.float32) -> PreTrainedModel:
    """Loaded anew: casting a model in memory would round its rotary frequencies too."""
    return transformers().AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation, and how far apart the two best logits were at the closest."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    gap: float


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: tuple[int, ...], num_tokens: int) -> Greedy:
    tokens = list(prompt)
    gap = float("inf")
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        best = logits.topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return Greedy(prompt, tuple(tokens[len(prompt) :]), gap)


def references(model: PreTrainedModel, lengths: list[int], num_tokens: int, seed: int = 0) -> list[Greedy]:
    """One continuation of a random prompt for each length; prompts whose choices are closer than 1e-3 are replaced."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        for _ in range(20):
            prompt = tuple(torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist())
            reference = greedy(model, prompt, num_tokens)
            if reference.gap >= 1e-3:
                found.append(reference)
                break
        else:
            raise AssertionError(f"no prompt of {length} tokens has choices 1e-3 apart")
    return found
