"""Chats render as transformers renders them: templates of the shapes that models ship, and any list of messages."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from msi.errors import ConfigError, InvalidRequest
from msi.server.chat import parse_chat
from msi.server.chat_template import ChatTemplate, ChatTemplates
from tests.installed import transformers

FOLDER = Path(__file__).parent / "chat_templates"
SOURCES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "image_token": "<img>"}
TAKE_PARTS = ("glm", "parts")
OURS = {name: ChatTemplate(source, SPECIAL) for name, source in SOURCES.items()}

TOOL = {"type": "function", "function": {"name": "look", "description": "see", "parameters": {"type": "object"}}}


def call(arguments, name="look"):
    return {"id": "abcdefgh1", "type": "function", "function": {"name": name, "arguments": arguments}}


def expected_of(name, messages):
    """What a server hands to transformers: arguments as objects, texts joined by newlines or as parts."""
    result = []
    for message in messages:
        message = dict(message)
        if isinstance(message.get("content"), list) and (name not in TAKE_PARTS or message["role"] == "tool"):
            message["content"] = "\n".join(part["text"] for part in message["content"])
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                {**one, "function": {**one["function"], "arguments": json.loads(one["function"]["arguments"])}}
                for one in calls
            ]
        else:
            message.pop("tool_calls", None)
        result.append(message)
    return result


@cache
def their_tokenizer():
    return transformers().PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)


def theirs(name, messages, *, tools=None, documents=None, prompt=True, continues=False, **values):
    return their_tokenizer().apply_chat_template(
        messages, tools=tools, documents=documents, chat_template=SOURCES[name], tokenize=False,
        add_generation_prompt=prompt, continue_final_message=continues, **values,
    )  # fmt: skip


def ours(name, messages, *, tools=None, documents=None, prompt=True, continues=False, **values):
    body = {
        "messages": messages, "add_generation_prompt": prompt, "continue_final_message": continues,
        "chat_template_kwargs": values, "documents": documents,
    }  # fmt: skip
    if tools:
        body |= {"tools": tools, "tool_choice": "none"}
    asked = parse_chat(json.loads(json.dumps(body)), max_tokens=100)
    return OURS[name].render(
        asked.messages,
        add_generation_prompt=asked.add_generation_prompt,
        values=asked.template_values,
        continue_final_message=asked.continue_final_message,
        tools=asked.tools,
        documents=asked.documents,
    )


CHATS = {
    "one": [{"role": "user", "content": "Why?"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Why?\nSay it."}],
    "developer": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    "long": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."},
        {"role": "user", "content": "{{ 7 * 7 }}{% raw %} \U0001f642 \u00e9 <|im_end|>"},
    ],
    "thought": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning": "so"},
    ],
    "nothing said": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    ],
    "tools": [
        {"role": "user", "content": "Look!"},
        {"role": "assistant", "content": None, "tool_calls": [call('{"at": "the \\u00e9", "n": 2}')], "name": None},
        {"role": "tool", "content": "seen", "tool_call_id": "abcdefgh1"},
        {"role": "assistant", "content": "I saw."},
        {"role": "user", "content": "And?"},
    ],
    "tools, empty": [
        {"role": "user", "content": "Look!"},
        {"role": "assistant", "content": "", "tool_calls": [call("{}")]},
        {"role": "tool", "content": "", "tool_call_id": "abcdefgh1"},
    ],
    "no calls": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}],
    "names": [{"role": "user", "content": "a", "name": "Jane"}, {"role": "assistant", "content": "b", "refusal": None}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": ""}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", SOURCES)
def test_chats_render_as_transformers_renders_them(name, chat):
    messages, cases = CHATS[chat], 0
    for options in (
        {}, {"prompt": False}, {"tools": [TOOL, TOOL]}, {"enable_thinking": False}, {"enable_thinking": True},
        {"documents": [{"title": "t", "text": "x"}]}, {"bos_token": "<b>", "reasoning_effort": "low"},
        {"prompt": False, "continues": True},
    ):  # fmt: skip
        try:
            wanted = theirs(name, expected_of(name, messages), **options)
        except Exception:  # a template refuses; ours may find another form that it takes
            continue
        assert ours(name, messages, **options) == wanted, options
        cases += 1
    assert cases or chat in ("nothing said", "tools", "tools, empty", "developer", "thought")


def test_a_template_that_knows_nothing_but_parts_gets_every_text_as_one():
    only_parts = ChatTemplate(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}", {}
    )
    assert only_parts.render([{"role": "user", "content": "ab"}], add_generation_prompt=True, values={}) == "ab;"


ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "ipython", "function"])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", " a ", "{{ 1 }}", "</think>x", "<think>\ny\n</think>z", "\n", "None"]
)
ARGUMENTS = st.sampled_from(["{}", '{"a": 1}', '{"a": {"b": [1, null, "\u00e9"]}}', '{"x": "y\\nz"}'])
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": TEXTS | PARTS},
        optional={
            "name": st.none() | TEXTS,
            "tool_calls": st.none() | st.lists(ARGUMENTS.map(call), max_size=2),
            "tool_call_id": st.just("abcdefgh1"),
            "reasoning_content": st.none() | TEXTS,
            "thinking": TEXTS,
        },
    ).flatmap(
        lambda message: st.just(message) if message["role"] not in ("assistant", "tool", "function")
        else st.sampled_from([message, {**message, "content": None}])
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


@given(st.sampled_from(sorted(SOURCES)), MESSAGES, st.booleans(), st.booleans(), st.booleans())
def test_any_list_of_messages_renders_as_in_transformers(name, messages, prompt, has_tools, continues):
    options = {"tools": [TOOL] if has_tools else None, "prompt": prompt and not continues, "continues": continues}
    try:
        wanted = theirs(name, expected_of(name, messages), **options)
    except Exception:
        wanted = None
    try:
        got = ours(name, messages, **options)
    except InvalidRequest as error:
        got, sentence = None, str(error)
    if wanted is None and got is None:
        assert len(sentence) < 400
        assert "\n" not in sentence
    elif wanted is not None:
        assert got == wanted


# -- where transformers gives up -------------------------------------------------------------------------------------


def test_a_call_without_content_renders_in_templates_that_ask_for_none_and_for_written_arguments():
    text = ours("deepseek", CHATS["tools"])
    assert '<|tool_calls_begin|>function<|tool_sep|>look\n```json\n{"at": "the \u00e9", "n": 2}\n```' in text
    assert "None" not in text


@pytest.mark.parametrize("name", SOURCES)
def test_content_null_never_renders_as_the_word(name):
    for chat in ("nothing said", "tools"):
        try:
            text = ours(name, CHATS[chat])
        except InvalidRequest:
            continue  # mistral's wants roles to alternate
        assert "None" not in text


@pytest.mark.parametrize("arguments", ["", "{not json", "5", "null", "[" * 100_000, "9" * 5000, None, 7, [1], {"a": 1}])
def test_arguments_that_are_no_object_become_one(arguments):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}]
    wanted = arguments if isinstance(arguments, dict | list) else {}
    assert (
        parse_chat({"messages": messages}, max_tokens=9).messages[1]["tool_calls"][0]["function"]["arguments"] == wanted
    )
    assert ours("qwen3", messages)


def test_continuing_the_last_message_needs_one_that_stands_at_the_end():
    for messages, complaint in (
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "no content to go on with"),
        ([{"role": "system", "content": "a"}], "leaves out the end of the last message"),
    ):
        with pytest.raises(InvalidRequest, match=complaint):
            ours("documents", messages, prompt=False, continues=True)
    with pytest.raises(InvalidRequest, match="ask for one"):
        ours("qwen3", CHATS["one"], prompt=True, continues=True)
    asked = parse_chat({"messages": CHATS["one"], "continue_final_message": True}, max_tokens=9)
    assert (asked.add_generation_prompt, asked.continue_final_message) == (False, True)


def test_tools_choose_their_own_template_where_there_is_one():
    templates = ChatTemplates({"default": "d", "tool_use": "t", "rag": "r"}, {})
    render = {"messages": [], "add_generation_prompt": True, "values": {}}
    assert templates.choose(has_tools=False).render(**render) == "d"
    assert templates.choose(has_tools=True).render(**render) == "t"
    assert not ChatTemplates({}, {})
    with pytest.raises(ConfigError, match="templates named rag, and none named default"):
        ChatTemplates({"rag": "r"}, {})


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ a", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% include 'x' %}{% if %}"]
)
def test_a_template_that_is_no_jinja_is_a_sentence(source):
    with pytest.raises(ConfigError, match=r"the chat template is not valid Jinja: .{1,200}$"):
        ChatTemplate(source, {})
