"""Structural tags: free text in which tags hold to a form, in xgrammar's words, as rules of a grammar.

They come as JSON: `{"format": {...}}`, whose formats are made of one another, or, older, `{"structures": [...],
"triggers": [...]}`. Pure; knows nothing of tokens but the ids of added ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msi.errors import InvalidRequest, shown
from msi.structured_outputs import StructuredOutputs
from msi.text.grammar_text import FREE, lark_json, lark_regex, lark_text, list_of

MAX_REPEATS = 1000
MAX_DEPTH = 64
WITHOUT_SPACES = StructuredOutputs(json_object=True, disable_any_whitespace=True)
SOMETHING = None  # follows, and is no text by which free text could end
Ends = tuple[str, ...] | None  # texts, one of which follows, and belongs to what it ends; () where nothing does
NOT_BUILT = {
    "qwen_xml_parameter": "arguments between tags are written where tools are called",
    "exclude_token": "formats of single tokens are not built but token",
    "any_tokens": "formats of single tokens are not built but token",
    "token_triggered_tags": "formats of single tokens are not built but token",
    "token_dispatch": "formats of single tokens are not built but token",
}


def tag_grammar(text: str, special: Mapping[str, int], in_lark: Callable[[str], str]) -> tuple[str, dict[str, Any]]:
    """(a list of grammars, the JSON schemas in it by their places).

    Args:
        text: of the structural tag, in JSON.
        special: ids of the tokenizer's added tokens, by their texts.
        in_lark: makes Lark of GBNF.

    Raises:
        InvalidRequest: says where it is none, or what is not built.
    """
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong("the structural tag", f"is not valid JSON: {error}") from error
    rules = _Rules(special, in_lark)
    root = rules.write(*_format_of(asked), ())
    parts = [{"lark_grammar": "\n".join([f"start: {root}", *rules.rules])}, *rules.grammars]
    return list_of(parts), rules.schemas


def _format_of(asked: Any) -> tuple[dict[str, Any], str]:
    """The format, and the place where it stands."""
    if not isinstance(asked, dict):
        raise _wrong("the structural tag", f"is {shown(asked)}; it must be an object")
    if isinstance(inner := asked.get("format"), dict):
        return inner, "format"
    triggers, structures = asked.get("triggers"), asked.get("structures")
    if not isinstance(triggers, list) or not isinstance(structures, list):
        raise _wrong("the structural tag", 'has no format; it looks like {"format": {"type": "triggered_tags", ...}}')
    tags = [{**_object(one, f"structures[{at}]"), "type": "tag"} for at, one in enumerate(structures)]
    for at, tag in enumerate(tags):
        schema = tag.get("schema")
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise _wrong(f"structures[{at}].schema", f"is not valid JSON: {error}") from error
        tag["content"] = {"type": "json_schema", "json_schema": schema}
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}, "structures"


class _Rules:
    """Writes formats as rules.

    Attributes:
        rules: in Lark's syntax.
        grammars: that they name, for the list.
        schemas: JSON schemas in them, by their places.
    """

    def __init__(self, special: Mapping[str, int], in_lark: Callable[[str], str]) -> None:
        self.rules: list[str] = []
        self.grammars: list[dict[str, str]] = []
        self.schemas: dict[str, Any] = {}
        self._special = special
        self._in_lark = in_lark
        self._depth = 0

    def write(self, asked: Any, where: str, ends: Ends) -> str:
        """The name of a rule for a format and what ends it. Raises InvalidRequest."""
        kind = _object(asked, where).get("type")
        if isinstance(kind, str) and kind in NOT_BUILT:
            raise _wrong(where, f"has the type {kind}, which is not supported: {NOT_BUILT[kind]}")
        writer = getattr(self, f"_{kind}", None) if isinstance(kind, str) and kind in TYPES else None
        if writer is None:
            raise _wrong(where, f"has the type {shown(kind)}; it must be one of {', '.join(TYPES)}")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _wrong(where, f"is nested more than {MAX_DEPTH} levels deep")
        body: str = writer(asked, where, ends)
        self._depth -= 1
        if kind not in FREE_TEXT:
            body = self._ended(body, ends)
        return self._rule(body)

    # -- what is fixed -----------------------------------------------------------------------------------------------

    def _const_string(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        return self._text(_string(asked, "value", where))

    def _json_schema(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        _refuse(asked, where, style=("json",), any_order=(False,), excludes=([],))
        schema = asked.get("json_schema")
        if not isinstance(schema, dict | bool):
            raise _wrong(f"{where}.json_schema", f"is {shown(schema)}; it must be a JSON schema")
        schema = {} if schema is True else {"not": {}} if schema is False else schema
        self.schemas[f"{where}.json_schema"] = schema
        return lark_json(schema, WITHOUT_SPACES if asked.get("max_whitespace_cnt") == 0 else None)

    def _regex(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        _refuse(asked, where, excludes=([],))
        return lark_regex(_string(asked, "pattern", where))

    def _grammar(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        name = f"grammar{len(self.grammars)}"
        self.grammars.append(
            {"name": name, "lark_grammar": FREE + self._in_lark(_string(asked, "grammar", where))}
        )  # fmt: skip
        return f"@{name}"

    def _token(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        token = asked.get("token")
        if isinstance(token, str) and token in self._special:
            token = self._special[token]
        if type(token) is not int or token < 0:
            raise _wrong(f"{where}.token", f"is {shown(token)}; it must be a token id, or an added token's text")
        return f"<[{token}]>"

    # -- what is made of others --------------------------------------------------------------------------------------

    def _sequence(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        elements = _items(asked, "elements", where)
        found = []
        at = 0
        while at < len(elements):
            one, place = elements[at], f"{where}.elements[{at}]"
            at += 1
            if not _is_open(one):
                found.append(self.write(one, place, ()))
            elif at == len(elements):
                found.append(self.write(one, place, ends))
                return " ".join(found)
            else:
                text, rest = _opening(elements[at])
                found.append(self.write(one, place, (text,) if text else SOMETHING))
                elements = [*elements[:at], *([] if rest is None else [rest]), *elements[at + 1 :]]
        return self._ended(" ".join(found) or '""', ends)

    def _or(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        elements = _items(asked, "elements", where)
        return " | ".join(self.write(one, f"{where}.elements[{at}]", ends) for at, one in enumerate(elements))

    def _optional(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        return f"{self._inner(asked, where)}?"

    def _plus(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        return f"{self._inner(asked, where)}+"

    def _star(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        return f"{self._inner(asked, where)}*"

    def _repeat(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        least, most = asked.get("min"), asked.get("max")
        if type(least) is not int or type(most) is not int or not 0 <= least <= MAX_REPEATS or most > MAX_REPEATS:
            raise _wrong(where, f"has min {shown(least)} and max {shown(most)}; they are integers up to {MAX_REPEATS}")
        if most < 0:
            return f"{self._inner(asked, where)}{{{least},}}"
        if most < least:
            raise _wrong(where, f"has min {least} above max {most}")
        return f"{self._inner(asked, where)}{{{least},{most}}}"

    def _inner(self, asked: dict[str, Any], where: str) -> str:
        return self.write(asked.get("content"), f"{where}.content", SOMETHING)

    def _tag(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        begin = asked.get("begin")
        opening = self._text(begin) if isinstance(begin, str) else self.write(begin, f"{where}.begin", ())
        return f"{opening} {self._closed(asked, where)}"

    def _closed(self, tag: dict[str, Any], where: str) -> str:
        """A tag's content and its end."""
        end, content = tag.get("end"), tag.get("content")
        if isinstance(end, dict):
            token = self.write(end, f"{where}.end", ())
            end = next((text for text, at in self._special.items() if end.get("token") in (text, at)), None)
            if end is None:
                return f"{self.write(content, f'{where}.content', SOMETHING)} {token}"
        texts = (end,) if isinstance(end, str) else tuple(end) if isinstance(end, list) else ()
        if not texts or not all(isinstance(one, str) for one in texts):
            raise _wrong(f"{where}.end", f"is {shown(end)}; it must be a text, or an array of texts")
        return self.write(content, f"{where}.content", texts if all(texts) or not _is_open(content) else SOMETHING)

    def _tags_with_separator(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        tags = _items(asked, "tags", where)
        one = self._rule(" | ".join(self.write(tag, f"{where}.tags[{at}]", ()) for at, tag in enumerate(tags)))
        more = "" if asked.get("stop_after_first") else f" ({self._text(_string(asked, 'separator', where))} {one})*"
        return f"{one}{more}" if asked.get("at_least_one") else f"({one}{more})?"

    # -- free text ---------------------------------------------------------------------------------------------------

    def _any_text(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        _refuse(asked, where, max_tokens=())
        return self._free(asked, where, ends, asked.get("max_chars"))

    def _triggered_tags(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        """Where a trigger is written, one of the tags that begin with it goes on."""
        tags, triggers = _items(asked, "tags", where), _texts(asked, "triggers", where)
        behind: dict[str, list[str]] = {}
        whole = []
        for at, tag in enumerate(tags):
            place = f"{where}.tags[{at}]"
            begin = _string(_object(tag, place), "begin", place)
            fitting = [one for one in triggers if one and begin.startswith(one)]
            if len(fitting) != 1:
                raise _wrong(
                    f"{place}.begin", f"is {shown(begin)}; it must begin with one of the triggers, and with one"
                )
            closed = self._rule(self._closed(tag, place))
            behind.setdefault(fitting[0], []).append(f"{self._text(begin[len(fitting[0]) :])} {closed}")
            whole.append(f"{self._text(begin)} {closed}")
        first = f"({' | '.join(whole)})" if asked.get("at_least_one") else ""
        return self._dispatched(asked, where, behind, ends, is_loop=not asked.get("stop_after_first"), first=first)

    def _dispatch(self, asked: dict[str, Any], where: str, ends: Ends) -> str:
        """Where a pattern is written, its format goes on."""
        behind: dict[str, list[str]] = {}
        for at, rule in enumerate(_items(asked, "rules", where)):
            place = f"{where}.rules[{at}]"
            if not isinstance(rule, list) or len(rule) != 2 or not isinstance(rule[0], str) or not rule[0]:
                raise _wrong(place, "must be an array of a text and a format")
            behind.setdefault(rule[0], []).append(self.write(rule[1], f"{place}[1]", SOMETHING))
        return self._dispatched(asked, where, behind, ends, is_loop=asked.get("loop") is not False)

    def _dispatched(
        self, asked: dict[str, Any], where: str, behind: Mapping[str, Sequence[str]], ends: Ends, *, is_loop: bool,
        first: str = "",
    ) -> str:  # fmt: skip
        """Free text; what goes on behind each of some texts; free text again.

        Args:
            first: what comes before all else.
        """
        found = [f"{self._up_to(asked, where, (text,))} ({' | '.join(rests)})" for text, rests in behind.items()]
        tag = self._rule(" | ".join(found))
        if is_loop:
            return f"{first} {tag}* {self._rule(self._free(asked, where, ends))}"
        if first:
            return self._ended(first, ends)
        return f"{self._ended(tag, ends)} | {self._free(asked, where, ends)}"

    def _free(self, asked: dict[str, Any], where: str, ends: Ends, max_chars: Any = None) -> str:
        """Any text, and what ends it."""
        if ends is SOMETHING:
            raise _wrong(where, "is free text, which has to be the last, or to be followed by a text that ends it")
        return self._up_to(asked, where, ends, max_chars) if ends else self._terminal(asked, where, max_chars)

    def _up_to(self, asked: dict[str, Any], where: str, ends: Sequence[str], max_chars: Any = None) -> str:
        """Any text, up to the first of these and with it."""
        text, found, plain = self._terminal(asked, where, max_chars), [], []
        for end in ends:
            marks = [one for one in self._special if one and one in end]
            if not marks:
                plain.append(self._text(end))
            elif any(end.startswith(one) for one in marks):
                found.append(f"{text} {self._text(end)}")
            else:
                raise _wrong(where, f"ends at {shown(end)}, within which there is a token; it may begin with it")
        if plain:
            found.append(self._rule(f"{text} ({' | '.join(plain)})", "[lazy]"))
        return self._rule(" | ".join(found))

    def _terminal(self, asked: dict[str, Any], where: str, max_chars: Any) -> str:
        """Of any text but what is excluded."""
        if max_chars is not None and (type(max_chars) is not int or not 0 <= max_chars <= 1 << 20):
            raise _wrong(f"{where}.max_chars", f"is {shown(max_chars)}; it must be an integer from 0 to {1 << 20}")
        pattern = f"/(?s:.{'*' if max_chars is None else f'{{0,{max_chars}}}'})/"
        if excluded := [one for one in _texts(asked, "excludes", where) if one]:
            escaped = "|".join("".join(f"\\x{{{ord(one):x}}}" for one in text) for text in excluded)
            pattern += f" & ~/(?s:.*)({escaped})(?s:.*)/"
        name = f"T{len(self.rules)}"
        self.rules.append(f"{name}: {pattern}")
        return name

    # -- rules -------------------------------------------------------------------------------------------------------

    def _ended(self, body: str, ends: Ends) -> str:
        return f"({body}) ({' | '.join(map(self._text, ends))})" if ends else body

    def _text(self, text: str) -> str:
        return lark_text(text, self._special)

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name


FREE_TEXT = ("any_text", "triggered_tags", "dispatch", "sequence", "or")  # see to their ends themselves
TYPES = (
    "const_string", "json_schema", "regex", "grammar", "token", "sequence", "or", "optional", "plus", "star", "repeat",
    "tag", "tags_with_separator", "any_text", "triggered_tags", "dispatch",
)  # fmt: skip


def _is_open(asked: Any) -> bool:
    """Whether it ends with free text, of which only what follows tells where that ends."""
    if not isinstance(asked, dict):
        return False
    elements = asked.get("elements")
    kind = asked.get("type")
    if kind in ("sequence", "or") and isinstance(elements, list) and elements:
        return any(map(_is_open, elements if kind == "or" else elements[-1:]))
    return kind in ("any_text", "triggered_tags", "dispatch")


def _opening(asked: Any) -> tuple[str, dict[str, Any] | None]:
    """The text with which a format begins, "" where it has none; and what is left of it."""
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "const_string" and isinstance(asked.get("value"), str):
        return asked["value"], None
    if kind == "tag" and isinstance(asked.get("begin"), str) and asked["begin"]:
        return asked["begin"], {**asked, "begin": ""}
    return "", asked


# -- values ----------------------------------------------------------------------------------------------------------


def _object(asked: Any, where: str) -> dict[str, Any]:
    if not isinstance(asked, dict):
        raise _wrong(where, f"is {shown(asked)}; it must be an object")
    return asked


def _string(asked: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(value := asked.get(name), str):
        raise _wrong(f"{where}.{name}", f"is {shown(value)}; it must be a text")
    return value


def _items(asked: dict[str, Any], name: str, where: str) -> list[Any]:
    if not isinstance(value := asked.get(name), list) or not value:
        raise _wrong(f"{where}.{name}", f"is {shown(value)}; it must be an array that is not empty")
    return value


def _texts(asked: dict[str, Any], name: str, where: str) -> list[str]:
    value = asked.get(name) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _wrong(f"{where}.{name}", f"is {shown(value)}; it must be an array of texts")
    return value


def _refuse(asked: dict[str, Any], where: str, **neutral: Sequence[Any]) -> None:
    """Options that would change the answer and are not built."""
    for name, values in neutral.items():
        value = asked.get(name)
        if value is not None and value not in values:
            raise _wrong(f"{where}.{name}", f"is {shown(value)}, which is not built")


def _wrong(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{where} {what}", param="structured_outputs")
