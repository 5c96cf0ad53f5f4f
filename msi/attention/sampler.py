"""Choosing tokens from logits, over a whole micro-batch at once.

The randomness of a request is a function of (seed, position) alone: each choice uses one number in [0, 1) drawn by
hashing the two, so the same request gives the same tokens whatever else runs beside it.

Order of operations: log-probabilities of the model's own distribution; grammars; bias, bans and penalties; then
greedy, or temperature, min-p, top-k, top-p over what is left, and one draw.

Rows know nothing of each other: one from which no token can be chosen is named in the result, and the others have the
tokens that they have without it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msi.attention.masks import Masks
from msi.errors import InvalidRequest, one_line
from msi.kernels.sampling import best, draw
from msi.sampling import uniform_of
from msi.sampling_params import MAX_LOGPROBS, MAX_TEMPERATURE, MIN_TEMPERATURE
from msi.types import Cause, LogitChanges, Sampled, TokenLogprobs, TokenSampling

Draw = Callable[[Tensor, Tensor], Tensor]
Best = Callable[[Tensor], tuple[Tensor, Tensor]]

MIN_LOGPROB = -9999.0  # vLLM's; JSON has no infinity


def sample(
    logits: Tensor,
    sampling: Sequence[TokenSampling],
    draw: Draw = draw,
    masks: Masks | None = None,
    best: Best = best,
) -> Sampled:
    """One token per row of logits float32 [n, vocab_size], which are changed in place; `failures` by row.

    Args:
        draw: the device's `msi.kernels.sampling.draw`.
        masks: of rows that are held to a grammar.
        best: the device's `msi.kernels.sampling.best`.
    """
    if not len(sampling):
        return Sampled([])
    wanted: dict[int, int] = {}
    raw, changes = logits, []
    if extras := [(row, one.extras) for row, one in enumerate(sampling) if one.extras is not None]:
        wanted = {row: extra.logprobs for row, extra in extras if extra.logprobs is not None}
        if wanted:
            raw = torch.log_softmax(logits[list(wanted)], dim=-1)
        changes = [(row, extra.changes) for row, extra in extras if extra.changes is not None]
    if masks is not None:
        masks.apply(logits)
    if changes:
        _change(logits, changes)
    tokens, highest = best(logits)
    failures: dict[int, Cause] = {} if masks is None else dict(masks.failures)
    if not (finite := highest.isfinite()).all():
        limited = {row for row, _ in changes} | set(() if masks is None else masks.rows)
        failures |= {
            row: _why_not(highest[row].item(), row in limited) for row in (~finite).nonzero().flatten().tolist()
        }
        logits[~finite] = 0.0  # no value of theirs gets into what follows
    if rows := [row for row, one in enumerate(sampling) if one.temperature >= MIN_TEMPERATURE]:
        tokens[rows] = draw(logits[rows], _numbers([sampling[row] for row in rows], logits))
    token_ids: list[int] = tokens.tolist()
    return Sampled(token_ids, _logprobs(raw, wanted, token_ids) if wanted else {}, failures)


def sample_each(
    logits: Tensor,
    sampling: Sequence[TokenSampling],
    draw: Draw = draw,
    masks: Masks | None = None,
    best: Best = best,
) -> Sampled:
    """As `sample`, one row after the other: an exception is the failure of its row. For when `sample` raised."""
    token_ids = []
    logprobs = {}
    failures: dict[int, Cause] = {}
    for row, one in enumerate(sampling):
        try:
            its_masks = None if masks is None else masks.of_row(row)
            alone = sample(logits[row : row + 1], [one], draw, its_masks, best)
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


def _why_not(best: float, is_limited: bool) -> Cause:
    """`is_limited`: the request says which tokens may follow."""
    if best == -math.inf and is_limited:
        return InvalidRequest(
            "no token can follow: every one is banned by the request (allowed_token_ids, bad_words, logit_bias, "
            "min_tokens, a grammar)",
            code="no_token_allowed",
        )
    return "the model gave logits that are not finite (NaN or infinity), so no token can be chosen"


def _change(logits: Tensor, changes: Sequence[tuple[int, LogitChanges]]) -> None:
    """Touches the tokens that are named and no others, so it costs their number, not the vocabulary's.

    Rows in which few tokens are allowed cost the vocabulary once.
    """
    if biased := [(row, token, bias) for row, one in changes for token, bias in one.logit_bias.items()]:
        added = torch.tensor([bias for _, _, bias in biased], dtype=logits.dtype, device=logits.device)
        logits[_entries([(row, token) for row, token, _ in biased], logits.device)] += added
    if allowed := [(row, one.allowed_token_ids) for row, one in changes if one.allowed_token_ids]:
        at, _ = _rows_and_tokens(allowed, [], logits.device)
        kept, rows = logits[at], [row for row, _ in allowed]
        logits[rows] = torch.where(logits[rows] < torch.inf, -torch.inf, torch.nan)
        logits[at] = kept
    if banned := [(row, token) for row, one in changes for token in one.banned_token_ids]:
        at = _entries(banned, logits.device)
        logits[at] = torch.where(logits[at] < torch.inf, -torch.inf, torch.nan)  # no ban hides a broken row
    if seen := [(row, one) for row, one in changes if one.repetition_penalty != 1]:
        tokens = [(row, ids) for row, one in seen for ids in (one.prompt_token_ids, one.output_token_ids)]
        of_row = [[one.repetition_penalty for _, one in seen for _ in range(2)]]
        at, (penalties,) = _rows_and_tokens(tokens, of_row, logits.device)
        values = logits[at]  # a token that comes twice is computed twice, with the same result
        logits[at] = torch.where(values > 0, values / penalties, values * penalties)
    if seen := [(row, one) for row, one in changes if one.frequency_penalty or one.presence_penalty]:
        of_row = [[one.frequency_penalty for _, one in seen], [one.presence_penalty for _, one in seen]]
        at, (frequency, presence) = _rows_and_tokens(
            [(row, one.output_token_ids) for row, one in seen], of_row, logits.device
        )
        counts = _flat([one.output_counts or (1,) * len(one.output_token_ids) for _, one in seen]).to(logits.device)
        logits.index_put_(at, -frequency * counts, accumulate=True)
        logits[at] -= presence


def _entries(entries: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices (rows, tokens) of some entries of the logits."""
    rows, tokens = torch.tensor(entries, dtype=torch.int64).T.to(device)
    return rows, tokens


def _rows_and_tokens(
    tokens: Sequence[tuple[int, Sequence[int]]], of_row: Sequence[Sequence[float]], device: torch.device
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Indices (rows, tokens) of all tokens of some rows, and for each of them the numbers of its row."""
    counts = torch.tensor([len(one) for _, one in tokens])
    rows = torch.tensor([row for row, _ in tokens]).repeat_interleave(counts)
    columns = _flat([one for _, one in tokens])
    # a client's numbers may be integers
    numbers = [torch.tensor(one, dtype=torch.float32).repeat_interleave(counts).to(device) for one in of_row]
    return (rows.to(device), columns.to(device)), numbers


def _flat(lists: Sequence[Sequence[int]]) -> Tensor:
    flat = array("q")  # torch.tensor takes five times as long; and arrays are copied at once
    for one in lists:
        flat.extend(one)
    return torch.asarray(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)


def _numbers(sampling: Sequence[TokenSampling], logits: Tensor) -> Tensor:
    """What `draw` wants to know, float64 [5, n]."""
    vocab_size = logits.shape[-1]
    numbers = [
        (
            min(one.temperature, MAX_TEMPERATURE),
            min(one.top_k, vocab_size) if one.top_k > 0 else vocab_size,
            one.top_p,
            0.0 if one.extras is None else one.extras.min_p,
            uniform_of(one.seed, one.position),
        )
        for one in sampling
    ]
    return torch.tensor(numbers, dtype=torch.float64).T.to(logits.device)


def _logprobs(raw: Tensor, wanted: dict[int, int], token_ids: Sequence[int]) -> dict[int, TokenLogprobs]:
    """By row, from log-probabilities [len(wanted), vocab_size]; `wanted`: row to how many of the best."""
    token_of = torch.tensor([[token_ids[row]] for row in wanted], device=raw.device)
    chosen = raw.gather(1, token_of).clamp(min=MIN_LOGPROB).flatten().tolist()
    count = min(MAX_LOGPROBS, raw.shape[-1])  # always as many: which of equal ones come first depends on it
    best, best_tokens = raw.topk(count, dim=-1)
    values, tokens = best.clamp(min=MIN_LOGPROB).tolist(), best_tokens.tolist()
    return {
        row: TokenLogprobs(token_ids[row], chosen[index], tuple(tokens[index][:top]), tuple(values[index][:top]))
        for index, (row, top) in enumerate(wanted.items())
    }
