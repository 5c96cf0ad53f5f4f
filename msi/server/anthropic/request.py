"""Anthropic's /v1/messages: a request as one to /v1/chat/completions.

Tools are those that the client runs. An assistant's message at the end is one to go on with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.server.anthropic.blocks import conversation, system_texts
from msi.server.field_table import NOT_IN_CHATS, NotDone
from msi.server.fields import Values, check_fields, typed
from msi.server.translation import (
    ASSISTANT,
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

NO_MATTER = {"cache_control", "betas", "inference_geo", "speed", "user_profile_id", "anthropic_beta", "diagnostics"}
FIELDS = PASSED | NO_MATTER | {
    "model", "messages", "max_tokens", "system", "stop_sequences", "stream", "tools", "tool_choice", "thinking",
    "output_config", "output_format", "context_management", "chat_template_kwargs",
}  # fmt: skip
NAMES = {"stop": "stop_sequences", "reasoning_effort": "output_config.effort"}
_LENGTH = "the name here is max_tokens"
_LOGPROBS = "log-probabilities are told by /v1/chat/completions"
NOT_IN_MESSAGES = NOT_IN_CHATS | {
    "mcp_servers": NotDone("no servers of tools are asked: the client runs all tools"),
    "container": NotDone("nothing runs in containers here"),
    "stop": NotDone("the name here is stop_sequences"),
    "max_completion_tokens": NotDone(_LENGTH),
    "max_tokens_to_sample": NotDone(_LENGTH),
    "n": NotDone("there is one answer", (1,)),
    "logprobs": NotDone(_LOGPROBS),
    "top_logprobs": NotDone(_LOGPROBS, (0,)),
    "prompt_logprobs": NotDone(_LOGPROBS),
    "response_format": NotDone("the name here is output_config.format"),
    "reasoning_effort": NotDone("the name here is output_config.effort"),
    "parallel_tool_calls": NotDone("the name here is tool_choice.disable_parallel_tool_use", (True,)),
}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
THINKING = {"enabled": True, "adaptive": True, "disabled": False}


def translated(values: Values, *, is_counted: bool = False) -> Translation:
    """Raises InvalidRequest: a field of the wrong type, or something that is not supported, by name.

    Args:
        is_counted: only the prompt's tokens are wanted.
    """
    ignored = check_fields(values, FIELDS, NOT_IN_MESSAGES)
    if values.get("max_tokens") is None and not is_counted:
        raise InvalidRequest("max_tokens is missing; say how long the answer may be", param="max_tokens")
    _check_context(values)
    chat: dict[str, Any] = passed(values) | _messages(values) | _thinking(values) | _output(values)
    for ours, theirs in (("max_tokens", "max_tokens"), ("stop", "stop_sequences")):
        if values.get(theirs) is not None:
            chat[ours] = values[theirs]
    if tools := objects(values, "tools"):
        chat["tools"] = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)]
    chat |= _choice(typed(values, "tool_choice", dict, {}))
    return Translation(chat, _names(values), ignored=ignored)


def _names(values: Values) -> dict[str, str]:
    form = "output_format" if values.get("output_format") else "output_config.format"
    return {**NAMES, "response_format": form}


def _messages(values: Values) -> dict[str, Any]:
    system = system_texts(values.get("system"), "system")
    leading = [message_of(SYSTEM, system)] if system else []
    messages = with_system_first([*leading, *conversation(values.get("messages"))])
    last = messages[-1]
    if last["role"] == ASSISTANT and any(last.get("content", ())) and "tool_calls" not in last:
        return {"messages": messages, "continue_final_message": True}
    return {"messages": messages}


def _thinking(values: Values) -> dict[str, Any]:
    """Whether the model thinks before it answers, and whether that is told; how long it may is up to max_tokens."""
    thinking = typed(values, "thinking", dict, {})
    if not thinking:
        return template_values(values, None)
    if not is_kind(thinking, *THINKING):
        raise InvalidRequest(
            f"thinking.type is {shown(thinking.get('type'))}; it must be enabled, adaptive or disabled",
            param="thinking.type",
        )
    is_on = THINKING[thinking["type"]]
    is_told = is_on and thinking.get("display") != "omitted"
    return template_values(values, is_on) | ({} if is_told else {"include_reasoning": False})


def _output(values: Values) -> dict[str, Any]:
    """How hard to think, and what the answer is to look like."""
    config = typed(values, "output_config", dict, {})
    form = typed(values, "output_format", dict, {}) or typed(config, "format", dict, {}, within="output_config")
    chat: dict[str, Any] = {}
    if (effort := typed(config, "effort", str, None, within="output_config")) is not None:
        chat["reasoning_effort"] = effort
    if form:
        is_schema = is_kind(form, "json_schema")
        schema = {"name": "answer", "schema": form.get("schema")}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema} if is_schema else form
    return chat


def _check_context(values: Values) -> None:
    """Raises InvalidRequest: something of the conversation is to be left out."""
    context = typed(values, "context_management", dict, {})
    for at, edit in enumerate(objects(context, "edits", "context_management")):
        if edit.get("keep") != "all":
            where = f"context_management.edits[{at}]"
            raise InvalidRequest(
                f"{where} is {shown(edit)}, which is not supported: all of the messages are used", param=where
            )


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") is not None and not is_kind(tool, "custom"):
        raise not_here(tool, where, "custom, a tool that the client runs and describes by name and input_schema")
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise wrong(f"{where}.input_schema", schema, "an object, the JSON schema of the tool's input")
    return function_of(text_of(tool, "name", where), tool.get("description"), schema, where)


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    if not choice:
        return {}
    chat: dict[str, Any] = {}
    if is_kind(choice, *CHOICES):
        chat["tool_choice"] = CHOICES[choice["type"]]
    elif is_kind(choice, "tool"):
        name = text_of(choice, "name", "tool_choice")
        chat["tool_choice"] = {"type": "function", "function": {"name": name}}
    else:
        kind = shown(choice.get("type"))
        raise InvalidRequest(
            f"tool_choice.type is {kind}; it must be auto, any, tool or none", param="tool_choice.type"
        )
    if typed(choice, "disable_parallel_tool_use", bool, False, within="tool_choice"):
        chat["parallel_tool_calls"] = False
    return chat
