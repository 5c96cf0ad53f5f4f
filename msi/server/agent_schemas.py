"""JSON schemas of what agents' endpoints take and answer, where that differs from a chat's. Pure; knows no HTTP."""

from __future__ import annotations

from typing import Any

from msi.server.field_schemas import FIELDS, Schema

OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}


def _said(kind: str | list[str], meaning: str, **more: Any) -> Schema:
    return {"type": kind, "description": meaning, **more}


_LENGTH: Schema = {"minimum": 1}
TEXT_OR_BLOCKS: Schema = {"anyOf": [{"type": ["string", "null"]}, OBJECTS]}
OF_RESPONSES: dict[str, Schema] = {
    "input": {
        "description": "A text; or items: message, reasoning, function_call, function_call_output.",
        "anyOf": [{"type": "string"}, {**OBJECTS, "minItems": 1}],
    },
    "instructions": _said(["string", "null"], "What the system says first."),
    "max_output_tokens": _said(["integer", "null"], "The most tokens to generate.", **_LENGTH),
    "max_tool_calls": _said(["integer", "null"], "Of tools that a server runs: there are none."),
    "tools": {**OBJECTS, "type": ["array", "null"], "description": "Functions that the client runs."},
    "reasoning": _said(["object", "null"], "effort, for the template; none is not to think."),
    "text": _said(["object", "null"], "format: what the answer looks like."),
    "include": _said(["array", "null"], "What else is told.", items={"type": "string"}),
    "stream_options": _said(["object", "null"], "None of them changes anything."),
    "truncation": _said(
        ["string", "null"],
        "auto leaves out the oldest turns of an input that does not fit the context; disabled.",
        enum=["auto", "disabled", None],
    ),
}
OF_MESSAGES: dict[str, Schema] = {
    "messages": {**OBJECTS, "minItems": 1, "description": "Of blocks: text, thinking, tool_use, tool_result."},
    "max_tokens": _said("integer", "The most tokens to generate.", **_LENGTH),
    "system": {**TEXT_OR_BLOCKS, "description": "What the system says first."},
    "stop_sequences": {**FIELDS["stop"], "description": "Strings that end the text; the answer names the one."},
    "tools": {**OBJECTS, "type": ["array", "null"], "description": "Tools that the client runs, with input_schema."},
    "tool_choice": _said(["object", "null"], "Whether tools are called: auto, any, tool or none."),
    "thinking": _said(["object", "null"], "Whether the model thinks first: enabled, adaptive or disabled."),
    "output_config": _said(["object", "null"], "effort, for the template; format: what the answer looks like."),
    "output_format": _said(["object", "null"], "What the answer looks like."),
    "context_management": _said(["object", "null"], "All of the messages are used: only edits that keep all."),
}


def own_schemas(fields: frozenset[str] | set[str], own: dict[str, Schema], ignored: set[str]) -> dict[str, Schema]:
    """Of an endpoint's fields, those that are described here."""
    found = {name: schema for name, schema in own.items() if name in fields}
    return found | {name: {"description": "Ignored."} for name in ignored}


_STRING: Schema = {"type": "string"}
_COUNTS: Schema = {"type": "object", "additionalProperties": True}
_REASONS = ["end_turn", "max_tokens", "stop_sequence", "tool_use", None]


def _object(required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


ANSWERS: dict[str, Schema] = {
    "Response": _object(
        "id object created_at model status output",
        id=_STRING,
        object={"const": "response"},
        created_at={"type": "integer"},
        model=_STRING,
        status={"enum": ["in_progress", "completed", "incomplete", "failed"]},
        output=OBJECTS,
        usage={"type": ["object", "null"]},
    ),
    "ResponseEvent": _object("type sequence_number", type=_STRING, sequence_number={"type": "integer"}),
    "Message": _object(
        "id type role model content stop_reason stop_sequence usage",
        id=_STRING,
        type={"const": "message"},
        role={"const": "assistant"},
        model=_STRING,
        content=OBJECTS,
        stop_reason={"enum": _REASONS},
        stop_sequence={"type": ["string", "null"]},
        usage=_COUNTS,
    ),
    "MessageEvent": _object("type", type=_STRING),
    "MessageTokens": _object("input_tokens", input_tokens={"type": "integer", "minimum": 0}),
    "MessageError": _object(
        "type error", type={"const": "error"}, error=_object("type message", type=_STRING, message=_STRING)
    ),
}
