"""The tools that a request declares: whether a call is one of theirs, and of what type its arguments are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from msi.server.parsing.deltas import Call
from msi.server.parsing.source import NotACall

MAX_SCHEMA_DEPTH = 8
TYPES: dict[type, tuple[str, ...]] = {
    bool: ("boolean",), int: ("integer", "number"), float: ("number",), list: ("array",), dict: ("object",),
    type(None): ("null",), str: ("string",),
}  # fmt: skip
PYTHONS = {"True": True, "False": False}  # as some models write them


class Tools:
    """By name.

    Args:
        schemas: of each tool's parameters, in JSON schema.
    """

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas

    def check(self, name: object) -> str:
        """A name that was declared. Raises NotACall."""
        if not isinstance(name, str) or name not in self._schemas:
            raise NotACall
        return name

    def called(self, text: str) -> Call:
        """From {"name": ..., "arguments": {...}}. Raises NotACall."""
        value = loads(text)
        if not isinstance(value, dict):
            raise NotACall
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, str):
            arguments = loads(arguments)
        return self.call(value.get("name"), {} if arguments is None else arguments)

    def call(self, name: object, arguments: object, call_id: str = "") -> Call:
        """Raises NotACall: there is no such tool, or its arguments are no JSON object."""
        name = self.check(name)
        if not isinstance(arguments, dict):
            raise NotACall
        return Call(name, dumps(arguments), call_id)

    def typed(self, name: str, parameter: str, text: str) -> Any:
        """An argument that was written as text, in the type that the schema names; as text where it is of none."""
        schema = self._schemas.get(name)
        properties = schema.get("properties") if isinstance(schema, dict) else None
        if not isinstance(properties, dict) or parameter not in properties:
            return text
        types = set(_types(properties[parameter]))
        if types and not types - {"string", "null"}:
            return None if "null" in types and text.strip() == "null" else text
        try:
            value = loads(text.strip())
        except NotACall:
            value = PYTHONS.get(text.strip(), text) if types else text
        if isinstance(value, str):
            return text
        if isinstance(value, float) and value.is_integer() and "number" not in types:
            value = int(value)
        return value if not types or types & set(TYPES[type(value)]) else text


def _types(schema: Any, depth: int = 0) -> Iterator[str]:
    """Names of the types that a schema allows; none where it does not say."""
    if not isinstance(schema, dict) or depth > MAX_SCHEMA_DEPTH:
        return
    named = schema.get("type")
    yield from (one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str))
    values = schema.get("enum")
    for value in [*(values if isinstance(values, list) else ()), *([schema["const"]] if "const" in schema else ())]:
        yield from TYPES[type(value)] if named is None else ()
    for combined in ("anyOf", "oneOf"):
        inner = schema.get(combined)
        for one in inner if isinstance(inner, list) else ():
            yield from _types(one, depth + 1)


def loads(text: str) -> Any:
    """JSON in which strings may hold line breaks, as models write them. Raises NotACall."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NotACall from error


def dumps(value: Any) -> str:
    """JSON that any reader takes. Raises NotACall: a number that JSON has no form for."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise NotACall from error
    return text


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
