"""Requests in another API's words as requests to /v1/chat/completions. Pure; knows no HTTP and neither API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.server.fields import Values, kind_of, typed
from msi.server.structured import FIELDS as STRUCTURED_FIELDS

# what no other API has, under vLLM's names
PASSED = frozenset({
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "allowed_token_ids", "bad_words", "stop_token_ids", "min_tokens", "ignore_eos",
    "skip_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens", "include_reasoning",
    "priority", "timeout_s",
    *STRUCTURED_FIELDS,
}) - {"response_format"}  # fmt: skip
SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Translation:
    """One request.

    Attributes:
        chat: the body that asks the same of /v1/chat/completions.
        names: what the API calls fields of `chat`, where that differs: errors name what the client wrote.
        told: what the answer repeats of the request.
        ignored: fields that nobody knows.
        is_cut_to_fit: what was said first is left out where all of it does not fit the context (`msi.server.cutting`).
    """

    chat: dict[str, Any]
    names: Mapping[str, str]
    told: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    is_cut_to_fit: bool = False

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The refusal of `chat` as one of the request."""
        for ours, theirs in self.names.items():
            if error.param == ours or error.param.startswith((f"{ours}.", f"{ours}[")):
                sentence = str(error)
                if sentence.startswith(ours):
                    sentence = theirs + sentence.removeprefix(ours)
                sentence = sentence.replace(f" in {ours} ", f" in {theirs} ")  # as of schemas
                return type(error)(sentence, param=theirs, code=error.code)
        return error


def passed(values: Values) -> dict[str, Any]:
    """What means the same to both."""
    return {name: values[name] for name in (*PASSED, "model", "stream") if name in values}


def template_values(values: Values, is_thinking: bool | None) -> dict[str, Any]:
    """chat_template_kwargs. Raises InvalidRequest.

    Args:
        is_thinking: whether the model is to think before it answers, under the names that templates have for it; None
            where the request leaves it to the model.
    """
    switches = {} if is_thinking is None else {"enable_thinking": is_thinking, "thinking": is_thinking}
    given = {**switches, **typed(values, "chat_template_kwargs", dict, {})}
    return {"chat_template_kwargs": given} if given else {}


# -- values ----------------------------------------------------------------------------------------------------------


def wrong(where: str, value: object, wanted: str) -> InvalidRequest:
    """The refusal of a value of a type that does not belong there."""
    return InvalidRequest(f"{where} is {kind_of(value)}; it must be {wanted}", param=where)


def is_kind(value: Any, *kinds: str) -> bool:
    """Whether an object's type is one of these."""
    return isinstance(value.get("type"), str) and value["type"] in kinds


def objects(values: Values, name: str, within: str = "") -> list[dict[str, Any]]:
    """An array of objects, or []. Raises InvalidRequest."""
    items: list[Any] = typed(values, name, list, [], within=within)
    for at, item in enumerate(items):
        if not isinstance(item, dict):
            raise wrong(f"{within}.{name}[{at}]".strip("."), item, "an object")
    return items


def text_of(values: Values, name: str, where: str = "", *, default: str | None = None) -> str:
    """A string. Raises InvalidRequest.

    Args:
        default: what stands for one that is absent or null; None if it has to be there.
    """
    value = values.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise wrong(f"{where}.{name}" if where else name, value, "a string")
    return value


def texts_of(content: object, where: str, names: Mapping[str, str], wanted: str) -> list[str]:
    """A string, or the texts of an array of parts. Raises InvalidRequest: a part of another type, by name.

    Args:
        names: types of parts, and which of their fields has the text.
        wanted: what may stand there, in words.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise wrong(where, content, wanted)
    return [_part(part, f"{where}[{at}]", names, wanted) for at, part in enumerate(content)]


def _part(part: object, where: str, names: Mapping[str, str], wanted: str) -> str:
    if not isinstance(part, dict):
        raise wrong(where, part, f"an object; {where.rpartition('[')[0]} is {wanted}")
    if not is_kind(part, *names):
        raise not_here(part, where, wanted)
    return text_of(part, names[part["type"]], where)


def not_here(item: Mapping[str, Any], where: str, wanted: str) -> InvalidRequest:
    """The refusal of something of a type that this server has nothing for."""
    return InvalidRequest(
        f"{where}.type is {shown(item.get('type'))}, which is not supported here; there may be {wanted}",
        param=f"{where}.type",
    )


def function_of(name: str, description: object, parameters: object, where: str) -> dict[str, Any]:
    """A tool, as /v1/chat/completions has it. Raises InvalidRequest."""
    function: dict[str, Any] = {"name": name}
    if description is not None:
        if not isinstance(description, str):
            raise wrong(f"{where}.description", description, "a string")
        function["description"] = description
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def call_of(call_id: str, name: str, arguments: object) -> dict[str, Any]:
    """A call of the history."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# -- messages --------------------------------------------------------------------------------------------------------


def message_of(role: str, texts: Sequence[str], **more: Any) -> Message:
    return {"role": role, "content": list(texts), **more}


def with_system_first(messages: Iterable[Message]) -> list[Message]:
    """The messages with one of the system at most, the first one: templates refuse others, or leave them out.

    What leads is joined. What the system says later becomes the end of what the user or a tool has said just before, or
    else the beginning of what the user says next: so the prompt of each turn begins as that of the turn before, and
    nothing comes between a call and its result. `content` is an array of texts, which are not changed in place.

    Raises InvalidRequest: nobody says anything.
    """
    found: list[Message] = []
    waiting: list[str] = []  # said after an answer
    for is_system, several in groupby(messages, key=lambda one: one["role"] == SYSTEM):
        if is_system:
            texts = [text for one in several for text in one["content"] if text]
            if not texts:
                continue
            if waiting or (found and found[-1]["role"] == ASSISTANT):
                waiting += texts
            else:
                _say(found, texts)
            continue
        for message in several:
            if waiting and message["role"] != TOOL:
                if message["role"] == USER and found[-1]["role"] == ASSISTANT:
                    first, *rest = message["content"] or [""]
                    message = {**message, "content": [_paragraphs(*waiting, first), *rest]}
                else:
                    _say(found, waiting)
                waiting = []
            found.append(message)
    if waiting:
        _say(found, waiting)
    if not found:
        raise InvalidRequest("nobody says anything in this conversation; give a message with a text", param="messages")
    return found


def _say(found: list[Message], texts: Sequence[str]) -> None:
    """Something that the system says, at the end of what there is."""
    if not found:
        found.append(message_of(SYSTEM, [_paragraphs(*texts)]))
    elif found[-1]["role"] == ASSISTANT:
        found.append(message_of(USER, [_paragraphs(*texts)]))
    else:
        *before, end = found[-1]["content"] or [""]
        found[-1] = {**found[-1], "content": [*before, _paragraphs(end, *texts)]}


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)
