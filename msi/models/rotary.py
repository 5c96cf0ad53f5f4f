"""The rotary frequencies that a configuration asks for."""

from __future__ import annotations

from torch import Tensor

from msi.kernels.rope import llama3_frequencies, rope_frequencies, yarn_frequencies
from msi.models.config import Rope


def frequencies_of(rope: Rope, num_rotated: int) -> Tensor:
    """float32 [num_rotated / 2] radians per position."""
    frequencies = rope_frequencies(num_rotated, rope.theta)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return llama3_frequencies(
            frequencies,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_len=rope.original_len,
        )
    if rope.kind == "yarn":
        return yarn_frequencies(
            frequencies,
            theta=rope.theta,
            factor=rope.factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            original_len=rope.original_len,
            truncate=rope.truncate,
        )
    return frequencies
