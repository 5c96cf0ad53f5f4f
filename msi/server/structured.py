"""What a body asks an answer to be: response_format, vLLM's structured_outputs, and the guided_ fields before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from msi.errors import InvalidRequest, shown
from msi.server.field_table import ALWAYS_NEUTRAL
from msi.structured_outputs import StructuredOutputs
from msi.text.grammar_text import is_list

GUIDED = {  # older names, by what they are now
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
    "guided_json_object": "json_object", "structural_tag": "structural_tag",
}  # fmt: skip
FIELDS = frozenset({"response_format", "structured_outputs", "guided_whitespace_pattern", *GUIDED})
NAMES = (
    "json", "regex", "choice", "grammar", "json_object", "structural_tag", "whitespace_pattern",
    "disable_any_whitespace", "disable_additional_properties",
)  # fmt: skip
FORMATS = "text, json_object, json_schema or structural_tag"


def structured_outputs(values: Mapping[str, Any]) -> StructuredOutputs | None:
    """What a body asks for; None for any text. Raises InvalidRequest: names the field."""
    found = {name: value for name in FIELDS if (value := values.get(name)) not in ALWAYS_NEUTRAL}
    pattern = found.pop("guided_whitespace_pattern", "")
    asked = {name: _asked(name, value) for name, value in found.items()}
    asked = {name: one for name, one in asked.items() if one}
    if len(asked) > 1:
        raise InvalidRequest(
            f"{' and '.join(sorted(asked))} each say what the answer has to be; give one of them", param=min(asked)
        )
    for name, one in asked.items():
        if is_list(str(one.get("grammar", ""))):
            raise InvalidRequest(f"{name} is a list of grammars; give one, in Lark's syntax or in GBNF", param=name)
        try:
            return StructuredOutputs(**{"whitespace_pattern": pattern, **one})
        except InvalidRequest as error:
            raise InvalidRequest(str(error), param=name) from error
    return None


def field_of(values: Mapping[str, Any]) -> str:
    """The field that says what the answer has to be."""
    return next((name for name in sorted(FIELDS) if values.get(name) not in ALWAYS_NEUTRAL), "structured_outputs")


def _asked(name: str, value: Any) -> dict[str, Any]:
    """As vLLM's structured_outputs; {} for any text."""
    if name == "response_format":
        return _formatted(value)
    if name in GUIDED:
        return {GUIDED[name]: _value(GUIDED[name], value)}
    if not isinstance(value, dict):
        raise InvalidRequest(f"structured_outputs is {shown(value)}; it must be an object", param=name)
    asked = {}
    for key, one in value.items():
        if one is None or one is False:
            continue
        if key not in NAMES:
            why = f"which it does not have; it has {', '.join(NAMES)}"
            raise InvalidRequest(f"structured_outputs has {shown(key)}, {why}", param=name)
        asked[key] = _value(key, one)
    if (is_closed := asked.pop("disable_additional_properties", False)) not in (True, False):
        raise InvalidRequest(
            f"disable_additional_properties of structured_outputs is {shown(is_closed)}; it must be true or false",
            param=name,
        )
    if is_closed and isinstance(asked.get("json"), str):
        asked["json"] = _closed(asked["json"])
    return asked


def _closed(schema: str) -> str:
    """With no properties but those that it names, where it does not say otherwise, as vLLM."""
    try:
        values = orjson.loads(schema)
    except orjson.JSONDecodeError:
        return schema  # whoever compiles it says what is wrong
    left = [values]
    while left:
        one = left.pop()
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        if isinstance(one, dict) and ("properties" in one or "patternProperties" in one):
            one.setdefault("additionalProperties", False)
    return orjson.dumps(values).decode()


def _value(key: str, value: Any) -> Any:
    """JSON as text, choices as a tuple; all else as it is, to be checked where it is put together."""
    if key in ("json", "structural_tag") and not isinstance(value, str):
        try:
            return orjson.dumps(value).decode()
        except TypeError as error:
            raise InvalidRequest(f"{key} is no JSON: {error}", param="structured_outputs") from error
    return tuple(value) if isinstance(value, list) else value


def _formatted(value: Any) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    if kind == "structural_tag":
        return {"structural_tag": _value(kind, value)}
    if kind != "json_schema":
        raise InvalidRequest(f"response_format is {shown(value)}; its type must be {FORMATS}", param="response_format")
    inner = value.get("json_schema")
    schema = inner.get("schema", inner.get("json_schema")) if isinstance(inner, dict) else None
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(
            'response_format has no schema; it looks like {"type": "json_schema", "json_schema": {"name": "...", '
            '"schema": {...}}}',
            param="response_format",
        )
    return {"json": _value("json", schema)}
