"""OpenAI's /v1/completions: what a request may say, and how answers look. Pure; knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from msi.errors import InvalidRequest
from msi.types import Output, SamplingParams

SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos")
# accepted where they ask for what is done anyway
NEUTRAL = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "presence_penalty": 0,
    "frequency_penalty": 0, "logit_bias": None, "stream_options": None, "user": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One parsed body."""

    model: str
    prompt: str | tuple[int, ...]
    params: SamplingParams
    stream: bool


def parse_completion(body: bytes) -> CompletionRequest:
    """Raises InvalidRequest: malformed JSON, a field of the wrong type, or one that is not supported, by name."""
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body is {_kind(values)}; it must be a JSON object")
    known = {"model", "prompt", "stream", "stop", *SAMPLING_FIELDS, *NEUTRAL}
    for name, value in values.items():
        if name not in known:
            raise InvalidRequest(f"field {name!r} is not supported; supported: {', '.join(sorted(known))}")
        if name in NEUTRAL and name != "user" and value is not None and value != NEUTRAL[name]:
            raise InvalidRequest(f"{name} is {value!r}; only {NEUTRAL[name]!r} is supported yet")
    sampling = {name: values[name] for name in SAMPLING_FIELDS if values.get(name) is not None}
    return CompletionRequest(
        model=_typed(values, "model", str, ""),
        prompt=_prompt(values),
        params=SamplingParams(stop=_stop(values), **sampling),
        stream=_typed(values, "stream", bool, False),
    )


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "a number" if isinstance(value, float) else names.get(type(value), "null")


def _typed(values: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = values.get(name)
    if value is None:
        return default
    if type(value) is not kind:
        raise InvalidRequest(f"{name} is {_kind(value)}; it must be {_kind(kind())}")
    return value


def _prompt(values: Mapping[str, Any]) -> str | tuple[int, ...]:
    prompt = values.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        return _prompt({"prompt": prompt[0]})
    if isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt):
        return tuple(prompt)
    raise InvalidRequest(f"prompt is {_kind(prompt)}; it must be a string, or an array of token ids")


def _stop(values: Mapping[str, Any]) -> tuple[str, ...]:
    stop = values.get("stop")
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    if isinstance(stop, list):
        return tuple(stop)
    raise InvalidRequest(f"stop is {_kind(stop)}; it must be a string or an array of strings")


def completion_chunk(output: Output, model: str, created: int) -> bytes:
    """One server-sent event's JSON."""
    return orjson.dumps(_completion(output.request_id, output.text, output.finish_reason, model, created))


def completion_body(outputs: list[Output], model: str, created: int) -> bytes:
    """The whole answer of a request that did not stream."""
    last = outputs[-1]
    num_completion = sum(len(output.token_ids) for output in outputs)
    text = "".join(output.text for output in outputs)
    usage = {
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": num_completion,
        "total_tokens": last.num_prompt_tokens + num_completion,
    }
    return orjson.dumps(_completion(last.request_id, text, last.finish_reason, model, created) | {"usage": usage})


def _completion(request_id: str, text: str, finish_reason: str | None, model: str, created: int) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return {"id": request_id, "object": "text_completion", "created": created, "model": model, "choices": [choice]}


def error_body(message: str, kind: str, code: int) -> bytes:
    """OpenAI's error object."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
