"""What `LLM` returns: whole answers, in vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msi.prompt_logprobs import PromptLogprobs
from msi.types import Output, TokenLogprobs, TokenText


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one position.

    Attributes:
        rank: 1 for the most probable token; None where it is not among those that were asked for.
        decoded_token: what it adds to the text.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice.

    Attributes:
        cumulative_logprob: sum over the tokens; None where no log-probabilities were asked for.
        logprobs: for each token, the chosen one and the most probable ones by token id; None likewise.
        finish_reason: "stop" or "length".
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All choices of one prompt.

    Attributes:
        prompt: its text; None where token ids were given.
        num_cached_tokens: of the prompt, that the prefix cache had.
        prompt_logprobs: as `CompletionOutput.logprobs`, for each token of the prompt; None for its first one.
        finished: always; vLLM's name for it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0
    finished: bool = True
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None


@dataclass(slots=True)
class Choice:
    """One choice while its outputs come."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_texts: list[TokenText] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, output: Output) -> None:
        self.texts.append(output.text)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.token_texts += output.token_texts
        self.finish_reason = output.finish_reason

    def whole(self, index: int, *, has_logprobs: bool, token_text: Callable[[int], TokenText]) -> CompletionOutput:
        """Args:
        token_text: what a token that was not chosen would add to a text.
        """
        return CompletionOutput(
            index=index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            cumulative_logprob=sum(one.logprob for one in self.logprobs) if has_logprobs else None,
            logprobs=_by_token(self.logprobs, self.token_texts, token_text) if has_logprobs else None,
            finish_reason=self.finish_reason,
        )


def _by_token(
    logprobs: Sequence[TokenLogprobs], texts: Sequence[TokenText], token_text: Callable[[int], TokenText]
) -> tuple[dict[int, Logprob], ...]:
    found = []
    for one, added in zip(logprobs, texts, strict=True):
        top = dict(zip(one.top_token_ids, one.top_logprobs, strict=True))
        ranks = {token: rank for rank, token in enumerate(one.top_token_ids, 1)}
        here = {one.token_id: Logprob(one.logprob, ranks.get(one.token_id), added.text)}
        here |= {
            token: Logprob(value, ranks[token], token_text(token).text)
            for token, value in top.items()
            if token != one.token_id
        }
        found.append(here)
    return tuple(found)


def by_position(
    token_ids: Sequence[int], logprobs: PromptLogprobs, token_text: Callable[[int], TokenText]
) -> tuple[dict[int, Logprob] | None, ...]:
    """Of a prompt's tokens, in the form of `RequestOutput.prompt_logprobs`."""
    found: list[dict[int, Logprob] | None] = [None]
    for token_id, one in zip(token_ids[1:], logprobs.tokens(), strict=True):
        here = {token_id: Logprob(one.logprob, one.rank, token_text(token_id).text)}
        for rank, (other, value) in enumerate(zip(one.top_token_ids, one.top_logprobs, strict=True), 1):
            here.setdefault(other, Logprob(value, rank, token_text(other).text))
        found.append(here)
    return tuple(found)
