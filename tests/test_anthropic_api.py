"""Anthropic's Messages API on values: what a request asks of a chat, and what objects and events its answer becomes."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.errors import InvalidRequest, ModelNotFound, RequestFailed, Unavailable
from msi.server.anthropic.answer import MessageAnswer
from msi.server.anthropic.errors import error_body
from msi.server.anthropic.request import FIELDS, NOT_IN_MESSAGES, translated
from msi.server.calls import error_of, status_of
from msi.server.chat import parse_chat
from msi.server.field_table import IGNORED
from msi.server.prepare import ANTHROPIC
from tests.test_bodies import ODD, USER, VALUES
from tests.test_responses_api import called, said
from tests.typed_streams import CALL, SAID, asked, cut, message_of, outputs_of, plain

TOOL = {"name": "weather", "description": "of a city", "input_schema": {"type": "object"}}


def chat(**fields):
    return translated({"messages": [USER], "max_tokens": 9, **fields}).chat


def messages(*given, **fields):
    return chat(messages=list(given), **fields)["messages"]


def text(words, **more):
    return {"type": "text", "text": words, **more}


# -- requests --------------------------------------------------------------------------------------------------------


def test_messages_and_their_blocks_become_those_of_a_chat():
    assert messages(
        {"role": "user", "content": [text("How is"), text("Paris?", cache_control={"type": "ephemeral"})]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            text("I look."), {"type": "tool_use", "id": "c1", "name": "weather", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "weather"},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}, text("And?"),
            {"type": "tool_result", "tool_use_id": "c2", "content": [text("wet"), text("cold")], "is_error": False},
            {"type": "tool_result", "tool_use_id": "c3"},
        ]},
        system=[text("Be brief.", cache_control={"type": "ephemeral"}), text("Be kind.")],
    ) == [
        said("system", "Be brief.\n\nBe kind."), said("user", "How is", "Paris?"),
        {"role": "assistant", "content": ["I look."], "reasoning": "hm",
         "tool_calls": [called("c1", arguments={"a": 1}), called("c2", arguments={})]},
        said("tool", "sunny", tool_call_id="c1"), said("tool", "wet", "cold", tool_call_id="c2"),
        said("tool", tool_call_id="c3"), said("user", "And?"),
    ]  # fmt: skip


def test_what_claude_code_says_of_itself_in_each_request_is_no_part_of_the_prompt():
    note = text("x-anthropic-billing-header: cc_version=1; cch=9f3a;")
    assert messages(USER, system=[note, text("Be brief.")])[0] == said("system", "Be brief.")
    assert messages(USER, system=[note]) == [said("user", "a")]
    assert messages({"role": "ctx", "content": "a"}, {"role": "system", "content": "b"}) == [said("user", "a\n\nb")]


def test_an_answer_at_the_end_is_one_to_go_on_with():
    prefill = {"role": "assistant", "content": "The best answer is ("}
    assert chat(messages=[USER, prefill])["continue_final_message"] is True
    calling = [text("a"), {"type": "tool_use", "id": "c", "name": "f"}]
    for content in ("", [], calling):
        last = {"role": "assistant", "content": content}
        assert "continue_final_message" not in chat(messages=[USER, last])


def test_fields_get_the_chats_names():
    assert chat(
        model="m", temperature=0.5, top_p=0.5, top_k=4, stream=True, stop_sequences=["x"], tools=[TOOL],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True}, output_config={"effort": "low"},
        ignore_eos=True,
    ) == {
        "messages": [said("user", "a")], "model": "m", "max_tokens": 9, "temperature": 0.5, "top_p": 0.5, "top_k": 4,
        "stream": True, "stop": ["x"], "tool_choice": "auto", "parallel_tool_calls": False, "ignore_eos": True,
        "reasoning_effort": "low",
        "tools": [{"type": "function", "function": {
            "name": "weather", "description": "of a city", "parameters": {"type": "object"}}}],
    }  # fmt: skip
    for kind, choice in (("any", "required"), ("none", "none")):
        assert chat(tool_choice={"type": kind})["tool_choice"] == choice
    named = chat(tools=[{**TOOL, "type": "custom"}], tool_choice={"type": "tool", "name": "weather"})["tool_choice"]
    assert named == {"type": "function", "function": {"name": "weather"}}
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
    assert chat(output_config={"format": schema})["response_format"] == wanted
    assert chat(output_format=schema)["response_format"] == wanted


def test_thinking_is_switched_in_the_template_and_told_unless_it_is_not_wanted():
    on, off = ({"enable_thinking": is_on, "thinking": is_on} for is_on in (True, False))
    for thinking in ({"type": "enabled", "budget_tokens": 2048}, {"type": "adaptive", "display": "summarized"}):
        assert chat(thinking=thinking) == {**chat(), "chat_template_kwargs": on}
    assert chat(thinking={"type": "enabled", "display": "omitted"})["include_reasoning"] is False
    assert chat(thinking={"type": "disabled"}) == {**chat(), "chat_template_kwargs": off, "include_reasoning": False}


NEUTRAL = {
    "metadata": [{"user_id": "u"}], "service_tier": ["auto"], "cache_control": [{"type": "ephemeral"}],
    "mcp_servers": [None, []], "container": [None], "system": [None, "", []], "stop_sequences": [None, []],
    "context_management": [None, {}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}],
    "tools": [None, []], "tool_choice": [None, {}, {"type": "auto"}], "thinking": [None, {}], "n": [1],
    "betas": [["a"]],
    "output_config": [None, {}], "top_logprobs": [0], "inference_geo": ["eu"], "stream": [None, False],
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_ask_for_nothing(name):
    nothing = parse_chat(chat(), max_tokens=9)
    for value in NEUTRAL[name]:
        assert parse_chat(chat(**{name: value}), max_tokens=9) == nothing, value


CHANGES = [
    ({"max_tokens": None}, "max_tokens", "is missing; say how long"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "is not supported here"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "must be an object"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name", "must be a string"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type", "must be auto, any, tool or none"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "must be a string"),
    ({"tool_choice": "auto"}, "tool_choice", "must be an object"),
    ({"thinking": {"type": "some"}}, "thinking.type", "must be enabled, adaptive or disabled"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "the client runs all tools"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0]",
     "all of the messages are used"),
    ({"context_management": {"edits": [7]}}, "context_management.edits[0]", "must be an object"),
    ({"stop": ["a"]}, "stop", "the name here is stop_sequences"),
    ({"messages": []}, "messages", "not empty"), ({"messages": "a"}, "messages", "must be an array"),
    ({"messages": [7]}, "messages[0]", "an object with role and content"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "must be user or assistant"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "a string or an array of content blocks"),
    ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content[0]", "a content block"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type",
     "'image', which is not supported here; there may be text and tool_result blocks"),
    ({"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]}, "messages[0].content[0].type",
     "there may be text, thinking and tool_use blocks"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id",
     "must be a string"),
    ({"system": 5}, "system", "a string or an array of text blocks"),
    ({"system": [{"type": "image"}]}, "system[0].type", "is not supported here"),
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
        ({"stop_sequences": "a" * 5000}, "stop_sequences"), ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1e9}, "temperature"), ({"output_format": {"type": "x"}}, "output_format"),
        ({"output_config": {"format": {"type": "x"}}}, "output_config.format"),
    ],
)  # fmt: skip
def test_what_the_chat_refuses_is_told_in_the_clients_names(body, param):
    request = translated({"messages": [USER], "max_tokens": 9, **body})
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(request.chat, max_tokens=9)
    error = request.renamed(caught.value)
    assert error.param == param
    assert str(error).startswith(f"{param} is ")


def test_who_counts_needs_no_limit():
    assert translated({"messages": [USER]}, is_counted=True).chat == {"messages": [said("user", "a")]}


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


@pytest.mark.parametrize("name", sorted(FIELDS | set(NOT_IN_MESSAGES) | IGNORED))
def test_whatever_a_field_holds_it_is_a_chat_or_a_sentence(name):
    for value in ODD:
        check({"messages": [USER], "max_tokens": 9, name: value})


KINDS = ["text", "thinking", "redacted_thinking", "tool_use", "tool_result", "image"]
BLOCKS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(KINDS) | VALUES, "text": st.text(max_size=5) | VALUES, "thinking": VALUES,
        "id": st.text(max_size=3) | VALUES, "name": st.text(max_size=3) | VALUES, "input": VALUES,
        "tool_use_id": st.text(max_size=3) | VALUES, "content": st.text(max_size=3) | VALUES,
    },
)  # fmt: skip
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system"]) | VALUES,
        "content": st.text(max_size=5) | st.lists(BLOCKS | VALUES, max_size=4) | VALUES,
    },
)
BODIES = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES | VALUES, max_size=4) | VALUES, "max_tokens": st.just(9) | VALUES},
    optional=dict.fromkeys(sorted(FIELDS - {"messages", "max_tokens"}), VALUES),
)


@given(BODIES)
def test_no_body_ends_in_anything_but_a_chat_or_a_sentence(body):
    check(body)


# -- answers ---------------------------------------------------------------------------------------------------------


def answer_of(**options):
    return MessageAnswer("id", "m", asked(ANTHROPIC, **options))


def streamed(pieces, reason="stop", **options):
    answer = answer_of(**options)
    return plain([event for output in outputs_of(pieces, reason) for event in answer.add(output)])


def whole(pieces, reason="stop", stopped_by="", **options):
    answer = answer_of(stream=False, **options)
    for output in outputs_of(pieces, reason, stopped_by):
        answer.add(output)
    return orjson.loads(answer.whole())


def test_a_whole_answer_has_a_block_for_what_was_thought_the_text_and_each_call():
    answer = whole([SAID])
    assert len({call.pop("id") for call in answer["content"][2:]}) == 2
    assert len(answer["content"][0].pop("signature")) == 64
    call = {"type": "tool_use", "name": "weather", "input": {"city": "Paris"}}
    assert answer == {
        "id": "msg_id", "type": "message", "role": "assistant", "model": "m", "stop_reason": "tool_use",
        "stop_sequence": None,
        "content": [{"type": "thinking", "thinking": "hm, well"}, {"type": "text", "text": "\n\nI look."}, call, call],
        "usage": {"input_tokens": 6, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0,
                  "output_tokens": 2},
    }  # fmt: skip


def test_the_events_of_a_stream_come_in_their_order():
    kinds = [event["type"] for event in streamed(["<think>a</think>b", CALL])]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    thought = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *thought, *block, *block, "message_delta", "message_stop"]


@given(st.lists(st.integers(0, 1000), max_size=12), st.sampled_from([SAID, SAID[:12], SAID[:60], "Hi", CALL, ""]),
       st.sampled_from(["stop", "length"]))  # fmt: skip
def test_however_a_stream_is_cut_it_tells_what_the_whole_answer_is(places, said, reason):
    pieces = cut(said, *places)
    streams, wholes = message_of(streamed(pieces, reason)), whole(pieces, reason)
    for block in (*streams["content"], *wholes["content"]):
        block.pop("id", None)
    assert streams == wholes


@pytest.mark.parametrize(
    ("pieces", "reason", "stopped_by", "told"),
    [
        (["Hi"], "stop", "", ("end_turn", None)),
        (["Hi"], "length", "", ("max_tokens", None)),
        (["Hi"], "stop", "END", ("stop_sequence", "END")),
        ([CALL], "stop", "", ("tool_use", None)),
        ([CALL], "length", "", ("max_tokens", None)),
        ([CALL[:40]], "length", "", ("max_tokens", None)),
        ([], "stop", "", ("end_turn", None)),
    ],
)
def test_the_reason_of_the_end_is_told(pieces, reason, stopped_by, told):
    answer = whole(pieces, reason, stopped_by)
    assert (answer["stop_reason"], answer["stop_sequence"]) == told


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("no"), "invalid_request_error"),
        (ModelNotFound("no"), "not_found_error"),
        (Unavailable("no"), "overloaded_error"),
        (RequestFailed("no"), "api_error"),
    ],
)
def test_errors_have_anthropics_shape_and_are_an_event_in_a_stream(error, kind):
    told = {"type": "error", "error": {"type": kind, "message": "no"}}
    assert error_body(error_of(error), status_of(error)) == told
    assert answer_of().failed(error_of(error), status_of(error)) == [told]


@pytest.mark.parametrize("content", [None, [], [{"type": "text", "text": ""}]])
def test_a_conversation_in_which_nobody_says_anything_is_refused(content):
    silent = {"role": "system"} if content is None else {"role": "system", "content": content}
    with pytest.raises(InvalidRequest, match="nobody says anything"):
        messages(silent, silent)
