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
from collections.abc import Sequence

import torch
from torch import Tensor

from msi.attention.logit_changes import change
from msi.attention.masks import Masks
from msi.errors import InvalidRequest, one_line
from msi.kernels.kernels import TokenKernels
from msi.kernels.plain import PlainKernels
from msi.sampling import uniform_of
from msi.sampling_params import MAX_LOGPROBS, MAX_TEMPERATURE, MIN_TEMPERATURE
from msi.types import Cause, Sampled, TokenLogprobs, TokenSampling

PLAIN = PlainKernels(torch.device("cpu"))
MIN_LOGPROB = -9999.0  # vLLM's; JSON has no infinity


def sample(
    logits: Tensor,
    sampling: Sequence[TokenSampling],
    masks: Masks | None = None,
    kernels: TokenKernels = PLAIN,
) -> Sampled:
    """One token per row of logits float32 [n, vocab_size], which are changed in place; `failures` by row.

    Args:
        masks: of rows that are held to a grammar.
        kernels: of the logits' device.
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
        masks.apply(logits, kernels)
    if changes:
        change(logits, changes, kernels)
    tokens, highest = kernels.best(logits)
    failures: dict[int, Cause] = {} if masks is None else dict(masks.failures)
    if not (finite := highest.isfinite()).all():
        limited = {row for row, _ in changes} | set(() if masks is None else masks.rows)
        failures |= {
            row: _why_not(highest[row].item(), row in limited) for row in (~finite).nonzero().flatten().tolist()
        }
        logits[~finite] = 0.0  # no value of theirs gets into what follows
    if rows := [row for row, one in enumerate(sampling) if one.temperature >= MIN_TEMPERATURE]:
        tokens[rows] = kernels.draw(logits[rows], _numbers([sampling[row] for row in rows], logits))
    token_ids: list[int] = tokens.tolist()
    return Sampled(token_ids, _logprobs(raw, wanted, token_ids) if wanted else {}, failures)


def sample_each(
    logits: Tensor,
    sampling: Sequence[TokenSampling],
    masks: Masks | None = None,
    kernels: TokenKernels = PLAIN,
) -> Sampled:
    """As `sample`, one row after the other: an exception is the failure of its row. For when `sample` raised."""
    token_ids = []
    logprobs = {}
    failures: dict[int, Cause] = {}
    for row, one in enumerate(sampling):
        try:
            its_masks = None if masks is None else masks.of_row(row)
            alone = sample(logits[row : row + 1], [one], its_masks, kernels)
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


def _numbers(sampling: Sequence[TokenSampling], logits: Tensor) -> Tensor:
    """What `draw` wants to know, float64 [5, n] in the host's memory."""
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
    return torch.tensor(numbers, dtype=torch.float64).T.contiguous()


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
