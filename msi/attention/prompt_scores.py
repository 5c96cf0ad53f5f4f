"""Log-probabilities of tokens that are known already: a prompt's, each given what comes before it.

The head is applied to some rows at a time: the logits of a long chunk never lie in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msi.attention.sampler import MIN_LOGPROB
from msi.prompt_logprobs import PromptLogprobs
from msi.sampling_params import MAX_LOGPROBS
from msi.types import PromptRows

MAX_LOGITS_BYTES = 16 * 1024 * 1024  # at a time

Head = Callable[[Tensor], Tensor]


def score(
    head: Head, prompt_rows: Sequence[PromptRows], vocab_size: int, device: torch.device
) -> tuple[dict[int, PromptLogprobs], set[int]]:
    """What is wanted of each sequence, by its index in the micro-batch; and those whose values are not finite.

    Args:
        head: logits float32 [n, vocab_size] of rows int32 [n] of a pass, which ascend.
    """
    rows = torch.cat([torch.arange(one.first, one.first + len(one.next_token_ids)) for one in prompt_rows])
    rows = rows.to(device, torch.int32)
    following = torch.tensor([token for one in prompt_rows for token in one.next_token_ids], device=device)
    at_a_time = max(1, MAX_LOGITS_BYTES // (4 * vocab_size))
    starts = range(0, len(rows), at_a_time)
    scored = [_score(head(rows[start : start + at_a_time]), following[start : start + at_a_time]) for start in starts]
    logprobs, ranks, top_token_ids, top_logprobs = (torch.cat(column).cpu() for column in zip(*scored, strict=True))
    found: dict[int, PromptLogprobs] = {}
    broken = set()
    end = 0
    for one in prompt_rows:
        own = slice(end, end := end + len(one.next_token_ids))
        if logprobs[own].isnan().any():
            broken.add(one.sequence)
            continue
        num_top = min(one.num_top, top_logprobs.shape[1])
        found[one.sequence] = PromptLogprobs(
            one.position + 1, num_top, _packed(logprobs[own]), _packed(ranks[own]),
            _packed(top_token_ids[own, :num_top]), _packed(top_logprobs[own, :num_top]),
        )  # fmt: skip
    return found, broken


def _score(logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float32 [n], int32 [n], int32 [n, k], float32 [n, k]; a row that is not finite has NaN."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, following[:, None])
    ranks = (logprobs > chosen).sum(dim=-1, dtype=torch.int32) + 1
    # always as many: which of equal ones come first depends on it
    best, best_tokens = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[-1]), dim=-1)
    return chosen.flatten().clamp(min=MIN_LOGPROB), ranks, best_tokens.to(torch.int32), best.clamp(min=MIN_LOGPROB)


def _packed(numbers: Tensor) -> bytes:
    return bytes(numbers.contiguous().numpy().tobytes())
