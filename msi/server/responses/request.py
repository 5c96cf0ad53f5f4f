"""OpenAI's /v1/responses: a request as one to /v1/chat/completions.

Nothing is kept: a request brings the whole conversation. Tools are functions, which the client runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.server.field_table import NOT_IN_CHATS, NotDone
from msi.server.fields import Values, check_fields, typed
from msi.server.responses.items import conversation
from msi.server.translation import (
    PASSED,
    SYSTEM,
    Translation,
    function_of,
    is_kind,
    message_of,
    not_here,
    objects,
    passed,
    template_values,
    text_of,
    with_system_first,
    wrong,
)

FIELDS = PASSED | {
    "model", "input", "instructions", "max_output_tokens", "stream", "stream_options", "tools", "tool_choice",
    "parallel_tool_calls", "reasoning", "text", "include", "max_tool_calls", "stop", "chat_template_kwargs",
    "truncation",
}  # fmt: skip
NAMES = {
    "messages": "input", "max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort",
    "response_format": "text.format", "verbosity": "text.verbosity",
}  # fmt: skip
_KEPT = "nothing is kept here: send the whole conversation as input"
_LENGTH = "the name here is max_output_tokens"
_LOGPROBS = "log-probabilities are told by /v1/chat/completions"
NOT_IN_RESPONSES = NOT_IN_CHATS | {
    "previous_response_id": NotDone(_KEPT),
    "conversation": NotDone(_KEPT),
    "previous_input_messages": NotDone("all that was said belongs to input"),
    "prompt": NotDone("no prompts are kept here: send instructions and input"),
    "background": NotDone("an answer comes on the connection that asked for it"),
    "context_management": NotDone("all of the input is used"),
    "logprobs": NotDone(_LOGPROBS),
    "top_logprobs": NotDone(_LOGPROBS, (0,)),
    "prompt_logprobs": NotDone(_LOGPROBS),
    "n": NotDone("there is one answer", (1,)),
    "messages": NotDone("the name here is input"),
    "max_tokens": NotDone(_LENGTH),
    "max_completion_tokens": NotDone(_LENGTH),
    "response_format": NotDone("the name here is text.format"),
    "reasoning_effort": NotDone("the name here is reasoning.effort"),
    "image": NotDone("only text comes out"),
}
TOLD = (
    "instructions", "max_output_tokens", "max_tool_calls", "metadata", "prompt_cache_key", "reasoning",
    "safety_identifier", "text", "user",
)  # fmt: skip
TOOL_CHOICES = ("auto", "none", "required")
TRUNCATIONS = ("auto", "disabled")


def translated(values: Values) -> Translation:
    """Raises InvalidRequest: a field of the wrong type, or something that is not supported, by name."""
    ignored = check_fields(values, FIELDS, NOT_IN_RESPONSES)
    _check_include(values)
    reasoning = typed(values, "reasoning", dict, {})
    effort = typed(reasoning, "effort", str, None, within="reasoning")
    chat: dict[str, Any] = {**passed(values), "messages": _messages(values)}
    chat |= template_values(values, False if effort == "none" else None)
    if effort is not None:
        chat["reasoning_effort"] = effort
    for ours, theirs in (("max_tokens", "max_output_tokens"), ("stop", "stop")):
        if theirs in values:
            chat[ours] = values[theirs]
    tools = objects(values, "tools")
    if tools:
        chat["tools"] = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)]
    if "parallel_tool_calls" in values:
        chat["parallel_tool_calls"] = values["parallel_tool_calls"]
    chat |= _choice(values.get("tool_choice")) | _form(typed(values, "text", dict, {}))
    truncation = typed(values, "truncation", str, "disabled")
    if truncation not in TRUNCATIONS:
        raise InvalidRequest(f"truncation is {shown(truncation)}; it must be auto or disabled", param="truncation")
    told = _told(values, tools) | {"truncation": truncation}
    return Translation(chat, NAMES, told, ignored, is_cut_to_fit=truncation == "auto")


def _messages(values: Values) -> list[dict[str, Any]]:
    instructions = text_of(values, "instructions", default="")
    leading = [message_of(SYSTEM, [instructions])] if instructions else []
    return with_system_first([*leading, *conversation(values.get("input"))])


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not is_kind(tool, "function"):
        raise not_here(tool, where, "function, a tool that the client runs")
    name = text_of(tool, "name", where)
    return function_of(name, tool.get("description"), tool.get("parameters"), where)


def _choice(choice: object) -> dict[str, Any]:
    if choice is None:
        return {}
    if isinstance(choice, str) and choice in TOOL_CHOICES:
        return {"tool_choice": choice}
    if isinstance(choice, dict) and is_kind(choice, "function") and isinstance(choice.get("name"), str):
        return {"tool_choice": {"type": "function", "function": {"name": choice["name"]}}}
    raise InvalidRequest(
        f"tool_choice is {shown(choice)}; it must be auto, none, required, or an object like "
        '{"type": "function", "name": "..."}',
        param="tool_choice",
    )


def _form(text: Mapping[str, Any]) -> dict[str, Any]:
    """How the answer is to look, as /v1/chat/completions is told it."""
    chat = {} if text.get("verbosity") is None else {"verbosity": text["verbosity"]}
    form = typed(text, "format", dict, {}, within="text")
    if form and not is_kind(form, "text"):
        schema = {name: value for name, value in form.items() if name != "type"}
        is_schema = is_kind(form, "json_schema")
        chat["response_format"] = {"type": "json_schema", "json_schema": schema} if is_schema else form
    return chat


def _check_include(values: Values) -> None:
    """Raises InvalidRequest. What else may be included belongs to tools that are not here, or is told anyway."""
    for at, name in enumerate(typed(values, "include", list, [])):
        if not isinstance(name, str):
            raise wrong(f"include[{at}]", name, "a string")
        if name == "message.output_text.logprobs":
            raise InvalidRequest(f"include has {name}, which is not supported: {_LOGPROBS}", param="include")


def _told(values: Values, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """What the answer repeats. Nothing is stored, whatever was asked: no answer depends on it."""
    told: dict[str, Any] = {name: values.get(name) for name in TOLD}
    told |= {"metadata": told["metadata"] or {}, "text": told["text"] or {"format": {"type": "text"}}}
    told |= {"reasoning": told["reasoning"] or {"effort": None, "summary": None}}
    is_parallel = values.get("parallel_tool_calls") is not False
    return told | {
        "tools": tools,
        "tool_choice": values.get("tool_choice") or "auto",
        "parallel_tool_calls": is_parallel,
    }
