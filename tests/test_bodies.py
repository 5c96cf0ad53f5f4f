"""JSON bodies: what is taken, what is neutral, what is refused by name; never anything but a value or a sentence."""

from __future__ import annotations

import dataclasses
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.control.client_messages import Welcome
from msi.errors import InvalidRequest, shown
from msi.sampling_params import SamplingDefaults
from msi.server.answers import Usage
from msi.server.chat import FIELDS as CHAT_FIELDS
from msi.server.chat import ChatRequest, parse_chat
from msi.server.chat_answers import ChatAnswer
from msi.server.completions import FIELDS as COMPLETION_FIELDS
from msi.server.completions import MAX_TOTAL_CHOICES, CompletionAnswer, CompletionRequest, parse_completion
from msi.server.field_table import IGNORED, NOT_DONE, NOT_IN_CHATS, NOT_IN_COMPLETIONS
from msi.server.fields import MAX_DEPTH, Streaming, parse_object
from msi.server.prepare import ANSWERS, ENDPOINTS, MESSAGE, NotUnderstood, Preparation, Setup
from msi.server.replies import ChunkReply
from msi.server.tokenizing import parse_detokenize
from msi.server.urgency import Urgency, urgency
from msi.types import Output, SamplingParams, TokenText

USER = {"role": "user", "content": "a"}


def completion(**fields):
    return parse_completion({"prompt": "a", **fields})


def chat(**fields):
    return parse_chat({"messages": [USER], **fields}, max_tokens=100)


# -- neutral values --------------------------------------------------------------------------------------------------

NEUTRAL = {
    "best_of": [None, 1, 1.0], "suffix": [None, ""], "echo": [None, False], "logprobs": [None, False],
    "n": [None, 1, 1.0], "stop": [None, "", [], False], "stop_token_ids": [None, [], {}, False],
    "logit_bias": [None, {}, [], False], "stream": [None, False, 0],
    "stream_options": [None, {}, {"include_usage": False}], "min_tokens": [None, 0, 0.0], "seed": [None],
    "user": [None, "me", 5], "model": [None, ""], "max_tokens": [None, 16.0],
    "temperature": [None, 1, 1.0], "top_p": [None, 1, 1.0], "top_k": [None, 0, 0.0], "min_p": [None, 0, 0.0],
    "presence_penalty": [None, 0, 0.0], "frequency_penalty": [None, 0], "repetition_penalty": [None, 1, 1.0],
    "ignore_eos": [None, False, 0], "use_beam_search": [None, False], "length_penalty": [None, 1, 1.0],
    "response_format": [None, {"type": "text"}, {}], "structured_outputs": [None, {}], "guided_json": [None, {}, ""],
    "guided_regex": [None, ""], "guided_choice": [None, []], "guided_whitespace_pattern": [None, "", " ?"],
    "prompt_logprobs": [None, False], "allowed_token_ids": [None, []],
    "bad_words": [None, []], "truncate_prompt_tokens": [None], "logits_processors": [None, []],
    "prompt_embeds": [None], "modalities": [None, ["text"], []], "audio": [None, {}], "tools": [None, []],
    "tool_choice": [None, "none", "auto"], "functions": [None, []], "function_call": [None, "none", "auto"],
    "skip_special_tokens": [None, True], "include_stop_str_in_output": [None, False], "store": [None, True, False],
    "metadata": [None, {"a": "b"}], "service_tier": ["auto"], "parallel_tool_calls": [None, True, False],
    "spaces_between_special_tokens": [True, False], "kv_transfer_params": [None],
    "return_token_ids": [None, False], "num_beams": [1], "do_sample": [True], "typical_p": [1.0],
    "cache_salt": [None, ""], "return_tokens_as_token_ids": [False],
    "verbosity": [None, "medium"], "request_id": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_of_any_field_ask_for_nothing(name):
    for value in NEUTRAL[name]:
        assert completion(**{name: value}) == completion(), value
        if name != "max_tokens":  # whose default is another
            assert chat(**{name: value}) == chat(), value


CHANGES = {
    "best_of": 2, "suffix": "b", "regex": "a+",
    "use_beam_search": True, "length_penalty": 2, "logits_processors": ["x"], "prompt_embeds": "AAAA",
    "audio": {"voice": "x"}, "modalities": ["text", "audio"],
    "kv_transfer_params": {"a": 1}, "thinking_token_budget": 5,
    "max_new_tokens": 5, "repeat_penalty": 1.1, "num_beams": 4, "do_sample": False, "functions": [{"name": "f"}],
    "tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}],
    "web_search_options": {"a": 1},
    "verbosity": "low", "return_token_offsets": True, "detokenize": False, "typical_p": 0.5, "lora_path": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_would_change_the_answer_and_is_not_done_is_refused_by_name(name):
    for parse in (completion, chat):
        with pytest.raises(InvalidRequest) as caught:
            parse(**{name: CHANGES[name]})
        assert caught.value.param == name
        assert name in str(caught.value)


TAKEN = {
    "allowed_token_ids": ([1, 2.0], (1, 2)), "bad_words": (["a", " b"], ("a", " b")),
    "truncate_prompt_tokens": (5.0, 5), "include_stop_str_in_output": (True, True), "skip_special_tokens": (0, False),
}  # fmt: skip


def test_what_both_endpoints_take_reaches_the_sampler():
    for name, (given_value, expected) in TAKEN.items():
        for parse in (completion, chat):
            assert getattr(parse(**{name: given_value}).params, name) == expected
            with pytest.raises(InvalidRequest) as caught:
                parse(**{name: "x"})
            assert caught.value.param == name


WRITTEN = {
    "temperature": ("0.5", 0.5), "top_p": ("1", 1), "min_p": ("+1e-1", 0.1), "presence_penalty": ("-2", -2),
    "max_tokens": ("16", 16), "top_k": ("-1", -1), "seed": ("7.0", 7), "n": ("2", 2), "ignore_eos": ("True", True),
    "skip_special_tokens": ("false", False),
}  # fmt: skip


def test_numbers_and_booleans_may_be_written_as_texts():
    for name, (text, expected) in WRITTEN.items():
        for parse in (completion, chat):
            assert getattr(parse(**{name: text}).params, name) == expected
            for wrong in ("", "0x10", "1_0", "nan", "1e999", "१", "1" * 99, "null"):
                with pytest.raises(InvalidRequest, match=name):
                    parse(**{name: wrong})


WRITTEN_INSIDE = {
    "allowed_token_ids": (["5", 6.0], (5, 6)), "stop_token_ids": (["7"], (7,)),
    "logit_bias": ({"5": "-1.5", "6": "2"}, {5: -1.5, 6: 2}),
}  # fmt: skip


def test_so_may_those_within_lists_and_those_that_no_sampler_reads():
    for name, (given_value, expected) in WRITTEN_INSIDE.items():
        for parse in (completion, chat):
            assert getattr(parse(**{name: given_value}).params, name) == expected
    assert completion(n="2", best_of="2").params.n == 2
    assert parse_detokenize({"tokens": ["5", 6.0, "7e0"]}).token_ids == (5, 6, 7)
    assert chat(logprobs="true", top_logprobs="3").params.logprobs == 3
    assert urgency({"priority": "-2", "timeout_s": "0.5"}) == Urgency(-2, 0.5)
    for parse in (completion, chat):
        assert parse(ignore_eos=1).params.ignore_eos
        assert not parse(ignore_eos=0.0).params.ignore_eos
        for wrong in (2, -1, 0.5):
            with pytest.raises(InvalidRequest, match="ignore_eos"):
                parse(ignore_eos=wrong)
    for name in ("priority", "timeout_s"):
        for wrong in ("", "1e999", "nan", "x"):
            with pytest.raises(InvalidRequest, match=name):
                urgency({name: wrong})


@pytest.mark.parametrize("limit", [-1, 0, 1.5, "x", True, 2**63, []])
def test_a_limit_is_refused_by_the_name_that_the_request_has_for_it(limit):
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(InvalidRequest, match=f"^{name} is") as caught:
            chat(**{name: limit})
        assert caught.value.param == name


@pytest.mark.parametrize("parameters", ["x", 5, True, [1], ["a"], 0.5])
def test_a_tools_schema_that_is_no_object_is_refused_by_name(parameters):
    with pytest.raises(InvalidRequest) as caught:
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}], tool_choice="required")
    assert caught.value.param == "tools[0].function.parameters"
    for nothing in (None, {}, [], False, ""):  # as clients write an empty object
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": nothing}}], tool_choice="required")


def test_a_byte_order_mark_before_a_body_is_no_part_of_it():
    for body in ('\ufeff{"prompt": "\ufeffa"}', '\ufeff{"prompt": "\ufeffa"}'.encode()):
        assert parse_object(body) == {"prompt": "\ufeffa"}
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse_object("\ufeff" * 2 + "{}")


def test_unknown_fields_are_ignored_and_told():
    odd = {"frobnicate": 1, "x" * 1000: {"deep": []}, "stream_options": {"include_obfuscation": False}}
    for parse, plain in ((completion, completion()), (chat, chat())):
        assert parse(**odd) == dataclasses.replace(plain, ignored=("frobnicate", "x" * 256))
    many = completion(**{f"field_{index}": 1 for index in range(1000)})
    assert len(many.ignored) == 32


def test_the_tables_do_not_contradict_each_other():
    taken = COMPLETION_FIELDS | CHAT_FIELDS
    assert not taken & IGNORED
    assert not IGNORED & set(NOT_DONE)
    assert not COMPLETION_FIELDS & set(NOT_IN_COMPLETIONS)
    assert not CHAT_FIELDS & set(NOT_IN_CHATS)
    assert not (taken - set(NOT_IN_CHATS) - set(NOT_IN_COMPLETIONS)) & set(NOT_DONE)


# -- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([1.0, 2], ((1, 2),)),
        ([[1, 2]], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a", [3]], ("a", (3,))),
    ],
)
def test_prompts_come_alone_or_several(prompt, expected):
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    "prompt",
    [None, 5, True, {}, [], [[]], [""[:0], 5], [True], [[1], []], [None], [[["a"]]], [1, "a"], [[1, [2]]], {"a": 1}],
)
def test_prompts_of_other_shapes_are_refused(prompt):
    allowed = r"it must be a (string, or an array|token id)"
    with pytest.raises(InvalidRequest, match=rf"prompt(\[[0-9]\])? is .*; {allowed}") as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([[]], "prompt[0] is an empty array; it must be a string, or an array of token ids that is not empty"),
        ([[1], "a", None], "prompt[2] is null; it must be a string, or an array of token ids that is not empty"),
        (["a", 5], "prompt[1] is a number; it must be a string, or an array of token ids that is not empty"),
        ([[1, [2]]], "prompt[0] is an array of other things than token ids; it must be a string, or an array of "
                     "token ids that is not empty"),
        ([1, "a"], "prompt[1] is a string; it must be a token id, as the first is one"),
        ([1, 2.5], "prompt[1] is a number; it must be a token id, as the first is one"),
    ],
)  # fmt: skip
def test_of_several_prompts_the_one_that_is_none_is_named(prompt, sentence):
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert str(caught.value) == sentence


def test_the_choices_of_one_request_are_bounded_all_together():
    assert len(completion(prompt=["a"] * MAX_TOTAL_CHOICES).prompts) == MAX_TOTAL_CHOICES
    with pytest.raises(InvalidRequest, match=r"9 prompts with n = 128 are 1152 choices; at most 1024") as caught:
        completion(prompt=["a"] * 9, n=128)
    assert caught.value.param == "prompt"


def test_usage_counts_each_prompt_once_and_the_cache_hits_of_its_first_choice():
    usage = Usage(num_choices=2)
    for index, cached in ((0, 16), (1, 32), (2, 0), (3, 64), (0, 16)):
        usage.add(Output("r", "x", (1,), None, 100 + index // 2, index, (), cached))
    assert usage.values() == {
        "prompt_tokens": 201, "completion_tokens": 5, "total_tokens": 206,
        "prompt_tokens_details": {"cached_tokens": 16},
    }  # fmt: skip


# -- values that make no sense ---------------------------------------------------------------------------------------

DEEP = json.loads("[" * 90 + "]" * 90)
ODD = [
    None, True, False, 0, 1, -1, 1.0, 0.5, -0.0, 1e-50, 1e30, 1e308, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), "", "a",
    "1", "none", "auto", "x" * 10_000, "\x00", [], {}, [None], [1], ["a"], [1.5], [[]], [{}], {"a": 1}, {"a": None},
    {"type": "text"}, {"9" * 5000: 1}, {"5": 1}, {"5": "1"}, {"5": 1e300}, {"-1": 1}, {"\u0665": 1}, {"": 1}, DEEP,
    ["x" * 5000] * 20,
    list(range(2000)), {str(index): 1 for index in range(2000)},
]  # fmt: skip
EVERY_FIELD = sorted(
    COMPLETION_FIELDS | CHAT_FIELDS | set(NOT_DONE) | IGNORED | set(NOT_IN_CHATS) | set(NOT_IN_COMPLETIONS)
)


def check(parse, body):
    """A frozen value, or one sentence of a bounded length that names a field."""
    try:
        asked = parse(body)
    except InvalidRequest as error:
        sentence, param = str(error), error.param
    else:
        assert isinstance(asked, CompletionRequest | ChatRequest)
        assert isinstance(asked.params, SamplingParams)
        return
    assert 0 < len(sentence) < 600
    assert "\n" not in sentence
    assert param, sentence


def parse_both(body):
    check(parse_completion, {"prompt": "a", **body})
    check(lambda body: parse_chat(body, max_tokens=100), {"messages": [USER], **body})


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_whatever_a_field_holds_the_answer_is_a_value_or_a_sentence_that_names_it(name):
    for value in ODD:
        parse_both({name: value})


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN |= st.text(max_size=20)
NAMES = st.sampled_from(
    [*EVERY_FIELD, "role", "content", "type", "text", "function", "name", "arguments", "tool_calls"]
)
VALUES = st.recursive(
    PLAIN | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries({}, optional={"type": st.just("text") | VALUES, "text": st.text(max_size=9) | VALUES})
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "id": VALUES,
        "function": st.fixed_dictionaries({}, optional={"name": st.text(max_size=5), "arguments": VALUES}) | VALUES,
    },
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant", "tool"]) | VALUES,
        "content": st.text(max_size=9) | st.lists(PARTS | VALUES, max_size=3) | VALUES,
        "tool_calls": st.lists(CALLS | VALUES, max_size=2) | VALUES,
        "name": VALUES,
    },
)
BODIES = st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=8)


@given(BODIES)
def test_no_body_ends_in_anything_but_a_request_or_a_sentence(body):
    parse_both(body)
    check(parse_completion, body)


@given(BODIES, st.lists(MESSAGES | VALUES, max_size=4) | VALUES)
def test_no_list_of_messages_ends_in_anything_but_a_request_or_a_sentence(body, messages):
    check(lambda body: parse_chat(body, max_tokens=100), {**body, "messages": messages})


@pytest.fixture(scope="module")
def preparation(tiny_model):
    template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    tokenizer = (tiny_model / "tokenizer.json").read_bytes()
    return Preparation(Setup(Welcome("tiny", 290, 512, tokenizer, {"default": template})))


@given(body=BODIES, messages=st.lists(MESSAGES, max_size=3), endpoint=st.sampled_from(ENDPOINTS))
@pytest.mark.slow
def test_what_is_understood_of_any_body_crosses_processes_as_it_is(preparation, body, messages, endpoint):
    message = {"type": "generate", "id": "a"} if endpoint == MESSAGE else {}
    for more in ({}, {"prompt": "a"}, {"messages": messages}):
        understood = preparation.understand(endpoint, orjson.dumps({**body, **message, **more}))
        assert ANSWERS.decode(ANSWERS.encode(understood)) == understood
        if isinstance(understood, NotUnderstood):
            assert understood.failure.kind in ("invalid_request", "model_not_found"), understood
            assert 0 < len(understood.failure.message) < 600
            assert understood.failure.param or "no chat template" in understood.failure.message


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_no_bytes_end_in_anything_but_an_object_or_a_sentence(body):
    try:
        result = parse_object(body)
    except InvalidRequest as error:
        result = error
    assert isinstance(result, dict) or len(str(result)) < 600


@pytest.mark.parametrize("depth", [1000, 1024, 5000, 1_000_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_a_body_that_is_nested_too_deep_is_refused(depth, opening):
    closing = "]" if opening == "[" else "}"
    body = '{"prompt":' + opening * depth + "1" + closing * depth + "}"
    with pytest.raises(InvalidRequest, match="nested more than 100 levels deep"):
        parse_object(body.encode())
    assert parse_object('{"prompt":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}")


def test_errors_quote_at_most_a_line():
    for value in (*ODD, 10**5000, "x\ny" * 100, {"a": ["x" * 500] * 9}):
        assert len(shown(value)) <= 100
        assert "\n" not in shown(value)


# -- stream options, defaults ----------------------------------------------------------------------------------------


def test_stream_options_say_which_usage_is_wanted():
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert completion(stream=True, stream_options=options).streaming == Streaming(True, True, True)
    assert completion(stream=True, stream_options={"include_usage": True}).streaming == Streaming(True, True, False)
    # as in vLLM, there are no continuous ones without usage
    assert completion(stream=True, stream_options={"continuous_usage_stats": True}).streaming == Streaming(True)


def test_what_a_body_leaves_out_comes_from_the_models_defaults():
    defaults = SamplingDefaults(
        temperature=0.6, top_p=0.95, top_k=20, min_p=0.01, repetition_penalty=1.05, max_tokens=40
    )
    expected = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.01, repetition_penalty=1.05, max_tokens=40)
    assert parse_completion({"prompt": "a", "top_k": None}, defaults).params == expected
    assert parse_chat({"messages": [USER]}, max_tokens=100, defaults=defaults).params == expected
    given = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "max_tokens": 90}
    assert parse_completion({"prompt": "a", **given}, defaults).params == SamplingParams(**given)
    limited = dataclasses.replace(defaults, is_limit=True)
    assert parse_completion({"prompt": "a", **given}, limited).params.max_tokens == 40
    assert parse_completion({"prompt": "a", "max_tokens": 9}, limited).params.max_tokens == 9


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [Streaming(True), Streaming(True, True), Streaming(True, True, True)])
@pytest.mark.parametrize("kind", [CompletionAnswer, ChatAnswer])
def test_the_events_of_a_stream_are_the_chunks_of_its_answer(kind, streaming):
    said, shaped = (kind("id", "m", 5, lambda token: TokenText("", b""), 2) for _ in range(2))
    reply = ChunkReply(said, streaming)
    for step in range(6):
        for index in (0, 1):
            text, reason = ("", "length") if step == 5 else (f'"\\ \0é\u2028 {step}', None)
            output = Output("r", text, (step,), reason, 7, index, (), 3)
            chunks = [*shaped.opening(output), shaped.chunk(output)]
            if streaming.include_usage:
                usage = shaped.usage.values() if streaming.continuous_usage else None
                chunks = [chunk | {"usage": usage} for chunk in chunks]
            events = reply.events(output).removesuffix(b"\n\n").split(b"\n\n")
            assert [orjson.loads(event.removeprefix(b"data: ")) for event in events] == chunks
    assert said.usage.values() == shaped.usage.values()
