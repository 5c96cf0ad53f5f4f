"""Choosing one token per row from logits: the best, or one that is drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """int64 and float32 [n]: each row's best token, the first of equal ones, and its logit. A NaN is the most."""
    tokens = logits.argmax(dim=-1)
    return tokens, logits.gather(1, tokens[:, None]).flatten()


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """int64 [n] of logits float32 [n, vocab_size], each row's best finite.

    Temperature, then min_p, top_k and top_p over what is left, then one draw. The best token of a row is never left
    out, so one can always be drawn.

    Args:
        numbers: float64 [5, n]: temperature, top_k (at least 1), top_p, min_p, and a number in [0, 1); in the host's
            memory, or the device's.
    """
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    return drawn(values, order, numbers)


def drawn(values: Tensor, order: Tensor, numbers: Tensor) -> Tensor:
    """The same of rows that are in order already: logits from the best down, among equal ones by rising id; of rows
    with a top_k, so many of them will do.

    Args:
        values: float32 [n, m].
        order: int64 [n, m], whose they are.
    """
    numbers = numbers.to(values.device)
    temperature, top_k, top_p, min_p, uniform = (numbers[row, :, None] for row in range(5))
    scaled = (values - values[:, :1]) / temperature.to(values.dtype)
    shares = scaled.to(torch.float64).exp_()  # of the best's probability, so whatever follows in a row changes none
    rest = shares[:, 1:]
    rest.masked_fill_(rest < min_p, 0.0)
    ranks = torch.arange(1, values.shape[-1], device=values.device)
    rest.masked_fill_(ranks >= top_k, 0.0)
    up_to = shares.cumsum(dim=-1)
    rest.masked_fill_(up_to[:, :-1] >= top_p * up_to[:, -1:], 0.0)
    cumulative = shares.cumsum(dim=-1)
    picked = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    num_left = (shares > 0).sum(dim=-1, keepdim=True)
    return order.gather(1, picked.minimum(num_left - 1)).flatten()
