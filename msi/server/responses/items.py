"""The items of a request's input as the messages of a chat: what was said, thought and called, and what tools gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.server.translation import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    Message,
    call_of,
    is_kind,
    message_of,
    not_here,
    text_of,
    texts_of,
    wrong,
)

ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "developer": SYSTEM}
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
THOUGHTS = {"reasoning_text": "text", "summary_text": "text", "text": "text"}
WANTED = "a string or an array of text parts"
KINDS = "message, function_call, function_call_output and reasoning"


def conversation(given: object) -> list[Message]:
    """Messages; `content` is an array of texts, or absent. Raises InvalidRequest."""
    if isinstance(given, str):
        return [message_of(USER, [given])]
    if not isinstance(given, list) or not given:
        raise wrong("input", given, "a string, or an array of items that is not empty")
    messages: list[Message] = []
    for at, item in enumerate(given):
        where = f"input[{at}]"
        if not isinstance(item, dict):
            raise wrong(where, item, "an object")
        _add(messages, item, where)
    return messages


def _add(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    """One item. An answer comes in several: what was thought, then the text, then calls."""
    if item.get("type") is None or is_kind(item, "message"):
        _add_message(messages, item, where)
    elif is_kind(item, "reasoning"):
        if thought := _thought(item, where):
            answer = _answer(messages, unless=("content", "tool_calls"))
            answer["reasoning"] = answer.get("reasoning", "") + thought
    elif is_kind(item, "function_call"):
        name, call_id = text_of(item, "name", where), text_of(item, "call_id", where, default="")
        call = call_of(call_id, name, text_of(item, "arguments", where, default="{}"))
        _answer(messages).setdefault("tool_calls", []).append(call)
    elif is_kind(item, "function_call_output"):
        texts = texts_of(item.get("output"), f"{where}.output", TEXTS, WANTED)
        messages.append(message_of(TOOL, texts, tool_call_id=text_of(item, "call_id", where)))
    else:
        raise not_here(item, where, KINDS)


def _add_message(messages: list[Message], item: Mapping[str, Any], where: str) -> None:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(
            f"{where}.role is {shown(role)}; it must be user, assistant, system or developer", param=f"{where}.role"
        )
    texts = texts_of(item.get("content"), f"{where}.content", TEXTS, WANTED)
    if ROLES[role] == ASSISTANT:
        _answer(messages, unless=("content", "tool_calls"))["content"] = texts
    else:
        messages.append(message_of(ROLES[role], texts))


def _answer(messages: list[Message], unless: Iterable[str] = ()) -> Message:
    """The last message, which an item goes on with, or a new one; it is new if it has one of `unless` already."""
    if not messages or messages[-1]["role"] != ASSISTANT or any(name in messages[-1] for name in unless):
        messages.append({"role": ASSISTANT})
    return messages[-1]


def _thought(item: Mapping[str, Any], where: str) -> str:
    """All of it where it is there, else its summary; what is encrypted says nothing here."""
    for name in ("content", "summary"):
        if item.get(name) and (texts := texts_of(item[name], f"{where}.{name}", THOUGHTS, "an array of texts")):
            return "\n".join(texts)
    return ""
