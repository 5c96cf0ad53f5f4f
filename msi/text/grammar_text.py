"""Grammars as llguidance reads them: a list of them as JSON, in Lark's syntax or JSON schemas, the answer's first.

Pure; knows nothing of tokens but the ids of added ones, which no text stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from msi.errors import InvalidRequest
from msi.structured_outputs import StructuredOutputs

NATURAL = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}
COMPACT = {"whitespace_flexible": False}
JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
FREE = "// free\n"  # marks rules that a client wrote


def grammar_text(asked: StructuredOutputs) -> str:
    """Of the whole answer. Raises InvalidRequest: the schema is no JSON object."""
    return asked.grammar if is_list(asked.grammar) else list_of([part_of(asked)])


def grammar_behind(lark: str, asked: StructuredOutputs) -> str:
    """Of an answer that begins with something else.

    Args:
        lark: rules, of which `start` names what is asked for as `@answer`.
    """
    parts = _parts_of(asked.grammar) if is_list(asked.grammar) else [part_of(asked)]
    return list_of([{"lark_grammar": lark}, {**parts[0], "name": "answer"}, *parts[1:]])


def unforced(grammar: str) -> str:
    """The same, without the tokens that a tokenizer makes of text of which there is one way only."""
    first, *others = _parts_of(grammar)
    option = '%llguidance {"no_forcing": true}\n'
    if "lark_grammar" in first:
        return list_of([{**first, "lark_grammar": option + first["lark_grammar"]}, *others])
    return list_of([{"lark_grammar": f"{option}start: @answer"}, {**first, "name": "answer"}, *others])


def _parts_of(grammar: str) -> list[dict[str, Any]]:
    try:
        parts = json.loads(grammar)["grammars"]
    except (ValueError, KeyError, RecursionError) as error:
        raise InvalidRequest(f"the list of grammars is not valid JSON: {error}", param="structured_outputs") from error
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise InvalidRequest("grammars is no list of objects", param="structured_outputs")
    return parts


def list_of(parts: Iterable[Mapping[str, Any]]) -> str:
    return json.dumps({"grammars": list(parts)})


def is_list(grammar: str) -> bool:
    """Whether it is a list of grammars already."""
    return grammar.startswith('{"grammars":')


def has_free_rules(grammar: str) -> bool:
    """Whether a client wrote rules in it."""
    return json.dumps(FREE)[1:-1] in grammar


def part_of(asked: StructuredOutputs) -> dict[str, Any]:
    """One grammar of a list."""
    if asked.grammar:
        return {"lark_grammar": FREE + asked.grammar}
    if asked.regex:
        return {"lark_grammar": f"start: ANSWER\nANSWER: {lark_regex(asked.regex)}"}
    if asked.choice:
        return {"lark_grammar": f"start: ANSWER\nANSWER: {' | '.join(map(lark_string, asked.choice))}"}
    return {"json_schema": with_spaces(schema_of(asked), asked)}


def schema_of(asked: StructuredOutputs) -> dict[str, Any]:
    """The JSON schema that is asked for. Raises InvalidRequest: it is none."""
    if asked.json_object:
        return dict(JSON_OBJECT)
    try:
        schema = json.loads(asked.json)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the JSON schema is not valid JSON: {error}", param="structured_outputs") from error
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise InvalidRequest("a JSON schema is an object", param="structured_outputs")
    return schema


def with_spaces(schema: Mapping[str, Any], asked: StructuredOutputs | None = None) -> dict[str, Any]:
    """A schema that says which white space there may be, unless it does already."""
    spaces: dict[str, Any] = NATURAL
    if asked is not None and asked.disable_any_whitespace:
        spaces = COMPACT
    elif asked is not None and asked.whitespace_pattern:
        spaces = {"whitespace_pattern": asked.whitespace_pattern}
    own = schema.get("x-guidance")
    return {**schema, "x-guidance": {**spaces, **(own if isinstance(own, dict) else {})}}


# -- Lark ------------------------------------------------------------------------------------------------------------


def lark_string(text: str) -> str:
    """A literal."""
    return json.dumps(text, ensure_ascii=False)


def lark_json(schema: Mapping[str, Any], asked: StructuredOutputs | None = None) -> str:
    """JSON of a schema, as a rule's body; `asked` says which white space there may be."""
    return f"%json {json.dumps(with_spaces(schema, asked))}"


def lark_regex(pattern: str) -> str:
    """A literal of a regular expression."""
    quoted = re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    return "/" + quoted.replace("\n", "\\n").replace("\r", "\\r") + "/"


def lark_text(text: str, special: Mapping[str, int]) -> str:
    """A literal in which added tokens are named by their ids.

    Args:
        special: ids of the tokenizer's added tokens, by their texts.
    """
    if not (inside := [one for one in special if one and one in text]):
        return lark_string(text)
    marks = sorted(inside, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text)
    return " ".join(f"<[{special[piece]}]>" if piece in special else lark_string(piece) for piece in pieces if piece)
