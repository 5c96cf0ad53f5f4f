"""OpenAI's /v1/completions: what a request may say, and how answers look. Pure; knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from msi.errors import InvalidRequest
from msi.server.fields import (
    SHARED_FIELDS,
    Usage,
    Values,
    is_usage_wanted,
    kind_of,
    logprob_values,
    refuse_unknown,
    sampling_params,
    typed,
)
from msi.types import Output, SamplingParams, TokenText

DEFAULT_MAX_TOKENS = 16
FIELDS = {"prompt", "echo", "logprobs", *SHARED_FIELDS}
NEUTRAL = {"best_of": 1, "suffix": None}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One parsed body.

    Attributes:
        echo: whether the prompt comes before the text.
    """

    prompt: str | tuple[int, ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    echo: bool


def parse_completion(values: Values) -> CompletionRequest:
    """Raises InvalidRequest: a field of the wrong type, or one that is not supported, by name."""
    refuse_unknown(values, FIELDS, NEUTRAL)
    logprobs, echo = values.get("logprobs"), typed(values, "echo", bool, False)
    if echo and logprobs is not None:
        raise InvalidRequest("echo and logprobs do not go together: the prompt's log-probabilities are not computed")
    return CompletionRequest(
        prompt=_prompt(values.get("prompt")),
        params=sampling_params(values, max_tokens=DEFAULT_MAX_TOKENS, logprobs=logprobs),
        stream=typed(values, "stream", bool, False),
        include_usage=is_usage_wanted(values),
        echo=echo,
    )


def _prompt(prompt: object) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        return _prompt(prompt[0])
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        return tuple(prompt)
    raise InvalidRequest(f"prompt is {kind_of(prompt)}; it must be a string, or an array of token ids")


class CompletionAnswer:
    """Shapes the outputs of one request.

    Of log-probabilities, `tokens` joined are the text (less the echo), and `top_logprobs` name the chosen token as
    `tokens` do, others by what they would add. Where two share a text, the less probable one is "token_id:N".

    Args:
        token_text: what a token would add to a text.
        echo: the prompt's text, if it is wanted before every choice's.
        has_logprobs: whether log-probabilities are wanted.
    """

    def __init__(
        self, request_id: str, model: str, created: int, token_text: Callable[[int], TokenText], num_choices: int,
        echo: str = "", has_logprobs: bool = False,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self._usage = Usage()
        self._token_text = token_text
        self._has_logprobs = has_logprobs
        self._num_choices = num_choices
        self._echo = echo
        self._offsets = [len(echo)] * num_choices  # characters before the next token, for logprobs
        self._head = {"id": request_id, "object": "text_completion", "created": created, "model": model}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before the first output's."""
        if not self._echo:
            return []
        return [self._head | {"choices": [_choice(index, self._echo)]} for index in range(self._num_choices)]

    def chunk(self, output: Output) -> dict[str, Any]:
        """One server-sent event."""
        self._usage.add(output)
        choice = _choice(output.index, output.text, self._logprobs(output), output.finish_reason)
        return self._head | {"choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The event that tells usage, after all others."""
        return self._head | {"choices": [], "usage": self._usage.values()}

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [_choice(index, self._echo) for index in range(self._num_choices)]
        for output in outputs:
            (part,) = self.chunk(output)["choices"]
            choice = choices[output.index]
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            if (earlier := choice["logprobs"]) is None:
                choice["logprobs"] = part["logprobs"]
            elif part["logprobs"] is not None:
                for name, values in part["logprobs"].items():
                    earlier[name] += values
        return self._head | {"choices": choices, "usage": self._usage.values()}

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        tokens, values, tops, offsets = [], [], [], []
        for one, added in zip(output.logprobs, output.token_texts, strict=True):
            value, best = logprob_values(one)
            tokens.append(added.text)
            values.append(value)
            tops.append(self._top_logprobs(one.token_id, added.text, value, best))
            offsets.append(self._offsets[output.index])
            self._offsets[output.index] += len(added.text)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top_logprobs(self, chosen: int, text: str, value: float, best: list[tuple[int, float]]) -> dict[str, float]:
        """By text. The chosen token is always there, and nothing is lost where texts are the same."""
        named = {text: value}
        for token_id, logprob in best:
            if token_id != chosen:
                name = self._token_text(token_id).text
                named[f"token_id:{token_id}" if name in named else name] = logprob
        return named


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
