"""GET /openapi.json says what is there: every endpoint, every field, and only bounds that hold."""

from __future__ import annotations

import dataclasses
import json

import aiohttp
import jsonschema
import pytest

import msi
from msi.errors import InvalidRequest
from msi.sampling_params import SamplingParams
from msi.server import chat, completions, tokenizing
from msi.server.calls import STATUS_OF
from msi.server.field_schemas import BOUNDS, field_schema, meanings
from msi.server.field_table import ALWAYS_NEUTRAL, NOT_DONE
from msi.server.gateway import PROBES, Gateway
from msi.server.openapi import OPERATIONS, SCHEMAS, description
from tests.edge import gateway, with_template

FIELDS = completions.FIELDS | chat.FIELDS | tokenizing.TEXT_FIELDS | tokenizing.TOKEN_FIELDS


def endpoints(served: Gateway):
    return {(path, method) for path, methods in served._handlers.items() for method in methods}


async def test_every_endpoint_is_described_and_nothing_else(tiny_model):
    seen = []

    class Seen(Gateway):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            seen.append(self)

    async with (
        gateway(tiny_model, kind=Seen) as (_, url),
        aiohttp.ClientSession() as session,
        session.get(f"{url}/openapi.json") as response,
    ):
        assert response.status == 200
        document = await response.json()
    assert document == json.loads(json.dumps(description(msi.__version__)))
    described = {(path, method) for path, methods in OPERATIONS.items() for method in methods}
    missing = endpoints(seen[0]) - described
    assert not missing, f"msi/server/openapi.py does not describe {missing}: add them to OPERATIONS"
    assert described == endpoints(seen[0])


def test_every_field_is_described():
    bare = [name for name in sorted(FIELDS) if not field_schema(name).get("description")]
    assert not bare, f"msi/server/field_schemas.py says nothing of {bare}"
    assert {one.name for one in dataclasses.fields(SamplingParams)} == set(meanings(SamplingParams))


def test_every_field_of_agents_is_described():
    for path in ("/v1/responses", "/v1/messages", "/v1/messages/count_tokens"):
        one = OPERATIONS[path]["POST"]
        assert set(one.own) <= set(one.fields), "nothing is described that is not read"
        bare = [name for name in one.fields if not (one.own.get(name) or field_schema(name)).get("description")]
        assert not bare, f"msi/server/agent_schemas.py says nothing of {bare}"


def test_what_is_not_done_says_which_values_are_taken_all_the_same():
    document = description("1")
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name, one in NOT_DONE.items():
        if name not in completions.FIELDS:
            assert one.what in body["properties"][name]["description"]
            assert body["properties"][name]["enum"] == [*ALWAYS_NEUTRAL, *one.neutral]


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_those_that_are_kept(name):
    """What lies on one is taken, and what lies beyond it refused."""
    bounds = BOUNDS[name]
    taken, refused = [], []
    for bound, step in (("minimum", -1), ("maximum", 1)):
        if bound in bounds:
            taken.append(bounds[bound])
            refused.append(bounds[bound] + step)
    if "exclusiveMinimum" in bounds:
        refused.append(bounds["exclusiveMinimum"])
    if most := bounds.get("maxItems"):
        word = "a" if name == "bad_words" else 1
        taken.append((word,) * most)
        refused.append((word,) * (most + 1))
    if most := bounds.get("maxProperties"):
        taken.append(dict.fromkeys(range(most), 1.0))
        refused.append(dict.fromkeys(range(most + 1), 1.0))
    assert taken or refused
    for value in taken:
        SamplingParams(**{name: value})
    for value in refused:
        with pytest.raises(InvalidRequest, match=name):
            SamplingParams(**{name: value})


def test_references_lead_somewhere_and_keys_are_asked_where_they_are_needed():
    document = description("1", needs_key=True)
    named = {part.partition('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert named == set(SCHEMAS)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["security"] == ([{}] if path in (*PROBES, "/") else [{"key": []}])
    assert "security" not in json.dumps(description("1")["paths"])


def test_every_endpoint_that_generates_says_what_may_go_wrong_and_how_a_stream_tells_it():
    """Its worker may be lost, and a request may give itself less time than its answer takes."""
    paths = description(msi.__version__)["paths"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        responses = paths[path]["post"]["responses"]
        assert {str(status) for status in STATUS_OF.values()} <= set(responses), path
        error = responses["408"]["content"]["application/json"]["schema"]
        assert error in contents_of(responses)["anyOf"], path


def contents_of(responses):
    """The schema of what the events of a stream hold."""
    data = responses["200"]["content"]["text/event-stream"]["schema"]["properties"]["data"]
    return data["anyOf"][1]["contentSchema"] if "anyOf" in data else data["contentSchema"]


TOKENS = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "ignore_eos": True}
EVERYTHING = {
    "return_token_ids": True, "prompt_logprobs": 2, "n": 2,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip
STREAMS = [
    ("/v1/completions", TOKENS),
    ("/v1/completions", TOKENS | EVERYTHING | {"logprobs": 2, "echo": True}),
    ("/v1/completions", TOKENS | {"timeout_s": 0.001}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | EVERYTHING | {"logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", CHAT | {"timeout_s": 0.001}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 3}),
    ("/v1/messages", CHAT),
]


async def test_every_event_of_a_stream_is_as_described(tiny_model, tmp_path):
    model = with_template(tiny_model, tmp_path / "model")
    async with gateway(model) as (_, url), aiohttp.ClientSession() as session:
        async with session.get(f"{url}/openapi.json") as response:
            document = await response.json()
        for path, body in STREAMS:
            responses = document["paths"][path]["post"]["responses"]
            schema = contents_of(responses) | {"components": document["components"]}
            async with session.post(url + path, json=body | {"stream": True}) as response:
                assert str(response.status) in responses
                text = await response.text()
            if response.status != 200:
                continue
            events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")]
            if path.endswith("completions"):
                assert events.pop() == "[DONE]"
            assert events
            for event in events:
                jsonschema.validate(json.loads(event), schema)
