"""Calls of tools and reasoning in chats: what is asked for, and what answers look like, streamed or not."""

from __future__ import annotations

import contextlib

import aiohttp
import openai
import orjson
import pytest
from tokenizers import Tokenizer

from msi.control.client_messages import Welcome
from msi.engine import Engine
from msi.errors import InvalidRequest
from msi.server.chat_answers import ChatAnswer
from msi.server.gateway import Gateway
from msi.server.parsing.choice import REASONING_PARSERS, TOOL_PARSERS
from msi.server.parsing.parser import Parsing, thinking_of
from msi.server.prepare import ANSWERS, CHAT, MESSAGE, NotUnderstood, Preparation, Setup
from msi.server.whole import Whole
from msi.settings import REASONING_PARSERS as REASONING_NAMES
from msi.settings import TOOL_CALL_PARSERS as TOOL_NAMES
from msi.text.prompts import Prompts
from msi.text.text_stream import TextStream
from msi.types import Output
from tests.edge import TEMPLATE
from tests.test_bodies import USER

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
HERMES = TEMPLATE + "{# <tool_call> <think></think> #}"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = f"<think>hm</think>\n\nI look.\n{CALL}"
CUTS = [THOUGHT[at : at + 7] for at in range(0, len(THOUGHT), 7)]


# -- the shape of answers --------------------------------------------------------------------------------------------


def answer_of(is_streamed, tools=("weather",), **options):
    schemas = orjson.dumps(dict.fromkeys(tools))
    parsing = Parsing("hermes", "qwen3", schemas, **options)
    return ChatAnswer("id", "m", 1, lambda token: None, 1, parsing=parsing, is_streamed=is_streamed)


def outputs_of(pieces, reason="stop"):
    return [Output("r", piece, (1,)) for piece in pieces] + [Output("r", "", (2,), reason)]


def message_of(pieces, reason="stop", **options):
    """(message, finish_reason) of an answer that does not stream."""
    whole = Whole(answer_of(False, **options))
    for output in outputs_of(pieces, reason):
        whole.add(output)
    (choice,) = orjson.loads(b"".join(whole.parts()))["choices"]
    return choice["message"], choice["finish_reason"]


def test_a_whole_answer_has_reasoning_content_and_calls_apart():
    message, reason = message_of(CUTS)
    (call,) = message.pop("tool_calls")
    assert message == {
        "role": "assistant", "content": "\n\nI look.", "reasoning": "hm", "reasoning_content": "hm",
    }  # fmt: skip
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    assert reason == "tool_calls"


def test_content_is_null_where_there_is_nothing_but_calls_or_reasoning():
    message, _ = message_of(["<think>hm</think>\n\n", CALL, "\n"])
    assert message["content"] is None
    message, reason = message_of(["<think>hm"], "length")
    assert (message["content"], message["reasoning"], reason) == (None, "hm", "length")
    assert message_of([]) == ({"role": "assistant", "content": ""}, "stop")
    assert message_of(["Hi"]) == ({"role": "assistant", "content": "Hi"}, "stop")


def test_half_a_call_at_the_end_of_the_room_is_text_and_no_reason_to_call():
    message, reason = message_of([CALL[:50]], "length")
    assert (message, reason) == ({"role": "assistant", "content": CALL[:50]}, "length")
    message, reason = message_of([CALL, CALL[:50]], "length")
    assert (len(message["tool_calls"]), reason) == (1, "length")


def test_a_stream_tells_each_thing_once():
    answer = answer_of(True)
    deltas = [answer.chunk(output)["choices"][0] for output in outputs_of(CUTS)]
    assert [one["finish_reason"] for one in deltas] == [None] * len(CUTS) + ["tool_calls"]
    for name, text in (("reasoning", "hm"), ("reasoning_content", "hm"), ("content", "\n\nI look.")):
        assert "".join(one["delta"].get(name, "") for one in deltas) == text
    ((call,),) = [one["delta"]["tool_calls"] for one in deltas if "tool_calls" in one["delta"]]
    assert call["index"] == 0
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}


def test_usage_and_ids_count_as_ever():
    answer = answer_of(True)
    for output in outputs_of(CUTS):
        answer.chunk(output)
    assert answer.usage.values()["completion_tokens"] == len(CUTS) + 1


@pytest.mark.parametrize(
    ("pieces", "options", "expected"),
    [
        (["<think>", "hm", ",", " well", "</think>", "Hi"], {}, 3),
        (["\n", "<thi", "nk>", "hm", ",", "</", "think>", "\n", "Hi"], {}, 2),
        (["hm", ",", "</think>", "Hi"], {"is_thinking": True}, 2),
        (["\n", "hm", "</b", ">", "</think>"], {"is_thinking": True}, 4),
        (["<think>", "hm"], {"has_reasoning": False}, 1),
        (["Hi", "<think>", "hm"], {}, 0),
        ([], {}, 0),
    ],
)
def test_tokens_that_were_thought_are_counted(pieces, options, expected):
    answer = answer_of(True, **options)
    for output in outputs_of(pieces, "length")[: len(pieces)]:
        answer.chunk(output)
    answer.chunk(Output("r", "", (), "length"))
    assert answer.usage.values()["completion_tokens_details"] == {"reasoning_tokens": expected}


def test_usage_has_no_reasoning_where_nothing_looks_for_it():
    answer = ChatAnswer("id", "m", 1, lambda token: None, 1, parsing=Parsing("hermes", ""))
    answer.chunk(Output("r", "Hi", (5,), "stop"))
    assert "completion_tokens_details" not in answer.usage.values()


@pytest.mark.parametrize(
    ("parsing", "text", "said"),
    [
        (Parsing("", "qwen3"), "<think>a stop b</think>c stop d", "<think>a stop b</think>c "),
        (Parsing("", "qwen3"), " \n<think>stop</think>c stop d", " \n<think>stop</think>c "),
        (Parsing("", "qwen3", is_thinking=True), "a stop b</think>c stop d", "a stop b</think>c "),
        (Parsing("", "qwen3"), "c <think>a stop b", "c <think>a "),
        (Parsing("", "qwen3"), "<thin stop", "<thin "),
        (Parsing("", "qwen3"), "\n" * 200 + "stop", "\n" * 200),
        (Parsing("", "deepseek_r1", is_thinking=True), "a stop", "a stop"),
        (Parsing("kimi_k2", "kimi_k2", is_thinking=True), "a stop<|tool_calls_section_begin|>stop", None),
        (Parsing("", "openai_gptoss"), "<|channel|>analysis<|message|>stop<|end|><|start|>assistant<|channel|>final"
         "<|message|>c stop", None),
        (Parsing("hermes", ""), "<think>stop", "<think>"),
        (Parsing("openai", ""), "<|channel|>analysis<|message|>stop", "<|channel|>analysis<|message|>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_stop_strings_do_not_count_in_what_is_thought(parsing, text, said, size):
    expected = text[: text.rindex("stop")] if said is None else said
    stream = TextStream(None, (), ("stop",), thinking=thinking_of(parsing))
    found = ""
    for piece in (text[at : at + size] for at in range(0, len(text), size)):
        if not stream.is_stopped:
            found += stream._certain([piece], False)
    if not stream.is_stopped:
        found += stream._certain([], True)
    assert found == expected
    assert stream.is_stopped is (found != text)


# -- what is asked ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return (tiny_model / "tokenizer.json").read_bytes()


@pytest.fixture
def asked(tokenizer):
    """Of a body: what it asks."""

    def ask(template=HERMES, endpoint=CHAT, parsers=("auto", "auto"), tokenizer=tokenizer, **fields):
        welcome = Welcome(
            "tiny", 290, 512, tokenizer, {"default": template}, tool_call_parser=parsers[0], reasoning_parser=parsers[1]
        )
        body = orjson.dumps({"messages": [USER], **fields})
        answer = Preparation(Setup(welcome)).understand(endpoint, body)
        assert ANSWERS.decode(ANSWERS.encode(answer)) == answer, "it crosses processes"
        if isinstance(answer, NotUnderstood):
            raise answer.failure.error()
        return answer.request

    return ask


def test_tools_are_looked_for_where_they_are_given_and_the_template_shows_how(asked):
    parsing = asked(tools=[WEATHER], parallel_tool_calls=False).parsing
    assert parsing == Parsing(
        "hermes", "qwen3", orjson.dumps({"weather": WEATHER["function"]["parameters"]}), has_parallel_calls=False
    )
    assert asked(tools=[WEATHER], tool_choice="none").parsing == Parsing("", "qwen3")
    assert asked().parsing == Parsing("", "qwen3")
    assert asked(include_reasoning=False).parsing == Parsing("", "qwen3", has_reasoning=False)
    assert asked(template=TEMPLATE).parsing is None


def test_the_servers_parsers_go_before_the_template(asked):
    assert asked(parsers=("mistral", "none"), tools=[WEATHER]).parsing.tool_parser == "mistral"
    assert asked(parsers=("mistral", "none")).parsing is None
    assert asked(parsers=("none", "deepseek_r1")).parsing == Parsing("", "deepseek_r1", is_thinking=True)


def test_the_prompts_end_says_whether_the_model_thinks_already(asked):
    for end, is_thinking in (("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)):
        template = "{{ messages[0].content }}{{ '" + end.replace("\n", "\\n") + "' }}"
        assert asked(template, parsers=("none", "qwen3")).parsing.is_thinking is is_thinking


def test_special_tokens_are_shown_only_where_a_parser_has_to_see_them(asked, tokenizer):
    with_control = Tokenizer.from_buffer(tokenizer)
    with_control.add_special_tokens(["[TOOL_CALLS]"])
    with_control.add_tokens(["<tool_call>"])
    options = {"tools": [WEATHER], "tokenizer": with_control.to_str().encode()}
    mistral = "{{ messages[0].content }}{# [TOOL_CALLS] #}"
    assert not asked(mistral, **options).params.skip_special_tokens
    assert asked(mistral, **options, tool_choice="none").params.skip_special_tokens
    assert asked(**options).params.skip_special_tokens, "<tool_call> is text"


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ("any", "it must be auto, none, required"),
        (5, "it must be auto, none, required"),
        ({"type": "allowed_tools"}, "it must be auto, none, required"),
        ({"type": "function", "function": {"name": "other"}}, "tool_choice names 'other'"),
        ({"type": "function"}, "tool_choice names None"),
    ],
)
def test_a_choice_of_nothing_that_is_there_is_refused_by_name(asked, choice, complaint):
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        asked(tools=[WEATHER], tool_choice=choice)
    assert caught.value.param == "tool_choice"


def test_calls_can_be_forced_where_nobody_knows_how_the_model_writes_them(asked):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        for endpoint in ({}, {"endpoint": MESSAGE, "id": "a", "type": "generate"}):
            request = asked(template=TEMPLATE, tools=[WEATHER], tool_choice=choice, **endpoint)
            assert request.parsing.tool_parser == "json"
            assert "weather" in request.params.structured_outputs.grammar
    with pytest.raises(InvalidRequest, match="there are no tools"):
        asked(tool_choice="required")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"template": TEMPLATE}, "serve with `tool_call_parser`"),
        ({"parsers": ("none", "auto")}, "serve with `tool_call_parser`"),
        ({"template": TEMPLATE, "endpoint": MESSAGE, "id": "a", "type": "generate"}, "serve with `tool_call_parser`"),
    ],
)
def test_tools_without_a_parser_are_refused_with_what_to_do(asked, options, complaint):
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": None}):
        with pytest.raises(InvalidRequest, match=complaint) as caught:
            asked(tools=[WEATHER], **options, **choice)
        assert caught.value.param == "tools"
        assert '"tool_choice": "none"' in str(caught.value)
    assert asked(tools=[WEATHER], tool_choice="none", **options) is not None


def test_text_over_the_websocket_is_told_as_it_is_unless_tools_may_be_called(asked):
    message = {"endpoint": MESSAGE, "id": "a", "type": "generate"}
    assert asked(**message).parsing is None
    assert asked(**message, tools=[WEATHER], tool_choice="none").parsing is None
    assert asked(**message, tools=[WEATHER]).parsing == asked(tools=[WEATHER]).parsing


def test_the_options_name_every_parser():
    assert set(TOOL_NAMES) == set(TOOL_PARSERS)
    assert set(REASONING_NAMES) == set(REASONING_PARSERS)


# -- over HTTP -------------------------------------------------------------------------------------------------------


class Saying(Engine):
    """An engine without an instance, which always says the same."""

    def __init__(self, tokenizer, pieces):
        super().__init__()
        self._welcome = Welcome("tiny", 290, 512, tokenizer, {"default": HERMES})
        self._prompts = Prompts.of(tokenizer, 290, 512)
        self._pieces = pieces

    async def generate(self, prompt, params=None, *, request_id="", thinking=None, **urgency):
        for index in range(params.n):
            for output in outputs_of(self._pieces):
                yield Output("r", output.text, output.token_ids, output.finish_reason, len(prompt), index)


@contextlib.asynccontextmanager
async def saying(tokenizer, pieces):
    gateway = Gateway(Saying(tokenizer, pieces), host="127.0.0.1", port=0)
    url = await gateway.start()
    try:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            yield client
    finally:
        await gateway.close()


async def test_openais_client_gets_calls_streamed_and_whole(tokenizer):
    body = {"model": "tiny", "messages": [USER], "tools": [WEATHER], "n": 2}
    async with saying(tokenizer, CUTS) as client:
        whole = await client.chat.completions.create(**body)
        for choice in whole.choices:
            (call,) = choice.message.tool_calls
            assert (call.type, call.function.name) == ("function", "weather")
            assert call.function.arguments == '{"city": "Paris"}'
            assert (choice.message.content, choice.message.reasoning) == ("\n\nI look.", "hm")
            assert choice.finish_reason == "tool_calls"
        async with client.chat.completions.stream(**body) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert [one.message.content for one in final.choices] == ["\n\nI look."] * 2
        for choice in final.choices:
            (call,) = choice.message.tool_calls
            assert call.function.arguments == '{"city": "Paris"}'
            assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_the_websocket_tells_calls_apart_where_they_may_be_made(tokenizer, choice):
    asked = {"messages": [USER], "tools": [WEATHER], "tool_choice": choice, "n": 2}
    async with saying(tokenizer, CUTS) as client, aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{client.base_url}stream") as socket:
            await socket.send_json({"type": "generate", "id": "a", **asked})
            outputs = []
            while (message := await socket.receive_json(timeout=60))["type"] == "output":
                outputs.append(message)
        async with session.post(f"{client.base_url}chat/completions", json=asked) as response:
            whole = await response.json()
    assert message["type"] == "done"
    if choice == "auto":
        assert message["usage"] == whole["usage"]
    for index, expected in enumerate(whole["choices"]):
        mine = [one for one in outputs if one["index"] == index]
        assert mine[-1]["finish_reason"] == expected["finish_reason"]
        assert "".join(one["text"] for one in mine) == (expected["message"]["content"] if choice == "auto" else THOUGHT)
        called = [call for one in mine for call in one.get("tool_calls", ())]
        assert [call["function"]["name"] for call in called if "id" in call] == ["weather"] * (choice == "auto")
        if choice == "auto":
            assert "".join(one.get("reasoning", "") for one in mine) == expected["message"]["reasoning"]
            assert "".join(call["function"]["arguments"] for call in called) == '{"city": "Paris"}'


async def test_an_answer_with_calls_goes_back_into_the_history(tokenizer):
    async with saying(tokenizer, CUTS) as client:
        body = {"model": "tiny", "messages": [USER], "tools": [WEATHER]}
        message = (await client.chat.completions.create(**body)).choices[0].message
        (call,) = message.tool_calls
        said = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        body["messages"] = [USER, message.model_dump(exclude_none=True), said]
        assert (await client.chat.completions.create(**body)).choices[0].finish_reason == "tool_calls"


async def test_without_tools_the_markup_of_calls_is_text(tokenizer):
    async with saying(tokenizer, [CALL]) as client:
        whole = await client.chat.completions.create(model="tiny", messages=[USER])
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (CALL, "stop")
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{client.base_url}completions", json={"prompt": "a"}) as response,
        ):
            assert (await response.json())["choices"][0]["text"] == CALL, "completions are text"
