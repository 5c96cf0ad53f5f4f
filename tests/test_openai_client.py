"""OpenAI's own client against a real gateway: completions and chat, streamed and not."""

from __future__ import annotations

from typing import Annotated, Literal

import openai
import pydantic
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from msi import SamplingParams
from tests.conftest import TEXT
from tests.edge import gateway, with_template
from tests.test_engine import collect, idle

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREEDY = {"max_tokens": 12, "temperature": 0}
ENDLESS = {"ignore_eos": True}
MESSAGES = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "It is a truth"}]
RENDERED = "<s><system>Be brief.\n<user>It is a truth\n<assistant>"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_model, tmp_path_factory):
    """(engine, client)"""
    model = with_template(tiny_model, tmp_path_factory.mktemp("model"))
    async with gateway(model, api_keys=("secret",)) as (engine, url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60) as client:
            yield engine, client
        await idle(engine)


async def chat_tokens(engine, tiny_model):
    """What chat answers must be: the rendered prompt's tokens, without any that the tokenizer would add."""
    ids = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode(RENDERED, add_special_tokens=False).ids
    return await collect(engine, ids, **GREEDY, **ENDLESS)


async def test_completions(served):
    engine, client = served
    expected, tokens, _ = await collect(engine, TEXT, **GREEDY, **ENDLESS)
    answer = await client.completions.create(model="tiny", prompt=TEXT, **GREEDY, extra_body=ENDLESS)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "length")
    assert answer.usage.completion_tokens == len(tokens)


async def test_completions_stream(served):
    engine, client = served
    expected, tokens, _ = await collect(engine, TEXT, **GREEDY, **ENDLESS)
    stream = await client.completions.create(
        model="tiny", prompt=TEXT, stream=True, stream_options={"include_usage": True}, **GREEDY, extra_body=ENDLESS
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], len(tokens))


async def test_chat(served, tiny_model):
    engine, client = served
    expected, tokens, _ = await chat_tokens(engine, tiny_model)
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY, extra_body=ENDLESS)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    message = answer.choices[0].message
    assert (message.role, message.content, answer.choices[0].finish_reason) == ("assistant", expected, "length")
    assert answer.usage.completion_tokens == len(tokens)
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in MESSAGES]
    again = await client.chat.completions.create(
        model="tiny", messages=parts, max_completion_tokens=12, temperature=0, extra_body=ENDLESS
    )
    assert again.choices[0].message.content == expected


async def test_chat_streams(served, tiny_model):
    engine, client = served
    expected, tokens, _ = await chat_tokens(engine, tiny_model)
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY,
        extra_body=ENDLESS,
    )  # fmt: skip
    first, *rest, last = [chunk async for chunk in stream]
    assert (first.object, first.choices[0].delta.role) == ("chat.completion.chunk", "assistant")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == expected
    assert [chunk.choices[0].finish_reason for chunk in rest] == [None] * (len(rest) - 1) + ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], len(tokens))


@pytest.mark.slow
async def test_without_a_limit_a_chat_goes_on_to_the_end_of_the_context(served):
    engine, client = served
    answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, extra_body=ENDLESS)
    assert answer.usage.total_tokens == engine.max_model_len
    assert answer.choices[0].finish_reason == "length"


async def test_choices_come_by_index_streamed_or_not(served):
    _, client = served
    asked = {"model": "tiny", "prompt": TEXT, "n": 3, "seed": 3, "max_tokens": 8, "extra_body": ENDLESS}
    answer = await client.completions.create(**asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 24
    texts = ["", "", ""]
    async for chunk in await client.completions.create(stream=True, **asked):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


async def test_echo_puts_the_prompt_before_every_choice(served):
    _, client = served
    asked = {"model": "tiny", "prompt": TEXT, "n": 2, "seed": 3, "max_tokens": 4, "extra_body": ENDLESS}
    plain = await client.completions.create(**asked)
    echoed = await client.completions.create(echo=True, **asked)
    expected = [TEXT + choice.text for choice in plain.choices]
    assert [choice.text for choice in echoed.choices] == expected
    texts = ["", ""]
    async for chunk in await client.completions.create(echo=True, stream=True, **asked):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


async def test_logprobs_of_completions(served):
    engine, client = served
    asked = {"model": "tiny", "prompt": TEXT, "logprobs": 2, **GREEDY, "extra_body": ENDLESS}
    choice = (await client.completions.create(**asked)).choices[0]
    answer = choice.logprobs
    params = SamplingParams(logprobs=2, **GREEDY, **ENDLESS)
    outputs = [output async for output in engine.generate(TEXT, params)]
    expected = [one for output in outputs for one in output.logprobs]
    assert answer.tokens == [one.text for output in outputs for one in output.token_texts]
    assert "".join(answer.tokens) == choice.text
    assert answer.token_logprobs == pytest.approx([one.logprob for one in expected])
    for token, tops, one in zip(answer.tokens, answer.top_logprobs, expected, strict=True):
        others = set(one.top_token_ids) - {one.token_id}
        assert tops[token] == pytest.approx(one.logprob)
        assert sorted(tops.values()) == pytest.approx(
            sorted([one.logprob, *(value for token, value in zip(one.top_token_ids, one.top_logprobs, strict=True)
                                   if token in others)])
        )  # fmt: skip
    lengths = [len(token) for token in answer.tokens]
    assert answer.text_offset == [sum(lengths[:index]) for index in range(len(lengths))]
    stream = await client.completions.create(stream=True, **asked)
    pieces = [chunk.choices[0].logprobs async for chunk in stream]
    assert [token for piece in pieces for token in piece.tokens] == answer.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == answer.text_offset


async def test_logprobs_of_chat(served):
    _, client = served
    asked = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 3, **GREEDY}
    answer = await client.chat.completions.create(**asked, extra_body=ENDLESS)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    data = b"".join(bytes(entry.bytes) for entry in content)
    assert data.decode(errors="replace") == answer.choices[0].message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert entry.logprob <= 0
    stream = await client.chat.completions.create(stream=True, **asked, extra_body=ENDLESS)
    pieces = [chunk.choices[0].logprobs async for chunk in stream]
    assert [entry for piece in pieces if piece for entry in piece.content] == content


async def test_every_sampling_parameter_is_taken(served):
    _, client = served
    shared = {
        "model": "tiny", "temperature": 0.9, "top_p": 0.9, "seed": 1, "presence_penalty": 0.5,
        "frequency_penalty": 0.5, "logit_bias": {"5": -100}, "stop": ["never to be"], "max_tokens": 6, "user": "me",
        "extra_body": {
            "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 6, "stop_token_ids": [9],
        },
    }  # fmt: skip
    completion = await client.completions.create(prompt=TEXT, **shared)
    chat = await client.chat.completions.create(messages=MESSAGES, **shared)
    assert completion.usage.completion_tokens == chat.usage.completion_tokens == 6


class Person(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(max_length=6)]
    age: Annotated[int, pydantic.Field(ge=0, le=150)]
    mood: Literal["glad", "sad"]
    friends: Annotated[list[Literal["Ann", "Bob"]], pydantic.Field(max_length=2)]


async def test_a_pydantic_model_as_response_format_is_what_comes_back(served):
    _, client = served
    asked = {"model": "tiny", "messages": MESSAGES, "response_format": Person, "max_tokens": 300}
    for seed in range(3):
        answer = await client.chat.completions.parse(**asked, seed=seed)
        assert isinstance(answer.choices[0].message.parsed, Person)
        assert answer.choices[0].finish_reason == "stop"
    async with client.chat.completions.stream(**asked, seed=0) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person)


async def test_a_forced_tool_gets_arguments_of_its_model(served):
    _, client = served
    tool = openai.pydantic_function_tool(Person, name="meet")
    answer = await client.chat.completions.parse(
        model="tiny", messages=MESSAGES, tools=[tool], tool_choice="required", max_tokens=400, parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "meet"
    assert isinstance(call.function.parsed_arguments, Person)


async def test_errors_are_the_clients_own(served):
    _, client = served
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        await client.completions.create(model="tiny", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served here"):
        await client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError, match="needs an API key"):
        await client.with_options(api_key="wrong").models.list()
    assert [model.id async for model in await client.models.list()] == ["tiny"]


async def test_leaving_a_stream_cancels(served):
    engine, client = served
    stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, extra_body=ENDLESS)
    async for _ in stream:
        break
    await stream.close()
    await idle(engine)
