"""OpenAI's /v1/completions: what a request may say, and how answers look. Pure; knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msi.errors import InvalidRequest
from msi.sampling_params import NO_DEFAULTS, SamplingDefaults
from msi.server.answers import Usage, logprob_values
from msi.server.field_table import NOT_IN_COMPLETIONS
from msi.server.fields import (
    SHARED_FIELDS,
    Streaming,
    Values,
    as_integer,
    check_fields,
    kind_of,
    num_logprobs,
    sampling_params,
    streaming,
    typed,
    whole_number,
)
from msi.server.prompt_answers import PromptAnswers, named_top
from msi.server.token_ids import TokenIds, id_name, named_by_id
from msi.types import Output, SamplingParams, TokenText

DEFAULT_MAX_TOKENS = 16
MAX_TOTAL_CHOICES = 1024  # of all prompts of a request
CHANGE_CHATS_ONLY = {"parallel_tool_calls", "include_reasoning"}
FIELDS = SHARED_FIELDS | CHANGE_CHATS_ONLY | {"prompt", "echo", "logprobs", "best_of"}

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One parsed body.

    Attributes:
        prompts: each gets `params.n` choices, which are numbered prompt by prompt.
        echo: whether the prompt comes before the text; with `params.logprobs`, its log-probabilities before theirs.
        num_listed: how many of the most probable tokens `prompt_logprobs` has of each position; None for none of it.
        add_special_tokens: whether the tokenizer puts its own around a text.
        ignored: fields that nobody knows.
    """

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    streaming: Streaming
    echo: bool
    num_listed: int | None = None
    add_special_tokens: bool = True
    ignored: tuple[str, ...] = ()


def parse_completion(values: Values, defaults: SamplingDefaults = NO_DEFAULTS) -> CompletionRequest:
    """Raises InvalidRequest: a field of the wrong type, or one that is not supported, by name.

    Args:
        defaults: the model's own parameters.
    """
    ignored = check_fields(values, FIELDS, NOT_IN_COMPLETIONS)
    echo, logprobs = typed(values, "echo", bool, False), num_logprobs(values, "logprobs")
    listed = num_logprobs(values, "prompt_logprobs")
    scored = [num for num in (listed, logprobs if echo else None) if num is not None]
    params = sampling_params(
        values, defaults=defaults, max_tokens=DEFAULT_MAX_TOKENS, logprobs=logprobs,
        prompt_logprobs=max(scored, default=None), echo=echo,
    )  # fmt: skip
    if whole_number(values, "best_of") not in (None, params.n):
        raise InvalidRequest("best_of must equal n: all choices are given, none is judged", param="best_of")
    prompts = _prompts(values.get("prompt"))
    if len(prompts) * params.n > MAX_TOTAL_CHOICES:
        raise InvalidRequest(
            f"{len(prompts)} prompts with n = {params.n} are {len(prompts) * params.n} choices; at most "
            f"{MAX_TOTAL_CHOICES} are allowed in one request",
            param="prompt",
        )
    return CompletionRequest(
        prompts=prompts,
        params=params,
        streaming=streaming(values),
        echo=echo,
        num_listed=listed,
        add_special_tokens=typed(values, "add_special_tokens", bool, True),
        ignored=ignored,
    )


def _prompts(prompt: object) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if _is_tokens(prompt):
            return (tuple(map(as_integer, prompt)),)
        bad = next((at for at, one in enumerate(prompt) if not _is_prompt(one)), None)
        if bad is None:
            return tuple(one if isinstance(one, str) else tuple(map(as_integer, one)) for one in prompt)
        raise _not_one(prompt, bad)
    what = "an empty array" if prompt == [] else kind_of(prompt)
    raise InvalidRequest(
        f"prompt is {what}; it must be a string, or an array of token ids, or an array of such prompts", param="prompt"
    )


def _not_one(prompts: list[Any], at: int) -> InvalidRequest:
    """The refusal of an array for one of its items, the first that is no prompt, or no token id as the others are."""
    wanted = "a string, or an array of token ids that is not empty"
    if type(as_integer(prompts[0])) is int:
        at = next(at for at, one in enumerate(prompts) if type(as_integer(one)) is not int)
        wanted = "a token id, as the first is one"
    bad = prompts[at]
    what = kind_of(bad) if bad or not isinstance(bad, list) else "an empty array"
    what = "an array of other things than token ids" if bad and isinstance(bad, list) else what
    return InvalidRequest(f"prompt[{at}] is {what}; it must be {wanted}", param="prompt")


def _is_prompt(one: Any) -> bool:
    return isinstance(one, str) or (isinstance(one, list) and bool(one) and _is_tokens(one))


def _is_tokens(items: list[Any]) -> bool:
    return all(type(as_integer(item)) is int for item in items)


class CompletionAnswer:
    """Shapes the outputs of one request.

    Of log-probabilities, `tokens` joined are the text (less the echo), and `top_logprobs` name the chosen token as
    `tokens` do, others by what they would add. Where two share a text, the less probable one is "token_id:N".

    Args:
        token_text: what a token would add to a text.
        num_choices: of each prompt.
        echoes: what comes before the text, for each prompt.
        has_logprobs: whether log-probabilities are wanted.
        prompts: log-probabilities of the prompts, where those are wanted.
        token_ids: where those are wanted.
        names_by_id: log-probabilities name tokens by their ids.

    Attributes:
        is_plain: the chunks of a choice differ in nothing but their text, up to the one that ends it.
    """

    def __init__(
        self, request_id: str, model: str, created: int, token_text: Callable[[int], TokenText], num_choices: int,
        echoes: Sequence[str] = ("",), has_logprobs: bool = False, prompts: PromptAnswers | None = None,
        token_ids: TokenIds | None = None, names_by_id: bool = False,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.usage = Usage(num_choices)
        self.is_plain = not has_logprobs and prompts is None and token_ids is None
        self._token_text = named_by_id(token_text) if names_by_id else token_text
        self.token_ids = token_ids
        self._names_by_id = names_by_id
        self._has_logprobs = has_logprobs
        self._prompts = prompts
        self._num_each = num_choices
        self._is_open = False
        self._echoes = [echo for echo in echoes for _ in range(num_choices)]
        self.num_choices = len(self._echoes)
        self._offsets = [len(echo) for echo in self._echoes]  # characters before the next token, for logprobs
        self._head = {"id": request_id, "object": "text_completion", "created": created, "model": model}

    def opening(self, output: Output) -> list[dict[str, Any]]:
        """Chunks that come before an output's: the echoes, and log-probabilities prompt by prompt."""
        if self._prompts is not None:
            if output.prompt_logprobs is None:
                return []
            return [
                self._head | {"choices": [self._opened(index, self._prompts)]}
                for index in range(output.index, output.index + self._num_each)
            ]
        if self._is_open:
            return []
        self._is_open = True
        return [self._head | {"choices": [_choice(index, echo)]} for index, echo in enumerate(self._echoes) if echo]

    def _opened(self, index: int, prompts: PromptAnswers) -> dict[str, Any]:
        return _choice(index, self._echoes[index], prompts.echoed_whole(index) or None) | prompts.listed(index)

    def echoed(self, index: int) -> Mapping[str, bytes]:
        """What comes before a choice's own log-probabilities, items as JSON by name."""
        return {} if self._prompts is None else self._prompts.echoed(index)

    def chunk(self, output: Output) -> dict[str, Any]:
        """One server-sent event."""
        self.usage.add(output)
        choice = _choice(output.index, output.text, self._logprobs(output), output.finish_reason)
        if self.token_ids is not None:
            choice |= self.token_ids.first_of(output) | self.token_ids.take(output)
        return self._head | {"choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The event that tells usage, after all others."""
        return self._head | {"choices": [], "usage": self.usage.values()}

    def frame(self) -> dict[str, Any]:
        """The answer to a request that does not stream, less the choices."""
        return self._head | {"usage": self.usage.values()}

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """One choice of that answer, less log-probabilities."""
        values = {"index": index, "text": self._echoes[index] + text, "finish_reason": finish_reason}
        if self.token_ids is not None:
            values |= self.token_ids.of_prompt(index) | self.token_ids.whole(index)
        return values if self._prompts is None else values | self._prompts.listed(index)

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        tokens, values, tops, offsets = [], [], [], []
        for one, added in zip(output.logprobs, output.token_texts, strict=True):
            value, best = logprob_values(one)
            name = id_name(one.token_id) if self._names_by_id else added.text
            tokens.append(name)
            values.append(value)
            tops.append(named_top(one.token_id, name, value, best, self._token_text))
            offsets.append(self._offsets[output.index])
            self._offsets[output.index] += len(added.text)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _choice(
    index: int, text: str, logprobs: Mapping[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
