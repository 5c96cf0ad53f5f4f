"""What requests want changed of their rows of logits, laid out for the kernels that do it.

It costs the tokens that are named, not the vocabulary; rows in which few tokens are allowed cost that once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from msi.kernels.kernels import TokenKernels
from msi.kernels.penalties import Penalties
from msi.types import LogitChanges

WORD = 32  # tokens of a word of a mask


def change(logits: Tensor, changes: Sequence[tuple[int, LogitChanges]], kernels: TokenKernels) -> None:
    """In place, of rows, none of which comes twice: bias and bans, then penalties."""
    if allowed := [(row, one.allowed_token_ids) for row, one in changes if one.allowed_token_ids]:
        rows, bits = torch.tensor([row for row, _ in allowed]), packed([ids for _, ids in allowed], logits.shape[-1])
        kernels.allow(logits, rows.to(logits.device), bits.to(logits.device))
    biases = {
        (row, token): bias
        for row, one in changes
        for token, bias in (one.logit_bias | dict.fromkeys(one.banned_token_ids, -math.inf)).items()
    }
    if biases:
        at = torch.tensor(list(biases), dtype=torch.int64).T
        bias = torch.tensor(list(biases.values()), dtype=torch.float32)
        kernels.add_bias(logits, at.to(logits.device), bias.to(logits.device))
    if penalised := [
        (row, one)
        for row, one in changes
        if one.repetition_penalty != 1 or one.frequency_penalty or one.presence_penalty
    ]:
        kernels.penalise(logits, _penalties(penalised, logits.device))


def packed(token_ids: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """int32 [num_lists, vocab_size / 32, rounded up]: a bit for each token that a list has."""
    has = np.zeros((len(token_ids), -(-vocab_size // WORD) * WORD), np.bool_)
    for of_list, ids in zip(has, token_ids, strict=True):
        of_list[list(ids)] = True
    return torch.from_numpy(np.packbits(has, axis=1, bitorder="little").view(np.int32))


def _penalties(changes: Sequence[tuple[int, LogitChanges]], device: torch.device) -> Penalties:
    prompts = [one.prompt_token_ids if one.repetition_penalty != 1 else () for _, one in changes]
    outputs = [one.output_token_ids for _, one in changes]
    counts = [one.output_counts or (1,) * len(one.output_token_ids) for _, one in changes]
    which = torch.arange(len(changes)).repeat(2).repeat_interleave(torch.tensor([*map(len, (*prompts, *outputs))]))
    num_prompt = sum(map(len, prompts))
    seen = torch.zeros(3, len(which), dtype=torch.int64)
    seen[0], seen[1], seen[2, num_prompt:] = which, _flat([*prompts, *outputs]), _flat(counts)
    # a client's numbers may be integers
    numbers = [(one.repetition_penalty, one.frequency_penalty, one.presence_penalty) for _, one in changes]
    of_rows = torch.tensor(numbers, dtype=torch.float32).T
    rows = torch.tensor([row for row, _ in changes])
    return Penalties(rows.to(device), of_rows.to(device), seen.to(device), num_prompt)


def _flat(lists: Sequence[Sequence[int]]) -> Tensor:
    flat = array("q")  # torch.tensor takes five times as long; and arrays are copied at once
    for one in lists:
        flat.extend(one)
    return torch.asarray(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
