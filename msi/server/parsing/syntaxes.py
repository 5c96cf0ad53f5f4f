"""How models write calls of tools. Each reader starts at its opening marker, and yields a call once it is whole.

A reader stops with NotACall where the text is no call: what it has read since the last call is then content.
"""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from msi.server.parsing.source import MAX_NAME_CHARS, Reader, Source, Waiting
from msi.server.parsing.tools import Tools, loads

ID_CHARS = string.ascii_letters + string.digits
MISTRAL_ID_CHARS = 9  # its template refuses any other


@dataclass(frozen=True, slots=True)
class Syntax:
    """One way to write calls.

    Attributes:
        openings: texts with which a call, or several, begin.
        markers: other texts without which it is not recognised.
        ends_reasoning: whether the openings are control tokens, which never stand inside what a model thinks.
    """

    openings: tuple[str, ...]
    read: Callable[[Source, Tools], Reader[None]]
    markers: tuple[str, ...] = ()
    ends_reasoning: bool = False
    new_id: Callable[[], str] = lambda: f"call_{uuid.uuid4().hex[:24]}"


def _short_id() -> str:
    return "".join(secrets.choice(ID_CHARS) for _ in range(MISTRAL_ID_CHARS))


# -- JSON between markers --------------------------------------------------------------------------------------------


def read_hermes(source: Source, tools: Tools) -> Reader[None]:
    """<tool_call>{"name": N, "arguments": {...}}</tool_call>"""
    yield from source.expect("<tool_call>")
    yield from source.space()
    text = yield from source.json_object()
    yield tools.called(text)
    yield from source.maybe("</tool_call>")


def read_mistral(source: Source, tools: Tools) -> Reader[None]:
    """[TOOL_CALLS] [{"name": N, "arguments": {...}}, ...], and since 2025 [TOOL_CALLS]N[ARGS]{...}"""
    yield from source.expect("[TOOL_CALLS]")
    yield from source.space()
    if not (yield from source.take("[")):
        name = yield from source.word()
        tools.check(name)
        call_id = (yield from source.word()) if (yield from source.maybe("[CALL_ID]")) else ""
        yield from source.maybe("[ARGS]")
        arguments = yield from _arguments(source)
        yield tools.call(name, arguments, call_id)
        return
    while True:
        yield from source.space()
        text = yield from source.json_object()
        yield tools.called(text)
        if (yield from source.maybe(",", "]")) != ",":
            return


def read_json(source: Source, tools: Tools) -> Reader[None]:
    """[{"name": N, "parameters": {...}}, ...], as answers are made to look where a model has no way of its own"""
    yield from source.expect("[")
    while True:
        yield from source.space()
        text = yield from source.json_object()
        yield tools.called(text)
        if (yield from source.maybe(",", "]")) != ",":
            return


TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_SEP = (
    "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>",
    "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>",
    "<\uff5ctool\u2581sep\uff5c>",
)  # fmt: skip


def read_deepseek(source: Source, tools: Tools) -> Reader[None]:
    """Between its markers V3 writes function, a separator, N, and {...} in a fence; V3.1 N, a separator and {...}."""
    yield from source.take(TOOL_CALLS_BEGIN)
    yield from source.space()
    yield from source.expect(TOOL_CALL_BEGIN)
    while True:
        name = yield from source.until(TOOL_SEP, MAX_NAME_CHARS)
        is_fenced = False
        if name.strip() == "function" and not (yield from _is_next(source, "{")):
            name = yield from source.until("\n", MAX_NAME_CHARS)
            is_fenced = True
        name = tools.check(name.strip())
        if is_fenced:
            yield from source.space()
            yield from source.expect("```json")
        arguments = yield from _arguments(source, "```", TOOL_CALL_END)
        yield tools.call(name, arguments)
        if is_fenced:
            yield from source.maybe("```")
        yield from source.maybe(TOOL_CALL_END)
        if (yield from source.maybe(TOOL_CALL_BEGIN, TOOL_CALLS_END)) != TOOL_CALL_BEGIN:
            return


SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
KIMI_BEGIN, KIMI_ARGUMENTS, KIMI_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"


def read_kimi(source: Source, tools: Tools) -> Reader[None]:
    """functions.N:INDEX between markers, which is the call's id, and {...}."""
    yield from source.take(SECTION_BEGIN)
    yield from source.space()
    yield from source.expect(KIMI_BEGIN)
    while True:
        call_id = (yield from source.until(KIMI_ARGUMENTS, MAX_NAME_CHARS)).strip()
        name, colon, index = call_id.removeprefix("functions.").rpartition(":")
        has_index = bool(colon) and index.isdecimal()
        name = tools.check(name if has_index else call_id.removeprefix("functions."))
        arguments = yield from _arguments(source, KIMI_END)
        yield tools.call(name, arguments, call_id if has_index else "")
        yield from source.maybe(KIMI_END)
        if (yield from source.maybe(KIMI_BEGIN, SECTION_END)) != KIMI_BEGIN:
            return


def _arguments(source: Source, *ends: str) -> Waiting[object]:
    """A JSON object; nothing before one of `ends`, which is left, is an empty one."""
    yield from source.space()
    if ends and (end := (yield from source.take(*ends))):
        source.at -= len(end)
        return {}
    return loads((yield from source.json_object()))


def _is_next(source: Source, text: str) -> Waiting[bool]:
    """Whether this comes next, behind white space. Nothing is passed over."""
    start = source.at
    is_next = bool((yield from source.maybe(text)))
    source.at = start
    return is_next


# -- tags ------------------------------------------------------------------------------------------------------------


def read_qwen_xml(source: Source, tools: Tools) -> Reader[None]:
    """<tool_call><function=N><parameter=K>V</parameter>...</function></tool_call>"""
    is_wrapped = bool((yield from source.take("<tool_call>")))
    yield from source.space()
    yield from source.expect("<function=")
    name = tools.check((yield from source.until(">", MAX_NAME_CHARS)).strip())
    arguments = yield from _parameters(source, tools, name, "<parameter=", "</function>")
    yield tools.call(name, arguments)
    if is_wrapped:
        yield from source.maybe("</tool_call>")


def read_minimax(source: Source, tools: Tools) -> Reader[None]:
    """<minimax:tool_call><invoke name="N"><parameter name="K">V</parameter>...</invoke>...</minimax:tool_call>"""
    yield from source.expect("<minimax:tool_call>")
    yield from source.space()
    yield from source.expect("<invoke name=")
    while True:
        name = tools.check(_bare((yield from source.until(">", MAX_NAME_CHARS))))
        arguments = yield from _parameters(source, tools, name, "<parameter name=", "</invoke>")
        yield tools.call(name, arguments)
        if (yield from source.maybe("<invoke name=", "</minimax:tool_call>")) != "<invoke name=":
            return


def _parameters(source: Source, tools: Tools, name: str, opening: str, closing: str) -> Waiting[dict[str, object]]:
    """Arguments of one call, each between tags, up to the one that closes the call."""
    arguments: dict[str, object] = {}
    while True:
        yield from source.space()
        if (yield from source.expect(opening, closing, at_end=closing)) == closing:
            return arguments
        key = _bare((yield from source.until(">", MAX_NAME_CHARS)))
        text = yield from source.until("</parameter>")
        arguments[key] = tools.typed(name, key, text.removeprefix("\n").removesuffix("\n"))


def _bare(text: str) -> str:
    return text.strip().strip("\"'")


def read_glm(source: Source, tools: Tools) -> Reader[None]:
    """<tool_call>N<arg_key>K</arg_key><arg_value>V</arg_value>...</tool_call>"""
    yield from source.expect("<tool_call>")
    yield from source.space()
    name = tools.check((yield from source.word()))
    arguments: dict[str, object] = {}
    while True:
        yield from source.space()
        if (yield from source.expect("<arg_key>", "</tool_call>", at_end="</tool_call>")) == "</tool_call>":
            break
        key = (yield from source.until("</arg_key>", MAX_NAME_CHARS)).strip()
        yield from source.space()
        yield from source.expect("<arg_value>")
        arguments[key] = tools.typed(name, key, (yield from source.until("</arg_value>")))
    yield tools.call(name, arguments)


SYNTAXES = {
    "hermes": Syntax(("<tool_call>",), read_hermes),
    "qwen3_xml": Syntax(("<tool_call>", "<function="), read_qwen_xml),
    "mistral": Syntax(("[TOOL_CALLS]",), read_mistral, ("[ARGS]", "[CALL_ID]"), new_id=_short_id, ends_reasoning=True),
    "deepseek": Syntax(
        (TOOL_CALLS_BEGIN, TOOL_CALL_BEGIN), read_deepseek, (TOOL_CALLS_END, TOOL_CALL_END, TOOL_SEP),
        ends_reasoning=True,
    ),
    "kimi": Syntax(
        (SECTION_BEGIN, KIMI_BEGIN), read_kimi, (SECTION_END, KIMI_ARGUMENTS, KIMI_END), ends_reasoning=True
    ),
    "minimax": Syntax(("<minimax:tool_call>",), read_minimax),
    "glm": Syntax(("<tool_call>",), read_glm),
    "json": Syntax(("[",), read_json),
}  # fmt: skip
