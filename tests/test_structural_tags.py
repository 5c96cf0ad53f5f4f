"""Structural tags: what fits them is what fits xgrammar's, and what is none is refused with its place."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msi import Engine
from msi.errors import InvalidRequest
from msi.structured_outputs import StructuredOutputs
from msi.text.grammars import in_lark
from msi.text.structural_tags import TYPES, tag_grammar
from tests.conftest import TEXT
from tests.test_engine import collect
from tests.test_grammars import grammars_of, walked
from tests.test_structured_outputs import OPTIONS
from tests.vocabularies import tokenizer_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ANY = {"type": "any_text"}
DIGITS = {"type": "regex", "pattern": "[0-9]+"}


def const(text):
    return {"type": "const_string", "value": text}


def tag(begin, content, end):
    return {"type": "tag", "begin": begin, "content": content, "end": end}


TAGS = [tag("<f=a>", {"type": "json_schema", "json_schema": SCHEMA}, "</f>"), tag("<f=b>", DIGITS, "</f>")]
A, B = '<f=a>{"a": 1}</f>', "<f=b>12</f>"


def triggered(**options):
    return {"type": "triggered_tags", "triggers": ["<f="], "tags": TAGS, **options}


def separated(**options):
    return {"type": "tags_with_separator", "tags": TAGS, "separator": ",", **options}


def of(kind, **fields):
    return {"type": kind, **fields}


FORMATS = {  # (format, what fits, what does not); as xgrammar has it
    "const": (const("x"), ["x"], ["", "xx"]),
    "text": (ANY, ["", "hi <f=c>"], []),
    "excluded": (of("any_text", excludes=["<f", "/"]), ["", "hi < f"], ["a <f", "</"]),
    "short": (of("any_text", max_chars=3), ["", "abc"], ["abcd"]),
    "text behind": (of("sequence", elements=[const("<t>"), ANY]), ["<t>", "<t>x"], ["x", ""]),
    "text before": (of("sequence", elements=[ANY, const("</t>"), DIGITS]), ["</t>1", "hi</t>12"], ["hi12", "hi</t>x"]),
    "tag in text": (of("sequence", elements=[ANY, tag("<t>", ANY, "</t>"), ANY]), ["<t></t>", "a<t>b</t>c"], ["<t>"]),
    "or": (of("or", elements=[TAGS[0], DIGITS]), [A, "12"], [B, "x"]),
    "ends": (tag("<t>", ANY, ["</t>", "</u>"]), ["<t>x</t>", "<t></u>"], ["<t>x", "<t></t></u>"]),
    "triggered": (triggered(), ["", "hi", A, f"hi {B}x{A} y", "hi <f"], ["<f=c>", f"{A}<f=b>x", "<f=a>{}</f>"]),
    "at least one": (triggered(at_least_one=True), [A, f"{A} x {B}"], ["", f"hi {A}"]),
    "first": (triggered(stop_after_first=True), ["", "hi", f"hi {A}"], [f"{A} x", A + B]),
    "one": (triggered(at_least_one=True, stop_after_first=True), [A, B], ["", A + B, f"{A} "]),
    "without": (triggered(excludes=["x"]), [f"hi {A}"], ["x", f"{A}x"]),
    "triggered in a tag": (tag("<t>", triggered(), "</t>"), ["<t></t>", f"<t>hi{B}x</t>"], ["<t>", f"<t>{B}"]),
    "separated": (separated(), ["", A, f"{A},{B},{B}"], ["x", A + B, f"{A},"]),
    "at least one, separated": (separated(at_least_one=True), [A, f"{A},{B}"], [""]),
    "first, separated": (separated(stop_after_first=True), ["", A], [f"{A},{B}"]),
    "optional": (of("optional", content=TAGS[1]), ["", B], [B + B]),
    "plus": (of("plus", content=TAGS[1]), [B, B + B], [""]),
    "star": (of("star", content=TAGS[1]), ["", B + B], ["x"]),
    "repeat": (of("repeat", min=1, max=2, content=TAGS[1]), [B, B + B], ["", B * 3]),
    "repeat on": (of("repeat", min=2, max=-1, content=TAGS[1]), [B * 2, B * 5], ["", B]),
    "grammar": (of("grammar", grammar='root ::= "x" | "y" root'), ["x", "yyx"], ["y"]),
    "dispatch": (of("dispatch", rules=[["<d>", DIGITS], ["<x>", const("x")]]), ["", "a<d>1 b<x>x"], ["<d>a", "<x>1"]),
    "dispatch once": (of("dispatch", rules=[["<d>", DIGITS]], loop=False), ["hi", "a<d>1"], ["<d>1 b"]),
    "whitespace": (of("json_schema", json_schema=SCHEMA, max_whitespace_cnt=0), ['{"a":1}'], ['{"a": 1}']),
}  # fmt: skip


@functools.cache
def tokens():
    tokenizer = tokenizer_of("byte-level")
    return tokenizer, llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=tokenizer.get_vocab_size())


def fits(grammar, text):
    matcher = llguidance.LLMatcher(tokens()[1], grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = tokens()[1].tokenize_str(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def written(asked, special=None):
    return tag_grammar(json.dumps(asked), special or {}, in_lark)


@pytest.mark.parametrize("name", FORMATS)
def test_what_fits_a_format_and_what_does_not(name):
    asked, good, bad = FORMATS[name]
    grammar, _ = written({"type": "structural_tag", "format": asked})
    assert [text for text in good if not fits(grammar, text)] == []
    assert [text for text in bad if fits(grammar, text)] == []


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_the_older_form_is_tags_behind_triggers(schema):
    structures = [{"begin": "<f=a>", "schema": schema, "end": "</f>"}]
    grammar, schemas = written({"type": "structural_tag", "structures": structures, "triggers": ["<f="]})
    assert fits(grammar, f"hi {A}, {A}")
    assert not fits(grammar, "<f=a>{}</f>")
    assert list(schemas.values()) == [SCHEMA]


def test_added_tokens_are_tokens():
    tokenizer, _ = tokens()
    special = {"<s>": tokenizer.token_to_id("<s>"), "<unk>": tokenizer.token_to_id("<unk>")}
    for asked in (
        triggered(triggers=["<s>"], tags=[tag("<s>f=", DIGITS, "<unk>")], at_least_one=True, stop_after_first=True),
        tag("<s>f=", DIGITS, {"type": "token", "token": "<unk>"}),
        tag({"type": "token", "token": special["<s>"]}, const("f=12"), "<unk>"),
    ):
        grammar, _ = written({"format": asked}, special)
        matcher = llguidance.LLMatcher(tokens()[1], grammar, log_level=0)
        inside = tokens()[1].tokenize_str("f=12")
        token_ids = [special["<s>"], *inside, special["<unk>"]]
        assert matcher.try_consume_tokens(token_ids) == len(token_ids), matcher.get_error()
        assert matcher.is_accepting()
    thought = tag("<s>", ANY, {"type": "token", "token": "<unk>"})
    grammar, _ = written({"format": of("sequence", elements=[thought, DIGITS])}, special)
    matcher = llguidance.LLMatcher(tokens()[1], grammar, log_level=0)
    token_ids = [
        special["<s>"],
        *tokens()[1].tokenize_str("what </t"),
        special["<unk>"],
        *tokens()[1].tokenize_str("12"),
    ]
    assert matcher.try_consume_tokens(token_ids) == len(token_ids), matcher.get_error()


REFUSED = {
    "no json": ("{", "not valid JSON"),
    "no object": ("[]", "must be an object"),
    "no format": ({}, "has no format"),
    "no type": ({"format": {}}, "format has the type None; it must be one of const_string"),
    "no such type": ({"format": of("sequence", elements=[of("xml")])}, r"format\.elements\[0\] has the type 'xml'"),
    "not built": ({"format": of("token_dispatch")}, "token_dispatch, which is not supported"),
    "option": ({"format": of("json_schema", json_schema={}, style="xml")}, r"style is 'xml', which is not built"),
    "order": ({"format": of("json_schema", json_schema={}, any_order=True)}, "any_order is True, which is not built"),
    "limit": ({"format": of("any_text", max_tokens=5)}, "max_tokens is 5, which is not built"),
    "schema": ({"format": of("json_schema", json_schema=3)}, r"format\.json_schema is 3"),
    "trigger": ({"format": triggered(triggers=["<g="])}, r"tags\[0\]\.begin is '<f=a>'; it must begin with"),
    "triggers": ({"format": triggered(triggers=["<f=", "<f=a"])}, "begin with one of the triggers, and with one"),
    "no tags": ({"format": triggered(tags=[])}, "must be an array that is not empty"),
    "end": ({"format": tag("<t>", ANY, 3)}, r"format\.end is 3"),
    "free": ({"format": of("sequence", elements=[ANY, DIGITS])}, r"elements\[0\] is free text, which has to be"),
    "free again": ({"format": of("star", content=ANY)}, r"format\.content is free text"),
    "repeats": ({"format": of("repeat", min=1, max=10**6, content=DIGITS)}, "integers up to 1000"),
    "backwards": ({"format": of("repeat", min=3, max=1, content=DIGITS)}, "min 3 above max 1"),
    "token": ({"format": of("token", token="<nobody>")}, "an added token's text"),
    "deep": ({"format": functools.reduce(lambda one, _: of("star", content=one), range(99), DIGITS)}, "64 levels deep"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_is_refused_with_its_place(name):
    asked, complaint = REFUSED[name]
    with pytest.raises(InvalidRequest, match=complaint):
        tag_grammar(asked if isinstance(asked, str) else json.dumps(asked), {}, in_lark)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.sampled_from(["", "<f=", "<f=a>", "</f>", "[0-9]", *TYPES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "content", "begin", "end", "elements", "tags", "triggers", "rules", "format", "value",
                         "excludes", "pattern", "json_schema", "grammar", "separator", "min", "max", "token"]),
        inner, max_size=6,
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.sampled_from(TYPES), st.dictionaries(st.sampled_from(["content", "elements", "tags", "rules", "end"]), values)
)
def test_whatever_comes_is_a_grammar_or_a_sentence(kind, fields):
    asked = {"format": {"triggers": ["<f="], "value": "x", "pattern": "a", "begin": "<f=a>", "type": kind, **fields}}
    with contextlib.suppress(InvalidRequest):
        grammar, _ = written(asked)
        assert json.loads(grammar)["grammars"]


def test_any_way_through_a_tag_fits_it():
    tokenizer, _ = tokens()
    asked = {"format": triggered(at_least_one=True, stop_after_first=True)}
    for seed in range(12):
        structured = StructuredOutputs(structural_tag=json.dumps(asked))
        text = tokenizer.decode(walked(grammars_of(tokenizer), tokenizer, structured, seed))
        assert re.fullmatch(r'<f=a>\{"a": ?-?[0-9]+\}</f>|<f=b>[0-9]+</f>', text), text


async def test_a_random_model_keeps_to_tags(tiny_model):
    chance = random.Random(3)
    asked = {"format": of("sequence", elements=[triggered(at_least_one=True, stop_after_first=True), const("!")])}
    structured = StructuredOutputs(structural_tag=json.dumps(asked))
    async with Engine.local(model=tiny_model, **OPTIONS) as engine:
        for _ in range(3):
            seed = chance.randrange(1 << 30)
            text, _, reason = await collect(engine, TEXT, structured_outputs=structured, seed=seed, max_tokens=400)
            assert reason == "stop"
            assert re.fullmatch(r'(<f=a>\{"a": ?-?[0-9]+\}</f>|<f=b>[0-9]+</f>)!', text), text
