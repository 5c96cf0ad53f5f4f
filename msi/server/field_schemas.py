"""JSON schemas of the fields that bodies may have: of the sampler's from `SamplingParams`, the others by a table.

A field's type, its meaning and its bounds stand once: sampling parameters say theirs themselves, and what is refused or
ignored says so in `msi.server.field_table`. Pure; knows no HTTP.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from msi.sampling_params import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_INTEGER,
    MAX_LISTED_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    SamplingParams,
)
from msi.server.field_table import ALWAYS_NEUTRAL, IGNORED, NOT_DONE, NotDone
from msi.server.fields import MAX_SALT_CHARS
from msi.types import MAX_PRIORITY, MAX_TIMEOUT_S

Schema = dict[str, Any]

JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", types.NoneType: "null"}
BOUNDS: dict[str, Schema] = {  # of sampling parameters; a test holds them against what is refused
    "temperature": {"minimum": 0, "maximum": MAX_TEMPERATURE},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": MAX_INTEGER},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"minimum": MIN_REPETITION_PENALTY, "maximum": 100},
    "min_tokens": {"minimum": 0},
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "stop_token_ids": {"maxItems": MAX_LISTED_TOKENS},
    "allowed_token_ids": {"maxItems": MAX_ALLOWED_TOKENS},
    "bad_words": {"maxItems": MAX_BAD_WORDS},
    "logit_bias": {"maxProperties": MAX_LISTED_TOKENS},
}
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
MESSAGE: Schema = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "minLength": 1, "maxLength": 64},
        "content": {
            "anyOf": [
                {"type": ["string", "null"]},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
            ]
        },
        "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_call_id": {"type": ["string", "null"]},
    },
}
TOOL: Schema = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
            },
        },
    },
}

JSON_SCHEMA: Schema = {"type": ["object", "boolean"]}
GUIDED = "The older name of {} in structured_outputs."


def _switch(meaning: str) -> Schema:
    return {"type": ["boolean", "null"], "description": meaning}


FIELDS: dict[str, Schema] = {  # what is no sampling parameter, or looks otherwise in a body
    "model": {"type": ["string", "null"], "description": "Its name, as /v1/models says; may be left out."},
    "prompt": {
        "description": "A text, token ids, or an array of such prompts.",
        "anyOf": [
            {"type": "string"},
            TOKEN_IDS,
            {"type": "array", "items": {"anyOf": [{"type": "string"}, TOKEN_IDS]}, "minItems": 1},
        ],
    },
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1, "description": "The chat so far."},
    "stream": _switch("The answer comes in server-sent events."),
    "stream_options": {
        "type": ["object", "null"],
        "description": 'Only with "stream": true.',
        "properties": {
            "include_usage": _switch("A last event tells usage."),
            "continuous_usage_stats": _switch("With the former: every event tells usage so far."),
        },
    },
    "stop": {
        "description": "Strings that end the text; they are not part of it.",
        "anyOf": [
            {"type": ["string", "null"]},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOP_STRINGS},
        ],
    },
    "logit_bias": {
        "type": ["object", "null"],
        "description": "Token id to what is added to its logit.",
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "add_special_tokens": _switch("Whether the tokenizer puts its own around the text."),
    "echo": _switch("The prompt comes before the text."),
    "best_of": {"type": ["integer", "null"], "description": "As n: all choices are given, none is judged."},
    "max_completion_tokens": {"type": ["integer", "null"], "description": "OpenAI's newer name of max_tokens."},
    "top_logprobs": {
        "type": ["integer", "null"],
        "minimum": 0,
        "maximum": MAX_LOGPROBS,
        "description": 'How many of the most probable tokens are told of; with "logprobs": true.',
    },
    "add_generation_prompt": _switch("As in transformers."),
    "continue_final_message": _switch("As in transformers."),
    "chat_template_kwargs": {"type": ["object", "null"], "description": "More for the template."},
    "reasoning_effort": {"type": ["string", "null"], "description": "For the template."},
    "documents": {"type": ["array", "null"], "items": {"type": "object"}, "description": "For the template."},
    "tools": {"type": ["array", "null"], "items": TOOL, "description": "Functions that the model may call."},
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required", "", None]},
            {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
                },
            },
        ],
        "description": "Whether tools are called: as the model likes, or one of them, or the one that is named.",
    },
    "parallel_tool_calls": _switch("false: one call only."),
    "response_format": {
        "type": ["object", "null"],
        "description": "JSON of a schema, any JSON object, or a structural tag.",
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
            "json_schema": {
                "type": "object",
                "required": ["schema"],
                "properties": {
                    "name": {"type": "string"},
                    "strict": {"type": ["boolean", "null"]},
                    "schema": JSON_SCHEMA,
                },
            },
            "format": {"type": "object", "description": "Of a structural tag."},
        },
    },
    "structured_outputs": {
        "type": ["object", "null"],
        "description": "What the answer has to be: json, regex, choice, grammar, json_object or structural_tag.",
        "properties": {
            "json": {"anyOf": [JSON_SCHEMA, {"type": ["string", "null"]}]},
            "regex": {"type": ["string", "null"]},
            "choice": {"type": ["array", "null"], "items": {"type": "string"}},
            "grammar": {"type": ["string", "null"]},
            "json_object": {"type": ["boolean", "null"]},
            "structural_tag": {"type": ["string", "object", "null"]},
            "whitespace_pattern": {"type": ["string", "null"]},
            "disable_any_whitespace": {"type": ["boolean", "null"]},
            "disable_additional_properties": {"type": ["boolean", "null"]},
        },
    },
    "guided_json": {"anyOf": [JSON_SCHEMA, {"type": ["string", "null"]}], "description": GUIDED.format("json")},
    "guided_regex": {"type": ["string", "null"], "description": GUIDED.format("regex")},
    "guided_choice": {
        "type": ["array", "null"],
        "items": {"type": "string"},
        "description": GUIDED.format("choice"),
    },
    "guided_grammar": {"type": ["string", "null"], "description": GUIDED.format("grammar")},
    "guided_json_object": _switch(GUIDED.format("json_object")),
    "guided_whitespace_pattern": {
        "type": ["string", "null"],
        "description": GUIDED.format("whitespace_pattern"),
    },
    "structural_tag": {"type": ["string", "object", "null"], "description": GUIDED.format("structural_tag")},
    "include_reasoning": _switch("false leaves out what the model thought."),
    "priority": {
        "type": ["integer", "null"],
        "minimum": -MAX_PRIORITY,
        "maximum": MAX_PRIORITY,
        "description": "Lower is earlier, and is not preempted for what is higher.",
    },
    "timeout_s": {
        "type": ["number", "null"],
        "exclusiveMinimum": 0,
        "maximum": MAX_TIMEOUT_S,
        "description": "The whole answer comes in so many seconds, or ends with an error (408).",
    },
    "cache_salt": {
        "type": ["string", "null"],
        "maxLength": MAX_SALT_CHARS,
        "description": "Only requests with the same one find each other's prefixes in the cache.",
    },
    "return_token_ids": _switch("Token ids of prompt and answer."),
    "return_tokens_as_token_ids": _switch('Log-probabilities name tokens as "token_id:N".'),
    "return_token_strs": _switch("Each token's name, too."),
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}, "description": "Token ids."},
}


def body_schema(
    taken: Collection[str],
    not_here: Mapping[str, NotDone],
    required: Collection[str] = (),
    own: Mapping[str, Schema] | None = None,
) -> Schema:
    """Of an endpoint's body: what it reads, and what it would refuse or ignore.

    Args:
        taken: fields that it reads.
        not_here: fields that belong to another endpoint.
        own: fields that look otherwise here.
    """
    properties = {name: (own or {}).get(name) or field_schema(name) for name in sorted(taken)}
    refused = {**NOT_DONE, **not_here}
    for name in sorted(refused.keys() - set(taken)):
        one = refused[name]
        properties[name] = {"description": f"Not done: {one.what}.", "enum": [*ALWAYS_NEUTRAL, *one.neutral]}
    for name in sorted(IGNORED - properties.keys()):
        properties[name] = {"description": "Ignored."}
    return {"type": "object", "required": list(required), "properties": properties}


def field_schema(name: str) -> Schema:
    """Of a field that is read; without a type where nobody has described it, which a test finds."""
    if name in FIELDS:
        return FIELDS[name] | BOUNDS.get(name, {})
    if name in _PARAMS:
        return _type_schema(_PARAMS[name]) | BOUNDS.get(name, {}) | {"description": _MEANINGS.get(name, "")}
    return {}


def _type_schema(hint: Any) -> Schema:
    """In a body, null is as good as absent."""
    if typing.get_origin(hint) is tuple:
        return {"type": ["array", "null"], "items": {"type": JSON_TYPES[typing.get_args(hint)[0]]}}
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {"type": [*dict.fromkeys([*(JSON_TYPES[kind] for kind in kinds), "null"])]}


def meanings(documented: type) -> dict[str, str]:
    """What a docstring's "Attributes:" say, by name."""
    section = (documented.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if head := re.fullmatch(r" {8}([a-z_]+(?:, [a-z_]+)*): (.*)", line):
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


_PARAMS = {
    name: hint for name, hint in typing.get_type_hints(SamplingParams).items() if name != "bad_words_token_ids"
}  # bad_words are what a body has
_MEANINGS = meanings(SamplingParams)
