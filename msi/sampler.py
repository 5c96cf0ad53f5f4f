"""Choosing tokens from logits, over a whole micro-batch at once.

The randomness of a request is a function of (seed, position) alone: each choice uses one number in [0, 1) drawn by
hashing the two, so the same request gives the same tokens whatever else runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msi.types import TokenSampling

MASK = (1 << 64) - 1


def sample(logits: Tensor, sampling: Sequence[TokenSampling]) -> list[int]:
    """One token per row of logits float32 [n, vocab_size].

    Order of operations: temperature, then top-k, then top-p over what is left, then one draw.
    """
    if not len(sampling):
        return []
    tokens = logits.argmax(dim=-1)
    rows = [index for index, one in enumerate(sampling) if one.temperature > 0]
    if rows:
        tokens[rows] = _draw(logits[rows], [sampling[index] for index in rows])
    chosen: list[int] = tokens.tolist()
    return chosen


def _draw(logits: Tensor, sampling: Sequence[TokenSampling]) -> Tensor:
    temperature = torch.tensor([one.temperature for one in sampling])
    top_p = torch.tensor([one.top_p for one in sampling])
    vocab_size = logits.shape[-1]
    top_k = torch.tensor([one.top_k if one.top_k > 0 else vocab_size for one in sampling])
    uniform = torch.tensor([uniform_of(one.seed, one.position) for one in sampling], dtype=torch.float64)

    values, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax((values - values[:, :1]) / temperature[:, None], dim=-1, dtype=torch.float64)
    ranks = torch.arange(vocab_size)
    probabilities.masked_fill_(ranks >= top_k[:, None], 0.0)
    before = probabilities.cumsum(dim=-1) - probabilities
    total = probabilities.sum(dim=-1, keepdim=True)
    probabilities.masked_fill_(before >= top_p[:, None] * total, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    picked = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    num_left = (probabilities > 0).sum(dim=-1, keepdim=True)
    return order.gather(1, picked.minimum(num_left - 1)).flatten()


def uniform_of(seed: int, position: int) -> float:
    """A number in [0, 1) from 64 bits of seed and the position: splitmix64's output function, twice."""
    return (_mix(_mix(seed & MASK) + position & MASK) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state = state + 0x9E3779B97F4A7C15 & MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31
