"""Attacks on the endpoints that agents use: whole conversations with something wrong in them. Each asks and reports."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

from tools.hostility.report import Report
from tools.hostility.requests import anything
from tools.hostility.wire import Target, post

RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
_OF_RESPONSES = {
    "model": "", "instructions": "Be brief.", "max_output_tokens": 2, "temperature": 0, "top_p": 1, "stream": False,
    "store": False, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"format": {"type": "text"}, "verbosity": "medium"}, "metadata": {"a": "b"}, "tool_choice": "none",
    "parallel_tool_calls": True, "truncation": "disabled", "stream_options": {"include_obfuscation": False},
    "tools": [{"type": "function", "name": "f", "description": "d", "parameters": _PARAMETERS, "strict": True}],
    "input": [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "It is"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}], "content": None},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "id": "f", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "wet"}]},
    ],
}  # fmt: skip
_OF_MESSAGES = {
    "model": "", "max_tokens": 2, "temperature": 0, "top_p": 1, "top_k": 5, "stream": False, "stop_sequences": ["END"],
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "metadata": {"user_id": "u"}, "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "summarized"},
    "tool_choice": {"type": "none"}, "output_config": {"effort": "low"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "tools": [{"name": "f", "description": "d", "input_schema": _PARAMETERS, "type": "custom"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "It is"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I look."}, {"type": "tool_use", "id": "c", "name": "f", "input": {"city": "a"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "wet"}]},
        ]},
        {"role": "system", "content": "Be kind."},
    ],
}  # fmt: skip
CONVERSATIONS: dict[str, dict[str, Any]] = {
    RESPONSES: _OF_RESPONSES,
    MESSAGES: _OF_MESSAGES,
    COUNT: {name: value for name, value in _OF_MESSAGES.items() if name != "max_tokens"},
}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(what holds it, under which name or index) of everything in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


async def conversations(target: Target, chance: random.Random, report: Report) -> None:
    """Something at some places that does not belong there, or nothing where something does."""
    for _ in range(12):
        path = chance.choice(list(CONVERSATIONS))
        body = copy.deepcopy(CONVERSATIONS[path])
        for _ in range(chance.randrange(1, 4)):
            holder, key = chance.choice(list(places(body)))
            if chance.random() < 0.2:
                del holder[key]
            else:
                holder[key] = anything(chance, 3)
        report.answer(await post(target, path, body))
