"""OpenAI's /v1/chat/completions: what a request may say, and how answers look. Pure; knows no HTTP."""

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
from msi.types import MAX_LOGPROBS, Output, SamplingParams, TokenLogprobs, TokenText

ROLES = ("system", "developer", "user", "assistant", "tool")
FIELDS = {
    "messages", "max_completion_tokens", "logprobs", "top_logprobs", "add_generation_prompt", "chat_template_kwargs",
    *SHARED_FIELDS,
}  # fmt: skip
NEUTRAL = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One parsed body.

    Attributes:
        messages: each with its role, and its content as one text.
        template_values: more for the template, such as {"enable_thinking": False}.
    """

    messages: tuple[dict[str, Any], ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    add_generation_prompt: bool
    template_values: dict[str, Any]


def parse_chat(values: Values, *, max_tokens: int) -> ChatRequest:
    """Raises InvalidRequest: a field of the wrong type, or one that is not supported, by name.

    Args:
        max_tokens: where the body says nothing.
    """
    refuse_unknown(values, FIELDS, NEUTRAL)
    if (limit := values.get("max_completion_tokens")) is not None:
        values = {**values, "max_tokens": limit}
    messages = typed(values, "messages", list, None)
    if not messages:
        raise InvalidRequest("messages is missing or empty; give an array of objects with role and content")
    return ChatRequest(
        messages=tuple(_message(message, index) for index, message in enumerate(messages)),
        params=sampling_params(values, max_tokens=max_tokens, logprobs=_num_logprobs(values)),
        stream=typed(values, "stream", bool, False),
        include_usage=is_usage_wanted(values),
        add_generation_prompt=typed(values, "add_generation_prompt", bool, True),
        template_values=typed(values, "chat_template_kwargs", dict, {}),
    )


def _message(message: object, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} is {kind_of(message)}; it must be an object with role and content")
    if (role := message.get("role")) not in ROLES:
        raise InvalidRequest(f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{at}]") for at, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidRequest(f"{where}.content is {kind_of(content)}; it must be a string or an array of text parts")
    return {**message, "content": content}


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequest(f'{where} is not text; only {{"type": "text", "text": "..."}} is supported')
    return str(part["text"])


def _num_logprobs(values: Values) -> int | None:
    wanted, top = typed(values, "logprobs", bool, False), typed(values, "top_logprobs", int, None)
    if top is not None and not wanted:
        raise InvalidRequest('top_logprobs needs "logprobs": true')
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequest(f"top_logprobs is {top}; it must be an integer from 0 to {MAX_LOGPROBS}")
    return (top or 0) if wanted else None


class ChatAnswer:
    """Shapes the outputs of one request.

    Args:
        token_text: what a token would add to a text.
        has_logprobs: whether log-probabilities are wanted.
    """

    def __init__(
        self, request_id: str, model: str, created: int, token_text: Callable[[int], TokenText], num_choices: int,
        has_logprobs: bool = False,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self._usage = Usage()
        self._token_text = token_text
        self._has_logprobs = has_logprobs
        self._num_choices = num_choices
        self._common = {"id": request_id, "created": created, "model": model}
        self._head = self._common | {"object": "chat.completion.chunk"}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before the first output's."""
        delta = {"role": "assistant", "content": ""}
        return [self._head | {"choices": [_choice(index, "delta", delta)]} for index in range(self._num_choices)]

    def chunk(self, output: Output) -> dict[str, Any]:
        """One server-sent event."""
        self._usage.add(output)
        delta = {"content": output.text} if output.text or output.finish_reason is None else {}
        logprobs = logprobs_content(output, self._token_text) if self._has_logprobs else None
        choice = _choice(output.index, "delta", delta, logprobs, output.finish_reason)
        return self._head | {"choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The event that tells usage, after all others."""
        return self._head | {"choices": [], "usage": self._usage.values()}

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [
            _choice(index, "message", {"role": "assistant", "content": ""}) for index in range(self._num_choices)
        ]
        for output in outputs:
            (part,) = self.chunk(output)["choices"]
            choice = choices[output.index]
            choice["message"]["content"] += output.text
            choice["finish_reason"] = output.finish_reason
            if choice["logprobs"] is None:
                choice["logprobs"] = part["logprobs"]
            elif part["logprobs"] is not None:
                choice["logprobs"]["content"] += part["logprobs"]["content"]
        return self._common | {"object": "chat.completion", "choices": choices, "usage": self._usage.values()}


def logprobs_content(output: Output, token_text: Callable[[int], TokenText]) -> dict[str, Any]:
    """The chat endpoint's form of log-probabilities: `token` and `bytes` are what a token adds to the text.

    So joined they are the text, and its UTF-8; "" is a token inside a character, or one that ended the answer.
    """
    pairs = zip(output.logprobs, output.token_texts, strict=True)
    return {"content": [_token(one, added, token_text) for one, added in pairs]}


def _token(one: TokenLogprobs, added: TokenText, token_text: Callable[[int], TokenText]) -> dict[str, Any]:
    value, best = logprob_values(one)
    tops = [_entry(added if token == one.token_id else token_text(token), logprob) for token, logprob in best]
    return _entry(added, value) | {"top_logprobs": tops}


def _entry(token: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}


def _choice(
    index: int,
    name: str,
    content: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, name: content, "logprobs": logprobs, "finish_reason": finish_reason}
