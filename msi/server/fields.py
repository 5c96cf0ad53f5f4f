"""Fields of a JSON request body that endpoints share, and OpenAI's error object. Pure; knows no HTTP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import orjson

from msi.errors import InvalidRequest
from msi.types import Output, SamplingParams, TokenLogprobs

SAMPLING_FIELDS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "min_tokens", "n",
)  # fmt: skip
SHARED_FIELDS = ("model", "stream", "stream_options", "stop", "stop_token_ids", "logit_bias", "user", *SAMPLING_FIELDS)
LOWEST_LOGPROB = -9999.0  # JSON has no infinity

Values = Mapping[str, Any]


def parse_object(body: bytes | str) -> dict[str, Any]:
    """Raises InvalidRequest: malformed JSON, or not an object."""
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body is {kind_of(values)}; it must be a JSON object")
    return values


def refuse_unknown(values: Values, known: Collection[str], neutral: Values) -> None:
    """Raises InvalidRequest for a field that is not supported; `neutral` ones may ask for what is done anyway."""
    for name, value in values.items():
        if name in neutral:
            if value is not None and value != neutral[name]:
                raise InvalidRequest(f"{name} is {value!r}; only {neutral[name]!r} is supported yet")
        elif name not in known:
            supported = ", ".join(sorted({*known, *neutral}))
            raise InvalidRequest(f"field {name!r} is not supported; supported: {supported}")


def sampling_params(values: Values, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """What a body asks of the sampler.

    Args:
        max_tokens: where the body says nothing.

    Raises:
        InvalidRequest: names the parameter, what was given and what is allowed.
    """
    given = {name: values[name] for name in SAMPLING_FIELDS if values.get(name) is not None}
    stop = values.get("stop")
    if stop is not None and not isinstance(stop, str | list):
        raise InvalidRequest(f"stop is {kind_of(stop)}; it must be a string or an array of strings")
    return SamplingParams(
        **{"max_tokens": max_tokens, **given},
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=tuple(typed(values, "stop_token_ids", list, [])),
        logit_bias=_logit_bias(typed(values, "logit_bias", dict, {})),
        logprobs=logprobs,
    )


def _logit_bias(bias: dict[str, Any]) -> dict[int, Any]:
    for token in bias:
        if not (token.isascii() and token.isdigit()):
            raise InvalidRequest(f"logit_bias has the key {token!r}; keys are token ids, written as strings")
    return {int(token): value for token, value in bias.items()}


def is_usage_wanted(values: Values) -> bool:
    """stream_options.include_usage. Raises InvalidRequest."""
    options = typed(values, "stream_options", dict, None)
    if options is None:
        return False
    if not values.get("stream"):
        raise InvalidRequest('stream_options is only allowed with "stream": true')
    refuse_unknown(options, ("include_usage",), {})
    return bool(typed(options, "include_usage", bool, False))


def typed(values: Values, name: str, kind: type, default: Any) -> Any:
    """A field that is of this JSON type, or absent or null. Raises InvalidRequest."""
    value = values.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        raise InvalidRequest(f"{name} is {kind_of(value)}; it must be {kind_of(kind())}")
    return value


def kind_of(value: object) -> str:
    """A JSON value's type, in words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number"}
    return "a number" if isinstance(value, float) else names.get(type(value), "null")


class Usage:
    """Counts tokens of a request as its outputs pass."""

    def __init__(self) -> None:
        self._num_prompt = 0
        self._num_completion = 0

    def add(self, output: Output) -> None:
        self._num_prompt = output.num_prompt_tokens
        self._num_completion += len(output.token_ids)

    def values(self) -> dict[str, int]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_completion,
            "total_tokens": self._num_prompt + self._num_completion,
        }


def logprob_values(one: TokenLogprobs) -> tuple[float, list[tuple[int, float]]]:
    """The chosen token's, and (token, log-probability) of the best ones; finite."""
    best = zip(one.top_token_ids, one.top_logprobs, strict=True)
    return max(one.logprob, LOWEST_LOGPROB), [(token, max(value, LOWEST_LOGPROB)) for token, value in best]


def error_object(message: str, code: int) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if code < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": code}
