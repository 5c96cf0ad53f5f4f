"""The content blocks of a request's messages as the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.server.fields import typed
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

ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "ctx": USER, "msg": USER}  # as Claude Code sends them
TEXT = {"text": "text"}
RESULTS = {"text": "text", "tool_reference": "tool_name"}
WANTED = "a string or an array of text blocks"
OF_USERS, OF_ASSISTANTS = "text and tool_result blocks", "text, thinking and tool_use blocks"
# Claude Code's note on itself, another one in each request: no two prompts would begin with the same words
ATTRIBUTION = "x-anthropic-billing-header"


def system_texts(content: object, where: str) -> list[str]:
    """What the system says, nothing where it is absent. Raises InvalidRequest."""
    if content is None:
        return []
    return [text for text in texts_of(content, where, TEXT, WANTED) if text and not text.startswith(ATTRIBUTION)]


def conversation(given: object) -> list[Message]:
    """Messages; `content` is an array of texts, or absent. Raises InvalidRequest."""
    if not isinstance(given, list) or not given:
        raise wrong("messages", given, "an array of messages that is not empty")
    messages: list[Message] = []
    for at, message in enumerate(given):
        where = f"messages[{at}]"
        if not isinstance(message, dict):
            raise wrong(where, message, "an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise InvalidRequest(f"{where}.role is {shown(role)}; it must be user or assistant", param=f"{where}.role")
        content, place = message.get("content"), f"{where}.content"
        if ROLES[role] == SYSTEM:
            messages.append(message_of(SYSTEM, system_texts(content, place)))
        elif isinstance(content, str):
            messages.append(message_of(ROLES[role], [content]))
        elif not isinstance(content, list):
            raise wrong(place, content, "a string or an array of content blocks")
        elif ROLES[role] == USER:
            messages += _said(content, place)
        else:
            messages.append(_answered(content, place))
    return messages


def _said(blocks: list[Any], where: str) -> list[Message]:
    """Of a user's message: results of tools, then what the user says."""
    results: list[Message] = []
    texts: list[str] = []
    for at, block in enumerate(blocks):
        here = f"{where}[{at}]"
        if _is(block, "tool_result", here):
            results.append(_result(block, here))
        elif is_kind(block, "text"):
            texts.append(text_of(block, "text", here))
        else:
            raise not_here(block, here, OF_USERS)
    return results + ([message_of(USER, texts)] if texts or not results else [])


def _result(block: Mapping[str, Any], where: str) -> Message:
    content = block.get("content")
    texts = [] if content is None else texts_of(content, f"{where}.content", RESULTS, WANTED)
    return message_of(TOOL, texts, tool_call_id=text_of(block, "tool_use_id", where))


def _answered(blocks: list[Any], where: str) -> Message:
    """Of an assistant's message: what was thought, the text, and calls."""
    thoughts: list[str] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for at, block in enumerate(blocks):
        here = f"{where}[{at}]"
        if _is(block, "text", here):
            texts.append(text_of(block, "text", here))
        elif is_kind(block, "thinking"):
            thoughts.append(text_of(block, "thinking", here))
        elif is_kind(block, "tool_use"):
            arguments = typed(block, "input", dict, {}, within=here)
            calls.append(call_of(text_of(block, "id", here), text_of(block, "name", here), arguments))
        elif not is_kind(block, "redacted_thinking"):
            raise not_here(block, here, OF_ASSISTANTS)
    message: Message = {"role": ASSISTANT}
    for name, value in (("reasoning", "\n".join(thoughts)), ("content", texts), ("tool_calls", calls)):
        if value:
            message[name] = value
    return message


def _is(block: object, kind: str, where: str) -> bool:
    """Whether it is of this type. Raises InvalidRequest: it is no object."""
    if not isinstance(block, dict):
        raise wrong(where, block, "an object, a content block")
    return is_kind(block, kind)
