"""How models write calls of tools, as grammars: what fits one is what the family's reader in `syntaxes.py` reads back.

Arguments are held to the tool's JSON schema. Families that write each argument between tags write texts as they are: of
a text's schema its enum, its lengths and its pattern count there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.server.parsing.choice import JSON_CALLS, TOOL_PARSERS, is_harmony
from msi.server.parsing.syntaxes import (
    KIMI_ARGUMENTS,
    KIMI_BEGIN,
    KIMI_END,
    SECTION_BEGIN,
    SECTION_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEP,
)
from msi.text.grammar_text import lark_json, lark_regex, lark_string, lark_text

MOST_CALLS = 16  # of one answer, so that it comes to its end
MAX_REFS = 8  # one behind another
NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
KEY = re.compile(r"[^\s<>\"'=/]{1,128}")
INDEX = "{index}"
NO_ARGUMENTS = {"properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Form:
    """The texts around what varies; `INDEX` stands for a call's number.

    Attributes:
        parameter: before an argument's name, behind it, and behind its value; None where arguments are one JSON object.
    """

    before: str  # the name
    named: str  # behind it
    after: str  # the arguments
    begin: str = ""  # before all calls
    between: str = ""
    end: str = ""  # behind all
    parameter: tuple[str, str, str] | None = None


HERMES = Form('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", between="\n")
MISTRAL = Form('{"name": "', '", "arguments": ', "}", begin="[TOOL_CALLS] [", between=", ", end="]")
MISTRAL_NEW = Form("[TOOL_CALLS]", "[ARGS]", "")
DEEPSEEK_V3 = Form(
    f"{TOOL_CALL_BEGIN}function{TOOL_SEP}", "\n```json\n", f"\n```{TOOL_CALL_END}",
    begin=TOOL_CALLS_BEGIN, between="\n", end=TOOL_CALLS_END,
)  # fmt: skip
DEEPSEEK = Form(TOOL_CALL_BEGIN, TOOL_SEP, TOOL_CALL_END, begin=TOOL_CALLS_BEGIN, end=TOOL_CALLS_END)
KIMI = Form(
    f"{KIMI_BEGIN}functions.", f":{INDEX}{KIMI_ARGUMENTS}", KIMI_END, begin=SECTION_BEGIN, end=SECTION_END
)  # fmt: skip
HARMONY = Form(
    "<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "<|call|>", between="<|start|>assistant"
)
JSON = Form('{"name": "', '", "parameters": ', "}", begin="[", between=", ", end="]")
QWEN_XML = Form(
    "<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", between="\n",
    parameter=("<parameter=", ">\n", "\n</parameter>\n"),
)  # fmt: skip
MINIMAX = Form(
    '<invoke name="', '">\n', "</invoke>\n", begin="<minimax:tool_call>\n", end="</minimax:tool_call>",
    parameter=('<parameter name="', '">', "</parameter>\n"),
)  # fmt: skip
GLM = Form(
    "<tool_call>", "\n", "</tool_call>", between="\n",
    parameter=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
)  # fmt: skip
FORMS = {
    "hermes": HERMES, "mistral": MISTRAL, "deepseek": DEEPSEEK, "kimi": KIMI, "qwen3_xml": QWEN_XML,
    "minimax": MINIMAX, "glm": GLM,
}  # fmt: skip


def form_of(parser: str, templates: Iterable[str], special: Mapping[str, int]) -> Form:
    """How a model writes calls.

    Args:
        parser: name of the calls' syntax.
        templates: of chats; of two forms of a family, they show which.
        special: ids of the tokenizer's added tokens, by their texts.
    """
    if is_harmony(parser):
        return HARMONY
    if parser == JSON_CALLS:
        return JSON
    syntax, text = TOOL_PARSERS[parser], "\n".join(templates)
    if syntax == "deepseek" and (parser == "deepseek_v3" and "```json" in text):
        return DEEPSEEK_V3
    if syntax == "mistral" and ("[ARGS]" in text or "[ARGS]" in special):
        return MISTRAL_NEW
    return FORMS[syntax]


def calls_rules(form: Form, tools: Mapping[str, Any], *, is_one: bool, special: Mapping[str, int]) -> str:
    """Rules in Lark's syntax, of which `calls` is one call of these tools, or several.

    Args:
        tools: their parameters' JSON schemas, by name; None for none.

    Raises:
        InvalidRequest: a name that cannot be written.
    """
    return _Rules(form, special).calls(tools, 1 if is_one else MOST_CALLS)


class _Rules:
    def __init__(self, form: Form, special: Mapping[str, int]) -> None:
        self._form = form
        self._special = special
        self._lines: list[str] = []

    def calls(self, tools: Mapping[str, Any], most: int) -> str:
        form = self._form
        for at, (name, schema) in enumerate(tools.items()):
            if not NAME.fullmatch(name):
                raise InvalidRequest(
                    f"calls of tool {shown(name)} cannot be held to a grammar; its name must be 1 to 128 of "
                    "A-Z a-z 0-9 _ . -",
                    param="tools",
                )
            self._arguments(at, schema if isinstance(schema, dict) else {})
        if INDEX in form.named:
            rest = ""
            for index in reversed(range(most)):
                self._call(f"call{index}", tools, str(index))
                rest = f"call{index} ({rest})?" if rest else f"call{index}"
            body = rest
        else:
            self._call("call", tools, "")
            body = f"call ({self._text(form.between)} call){{0,{most - 1}}}" if most > 1 else "call"
        return "\n".join([f"calls: {self._text(form.begin)} {body} {self._text(form.end)}", *self._lines])

    def _call(self, rule: str, tools: Iterable[str], index: str) -> None:
        form = self._form
        kinds = [
            f"{self._text(form.before + name + form.named.replace(INDEX, index))} arguments{at} "
            f"{self._text(form.after)}"
            for at, name in enumerate(tools)
        ]
        self._lines.append(f"{rule}: {' | '.join(kinds)}")

    def _arguments(self, at: int, schema: dict[str, Any]) -> None:
        if self._form.parameter is None:
            self._lines.append(f"arguments{at}: {lark_json({**(schema or NO_ARGUMENTS), 'type': 'object'})}")
            return
        before, named, _ = self._form.parameter
        properties = schema.get("properties")
        required = schema.get("required")
        rules = []
        for number, (key, inner) in enumerate((properties if isinstance(properties, dict) else {}).items()):
            if not KEY.fullmatch(key):
                raise InvalidRequest(
                    f"parameter {shown(key)} cannot be held to a grammar; this model writes names between tags, so "
                    "they have no white space, quotes, brackets, = or /",
                    param="tools",
                )
            rule = f"argument{at}_{number}"
            self._value(f"value{at}_{number}", inner, schema)
            self._lines.append(f"{rule}: {self._text(before + key + named)} value{at}_{number}")
            is_required = isinstance(required, list) and key in required
            rules.append(rule if is_required else f"{rule}?")
        self._lines.append(f"arguments{at}: {' '.join(rules) or lark_string('')}")

    def _value(self, rule: str, schema: Any, root: Mapping[str, Any]) -> None:
        """One argument, and the text behind it."""
        assert self._form.parameter is not None
        closing = self._form.parameter[2]
        kinds = []
        for number, kind in enumerate(_kinds_of(schema, root)):
            name = f"{rule}_{number}"
            if isinstance(kind, str):
                self._lines.append(f"{name}: {lark_string(kind)} {self._text(closing)}")
            elif kind.get("type") == "string":
                self._raw_text(name, kind, closing)
            else:
                names = {one: root[one] for one in ("$defs", "definitions") if one in root}
                self._lines.append(f"{name}: {lark_json({**names, **kind})} {self._text(closing)}")
            kinds.append(name)
        self._lines.append(f"{rule}: {' | '.join(kinds)}")

    def _raw_text(self, rule: str, schema: Mapping[str, Any], closing: str) -> None:
        """A text as it is: lazily, up to where its tag is closed."""
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        length = f"(?s:.{{{least},{most}}})" if least or most != "" else "(?s:.*)"
        terminal = rule.upper()
        conditions = [lark_regex(length)]
        if isinstance(pattern := schema.get("pattern"), str):
            conditions.append(lark_regex(_anywhere(pattern)))
        mark = next((one for one in self._special if one in closing), "")
        tag = closing.strip()
        if not mark:
            conditions.append(f"~{lark_regex(f'(?s:.*){re.escape(tag)}(?s:.*)')}")
        self._lines.append(f"{terminal}: {' & '.join(conditions)}")
        if mark:
            self._lines.append(f"{rule}: {terminal} {self._text(closing)}")
        else:
            self._lines.append(f"{rule}[lazy]: {terminal} {lark_string(closing)}")

    def _text(self, text: str) -> str:
        return lark_text(text, self._special) if text else ""


def _kinds_of(schema: Any, root: Mapping[str, Any]) -> list[Any]:
    """What an argument may be: texts, which stand as they are, and schemas, of strings or of anything else."""
    schema = _resolved(schema, root)
    if not isinstance(schema, dict):
        return [{"type": "string"}]
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return [one if isinstance(one, str) else json.dumps(one) for one in values]
    for name in ("anyOf", "oneOf"):
        if isinstance(inner := schema.get(name), list) and inner:
            return [kind for one in inner for kind in _kinds_of(one, root)]
    types = schema.get("type")
    if isinstance(types, list) and "string" in types and len(types) > 1:
        return [{**schema, "type": "string"}, {**schema, "type": [one for one in types if one != "string"]}]
    if isinstance(types, list) and types == ["string"]:
        return [{**schema, "type": "string"}]
    return [{**schema, "type": "string"}] if types is None and "allOf" not in schema else [schema]


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """Behind references to definitions of the same schema."""
    for _ in range(MAX_REFS):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        found: Any = root
        for part in reference[2:].split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if found is None:
            break
        schema = found
    return schema


def _anywhere(pattern: str) -> str:
    """A pattern of JSON schema, which may stand anywhere unless it is anchored, for the whole of a text."""
    begin = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    return f"{begin}({pattern.removeprefix('^')[: -1 if not end else None]}){end}"
