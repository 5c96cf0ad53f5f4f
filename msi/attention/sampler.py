"""Choosing tokens from logits, over a whole micro-batch at once.

The randomness of a request is a function of (seed, position) alone: each choice uses one number in [0, 1) drawn by
hashing the two, so the same request gives the same tokens whatever else runs beside it.

Order of operations, as in vLLM: log-probabilities of the model's own distribution; bias, bans and penalties; then
greedy, or temperature, min-p, top-k, top-p over what is left, and one draw.

Rows know nothing of each other: one from which no token can be chosen is named in the result, and the others have the
tokens that they have without it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from msi.errors import one_line
from msi.sampling import uniform_of
from msi.types import (
    MAX_LOGPROBS,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    LogitChanges,
    Sampled,
    TokenLogprobs,
    TokenSampling,
)

MIN_LOGPROB = -9999.0  # vLLM's; JSON has no infinity


def sample(logits: Tensor, sampling: Sequence[TokenSampling]) -> Sampled:
    """One token per row of logits float32 [n, vocab_size], which are changed in place; `failures` by row."""
    if not len(sampling):
        return Sampled([])
    wanted: dict[int, int] = {}
    raw = logits
    if extras := [(row, one.extras) for row, one in enumerate(sampling) if one.extras is not None]:
        wanted = {row: extra.logprobs for row, extra in extras if extra.logprobs is not None}
        if wanted:
            raw = torch.log_softmax(logits[list(wanted)], dim=-1)
        if changes := [(row, extra.changes) for row, extra in extras if extra.changes is not None]:
            _change(logits, changes)
    tokens = logits.argmax(dim=-1)  # a NaN counts as the most
    best = logits.gather(1, tokens[:, None]).flatten()
    failures = {}
    if not (finite := best.isfinite()).all():
        failures = {row: _why_not(best[row].item()) for row in (~finite).nonzero().flatten().tolist()}
        logits[~finite] = 0.0  # no value of theirs gets into what follows
    if rows := [row for row, one in enumerate(sampling) if one.temperature >= MIN_TEMPERATURE]:
        tokens[rows] = _draw(logits[rows], [sampling[row] for row in rows])
    token_ids: list[int] = tokens.tolist()
    return Sampled(token_ids, _logprobs(raw, wanted, token_ids) if wanted else {}, failures)


def sample_each(logits: Tensor, sampling: Sequence[TokenSampling]) -> Sampled:
    """As `sample`, one row after the other: an exception is the failure of its row. For when `sample` raised."""
    token_ids = []
    logprobs = {}
    failures = {}
    for row, one in enumerate(sampling):
        try:
            alone = sample(logits[row : row + 1], [one])
        except Exception as error:
            token_ids.append(0)
            failures[row] = f"choosing its next token failed: {one_line(error)}"
            continue
        token_ids += alone.token_ids
        if alone.logprobs:
            logprobs[row] = alone.logprobs[0]
        if alone.failures:
            failures[row] = alone.failures[0]
    return Sampled(token_ids, logprobs, failures)


def _why_not(best: float) -> str:
    if best == -math.inf:
        return "no token can follow: every one is banned or impossible"
    return "the model gave logits that are not finite (NaN or infinity), so no token can be chosen"


def _change(logits: Tensor, changes: Sequence[tuple[int, LogitChanges]]) -> None:
    """Touches the tokens that are named and no others, so it costs their number, not the vocabulary's."""
    if biased := [(row, token, bias) for row, one in changes for token, bias in one.logit_bias.items()]:
        added = torch.tensor([bias for _, _, bias in biased], dtype=logits.dtype)
        logits[_entries([(row, token) for row, token, _ in biased])] += added
    if banned := [(row, token) for row, one in changes for token in one.banned_token_ids]:
        at = _entries(banned)
        logits[at] = torch.where(logits[at] < torch.inf, -torch.inf, torch.nan)  # no ban hides a broken row
    if seen := [(row, one) for row, one in changes if one.repetition_penalty != 1]:
        at, counts = _rows_and_tokens([(row, (*one.prompt_token_ids, *one.output_token_ids)) for row, one in seen])
        penalties = torch.tensor([one.repetition_penalty for _, one in seen]).repeat_interleave(counts)
        values = logits[at]  # a token that comes twice is computed twice, with the same result
        logits[at] = torch.where(values > 0, values / penalties, values * penalties)
    if seen := [(row, one) for row, one in changes if one.frequency_penalty or one.presence_penalty]:
        at, counts = _rows_and_tokens([(row, one.output_token_ids) for row, one in seen])
        frequency = torch.tensor([one.frequency_penalty for _, one in seen]).repeat_interleave(counts)
        logits.index_put_(at, -frequency, accumulate=True)
        logits[at] -= torch.tensor([one.presence_penalty for _, one in seen]).repeat_interleave(counts)


def _entries(entries: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Indices (rows, tokens) of some entries of the logits."""
    rows, tokens = torch.tensor(entries, dtype=torch.int64).T
    return rows, tokens


def _rows_and_tokens(tokens: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Indices (rows, tokens) of all tokens of some rows, and each row's number of them."""
    counts = torch.tensor([len(one) for _, one in tokens])
    rows = torch.tensor([row for row, _ in tokens]).repeat_interleave(counts)
    flat = array("q", chain.from_iterable(one for _, one in tokens))  # torch.tensor takes five times as long
    columns = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
    return (rows, columns), counts


def _draw(logits: Tensor, sampling: Sequence[TokenSampling]) -> Tensor:
    """Of rows whose best logit is finite. The best token of a row is never left out, so one can always be drawn."""
    temperature = torch.tensor([one.temperature for one in sampling]).clamp_(max=MAX_TEMPERATURE)
    top_p = torch.tensor([one.top_p for one in sampling], dtype=torch.float64)
    vocab_size = logits.shape[-1]
    top_k = torch.tensor([min(one.top_k, vocab_size) if one.top_k > 0 else vocab_size for one in sampling])
    uniform = torch.tensor([uniform_of(one.seed, one.position) for one in sampling], dtype=torch.float64)

    values, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax((values - values[:, :1]) / temperature[:, None], dim=-1, dtype=torch.float64)
    rest = probabilities[:, 1:]
    if any(one.extras is not None and one.extras.min_p > 0 for one in sampling):
        min_p = torch.tensor([0.0 if one.extras is None else one.extras.min_p for one in sampling], dtype=torch.float64)
        rest.masked_fill_(rest < min_p[:, None] * probabilities[:, :1], 0.0)
    ranks = torch.arange(1, vocab_size)
    rest.masked_fill_(ranks >= top_k[:, None], 0.0)
    before = probabilities.cumsum(dim=-1) - probabilities
    total = probabilities.sum(dim=-1, keepdim=True)
    rest.masked_fill_(before[:, 1:] >= top_p[:, None] * total, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    picked = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    num_left = (probabilities > 0).sum(dim=-1, keepdim=True)
    return order.gather(1, picked.minimum(num_left - 1)).flatten()


def _logprobs(raw: Tensor, wanted: dict[int, int], token_ids: Sequence[int]) -> dict[int, TokenLogprobs]:
    """By row, from log-probabilities [len(wanted), vocab_size]; `wanted`: row to how many of the best."""
    chosen = raw.gather(1, torch.tensor([[token_ids[row]] for row in wanted])).clamp(min=MIN_LOGPROB).flatten().tolist()
    count = min(MAX_LOGPROBS, raw.shape[-1])  # always as many: which of equal ones come first depends on it
    best, best_tokens = raw.topk(count, dim=-1)
    values, tokens = best.clamp(min=MIN_LOGPROB).tolist(), best_tokens.tolist()
    return {
        row: TokenLogprobs(token_ids[row], chosen[index], tuple(tokens[index][:top]), tuple(values[index][:top]))
        for index, (row, top) in enumerate(wanted.items())
    }
