"""OpenAI's /v1/chat/completions: what a request may say. Pure; knows no HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.sampling_params import MAX_LOGPROBS, NO_DEFAULTS, SamplingDefaults
from msi.server.field_table import ALWAYS_NEUTRAL, NOT_IN_CHATS
from msi.server.fields import (
    SHARED_FIELDS,
    Streaming,
    Values,
    check_fields,
    kind_of,
    num_logprobs,
    sampling_params,
    streaming,
    typed,
    whole_number,
)
from msi.types import SamplingParams

FIELDS = SHARED_FIELDS | {
    "messages", "max_completion_tokens", "logprobs", "top_logprobs", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs", "reasoning_effort", "documents", "tools", "tool_choice", "parallel_tool_calls",
    "include_reasoning",
}  # fmt: skip
MAX_ROLE_CHARS = 64
SPEAKERS_WITHOUT_CONTENT = ("assistant", "tool", "function")  # a call of tools says nothing
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
MAX_TEMPLATE_VALUES = 64
NO_PARSER = (
    "the model's chat template does not say how it writes calls of them; serve with `tool_call_parser`, by the name of "
    "the model's family"
)
WITHOUT_CALLS = 'With "tool_choice": "none" the tools stand in the prompt and the text comes as the model writes it'

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One parsed body.

    Attributes:
        messages: each with its role; content is a text, a tuple of text parts, or absent.
        tools, documents: for the template; None where there are none.
        template_values: more for the template, such as {"enable_thinking": False}.
        add_special_tokens: whether the tokenizer puts its own around what the template writes.
        calls_tools: the answer is searched for calls of `tools`.
        forced_tools: names of those that it has to call one of; () where it may do without.
        is_named_tool: the request names the tool that is called, and it is called once.
        has_parallel_calls: more calls than the first count.
        has_reasoning: what the model thought is told, where that is told apart.
        ignored: fields that nobody knows.
    """

    messages: tuple[Message, ...]
    params: SamplingParams
    streaming: Streaming
    add_generation_prompt: bool
    continue_final_message: bool
    tools: tuple[dict[str, Any], ...] | None
    documents: tuple[dict[str, Any], ...] | None
    template_values: dict[str, Any]
    add_special_tokens: bool = False
    calls_tools: bool = False
    forced_tools: tuple[str, ...] = ()
    is_named_tool: bool = False
    has_parallel_calls: bool = True
    has_reasoning: bool = True
    ignored: tuple[str, ...] = ()


def parse_chat(
    values: Values,
    *,
    max_tokens: int,
    defaults: SamplingDefaults = NO_DEFAULTS,
    no_calls: str = NO_PARSER,
) -> ChatRequest:
    """Raises InvalidRequest: a field of the wrong type, or one that is not supported, by name.

    Args:
        max_tokens: where neither the body nor the model's defaults say anything.
        defaults: the model's own parameters.
        no_calls: why answers are not searched for calls of tools, and what to do; "" where they are.
    """
    ignored = check_fields(values, FIELDS, NOT_IN_CHATS)
    messages = typed(values, "messages", list, [])
    if not messages:
        raise InvalidRequest(
            "messages is missing or empty; give an array of objects with role and content", param="messages"
        )
    continues = typed(values, "continue_final_message", bool, False)
    if continues and values.get("add_generation_prompt"):
        raise InvalidRequest(
            "continue_final_message goes on with the last message, add_generation_prompt begins a new one; ask for one",
            param="continue_final_message",
        )
    template_values = typed(values, "chat_template_kwargs", dict, {})
    if len(template_values) > MAX_TEMPLATE_VALUES:
        raise InvalidRequest(
            f"chat_template_kwargs has {len(template_values)} values; at most {MAX_TEMPLATE_VALUES} are allowed",
            param="chat_template_kwargs",
        )
    tools = _tools(values)
    forced = _forced_tools(values, tools)
    calls_tools = bool(forced) or _calls_tools(values, tools, no_calls)
    if (effort := typed(values, "reasoning_effort", str, None)) is not None:
        template_values = {"reasoning_effort": effort, **template_values}
    return ChatRequest(
        messages=tuple(_message(message, f"messages[{index}]") for index, message in enumerate(messages)),
        params=_params(values, defaults, max_tokens),
        streaming=streaming(values),
        add_generation_prompt=not continues and typed(values, "add_generation_prompt", bool, True),
        continue_final_message=continues,
        tools=tools,
        documents=_objects(values, "documents"),
        template_values=template_values,
        add_special_tokens=typed(values, "add_special_tokens", bool, False),
        calls_tools=calls_tools,
        forced_tools=forced,
        is_named_tool=isinstance(values.get("tool_choice"), dict),
        has_parallel_calls=_is_left_on(values, "parallel_tool_calls") or not calls_tools,
        has_reasoning=_is_left_on(values, "include_reasoning"),
        ignored=ignored,
    )


def _params(values: Values, defaults: SamplingDefaults, max_tokens: int) -> SamplingParams:
    """Raises InvalidRequest: names the limit as the request does."""
    limit = values.get("max_completion_tokens")
    asked: Values = values if limit is None else {**values, "max_tokens": limit}
    try:
        return sampling_params(
            asked, defaults=defaults, max_tokens=max_tokens, logprobs=_num_logprobs(values),
            prompt_logprobs=num_logprobs(values, "prompt_logprobs"),
        )  # fmt: skip
    except InvalidRequest as error:
        if limit is None or error.param != "max_tokens":
            raise
        name = "max_completion_tokens"
        raise InvalidRequest(str(error).replace(error.param, name), param=name, code=error.code) from error


# -- messages --------------------------------------------------------------------------------------------------------


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise _wrong(where, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not 0 < len(role) <= MAX_ROLE_CHARS:
        raise InvalidRequest(
            f"{where}.role is {shown(role)}; it must be one of system, developer, user, assistant and tool, or another "
            "name that the template knows",
            param=f"{where}.role",
        )
    # what is null is absent, as in transformers: templates would write "None"
    said = {name: value for name, value in message.items() if value is not None}
    if "content" in said:
        said["content"] = _content(said["content"], f"{where}.content")
    elif role not in SPEAKERS_WITHOUT_CONTENT:
        raise _wrong(f"{where}.content", None, "a string or an array of text parts")
    if calls := typed(said, "tool_calls", list, [], within=where):
        said["tool_calls"] = [_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)]
    else:
        said.pop("tool_calls", None)
    return said


def _content(content: object, where: str) -> str | tuple[str, ...]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(where, content, "a string or an array of text parts")
    parts = (_part(part, f"{where}[{at}]") for at, part in enumerate(content))
    return tuple(part for part in parts if part is not None)


def _part(part: object, where: str) -> str | None:
    """The text of one part; None where it has none."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    name = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if name is None or not isinstance(part, dict):
        raise InvalidRequest(f'{where} is not text; only {{"type": "text", "text": "..."}} is supported', param=where)
    text = part.get(name)
    if text is not None and not isinstance(text, str):
        raise _wrong(f"{where}.{name}", text, "a string")
    return text


def _call(call: object, where: str) -> dict[str, Any]:
    """A call of the history, its arguments as an object: that is what templates take apart."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(where, call, 'an object like {"type": "function", "function": {"name": "...", "arguments": "{}"}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = {}  # as vLLM: what a model wrote need not be JSON
    if not isinstance(arguments, dict | list):
        arguments = {}
    return {**call, "function": {**function, "arguments": arguments}}


# -- tools -----------------------------------------------------------------------------------------------------------


def _tools(values: Values) -> tuple[dict[str, Any], ...] | None:
    """Tools for the template."""
    tools = _objects(values, "tools")
    for at, tool in enumerate(tools or ()):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"tools[{at}]", tool, 'an object like {"type": "function", "function": {"name": "..."}}')
        parameters = function.get("parameters")
        if not isinstance(parameters, dict) and parameters not in ALWAYS_NEUTRAL:
            raise _wrong(f"tools[{at}].function.parameters", parameters, "an object, the JSON schema of its arguments")
    return tools


def _forced_tools(values: Values, tools: Sequence[dict[str, Any]] | None) -> tuple[str, ...]:
    """Names of the tools of which the answer has to call one. Raises InvalidRequest."""
    choice = values.get("tool_choice")
    if choice in (None, "", {}, "auto", "none"):
        return ()
    names = tuple(dict.fromkeys(tool["function"]["name"] for tool in tools or ()))
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        named = function.get("name") if isinstance(function, dict) else choice.get("name")
        if named not in names:
            raise InvalidRequest(
                f"tool_choice names {shown(named)}; the tools of this request are {shown(list(names))}",
                param="tool_choice",
            )
        names = (named,)
    elif choice != "required":
        raise InvalidRequest(
            f"tool_choice is {shown(choice)}; it must be auto, none, required, or an object like "
            '{"type": "function", "function": {"name": "..."}}',
            param="tool_choice",
        )
    if not names:
        raise InvalidRequest('tool_choice is "required", and there are no tools', param="tool_choice")
    return names


def _calls_tools(values: Values, tools: Sequence[dict[str, Any]] | None, no_calls: str) -> bool:
    """Whether the answer may call tools. Raises InvalidRequest: nobody would see its calls."""
    if values.get("tool_choice") == "none" or not tools:
        return False
    if no_calls:
        raise InvalidRequest(f"tools are given, and {no_calls}. {WITHOUT_CALLS}", param="tools")
    return True


def _is_left_on(values: Values, name: str) -> bool:
    """A switch that is on unless it is false."""
    return values.get(name) is None or bool(typed(values, name, bool, False))


def _objects(values: Values, name: str) -> tuple[dict[str, Any], ...] | None:
    items = typed(values, name, list, [])
    for at, item in enumerate(items):
        if not isinstance(item, dict):
            raise _wrong(f"{name}[{at}]", item, "an object")
    return tuple(items) or None


def _wrong(where: str, value: object, wanted: str) -> InvalidRequest:
    return InvalidRequest(f"{where} is {kind_of(value)}; it must be {wanted}", param=where)


def _num_logprobs(values: Values) -> int | None:
    wanted, top = typed(values, "logprobs", bool, False), whole_number(values, "top_logprobs")
    if top is None or top is False:
        top = 0
    if type(top) is not int or not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs is {shown(top)}; it must be an integer from 0 to {MAX_LOGPROBS}", param="top_logprobs"
        )
    if top and not wanted:
        raise InvalidRequest('top_logprobs needs "logprobs": true', param="top_logprobs")
    return top if wanted else None
