"""OpenAI's Responses API on values: what a request asks of a chat, and what objects and events its answer becomes."""

from __future__ import annotations

import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.errors import CONTEXT_EXCEEDED, InvalidRequest, RequestFailed
from msi.server.calls import error_of, status_of
from msi.server.chat import parse_chat
from msi.server.cutting import cut_to_fit
from msi.server.field_table import IGNORED
from msi.server.prepare import RESPONSE
from msi.server.responses.answer import ResponseAnswer
from msi.server.responses.request import FIELDS, NOT_IN_RESPONSES, translated
from tests.test_bodies import ODD, VALUES
from tests.typed_streams import CALL, SAID, asked, cut, outputs_of, plain, response_of

FUNCTION = {"type": "function", "name": "weather", "description": "of a city", "parameters": {"type": "object"}}


def chat(**fields):
    return translated({"input": "Hi", **fields}).chat


def messages(*items, **fields):
    return chat(input=list(items), **fields)["messages"]


def said(role, *texts, **more):
    return {"role": role, "content": list(texts), **more}


def called(call_id, name="weather", arguments="{}"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_text_is_what_the_user_says_and_instructions_are_the_systems():
    assert translated({"input": "Hi", "instructions": "Be brief."}).chat == {
        "messages": [said("system", "Be brief."), said("user", "Hi")]
    }


def test_items_become_the_messages_of_a_chat():
    assert messages(
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How is"},
                                                        {"type": "input_text", "text": "Paris?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "wet"}]},
        {"role": "user", "content": "And?"},
        instructions="Be brief.",
    ) == [
        said("system", "Be brief.\n\nBe kind."),
        said("user", "How is", "Paris?"),
        said("assistant", "I look.", reasoning="hm",
             tool_calls=[called("c1", arguments='{"a": 1}'), called("c2", arguments="")]),
        said("tool", "sunny", tool_call_id="c1"), said("tool", "wet", tool_call_id="c2"), said("user", "And?"),
    ]  # fmt: skip


def test_answers_that_follow_one_another_stay_apart_and_reasoning_belongs_to_what_follows_it():
    reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    encrypted = {"type": "reasoning", "summary": [], "encrypted_content": "xyz"}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    a, b = ({"role": "assistant", "content": text} for text in "ab")
    assert messages(a, b) == [said("assistant", "a"), said("assistant", "b")]
    assert messages(a, reasoning, b) == [said("assistant", "a"), said("assistant", "b", reasoning="hm")]
    assert messages(encrypted, a) == [said("assistant", "a")]
    assert messages(call, reasoning, call) == [
        {"role": "assistant", "tool_calls": [called("c", "f")]},
        {"role": "assistant", "reasoning": "hm", "tool_calls": [called("c", "f")]},
    ]


def test_what_the_system_says_later_stands_with_what_is_beside_it():
    """Templates refuse a second system message, or leave it out."""
    system, user, answer = ({"role": role, "content": role[0]} for role in ("developer", "user", "assistant"))
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "r"}
    assert messages(user, system, answer) == [said("user", "u\n\nd"), said("assistant", "a")]
    assert messages(user, answer, system, system, user) == [
        said("user", "u"), said("assistant", "a"), said("user", "d\n\nd\n\nu")
    ]  # fmt: skip
    assert messages(user, answer, system)[-1] == said("user", "d")
    assert messages(user, call, system, result, result, user)[2:] == [
        said("tool", "r", tool_call_id="c"), said("tool", "r\n\nd", tool_call_id="c"), said("user", "u")
    ]  # fmt: skip
    assert messages({"role": "system", "content": ""}, user) == [said("user", "u")]


def test_fields_get_the_chats_names():
    assert chat(
        model="m", max_output_tokens=9, temperature=0.5, top_p=0.5, stream=True, parallel_tool_calls=False, stop=["x"],
        tools=[FUNCTION], tool_choice={"type": "function", "name": "weather"}, reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        ignore_eos=True, chat_template_kwargs={"a": 1},
    ) == {
        "messages": [said("user", "Hi")], "model": "m", "max_tokens": 9, "temperature": 0.5, "top_p": 0.5,
        "stream": True, "parallel_tool_calls": False, "stop": ["x"], "ignore_eos": True, "reasoning_effort": "low",
        "chat_template_kwargs": {"a": 1},
        "tools": [{"type": "function", "function": {
            "name": "weather", "description": "of a city", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}
        },
    }  # fmt: skip
    for choice in ("auto", "none", "required"):
        assert chat(tool_choice=choice)["tool_choice"] == choice


def test_no_effort_is_no_thinking_unless_the_client_says_how_the_template_is_to_be_filled():
    off = {"enable_thinking": False, "thinking": False}
    assert chat(reasoning={"effort": "none"})["chat_template_kwargs"] == off
    given = chat(reasoning={"effort": "none"}, chat_template_kwargs={"enable_thinking": True})["chat_template_kwargs"]
    assert given == {**off, "enable_thinking": True}


NEUTRAL = {
    "store": [None, True, False], "previous_response_id": [None, ""], "background": [None, False],
    "truncation": [None, "disabled"], "include": [None, [], ["reasoning.encrypted_content"]], "metadata": [{"a": "b"}],
    "text": [None, {}, {"format": {"type": "text"}}, {"verbosity": "medium"}], "top_logprobs": [None, 0],
    "service_tier": ["auto"], "prompt_cache_key": ["k"], "safety_identifier": ["k"], "max_tool_calls": [None, 3],
    "stream_options": [None, {"include_obfuscation": False}], "n": [None, 1], "conversation": [None],
    "tools": [None, []],
    "reasoning": [None, {}, {"summary": "auto"}, {"effort": None}], "instructions": [None, ""], "user": ["me"],
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_ask_for_nothing(name):
    nothing = parse_chat(chat(), max_tokens=9)
    for value in NEUTRAL[name]:
        assert parse_chat(chat(**{name: value}), max_tokens=9) == nothing, value


CHANGES = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is kept here"),
    ({"conversation": "conv_1"}, "conversation", "nothing is kept here"),
    ({"background": True}, "background", "on the connection that asked"),
    ({"prompt": {"id": "p"}}, "prompt", "no prompts are kept"),
    ({"truncation": "left"}, "truncation", "must be auto or disabled"),
    ({"truncation": 7}, "truncation", "must be a string"),
    ({"context_management": [{"type": "compaction"}]}, "context_management", "all of the input is used"),
    ({"include": ["message.output_text.logprobs"]}, "include", "log-probabilities"),
    ({"top_logprobs": 3}, "top_logprobs", "log-probabilities"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", r"'web_search', which is not supported here"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "must be a string"),
    ({"tools": [FUNCTION, 7]}, "tools[1]", "must be an object"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice", "must be auto, none, required, or"),
    ({"tool_choice": "any"}, "tool_choice", "must be auto, none, required, or"),
    ({"messages": [1]}, "messages", "the name here is input"),
    ({"max_tokens": 5}, "max_tokens", "the name here is max_output_tokens"),
    ({"input": None}, "input", "array of items that is not empty"), ({"input": []}, "input", "not empty"),
    ({"input": [7]}, "input[0]", "must be an object"),
    ({"input": [{"role": "bishop", "content": "a"}]}, "input[0].role", "must be user, assistant, system or developer"),
    ({"input": [{"role": "user"}]}, "input[0].content", "must be a string or an array of text parts"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type",
     "'input_image', which is not supported here"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "there may be message, function_call"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "must be a string"),
    ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0].name", "must be a string"),
    ({"instructions": ["a"]}, "instructions", "must be a string"),
    ({"reasoning": {"effort": 5}}, "reasoning.effort", "must be a string"),
    ({"text": "a"}, "text", "must be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "sentence"), CHANGES)
def test_what_is_not_done_is_refused_by_its_own_name(body, param, sentence):
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        chat(**body)
    assert caught.value.param == param
    assert str(caught.value).startswith(param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens"), ({"max_output_tokens": "nine"}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"), ({"parallel_tool_calls": 3}, "parallel_tool_calls"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"), ({"text": {"format": {"type": "poem"}}}, "text.format"),
    ],
)  # fmt: skip
def test_what_the_chat_refuses_is_told_in_the_clients_names(body, param):
    asked = translated({"input": "Hi", **body})
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(asked.chat, max_tokens=9)
    error = asked.renamed(caught.value)
    assert error.param == param
    assert str(error).startswith(f"{param} is ")


def test_the_answer_repeats_what_was_asked():
    told = translated(
        {"input": "Hi", "instructions": "Be brief.", "metadata": {"a": "b"}, "tools": [FUNCTION], "tool_choice": "none",
         "max_output_tokens": 5, "parallel_tool_calls": False, "frobnicate": 1, "store": True}
    )  # fmt: skip
    assert told.ignored == ("frobnicate",)
    assert told.told == {
        "instructions": "Be brief.", "metadata": {"a": "b"}, "tools": [FUNCTION], "tool_choice": "none",
        "max_output_tokens": 5, "parallel_tool_calls": False, "max_tool_calls": None, "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None}, "safety_identifier": None, "text": {"format": {"type": "text"}},
        "user": None, "truncation": "disabled",
    }  # fmt: skip
    assert translated({"input": "Hi", "truncation": "auto"}).told["truncation"] == "auto"


# -- conversations that are too long ---------------------------------------------------------------------------------


def understanding(most, tried):
    """Of a chat that has at most so many messages."""

    def understand(chat):
        tried.append(len(chat["messages"]))
        if len(chat["messages"]) > most:
            raise InvalidRequest("too long", param="prompt", code=CONTEXT_EXCEEDED)
        return chat

    return understand


ROLES = st.lists(st.sampled_from(["user", "user", "assistant", "tool"]), max_size=40)


@given(st.booleans(), ROLES, st.integers(0, 42))
def test_the_oldest_turns_go_and_no_more_of_them_than_have_to(has_system, roles, most):
    leading = [{"role": "system"}] if has_system else []
    said = [{"role": role, "at": at} for at, role in enumerate(roles)]
    shorter = [said, *(said[at:] for at, role in enumerate(roles) if at and role == "user")]
    fitting = [one for one in shorter if len(leading) + len(one) <= most]
    chat, tried = {"messages": leading + said, "top_p": 0.5}, []
    if fitting:
        assert cut_to_fit(chat, understanding(most, tried)) == {"messages": leading + fitting[0], "top_p": 0.5}
    else:
        with pytest.raises(InvalidRequest, match="too long"):
            cut_to_fit(chat, understanding(most, tried))
    assert len(tried) <= 2 + math.log2(len(shorter))


def test_what_is_wrong_for_another_reason_is_not_tried_again():
    def understand(chat):
        tried.append(chat)
        raise InvalidRequest("temperature is 7", param="temperature")

    tried = []
    with pytest.raises(InvalidRequest, match="temperature"):
        cut_to_fit({"messages": [{"role": "user"}] * 9}, understand)
    assert len(tried) == 1


# -- any request -----------------------------------------------------------------------------------------------------


def check(body):
    """A chat whose messages are in order, or one sentence that names a field of the body."""
    try:
        found = translated(body)
        parse_chat(found.chat, max_tokens=100)
    except InvalidRequest as error:
        sentence, param = str(error), error.param
    else:
        assert all(message["role"] != "system" for message in found.chat["messages"][1:])
        return
    assert 0 < len(sentence) < 600
    assert "\n" not in sentence
    assert param, sentence
    assert not param.startswith("messages["), "a chat of ours is in order"


@pytest.mark.parametrize("name", sorted(FIELDS | set(NOT_IN_RESPONSES) | IGNORED))
def test_whatever_a_field_holds_it_is_a_chat_or_a_sentence(name):
    for value in ODD:
        check({"input": "Hi", name: value})


TEXTS = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["input_text", "output_text", "refusal", "input_image"]) | VALUES,
                  "text": st.text(max_size=5) | VALUES, "refusal": VALUES},
)  # fmt: skip
CONTENTS = st.text(max_size=5) | st.lists(TEXTS | VALUES, max_size=3) | VALUES
ITEMS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"]) | VALUES,
        "role": st.sampled_from(["user", "assistant", "system", "developer"]) | VALUES,
        "content": CONTENTS, "summary": CONTENTS, "output": CONTENTS, "arguments": VALUES,
        "call_id": st.text(max_size=3) | VALUES, "name": st.text(max_size=3) | VALUES,
    },
)  # fmt: skip
TOOLS = st.lists(
    st.fixed_dictionaries({}, optional={"type": st.just("function") | VALUES, "name": st.text(max_size=3) | VALUES,
                                        "description": VALUES, "parameters": VALUES}) | VALUES, max_size=2,
)  # fmt: skip
BODIES = st.fixed_dictionaries(
    {"input": st.lists(ITEMS | VALUES, max_size=4) | VALUES},
    optional=dict.fromkeys(sorted(FIELDS - {"input", "tools"}), VALUES) | {"tools": TOOLS | VALUES},
)


@given(BODIES)
def test_no_body_ends_in_anything_but_a_chat_or_a_sentence(body):
    check(body)


# -- answers ---------------------------------------------------------------------------------------------------------


def answer_of(**options):
    return ResponseAnswer("id", "m", 1, asked(RESPONSE, **options), clock=lambda: 7.9)


def streamed(pieces, reason="stop", **options):
    answer = answer_of(**options)
    return plain([event for output in outputs_of(pieces, reason) for event in answer.add(output)])


def whole(pieces, reason="stop", **options):
    answer = answer_of(stream=False, **options)
    for output in outputs_of(pieces, reason):
        assert not any("response" in event for event in answer.add(output)), "it would be made for nobody"
    return orjson.loads(answer.whole())


def test_a_whole_answer_has_an_item_for_what_was_thought_the_text_and_each_call():
    answer = whole([SAID])
    ids = [call.pop("call_id") for call in answer["output"][2:]]
    assert len(set(ids)) == 2
    assert all(one.startswith("call_") for one in ids)
    call = {"type": "function_call", "status": "completed", "name": "weather", "arguments": '{"city": "Paris"}'}
    assert answer["output"] == [
        {"id": "rs_id-0", "type": "reasoning", "status": "completed", "summary": [],
         "content": [{"type": "reasoning_text", "text": "hm, well"}]},
        {"id": "msg_id-1", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "\n\nI look.", "annotations": [], "logprobs": []}]},
        {"id": "fc_id-2", **call}, {"id": "fc_id-3", **call},
    ]  # fmt: skip
    del answer["output"]
    assert answer == {
        "id": "resp_id", "object": "response", "created_at": 1, "completed_at": 7, "model": "m", "status": "completed",
        "error": None, "incomplete_details": None, "background": False, "previous_response_id": None,
        "service_tier": "default", "store": False, "temperature": 1.0, "top_p": 1.0,
        "top_logprobs": 0, "tools": [], "metadata": {},
        "usage": {
            "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 1}, "total_tokens": 12,
        },
    }  # fmt: skip


def test_the_events_of_a_stream_come_in_their_order():
    kinds = [event["type"].removeprefix("response.") for event in streamed(["<think>a</think>b", CALL])]
    text = ["output_item.added", "content_part.added", "X.delta", "X.done", "content_part.done", "output_item.done"]
    call = ["output_item.added", "X.delta", "X.done", "output_item.done"]
    assert kinds == [
        "created", "in_progress",
        *(one.replace("X", "reasoning_text") for one in text),
        *(one.replace("X", "output_text") for one in text),
        *(one.replace("X", "function_call_arguments") for one in call),
        "completed",
    ]  # fmt: skip


def same(answer):
    """An answer without what is drawn by chance, or depends on how its tokens came."""
    answer = orjson.loads(orjson.dumps(answer))
    for item in answer["output"]:
        item.pop("call_id", None)
    return {name: value for name, value in answer.items() if name != "usage"}


@given(st.lists(st.integers(0, 1000), max_size=12), st.sampled_from([SAID, SAID[: 12], SAID[:60], "Hi", CALL, ""]),
       st.sampled_from(["stop", "length"]))  # fmt: skip
def test_however_a_stream_is_cut_it_tells_what_the_whole_answer_is(places, text, reason):
    found = response_of(streamed(cut(text, *places), reason))
    assert same(found) == same(whole([text], reason))
    assert found["status"] == ("completed" if reason == "stop" else "incomplete")


def test_an_answer_that_ends_at_the_limit_says_so_and_its_last_item_is_incomplete():
    found = response_of(streamed(["<think>hm</think>", "I lo"], "length"))
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in found["output"]] == ["completed", "incomplete"]


def test_without_parsers_all_is_text_and_nothing_is_no_item():
    (item,) = whole([SAID], parsing=None)["output"]
    assert item["content"][0]["text"] == SAID
    assert whole([], parsing=None)["output"] == []


def test_a_request_that_fails_in_its_stream_ends_with_what_it_had():
    answer, error = answer_of(), RequestFailed("worker attention-0 was lost")
    events = [event for output in outputs_of(["I lo"])[:1] for event in answer.add(output)]
    found = response_of(plain([*events, *answer.failed(error_of(error), status_of(error))]))
    assert found["error"] == {"code": "server_error", "message": "worker attention-0 was lost"}
    assert (found["output"][0]["status"], found["incomplete_details"]) == ("incomplete", None)
