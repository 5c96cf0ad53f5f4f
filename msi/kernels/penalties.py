"""What is done to logits before a token is chosen: masks of allowed tokens, biases, and penalties for tokens seen.

All of it in place, on logits float32 [num_rows, vocab_size]; rows that are not named stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """For what rows have seen, in the logits' memory.

    Attributes:
        rows: int64 [n], of the logits; no row twice.
        numbers: float32 [3, n], of each the repetition, frequency and presence penalty.
        seen: int64 [3, m]: an index into `rows`, a token, and how often the row's output has it; entries of prompts,
            whose count is 0, come first. An output's token may come again, and its counts add up.
        num_prompt: how many entries are of prompts.
    """

    rows: Tensor
    numbers: Tensor
    seen: Tensor
    num_prompt: int


def allow(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """In these rows a token becomes -inf whose bit is not set, unless it is broken: no mask hides that.

    Args:
        rows: int64 [n]; no row twice.
        bits: int32 [n, vocab_size / 32, rounded up], the lowest bit first.
    """
    values = logits[rows]
    each = bits.view(torch.uint8)[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    keeps = each.flatten(1)[:, : logits.shape[-1]].bool() | ~(values < torch.inf)
    logits[rows] = torch.where(keeps, values, -torch.inf)


def add_bias(logits: Tensor, at: Tensor, bias: Tensor) -> None:
    """A bias of -inf is a ban, which makes what is broken a NaN.

    Args:
        at: int64 [2, n], rows and tokens; no pair twice.
        bias: float32 [n].
    """
    rows, tokens = at
    logits[rows, tokens] += bias


def penalise(logits: Tensor, penalties: Penalties) -> None:
    """A token that its row has seen is divided by the repetition penalty where it is positive, else multiplied; then
    the frequency penalty goes off as often as the output has it, and the presence penalty where it has it at all.
    """
    which, tokens, counts = penalties.seen
    rows, of_output = penalties.rows[which], slice(penalties.num_prompt, None)
    repetition, frequency, presence = penalties.numbers[:, which]
    values = logits[rows, tokens]  # a token that comes twice is computed twice, with the same result
    logits[rows, tokens] = torch.where(values > 0, values / repetition, values * repetition)
    at = rows[of_output], tokens[of_output]
    logits.index_put_(at, -frequency[of_output] * counts[of_output], accumulate=True)
    logits[at] -= presence[of_output]
