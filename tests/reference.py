"""What is true: transformers on the same checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

VOCAB_SIZE = 199


def tiny_config(**changes) -> MixtralConfig:
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 7,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.35,
        "rope_theta": 1e4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return MixtralConfig(**{**values, **changes})


def save_tiny(path: Path, seed: int = 0, *, dtype=torch.float32, max_shard_size="1GB", **changes) -> MixtralForCausalLM:
    """Saves a random checkpoint and returns the model in float32."""
    torch.manual_seed(seed)
    MixtralForCausalLM(tiny_config(**changes)).to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return load_reference(path)


def load_reference(path: Path, dtype=torch.float32) -> MixtralForCausalLM:
    """Loaded anew: casting a model in memory would round its rotary frequencies too."""
    return MixtralForCausalLM.from_pretrained(path, dtype=dtype).eval()


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation, and how far apart the two best logits were at the closest."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    gap: float


@torch.inference_mode()
def greedy(model: MixtralForCausalLM, prompt: tuple[int, ...], num_tokens: int) -> Greedy:
    tokens = list(prompt)
    gap = float("inf")
    for _ in range(num_tokens):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        best = logits.topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return Greedy(prompt, tuple(tokens[len(prompt) :]), gap)


def references(model: MixtralForCausalLM, lengths: list[int], num_tokens: int, seed: int = 0) -> list[Greedy]:
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
