"""GET /openapi.json: every endpoint in OpenAPI 3.1, its bodies made from the tables that read them.

Pure; knows no HTTP. A test fails where the gateway has an endpoint, or an endpoint a field, that is not described.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from msi.server import chat, completions
from msi.server.agent_schemas import ANSWERS, OF_MESSAGES, OF_RESPONSES, own_schemas
from msi.server.anthropic import request as anthropic
from msi.server.field_schemas import Schema, body_schema
from msi.server.field_table import (
    NOT_IN_CHATS,
    NOT_IN_COMPLETIONS,
    NOT_IN_DETOKENIZE,
    NOT_IN_TOKENIZE,
    NotDone,
)
from msi.server.responses import request as responses
from msi.server.tokenizing import TEXT_FIELDS, TOKEN_FIELDS

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
EVERYWHERE = (400, 401, 403, 405, 503)
OF_BODIES = (404, 408, 413, 415)
GENERATING = (429, 502)
LOGPROBS_SWITCH: Schema = {"type": ["boolean", "null"], "description": "Log-probabilities of the chosen tokens."}


def _object(required: str = "", **properties: Any) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
COUNT: Schema = {"type": "integer", "minimum": 0}
IDS: Schema = {"type": "array", "items": COUNT}
OBJECT_OR_NULL: Schema = {"type": ["object", "null"]}
PROMPT_LOGPROBS: Schema = {"type": "array", "items": OBJECT_OR_NULL}
REASON: Schema = {"enum": ["stop", "length", "tool_calls", None]}
OF_A_MODEL: dict[str, Schema] = {"id": STRING, "object": {"const": "model"}, "created": INTEGER, "max_model_len": COUNT}
HEAD: dict[str, Schema] = {"id": STRING, "object": STRING, "created": INTEGER, "model": STRING}


def _answer(choice: Schema, *, is_chunk: bool = False, **more: Schema) -> Schema:
    usage = {"anyOf": [_ref("Usage"), {"type": "null"}]} if is_chunk else _ref("Usage")
    required = "id object created model choices" + ("" if is_chunk else " usage")
    return _object(required, **HEAD, choices=_list(choice), usage=usage, **more)


SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        "error",
        error=_object(
            "message type param code",
            message=STRING,
            type=STRING,
            param=TEXT_OR_NULL,
            code={"type": ["string", "integer"]},
        ),
    ),
    "Usage": _object(
        "prompt_tokens completion_tokens total_tokens",
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=_object(cached_tokens=COUNT),
    ),
    "Completion": _answer(
        _object(
            "index text finish_reason",
            index=COUNT,
            text=STRING,
            finish_reason=REASON,
            logprobs=OBJECT_OR_NULL,
            prompt_logprobs=PROMPT_LOGPROBS,
            prompt_token_ids=IDS,
            token_ids=IDS,
        )
    ),
    "ChatCompletion": _answer(
        _object(
            "index message finish_reason",
            index=COUNT,
            finish_reason=REASON,
            logprobs=OBJECT_OR_NULL,
            token_ids=IDS,
            message=_object(
                "role content",
                role={"const": "assistant"},
                content=TEXT_OR_NULL,
                reasoning=STRING,
                reasoning_content=STRING,
                tool_calls=_list({"type": "object"}),
            ),
        ),
        prompt_logprobs=PROMPT_LOGPROBS,
        prompt_token_ids=IDS,
    ),
    "CompletionEvent": _answer(
        _object(
            "index text",
            index=COUNT,
            text=STRING,
            finish_reason=REASON,
            logprobs=OBJECT_OR_NULL,
            prompt_logprobs=PROMPT_LOGPROBS,
            prompt_token_ids=IDS,
            token_ids=IDS,
        ),
        is_chunk=True,
    ),
    "ChatCompletionEvent": _answer(
        _object(
            "index delta",
            index=COUNT,
            delta={"type": "object"},
            finish_reason=REASON,
            logprobs=OBJECT_OR_NULL,
            token_ids=IDS,
        ),
        is_chunk=True,
        prompt_logprobs=PROMPT_LOGPROBS,
        prompt_token_ids=IDS,
    ),
    "Models": _object("object data", object={"const": "list"}, data=_list(_ref("Model"))),
    "Model": _object("id object created", **OF_A_MODEL),
    "Tokens": _object(
        "count max_model_len tokens",
        count=COUNT,
        max_model_len=COUNT,
        tokens=_list(COUNT),
        token_strs={"type": ["array", "null"], "items": STRING},
    ),
    "Prompt": _object("prompt", prompt=STRING),
    "Health": _object("status", status=STRING),
    "Ready": _object("ready status", ready={"type": "boolean"}, status=STRING),
    "Version": _object("version", version=STRING),
    **ANSWERS,
}
OF_PAGE = ("/", "/v1/events")
MESSAGES_OWN = own_schemas(anthropic.FIELDS, OF_MESSAGES, anthropic.NO_MATTER)


@dataclass(frozen=True)
class Operation:
    """One method of a path.

    Attributes:
        answer: name of the schema of its answer; "" where it is no JSON.
        events: of those of its server-sent events.
        fields: of its body; None where it has none.
        not_here: fields of other endpoints.
        own: fields that look otherwise than in other bodies.
        statuses: of HTTP, besides 200 and those that each endpoint has.
        error: name of the schema of its errors.
        is_probe: asked without a key.
        ends_with_done: the last event of a stream is the word that OpenAI's end with.
    """

    summary: str
    answer: str = ""
    events: str = ""
    fields: Collection[str] | None = None
    not_here: Mapping[str, NotDone] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    own: Mapping[str, Schema] = field(default_factory=dict)
    statuses: tuple[int, ...] = ()
    error: str = "Error"
    media: str = JSON
    is_probe: bool = False
    ends_with_done: bool = False


OPERATIONS: dict[str, dict[str, Operation]] = {
    "/v1/completions": {
        "POST": Operation(
            "A text goes on; OpenAI's completions.", "Completion", "CompletionEvent", completions.FIELDS,
            NOT_IN_COMPLETIONS, ("prompt",), statuses=GENERATING, ends_with_done=True,
        )
    },
    "/v1/chat/completions": {
        "POST": Operation(
            "A chat goes on, through the model's template; OpenAI's chat completions.", "ChatCompletion",
            "ChatCompletionEvent", chat.FIELDS, NOT_IN_CHATS, ("messages",), {"logprobs": LOGPROBS_SWITCH}, GENERATING,
            ends_with_done=True,
        )
    },
    "/v1/responses": {
        "POST": Operation(
            "A chat in other words; OpenAI's Responses.", "Response", "ResponseEvent", responses.FIELDS,
            responses.NOT_IN_RESPONSES, ("input",), own_schemas(responses.FIELDS, OF_RESPONSES, set()), GENERATING,
        )
    },
    "/v1/messages": {
        "POST": Operation(
            "A chat in other words; Anthropic's Messages.", "Message", "MessageEvent", anthropic.FIELDS,
            anthropic.NOT_IN_MESSAGES, ("messages", "max_tokens"), MESSAGES_OWN, GENERATING, "MessageError",
        )
    },
    "/v1/messages/count_tokens": {
        "POST": Operation(
            "The tokens of such a chat; Anthropic's.", "MessageTokens", fields=anthropic.FIELDS,
            not_here=anthropic.NOT_IN_MESSAGES, required=("messages",), own=MESSAGES_OWN, error="MessageError",
        )
    },
    "/v1/stream": {
        "GET": Operation("A WebSocket with many requests; see msi/server/README.md.", media="", statuses=(101, 426))
    },
    "/tokenize": {
        "POST": Operation(
            "The tokens of a text, or of a chat; vLLM's.", "Tokens",
            fields=TEXT_FIELDS | (chat.FIELDS - {"logprobs", "tool_choice"}), not_here=NOT_IN_TOKENIZE,
        )
    },
    "/detokenize": {
        "POST": Operation(
            "The text of tokens; vLLM's.", "Prompt", fields=TOKEN_FIELDS, not_here=NOT_IN_DETOKENIZE,
            required=("tokens",),
        )
    },
    "/v1/models": {"GET": Operation("What is served.", "Models")},
    "/v1/models/{model}": {"GET": Operation("The same of one model, by its name.", "Model", statuses=(404,))},
    "/health": {"GET": Operation("Whether the process lives.", "Health", is_probe=True)},
    "/ready": {"GET": Operation("Whether requests are taken; 503 says why not.", "Ready", is_probe=True)},
    "/version": {"GET": Operation("The server's version.", "Version", is_probe=True)},
    "/metrics": {"GET": Operation("Prometheus metrics.", media=TEXT)},
    "/": {"GET": Operation("A page that shows the instance at work.", media="text/html", is_probe=True)},
    "/v1/events": {"GET": Operation("What that page shows, as server-sent events.", media=EVENTS)},
    "/openapi.json": {"GET": Operation("This description.", media=JSON)},
}  # fmt: skip


def description(version: str, *, needs_key: bool = False, has_page: bool = True) -> dict[str, Any]:
    """The whole document.

    Args:
        needs_key: every request but probes needs one.
        has_page: whether the page and its events are served.
    """
    paths = {
        path: {method.lower(): _operation(path, one, needs_key) for method, one in methods.items()}
        for path, methods in OPERATIONS.items()
        if has_page or path not in OF_PAGE
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MegaScale-Infer, open",
            "version": version,
            "description": "Fields that a body may have and that are not named here are ignored.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _event(said: Schema, error: Schema, *, ends_with_done: bool) -> Schema:
    """Of each server-sent event: what its data hold. A stream that has begun tells of its failure so, too."""
    data: Schema = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": [said, error]}}
    if ends_with_done:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    return _object("data", event=STRING, data=data)


def _operation(path: str, one: Operation, needs_key: bool) -> dict[str, Any]:
    statuses = {*EVERYWHERE, *(OF_BODIES if one.fields is not None else ()), *one.statuses}
    responses: dict[str, Any] = {}
    if one.media:
        content = {one.media: {"schema": _ref(one.answer)} if one.answer else {}}
        if one.events:
            content[EVENTS] = {"schema": _event(_ref(one.events), _ref(one.error), ends_with_done=one.ends_with_done)}
        responses["200"] = {"description": "The answer.", "content": content}
    for status in sorted(statuses):
        schema = _ref("Ready") if status == 503 and one.answer == "Ready" else _ref(one.error)
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": {JSON: {"schema": schema}}}
    operation: dict[str, Any] = {"summary": one.summary, "responses": responses}
    if names := re.findall(r"{(\w+)}", path):
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": STRING} for name in names]
    if one.fields is not None:
        schema = body_schema(one.fields, one.not_here, one.required, one.own)
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if needs_key:
        operation["security"] = [{}] if one.is_probe else [{"key": []}]
    return operation
