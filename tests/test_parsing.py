"""Reasoning and calls of tools in what models write: found whichever way the text is cut, and nothing of it lost."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msi.server.parsing.choice import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    begins_thinking,
    chosen_reasoning_parser,
    chosen_tool_parser,
    markers_of,
)
from msi.server.parsing.deltas import Arguments, CallBegun, Content, Reasoning
from msi.server.parsing.parser import Parsing

NUMBER, TEXT = {"type": "integer"}, {"type": "string"}
SCHEMAS = {
    "weather": {"type": "object", "properties": {"city": TEXT, "days": NUMBER}},
    "now": None,
    "a.b-c": {},
    "typed": {
        "properties": {
            "text": TEXT, "number": {"type": "number"}, "whole": NUMBER, "yes": {"type": "boolean"},
            "list": {"type": "array"}, "object": {"type": "object"}, "maybe": {"type": ["string", "null"]},
            "any": {}, "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "one": {"enum": ["1", "2"]},
        }
    },
}  # fmt: skip
TOOLS = orjson.dumps(SCHEMAS)
BAR, LOW = "\uff5c", "\u2581"


def deepseek(text):
    """With the markers' own characters."""
    return text.replace("|", BAR).replace("_", LOW)


def parsed(pieces, tools="", reasoning="", *, is_cut=False, **options):
    """(what was thought, text, calls): each call's name and arguments."""
    parser = Parsing(tools, reasoning, TOOLS, **options).parser(lambda: "made")
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.close(is_cut=is_cut)
    thought = "".join(one.text for one in deltas if isinstance(one, Reasoning))
    text = "".join(one.text for one in deltas if isinstance(one, Content))
    calls = []
    for one in deltas:
        if isinstance(one, CallBegun):
            assert one.index == len(calls), "calls are counted"
            calls.append([one.name, "", one.id])
        elif isinstance(one, Arguments):
            calls[one.index][1] += one.text
    assert all(isinstance(json.loads(arguments), dict) for _, arguments, _ in calls)
    assert parser.num_calls == len(calls)
    return thought, text, [(name, json.loads(arguments)) for name, arguments, _ in calls]


PARIS = ("weather", {"city": "Paris"})
NOW = ("now", {})
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
QWEN = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
THINK = "<think>\nIs it <tool_call>? "
EXAMPLES = {  # name: (tool parser, reasoning parser, text, (thought, content, calls))
    "hermes": ("hermes", "", HERMES, ("", "", [PARIS])),
    "hermes text before": ("hermes", "", f"I look.\n\n{HERMES}", ("", "I look.", [PARIS])),
    "hermes two": ("hermes", "", f"{HERMES}\n{HERMES_NOW}\n", ("", "", [PARIS, NOW])),
    "hermes between": ("hermes", "", f"a {HERMES} b {HERMES_NOW} c ", ("", "a b c ", [PARIS, NOW])),
    "hermes thinks": ("hermes", "qwen3", f"{THINK}</think>\n\n{HERMES}", ("\nIs it <tool_call>? ", "", [PARIS])),
    "qwen xml": ("qwen3_xml", "", QWEN, ("", "", [("weather", {"city": "Paris", "days": 3})])),
    "qwen xml bare": ("qwen3_coder", "", "<function=now></function> ok", ("", " ok", [NOW])),
    "mistral old": (
        "mistral", "", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "now"}]',
        ("", "", [PARIS, NOW]),
    ),
    "mistral new": (
        "mistral", "", '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}', ("", "", [PARIS, NOW]),
    ),
    "mistral ids": (
        "mistral", "mistral", '[THINK]a[/THINK]b[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}', ("a", "b", [NOW]),
    ),
    "deepseek v3": (
        "deepseek_v3", "deepseek_r1",
        deepseek("a</think>b<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>weather\n```json\n")
        + '{"city": "Paris"}'
        + deepseek("\n```<|tool_call_end|>\n<|tool_call_begin|>function<|tool_sep|>now\n```json\n{}\n```")
        + deepseek("<|tool_call_end|><|tool_calls_end|>"),
        ("a", "b", [PARIS, NOW]),
    ),
    "deepseek v3.1": (
        "deepseek_v31", "deepseek_v3",
        deepseek("<|tool_calls_begin|><|tool_call_begin|>weather<|tool_sep|>")
        + '{"city": "Paris"}'
        + deepseek("<|tool_call_end|><|tool_call_begin|>now<|tool_sep|>{}<|tool_call_end|><|tool_calls_end|>"),
        ("", "", [PARIS, NOW]),
    ),
    "glm": (
        "glm45", "glm45",
        "\n<think>a</think>\nb\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        ("a", "\nb", [("weather", {"city": "Paris", "days": 3}), NOW]),
    ),
    "glm 4.7": (
        "glm47", "",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call><tool_call>now</tool_call>",
        ("", "", [PARIS, NOW]),
    ),
    "kimi": (
        "kimi_k2", "kimi_k2",
        "<think>a<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        ("a", "", [PARIS, NOW]),
    ),
    "minimax": (
        "minimax_m2", "minimax_m2",
        '<think>a</think><minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        ("a", "", [PARIS, NOW]),
    ),
    "minimax append think": ("", "minimax_m2_append_think", "a</think>b", ("", "<think>a</think>b", [])),
    "harmony": (
        "openai", "openai_gptoss",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Paris"}<|call|>',
        ("a", "b", [PARIS]),
    ),
    "harmony recipient in role": (
        "openai", "openai_gptoss",
        " to=functions.now<|channel|>commentary json<|message|>{}<|call|>", ("", "", [NOW]),
    ),
    "harmony final": (
        "openai", "openai_gptoss",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b <|x|> c",
        ("a", "b <|x|> c", []),
    ),
}  # fmt: skip
OPTIONS = {"deepseek v3": {"is_thinking": True}, "minimax append think": {"is_thinking": True}}
SHORT_CHARS = 90
NAMES = {parser: name for name, (parser, *_) in EXAMPLES.items() if parser}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_the_same_wherever_it_is_cut(name):
    tools, reasoning, text, expected = EXAMPLES[name]
    options = OPTIONS.get(name, {})
    assert parsed([text], tools, reasoning, **options) == expected
    assert parsed(text, tools, reasoning, **options) == expected, "character by character"
    for first in range(len(text) + 1):
        assert parsed([text[:first], text[first:]], tools, reasoning, **options) == expected
        for second in range(first, len(text) + 1) if len(text) <= SHORT_CHARS else ():
            pieces = [text[:first], text[first:second], text[second:]]
            assert parsed(pieces, tools, reasoning, **options) == expected


MARKUP = [
    piece
    for _, _, text, _ in EXAMPLES.values()
    for piece in (text, text[: len(text) // 2], text[len(text) // 3 :], text[:12], text[-12:])
] + ["\n", " ", "a", "{", '"', "}", "[", "]", "<", ">", "\\", "</think>", "<think>"]


@given(
    parser=st.sampled_from(sorted(TOOL_PARSERS)),
    reasoning=st.sampled_from(["", *sorted(REASONING_PARSERS)]),
    parts=st.lists(st.sampled_from(MARKUP) | st.text(max_size=5), max_size=6),
    data=st.data(),
    is_cut=st.booleans(),
)
def test_no_text_gives_anything_else_when_it_is_cut(parser, reasoning, parts, data, is_cut):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parsed([text], parser, reasoning, is_cut=is_cut)
    assert parsed(pieces, parser, reasoning, is_cut=is_cut) == whole


@given(parser=st.sampled_from(sorted(TOOL_PARSERS)), parts=st.lists(st.sampled_from(MARKUP) | st.text(), max_size=5))
def test_where_no_call_is_found_the_text_is_as_it_was_written(parser, parts):
    text = "".join(parts)
    _, content, calls = parsed([text], parser)
    if not calls and "<|" not in text:
        assert content == text


@pytest.mark.parametrize("parser", sorted(TOOL_PARSERS))
@pytest.mark.parametrize("text", ["", "Hi.", " a <b> [c] {d}\n\n", "1 < 2", "<", "[", "<tool", "x\n<too \n", "to=you"])
def test_text_without_calls_comes_through_unchanged_and_nothing_is_held_at_the_end(parser, text):
    assert parsed(text, parser) == ("", text, [])


def test_text_is_held_back_no_longer_than_it_may_begin_a_marker():
    parser = Parsing("hermes", "", TOOLS).parser()
    assert parser.push("a <tool") == [Content("a")]
    assert parser.push("s>") == [Content(" <tools>")]
    assert parser.push("<tool_call>\nno") == [Content("<tool_call>\n"), Content("no")]


# -- rules that others learnt from bugs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES.values()))
def test_a_name_that_was_not_declared_is_no_call(name):
    tools, reasoning, text, _ = EXAMPLES[name]
    odd = text.replace("weather", "whether").replace("now", "know")
    _, content, calls = parsed([odd], tools, reasoning, **OPTIONS.get(name, {}))
    assert calls == []
    for word in ("whether", "know"):
        assert content.count(word) == odd.count(word)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"days": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"days": 1e999}}\n</tool_call>',
        '<tool_call>\n{"arguments": {"city": "Paris"}}\n</tool_call>',
        '<tool_call>\n{"name": null}\n</tool_call>',
        '<tool_call>\n{"name": {"now": 1}}\n</tool_call>',
        "<tool_call>\nnow\n</tool_call>",
        '<tool_call>{"name": "now", "arguments": ' + "[" * 5000,
        "<tool_call><tool_call></tool_call>",
        "<tool_call>",
        '{"name": "now", "arguments": {}}',
    ],
)
def test_markup_that_is_no_well_formed_call_stays_text_whole_and_once(text):
    assert parsed([text], "hermes") == ("", text, [])


def test_a_call_behind_one_that_is_malformed_is_found():
    assert parsed([f"<tool_call>\nno\n</tool_call>\n{HERMES}"], "hermes") == (
        "", "<tool_call>\nno\n</tool_call>", [PARIS],
    )  # fmt: skip
    assert parsed([f"<tool_call>{HERMES}"], "hermes") == ("", "<tool_call>", [PARIS])


def test_an_end_tag_inside_a_json_string_ends_nothing():
    city = '</tool_call> \\" } ]'
    text = '<tool_call>{"name": "weather", "arguments": {"city": "' + city + '"}}</tool_call>'
    assert parsed(text, "hermes") == ("", "", [("weather", {"city": '</tool_call> " } ]'})])


@pytest.mark.parametrize("name", sorted(NAMES.values()))
def test_a_call_without_its_closing_tag_at_the_end_of_the_text_counts(name):
    tools, reasoning, text, expected = EXAMPLES[name]
    ends = ["</tool_call>", "</minimax:tool_call>", "</function>", "</invoke>", "\n", "]", "<|call|>",
            "<|tool_calls_section_end|>", "<|tool_call_end|>", deepseek("<|tool_calls_end|>"),
            deepseek("<|tool_call_end|>"), "```"]  # fmt: skip
    while any(text.endswith(end) for end in ends) and not text.endswith("[]"):
        text = text.removesuffix(next(end for end in ends if text.endswith(end)))
        assert parsed([text], tools, reasoning, **OPTIONS.get(name, {})) == expected, text[-40:]


@pytest.mark.parametrize("name", sorted(NAMES.values()))
def test_half_a_call_is_none_when_there_was_no_room_for_more(name):
    tools, reasoning, text, expected = EXAMPLES[name]
    options = OPTIONS.get(name, {})
    for end in range(len(text)):
        _, _, calls = parsed([text[:end]], tools, reasoning, is_cut=True, **options)
        assert calls == expected[2][: len(calls)], text[:end]


def test_a_call_without_arguments_has_an_empty_object():
    for text in ('<tool_call>{"name": "now"}', '<tool_call>{"name": "now", "arguments": null}',
                 '<tool_call>{"name": "now", "arguments": "{}"}'):  # fmt: skip
        assert parsed([text], "hermes") == ("", "", [NOW])
    begin, separator, end = map(deepseek, ("<|tool_call_begin|>", "<|tool_sep|>", "<|tool_call_end|>"))
    assert parsed(f"{begin}now{separator}{end}", "deepseek_v31") == ("", "", [NOW])
    text = "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|><|tool_call_end|>"
    assert parsed(text, "kimi_k2") == ("", "", [NOW])


def test_values_that_are_written_as_text_have_the_types_of_the_schema():
    written = {
        "text": "12", "number": "1.5", "whole": "3.0", "yes": "True", "list": '["a"]', "object": '{"a": 1}',
        "maybe": "null", "any": "[1]", "either": "null", "one": "1", "unknown": "5",
    }  # fmt: skip
    expected = {
        "text": "12", "number": 1.5, "whole": 3, "yes": True, "list": ["a"], "object": {"a": 1}, "maybe": None,
        "any": [1], "either": None, "one": "1", "unknown": "5",
    }  # fmt: skip
    tags = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in written.items())
    assert parsed([f"<function=typed>{tags}</function>"], "qwen3_xml")[2] == [("typed", expected)]
    odd = "".join(f"<parameter={name}>\n?\n</parameter>\n" for name in written)
    assert parsed([f"<function=typed>{odd}</function>"], "qwen3_xml")[2] == [("typed", dict.fromkeys(written, "?"))]


def test_a_text_of_several_lines_loses_only_the_line_breaks_of_its_tags():
    text = "<function=weather><parameter=city>\n\n  a < b\n\n</parameter></function>"
    assert parsed(text, "qwen3_xml")[2] == [("weather", {"city": "\n  a < b\n"})]


def test_line_breaks_inside_json_strings_are_escaped_for_the_client():
    text = '<tool_call>{"name": "weather", "arguments": {"city": "a\nb"}}</tool_call>'
    assert parsed(text, "hermes")[2] == [("weather", {"city": "a\nb"})]


def test_half_a_surrogate_pair_can_be_sent():
    parser = Parsing("hermes", "", TOOLS).parser()
    deltas = parser.push('<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}')
    assert deltas[1].text == '{"city": "\\ud800"}'


def test_an_unfinished_thought_is_all_thought():
    assert parsed(["<think>a", f"b {HERMES}"], "hermes", "qwen3") == (f"ab {HERMES}", "", [])
    assert parsed(["a </thi"], "hermes", "qwen3", is_thinking=True) == ("a </thi", "", [])


def test_a_thought_that_the_prompt_began_may_begin_again():
    assert parsed(["\n<think>a</think>b"], "", "qwen3", is_thinking=True) == ("a", "b", [])


def test_markers_behind_the_thought_mean_nothing():
    assert parsed("a <think>b</think>", "", "qwen3") == ("", "a <think>b</think>", [])


def test_without_parallel_calls_only_the_first_counts():
    assert parsed([HERMES + HERMES_NOW], "hermes", has_parallel_calls=False) == ("", "", [PARIS])


def test_reasoning_can_be_left_out():
    assert parsed(["<think>a</think>b"], "", "qwen3", has_reasoning=False) == ("", "b", [])


def ids(text, parser):
    made = Parsing(parser, "", TOOLS).parser()
    return [one.id for one in [*made.push(text), *made.close()] if isinstance(one, CallBegun)]


def test_every_call_has_an_id_in_the_models_own_form():
    one, two = ids(HERMES + HERMES_NOW, "hermes")
    assert one.startswith("call_")
    assert one != two
    (mistral,) = ids("[TOOL_CALLS]now[ARGS]{}", "mistral")
    assert len(mistral) == 9
    assert mistral.isalnum()
    assert ids(EXAMPLES["mistral ids"][2], "mistral") == ["abcdefghi"]
    assert ids(EXAMPLES["kimi"][2], "kimi_k2") == ["functions.weather:0", "functions.now:1"]
    (made,) = ids("<|tool_call_begin|>now<|tool_call_argument_begin|>{}", "kimi_k2")
    assert made.startswith("call_")


# -- which parser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in EXAMPLES if EXAMPLES[name][0] and name != "qwen xml bare"])
def test_a_template_that_writes_calls_names_their_parser(name):
    tools, _, text, _ = EXAMPLES[name]
    chosen = chosen_tool_parser("auto", ["{{ messages }}", text])
    assert TOOL_PARSERS[chosen] == TOOL_PARSERS[tools]
    assert markers_of(chosen, "") == markers_of(tools, "")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<think>{{ a }}</think>", "qwen3"),
        ("[THINK]</think>", "mistral"),
        ("<|channel|>final</think>", "openai_gptoss"),
    ],
)
def test_a_template_that_writes_what_was_thought_names_its_parser(template, name):
    assert chosen_reasoning_parser("auto", ["{{ messages }}", template]) == name


def test_a_template_without_calls_or_with_unknown_ones_names_none():
    for template in ("", "{{ messages }}", f"<{BAR}DSML{BAR}tool_calls> <tool_call>"):
        assert chosen_tool_parser("auto", [template]) == ""
    assert chosen_reasoning_parser("auto", ["{{ messages }}"]) == ""
    assert chosen_tool_parser("none", ["<tool_call>"]) == ""
    assert chosen_tool_parser("mistral", ["<tool_call>"]) == "mistral"


def test_the_end_of_the_prompt_says_whether_the_thought_has_begun():
    assert begins_thinking("<|user|>a<|assistant|><think>\n", "qwen3")
    assert not begins_thinking("What is <think>?<|assistant|>", "qwen3")
    assert not begins_thinking("<|assistant|><think>\n\n</think>\n\n", "deepseek_r1")
    assert begins_thinking("<|assistant|>", "deepseek_r1")
    assert not begins_thinking("<|assistant|><think>", "")
