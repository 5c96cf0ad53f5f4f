"""Values of a JSON request body: their types, what endpoints share, and which fields are taken, refused or ignored.

Pure; knows no HTTP. Whatever a body holds, reading it ends in a value or in an InvalidRequest that names the field.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from msi.errors import InvalidRequest, shown
from msi.sampling_params import MAX_LOGPROBS, SamplingDefaults
from msi.server.field_table import ALWAYS_NEUTRAL, IGNORED, NOT_DONE, NotDone
from msi.server.structured import FIELDS as STRUCTURED_FIELDS
from msi.server.structured import structured_outputs
from msi.types import SamplingParams

NUMBER = re.compile(r"[+-]?[0-9]{1,19}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?")  # in a text
BOOLEANS = {"true": True, "false": False}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors and shells begin files with it
SAMPLING_INTEGERS = ("max_tokens", "top_k", "seed", "min_tokens", "n", "truncate_prompt_tokens")
SAMPLING_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
SHARED_FIELDS = frozenset({
    "model", "stream", "stream_options", "stop", "stop_token_ids", "logit_bias", "ignore_eos", "add_special_tokens",
    "allowed_token_ids", "bad_words", "skip_special_tokens", "include_stop_str_in_output", "prompt_logprobs",
    "priority", "timeout_s", "cache_salt", "return_token_ids", "return_tokens_as_token_ids",
    *SAMPLING_INTEGERS, *SAMPLING_NUMBERS, *STRUCTURED_FIELDS,
})  # fmt: skip
MAX_DEPTH = 100  # of arrays and objects within one another
TOO_DEEP = f"the body is nested more than {MAX_DEPTH} levels deep"
MAX_NAME_CHARS = 256  # of a field
MAX_SALT_CHARS = 256
MAX_IGNORED_NAMES = 32  # that one request tells the log of

Values = Mapping[str, Any]


# -- bodies ----------------------------------------------------------------------------------------------------------


def parse_object(body: bytes | str) -> dict[str, Any]:
    """Raises InvalidRequest: malformed JSON, not an object, or one nested too deep."""
    body = body.removeprefix(BYTE_ORDER_MARK) if isinstance(body, bytes) else body.removeprefix("\ufeff")
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith("depth limit"):
            raise InvalidRequest(TOO_DEEP) from error
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body is {kind_of(values)}; it must be a JSON object")
    text = body if isinstance(body, bytes) else body.encode()
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _is_deeper(values, MAX_DEPTH):
        raise InvalidRequest(TOO_DEEP)
    return values


def _is_deeper(values: dict[str, Any], depth: int) -> bool:
    level: list[Any] = [values]
    for _ in range(depth):
        level = [
            item
            for one in level
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def check_fields(values: Values, taken: Collection[str], not_here: Mapping[str, NotDone]) -> tuple[str, ...]:
    """Names of the fields that are ignored though nobody knows what they mean.

    Args:
        taken: fields that the endpoint reads.
        not_here: fields that belong to another endpoint.

    Raises:
        InvalidRequest: a field that would change the answer, and is not done.
    """
    unknown: list[str] = []
    for name, value in values.items():
        if name in taken or name in IGNORED:
            continue
        not_done = not_here.get(name) or NOT_DONE.get(name)
        if not_done is None:
            if len(unknown) < MAX_IGNORED_NAMES:
                unknown.append(name[:MAX_NAME_CHARS])
        elif not is_neutral(value, not_done):
            raise InvalidRequest(f"{name} is {shown(value)}, which is not supported: {not_done.what}", param=name)
    return tuple(unknown)


def is_neutral(value: object, not_done: NotDone) -> bool:
    """Whether a value asks for nothing."""
    if value is False and any(neutral is True for neutral in not_done.neutral):
        return False
    return any(
        value == neutral and isinstance(value, bool) is isinstance(neutral, bool)
        for neutral in (*ALWAYS_NEUTRAL, *not_done.neutral)
    )


# -- what endpoints share --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Streaming:
    """How an answer comes.

    Attributes:
        stream: in events, as it is written.
        include_usage: a last event tells usage.
        continuous_usage: every event tells usage so far.
        token_ids: of prompt and answer, are in it.
        tokens_as_ids: log-probabilities name tokens by their ids.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False


def streaming(values: Values) -> Streaming:
    """What a body says of it. Raises InvalidRequest."""
    stream = typed(values, "stream", bool, False)
    options = typed(values, "stream_options", dict, {})
    include, continuous = (
        typed(options, name, bool, False, within="stream_options")
        for name in ("include_usage", "continuous_usage_stats")
    )
    if (include or continuous) and not stream:
        raise InvalidRequest('stream_options is only allowed with "stream": true', param="stream_options")
    token_ids, as_ids = (
        typed(values, name, bool, False) for name in ("return_token_ids", "return_tokens_as_token_ids")
    )
    return Streaming(stream, include, include and continuous, token_ids, as_ids)


def cache_salt(values: Values) -> str:
    """What keeps the prefixes of a body's prompts from those of others. Raises InvalidRequest."""
    salt = typed(values, "cache_salt", str, "")
    if len(salt) > MAX_SALT_CHARS:
        raise InvalidRequest(
            f"cache_salt has {len(salt)} characters; at most {MAX_SALT_CHARS} are allowed", param="cache_salt"
        )
    return str(salt)


def sampling_params(
    values: Values, *, defaults: SamplingDefaults, max_tokens: int, logprobs: int | None,
    prompt_logprobs: int | None = None, echo: bool = False,
) -> SamplingParams:  # fmt: skip
    """What a body asks of the sampler.

    Args:
        defaults: the model's own, for what the body leaves out.
        max_tokens: where neither says anything.
        echo: whether the prompt comes back.

    Raises:
        InvalidRequest: names the parameter, what was given and what is allowed.
    """
    given: dict[str, Any] = {"max_tokens": max_tokens, **defaults.values()}
    given |= {name: integer for name in SAMPLING_INTEGERS if (integer := whole_number(values, name)) is not None}
    given |= {name: written(values[name]) for name in SAMPLING_NUMBERS if values.get(name) is not None}
    params = SamplingParams(
        **given,
        ignore_eos=typed(values, "ignore_eos", bool, False),
        stop=_stop(values),
        stop_token_ids=_token_ids(values, "stop_token_ids"),
        logit_bias=_logit_bias(typed(values, "logit_bias", dict, {})),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        allowed_token_ids=_token_ids(values, "allowed_token_ids"),
        bad_words=tuple(typed(values, "bad_words", list, [])),
        skip_special_tokens=typed(values, "skip_special_tokens", bool, True),
        include_stop_str_in_output=typed(values, "include_stop_str_in_output", bool, False),
        structured_outputs=structured_outputs(values),
    )
    if not params.max_tokens and prompt_logprobs is None and not echo:
        raise InvalidRequest(
            "max_tokens is 0, so nothing would come back; ask for 1 or more, or in completions for echo or "
            "prompt_logprobs",
            param="max_tokens",
        )
    return defaults.limited(params)


def num_logprobs(values: Values, name: str) -> int | None:
    """How many of the most probable tokens are wanted, by this field; None for no log-probabilities.

    Raises InvalidRequest.
    """
    wanted = whole_number(values, name)
    if wanted is None or wanted is False:
        return None
    if type(wanted) is not int or not 0 <= wanted <= MAX_LOGPROBS:
        raise InvalidRequest(
            f"{name} is {shown(wanted)}; it must be an integer from 0 to {MAX_LOGPROBS}, or null", param=name
        )
    return wanted


def _stop(values: Values) -> tuple[str, ...]:
    stop = values.get("stop")
    if stop in ALWAYS_NEUTRAL:
        return ()
    if not isinstance(stop, str | list):
        raise InvalidRequest(f"stop is {kind_of(stop)}; it must be a string or an array of strings", param="stop")
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _token_ids(values: Values, name: str) -> tuple[int, ...]:
    return tuple(map(integer_of, typed(values, name, list, [])))


def _logit_bias(bias: dict[str, Any]) -> dict[int, Any]:
    for token in bias:
        if not re.fullmatch("[0-9]{1,10}", token):
            raise InvalidRequest(
                f"logit_bias has the key {shown(token)}; keys are token ids, written as strings", param="logit_bias"
            )
    return {int(token): written(value) for token, value in bias.items()}


# -- values ----------------------------------------------------------------------------------------------------------


def typed(values: Values, name: str, kind: type, default: Any, *, within: str = "") -> Any:
    """A field that is of this JSON type, or absent, null or otherwise nothing. Raises InvalidRequest.

    Args:
        within: the field that `values` are the value of.
    """
    value = values.get(name)
    if type(value) is kind:
        return value
    if kind is bool and type(value) in (int, float) and value in (0, 1):
        return value == 1
    if kind is bool and type(value) is str and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    if value is None or (kind in (list, dict) and value in ([], {}, False)):
        return default
    where = f"{within}.{name}" if within else name
    raise InvalidRequest(f"{where} is {kind_of(value)}; it must be {kind_of(kind())}", param=where)


def whole_number(values: Values, name: str) -> Any:
    """A field that should be an integer, or None; 16.0 and "16" are 16."""
    return integer_of(values.get(name))


def integer_of(value: Any) -> Any:
    """The integer that a value means, as a number or as a text; whatever else it is, as it is."""
    return as_integer(written(value))


def written(value: Any) -> Any:
    """The number that a text is, as vLLM takes it from clients that write all values as texts; else what it is."""
    if type(value) is not str or NUMBER.fullmatch(value) is None:
        return value
    return int(value) if value.lstrip("+-").isdigit() else float(value)


def as_integer(value: Any) -> Any:
    """16 for 16.0, which JSON does not tell apart; whatever else it is, as it is."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) < 2**63 else value


def kind_of(value: object) -> str:
    """A JSON value's type, in words."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number"}
    return "a number" if isinstance(value, float) else names.get(type(value), "null")
