"""/v1/responses and /v1/messages over HTTP: by their own clients, with calls of tools, and by those that mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import copy

import aiohttp
import anthropic
import openai
import orjson
import pytest
import pytest_asyncio

from msi.control.client_messages import Welcome
from msi.errors import RequestFailed
from msi.server.gateway import Gateway
from msi.server.prepare import ANTHROPIC, ANTHROPIC_COUNT, RESPONSE, NotUnderstood, Preparation, Setup, tokens_of
from tests.conftest import TEXT
from tests.edge import gateway, with_template
from tests.test_chat_parsing import CUTS, HERMES, Saying
from tests.test_engine import collect, idle
from tools.hostility.conversations import CONVERSATIONS, COUNT, MESSAGES, RESPONSES, places

GREEDY = {"max_tokens": 12, "temperature": 0}
ENDLESS = {"ignore_eos": True}
OF_ANTHROPIC = {"max_tokens": 12, "extra_body": {"temperature": 0, **ENDLESS}}  # whose client has no temperature
RENDERED = f"<s><system>Be brief.\n<user>{TEXT}\n<assistant>"
USER = {"role": "user", "content": TEXT}
SHORT = {"role": "user", "content": "a"}
FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
TOOL = {"name": "weather", "input_schema": {"type": "object"}}
in_module = pytest.mark.asyncio(loop_scope="module")


# -- a small model ---------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_model, tmp_path_factory):
    """(engine, url)"""
    model = with_template(tiny_model, tmp_path_factory.mktemp("model"))
    async with gateway(model, api_keys=("secret",)) as (engine, url):
        yield engine, url
        await idle(engine)


@contextlib.asynccontextmanager
async def clients(url, key="secret"):
    """(OpenAI's, Anthropic's)"""
    options = {"api_key": key, "max_retries": 0, "timeout": 60}
    async with (
        openai.AsyncOpenAI(base_url=f"{url}/v1", **options) as of_openai,
        anthropic.AsyncAnthropic(base_url=url, **options) as of_anthropic,
    ):
        yield of_openai, of_anthropic


@in_module
async def test_both_answer_as_the_engine_does(served):
    engine, url = served
    prompt = engine.encode(RENDERED, add_special_tokens=False)
    expected, tokens, _ = await collect(engine, prompt, **GREEDY, **ENDLESS)
    async with clients(url) as (of_openai, of_anthropic):
        answer = await of_openai.responses.create(
            model="tiny", instructions="Be brief.", input=TEXT, max_output_tokens=12, temperature=0, extra_body=ENDLESS
        )
        assert (answer.output_text, answer.status) == (expected, "incomplete")
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt), len(tokens))
        assert answer.incomplete_details.reason == "max_output_tokens"
        message = await of_anthropic.messages.create(model="tiny", system="Be brief.", messages=[USER], **OF_ANTHROPIC)
        assert ([block.text for block in message.content], message.stop_reason) == ([expected], "max_tokens")
        usage = message.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == len(prompt)
        assert usage.cache_read_input_tokens > 0, "the second finds what the first has computed"
        counted = await of_anthropic.messages.count_tokens(model="tiny", system="Be brief.", messages=[USER])
        assert counted.input_tokens == len(prompt)


@in_module
async def test_streams_tell_the_same(served):
    engine, url = served
    prompt = engine.encode(RENDERED, add_special_tokens=False)
    expected, _, _ = await collect(engine, prompt, **GREEDY, **ENDLESS)
    async with clients(url) as (of_openai, of_anthropic):
        asked = {"model": "tiny", "instructions": "Be brief.", "input": TEXT, "max_output_tokens": 12, "temperature": 0}
        events = [event async for event in await of_openai.responses.create(**asked, stream=True, extra_body=ENDLESS)]
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
        assert (events[-1].type, events[-1].response.output_text) == ("response.incomplete", expected)
        asked = {"model": "tiny", "system": "Be brief.", "messages": [USER], **OF_ANTHROPIC}
        async with of_anthropic.messages.stream(**asked) as stream:
            assert "".join([text async for text in stream.text_stream]) == expected
            assert (await stream.get_final_message()).stop_reason == "max_tokens"


@in_module
async def test_a_stop_sequence_is_named(served):
    engine, url = served
    prompt = engine.encode(RENDERED, add_special_tokens=False)
    expected, _, _ = await collect(engine, prompt, **GREEDY, **ENDLESS)
    stop = expected[4:7]
    async with clients(url) as (_, of_anthropic):
        message = await of_anthropic.messages.create(
            model="tiny", system="Be brief.", messages=[USER], stop_sequences=["\u0000never", stop], **OF_ANTHROPIC
        )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == expected[: expected.index(stop)]


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,  # a random model would never end
}


@in_module
async def test_a_schema_or_a_call_can_be_asked_for(served):
    """Of a model whose way of writing calls nobody knows: it is held to one."""
    _, url = served
    form = {"type": "json_schema", "name": "n", "schema": CITY, "strict": True}
    function = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    tool = {"name": "weather", "input_schema": CITY}
    async with clients(url) as (of_openai, of_anthropic):
        answer = await of_openai.responses.create(model="tiny", input="a", text={"format": form})
        assert orjson.loads(answer.output_text)["city"] in ("Paris", "Rome")
        asked = {"model": "tiny", "messages": [SHORT], "max_tokens": 99}
        message = await of_anthropic.messages.create(
            **asked, output_config={"format": {"type": "json_schema", "schema": CITY}}
        )
        assert orjson.loads(message.content[0].text)["city"] in ("Paris", "Rome")
        for choice in ("required", {"type": "function", "name": "weather"}):
            answer = await of_openai.responses.create(
                model="tiny", input="a", tools=[function], tool_choice=choice, parallel_tool_calls=False
            )
            (call,) = answer.output
            assert (call.name, orjson.loads(call.arguments)["city"] in ("Paris", "Rome")) == ("weather", True)
        for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
            message = await of_anthropic.messages.create(**asked, tools=[tool], tool_choice=choice)
            (call,) = message.content
            assert (call.name, call.input["city"] in ("Paris", "Rome")) == ("weather", True)
            assert message.stop_reason == "tool_use"


@in_module
async def test_errors_are_those_of_each_client(served):
    _, url = served
    async with clients(url) as (of_openai, of_anthropic):
        with pytest.raises(openai.BadRequestError, match="max_output_tokens is 0") as caught:
            await of_openai.responses.create(model="tiny", input="a", max_output_tokens=0)
        assert caught.value.param == "max_output_tokens"
        with pytest.raises(anthropic.BadRequestError, match="max_tokens is 0") as caught:
            await of_anthropic.messages.create(model="tiny", messages=[USER], max_tokens=0)
        assert caught.value.body["error"]["type"] == "invalid_request_error"
        with pytest.raises(anthropic.NotFoundError, match="'other' is not served here"):
            await of_anthropic.messages.create(model="other", messages=[USER], max_tokens=1)
        long = [{"role": "user", "content": TEXT * 20}]
        with pytest.raises(openai.BadRequestError) as caught:
            await of_openai.responses.create(model="tiny", input=long)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
        with pytest.raises(anthropic.BadRequestError, match="maximum context length is 512 tokens"):
            await of_anthropic.messages.create(model="tiny", messages=long, max_tokens=1)
        assert (await of_anthropic.messages.count_tokens(model="tiny", messages=long)).input_tokens > 512


@in_module
async def test_the_key_may_come_in_either_header(served):
    _, url = served
    body = {"messages": [USER], "max_tokens": 1}
    cases = [
        ({"x-api-key": "secret"}, 200), ({"Authorization": "Bearer secret"}, 200), ({}, 401),
        ({"x-api-key": "wrong"}, 401), ({"x-api-key": "wrong", "Authorization": "Bearer secret"}, 200),
        ({"x-api-key": "Bearer secret"}, 401), ({"x-api-key": ""}, 401),
    ]  # fmt: skip
    async with aiohttp.ClientSession() as session:
        for headers, status in cases:
            async with session.post(f"{url}{MESSAGES}", json=body, headers=headers) as response:
                assert response.status == status, headers
                answer = await response.json()
                if status == 401:
                    assert answer["error"]["type"] == "authentication_error"
                    assert answer["type"] == "error"


@in_module
async def test_what_is_refused_before_it_is_understood_has_the_paths_own_shape(served):
    _, url = served
    key = {"Authorization": "Bearer secret"}
    cases = [
        ({"data": b"{", "headers": key | {"Content-Type": "application/json"}}, 400, "invalid_request_error"),
        ({"data": b"{}", "headers": key | {"Content-Type": "text/plain"}}, 415, "invalid_request_error"),
        ({"data": b"[" * 500, "headers": key | {"Content-Type": "application/json"}}, 400, "invalid_request_error"),
    ]
    async with aiohttp.ClientSession() as session:
        for path in (MESSAGES, COUNT, RESPONSES):
            for options, status, kind in cases:
                async with session.post(url + path, **options) as response:
                    answer = await response.json()
                    assert (response.status, answer["error"]["type"]) == (status, kind)
                    assert ("type" in answer) == (path != RESPONSES)
            async with session.get(url + path, headers=key) as response:
                assert response.status == 405
        async with session.post(f"{url}/v1/messages/batches", headers=key) as response:
            assert (response.status, (await response.json())["error"]["type"]) == (404, "not_found_error")


@in_module
async def test_leaving_a_stream_cancels(served):
    engine, url = served
    async with clients(url) as (of_openai, of_anthropic):
        async for _ in await of_openai.responses.create(model="tiny", input="a", stream=True, extra_body=ENDLESS):
            break
        asked = {"model": "tiny", "messages": [USER], "max_tokens": 400, "extra_body": ENDLESS}
        async with of_anthropic.messages.stream(**asked) as stream:
            async for _ in stream:
                break
    await idle(engine)


# -- an engine that thinks and calls tools ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return (tiny_model / "tokenizer.json").read_bytes()


@contextlib.asynccontextmanager
async def saying(engine):
    gateway = Gateway(engine, host="127.0.0.1", port=0)
    url = await gateway.start()
    try:
        yield url
    finally:
        await gateway.close()


async def test_openais_client_gets_calls_and_gives_them_back(tokenizer):
    asked = {"model": "tiny", "tools": [FUNCTION]}
    async with saying(Saying(tokenizer, CUTS)) as url, clients(url) as (client, _):
        answer = await client.responses.create(input="How is Paris?", **asked)
        thought, _, call = answer.output
        assert (thought.content[0].text, answer.output_text) == ("hm", "\n\nI look.")
        assert (call.name, call.arguments) == ("weather", '{"city": "Paris"}')
        async with client.responses.stream(input="How is Paris?", **asked) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        assert final.output[2].arguments == call.arguments
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        history = [{"role": "user", "content": "How is Paris?"}, *answer.output, result]
        assert (await client.responses.create(input=history, **asked)).status == "completed"


async def test_anthropics_client_gets_calls_and_gives_them_back(tokenizer):
    asked = {"model": "tiny", "tools": [TOOL], "max_tokens": 9}
    async with saying(Saying(tokenizer, CUTS)) as url, clients(url) as (_, client):
        answer = await client.messages.create(messages=[SHORT], **asked)
        thought, text, call = answer.content
        assert (thought.thinking, text.text, answer.stop_reason) == ("hm", "\n\nI look.", "tool_use")
        assert (call.name, call.input) == ("weather", {"city": "Paris"})
        async with client.messages.stream(messages=[SHORT], **asked) as stream:
            final = await stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
        assert (final.content[2].input, final.stop_reason) == ({"city": "Paris"}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        history = [SHORT, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        assert (await client.messages.create(messages=history, **asked)).stop_reason == "tool_use"


async def test_the_clients_that_wait_do_as_well(tokenizer):
    def ask(url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            assert len(client.responses.create(model="tiny", input="a", tools=[FUNCTION]).output) == 3
            stream = client.responses.create(model="tiny", input="a", tools=[FUNCTION], stream=True)
            assert [event.type for event in stream][-1] == "response.completed"
        with anthropic.Anthropic(base_url=url, api_key="-", max_retries=0) as client:
            asked = {"model": "tiny", "messages": [SHORT], "max_tokens": 9, "tools": [TOOL]}
            assert len(client.messages.create(**asked).content) == 3
            with client.messages.stream(**asked) as stream:
                assert len(stream.get_final_message().content) == 3

    async with saying(Saying(tokenizer, CUTS)) as url:
        await asyncio.to_thread(ask, url)


class Failing(Saying):
    """Says something, and is lost."""

    async def generate(self, prompt, params=None, **context):
        async for output in super().generate(prompt, params, **context):
            yield output
            raise RequestFailed("worker attention-0 was lost")


async def test_a_failure_in_a_stream_reaches_the_client(tokenizer):
    async with saying(Failing(tokenizer, ["It is"])) as url, clients(url) as (of_openai, of_anthropic):
        *_, last = [event async for event in await of_openai.responses.create(model="tiny", input="a", stream=True)]
        assert (last.type, last.response.error.message) == ("response.failed", "worker attention-0 was lost")
        with pytest.raises(anthropic.APIStatusError, match="worker attention-0 was lost"):
            async with of_anthropic.messages.stream(model="tiny", messages=[SHORT], max_tokens=9) as stream:
                await stream.until_done()
        with pytest.raises(openai.InternalServerError, match="was lost"):
            await of_openai.responses.create(model="tiny", input="a")
        with pytest.raises(anthropic.InternalServerError, match="was lost"):
            await of_anthropic.messages.create(model="tiny", messages=[SHORT], max_tokens=9)


def test_a_conversation_that_is_too_long_is_cut_where_that_is_asked_for(tokenizer):
    preparation = Preparation(Setup(Welcome("tiny", 400, 512, tokenizer, {"default": HERMES})))
    turns = [{"role": role, "content": f"It is {at}"} for at in range(100) for role in ("user", "assistant")]
    body = {"instructions": "Be brief.", "input": [*turns, {"role": "user", "content": "And now?"}]}
    refused = preparation.understand(RESPONSE, orjson.dumps(body))
    assert (refused.failure.code, refused.failure.param) == ("context_length_exceeded", "input")
    cut = preparation.understand(RESPONSE, orjson.dumps(body | {"truncation": "auto"}))
    assert 400 < len(tokens_of(cut.request.prompts[0])) < 512
    assert orjson.loads(cut.request.told)["truncation"] == "auto"


# -- those that mean harm --------------------------------------------------------------------------------------------


ODD = (
    None, True, 0, -1, 1.5, 2**64 - 1, "", "a", "\x00" * 9, "x" * 5000, [], {}, [None], [[]], [{}], {"type": "text"},
    {"type": ["text"]}, {"type": "function", "name": []}, ["a", 7], {"a": {"b": []}},
)  # fmt: skip


@pytest.mark.parametrize(("path", "endpoint"), [(RESPONSES, RESPONSE), (MESSAGES, ANTHROPIC), (COUNT, ANTHROPIC_COUNT)])
def test_whatever_stands_at_any_place_of_a_conversation_it_is_understood_or_a_sentence(tokenizer, path, endpoint):
    preparation = Preparation(Setup(Welcome("tiny", 400, 512, tokenizer, {"default": HERMES})))
    body = copy.deepcopy(CONVERSATIONS[path])
    understood = preparation.understand(endpoint, orjson.dumps(body))
    assert not isinstance(understood, NotUnderstood), understood
    num_refused = 0
    for holder, key in list(places(body)):
        kept = holder[key]
        for value in ODD:
            holder[key] = value
            answer = preparation.understand(endpoint, orjson.dumps(body))
            if isinstance(answer, NotUnderstood):
                num_refused += 1
                assert answer.failure.kind in ("invalid_request", "model_not_found"), (key, value, answer)
                assert answer.failure.param, (key, value, answer)
                assert len(answer.failure.message) < 600
        holder[key] = kept
    assert num_refused > 300
