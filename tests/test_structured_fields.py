"""What bodies ask an answer to be, under every name that clients have for it; and where a schema goes wrong."""

from __future__ import annotations

import json
import sys

import orjson
import pytest

from msi.control.client_messages import Welcome
from msi.errors import InvalidRequest
from msi.server.prepare import (
    ANSWERS,
    ANTHROPIC,
    CHAT,
    COMPLETION,
    MESSAGE,
    RESPONSE,
    Elsewhere,
    NotUnderstood,
    Preparation,
    Setup,
)
from msi.structured_outputs import StructuredOutputs
from msi.text.grammar_text import lark_regex, lark_string, lark_text
from msi.text.grammars import fault_of, in_lark
from msi.text.structural_tags import tag_grammar
from tests.edge import TEMPLATE
from tests.test_bodies import USER

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
AS_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
JSON = StructuredOutputs(json=AS_TEXT)
OPEN, CLOSED = {"properties": {}, "additionalProperties": True}, {"additionalProperties": False}
TAG = {"format": {"type": "const_string", "value": "x"}}
TAGGED = StructuredOutputs(grammar=tag_grammar(json.dumps(TAG), {}, in_lark)[0])
FORMS = {
    "response_format tag": ({"response_format": {"type": "structural_tag", **TAG}}, TAGGED),
    "structured_outputs tag": ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, TAGGED),
    "tag": ({"structural_tag": TAG}, TAGGED),
    "response_format schema": ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, JSON),
    "response_format strict": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        JSON,
    ),
    "response_format object": ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
    "response_format text": ({"response_format": {"type": "text"}}, None),
    "structured_outputs json": ({"structured_outputs": {"json": SCHEMA, "regex": None, "json_object": False}}, JSON),
    "structured_outputs closed": (
        {"structured_outputs": {"json": {"items": [SCHEMA, OPEN]}, "disable_additional_properties": True}},
        StructuredOutputs(json=json.dumps({"items": [SCHEMA | CLOSED, OPEN]}, separators=(",", ":"))),
    ),
    "structured_outputs json text": ({"structured_outputs": {"json": AS_TEXT}}, JSON),
    "structured_outputs regex": ({"structured_outputs": {"regex": "a+"}}, StructuredOutputs(regex="a+")),
    "structured_outputs choice": (
        {"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputs(choice=("a", "b")),
    ),
    "structured_outputs grammar": (
        {"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutputs(grammar='start: "a"'),
    ),
    "structured_outputs json_object": (
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        StructuredOutputs(json_object=True, disable_any_whitespace=True),
    ),
    "guided_json": ({"guided_json": SCHEMA}, JSON),
    "guided_json text": ({"guided_json": AS_TEXT, "guided_decoding_backend": "xgrammar"}, JSON),
    "guided_regex": ({"guided_regex": "a+"}, StructuredOutputs(regex="a+")),
    "guided_choice": ({"guided_choice": ["a"]}, StructuredOutputs(choice=("a",))),
    "guided_grammar": ({"guided_grammar": 'start: "a"'}, StructuredOutputs(grammar='start: "a"')),
    "guided_json_object": ({"guided_json_object": True}, StructuredOutputs(json_object=True)),
    "guided_whitespace_pattern": (
        {"guided_json": SCHEMA, "guided_whitespace_pattern": "[ \n]?"},
        StructuredOutputs(json=AS_TEXT, whitespace_pattern="[ \n]?"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def welcome(tiny_model):
    return Welcome("tiny", 290, 512, (tiny_model / "tokenizer.json").read_bytes(), {"default": TEMPLATE})


@pytest.fixture
def asked(welcome):
    """Of a body: what its answer has to be."""
    preparation = Preparation(Setup(welcome))

    def ask(endpoint=CHAT, **fields):
        fixed = {
            CHAT: {"messages": [USER]}, COMPLETION: {"prompt": "a"},
            MESSAGE: {"type": "generate", "id": "a", "prompt": "a"},
        }[endpoint]  # fmt: skip
        answer = preparation.understand(endpoint, orjson.dumps(fixed | fields))
        assert ANSWERS.decode(ANSWERS.encode(answer)) == answer, "it crosses processes"
        if isinstance(answer, NotUnderstood):
            raise answer.failure.error()
        return answer.request.params.structured_outputs

    return ask


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETION, MESSAGE])
@pytest.mark.parametrize("form", FORMS)
def test_every_name_for_it_is_understood_on_every_endpoint(asked, form, endpoint):
    fields, expected = FORMS[form]
    assert asked(endpoint, **fields) == expected


REFUSED = {
    "two": ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex and response_format each"),
    "two inside": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "has regex and choice; give exactly one"),
    "none inside": ({"structured_outputs": {"disable_any_whitespace": True}}, "has nothing; give exactly one"),
    "unknown": ({"structured_outputs": {"ebnf": "a"}}, "has 'ebnf', which it does not have"),
    "closed": (
        {"structured_outputs": {"json": {}, "disable_additional_properties": "yes"}},
        "disable_additional_properties of structured_outputs is 'yes'",
    ),
    "no tag": ({"structural_tag": "{}"}, "the structural tag has no format"),
    "no object": ({"structured_outputs": "a"}, "structured_outputs is 'a'; it must be an object"),
    "format": ({"response_format": {"type": "grammar"}}, "its type must be text, json_object, json_schema or"),
    "format text": ({"response_format": "json"}, "its type must be text, json_object, json_schema or"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format has no schema"),
    "choice": ({"guided_choice": "a"}, "choice of structured_outputs is 'a'"),
    "regex": ({"guided_regex": "("}, "cannot be compiled"),
    "one of": (
        {"guided_json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
        "Write anyOf where more than one may hold",
    ),
    "look-around": ({"guided_regex": "(?!a)b"}, "cannot be compiled"),
    "grammar": ({"guided_grammar": "start: nothing"}, "cannot be compiled"),
    "gbnf": ({"guided_grammar": 'root ::= "a'}, "cannot be"),
    "no json": ({"guided_json": "{"}, "not valid JSON"),
    "list": ({"guided_json": "[1]"}, "a JSON schema is an object"),
    "long": ({"guided_regex": "a" * 140_000}, "up to 131072 bytes"),
    "list of grammars": ({"guided_grammar": '{"grammars": 5}'}, "guided_grammar is a list of grammars; give one"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_by_name_in_one_line(asked, case):
    fields, complaint = REFUSED[case]
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        asked(**fields)
    assert caught.value.param in fields
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


WRONG = {"not": {"type": "string"}}
PLACES = {
    "#": WRONG,
    "#/properties/a": {"type": "object", "properties": {"ok": {}, "a": WRONG}},
    "#/properties/a~1b/items": {
        "type": "object", "properties": {"a/b": {"type": "array", "items": WRONG}},
    },
    "#/anyOf/1/properties/x": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x": WRONG}}]},
    "#/$defs/Inner": {"$defs": {"Inner": WRONG}, "type": "array", "items": {"$ref": "#/$defs/Inner"}},
}  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_a_schema_that_cannot_be_compiled_is_refused_with_the_place(asked, where):
    schema = PLACES[where]
    assert fault_of(schema)[0] == where
    body = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    with pytest.raises(InvalidRequest, match="cannot be compiled at") as caught:
        asked(**body)
    assert f"in response_format cannot be compiled at {where}: " in str(caught.value)
    assert caught.value.param == "response_format"


def test_a_tools_schema_that_cannot_be_compiled_is_named(asked):
    tools = [
        {"type": "function", "function": {"name": "good"}},
        {"type": "function", "function": {"name": "bad", "parameters": PLACES["#/properties/a"]}},
    ]
    with pytest.raises(InvalidRequest, match="cannot be compiled") as caught:
        asked(tools=tools, tool_choice="required")
    assert "in tools[1].function.parameters cannot be compiled at #/properties/a: " in str(caught.value)
    tools[1]["function"]["name"] = "two words"
    with pytest.raises(InvalidRequest, match="calls of tool 'two words' cannot be held"):
        asked(tools=tools, tool_choice="required")


LOOPS = {
    "itself": {"$ref": "#"},
    "each other": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "anchor": {"$anchor": "a", "$ref": "#a"},
    "too wide": {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(3000)}},
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("field", ["response_format", "guided_json", "structured_outputs", "text_behind_thoughts"])
def test_a_schema_of_which_no_text_is_one_is_refused_before_it_runs_by_the_field_that_has_it(asked, loop, field):
    schema = LOOPS[loop]
    body = {
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        "guided_json": {"guided_json": schema},
        "structured_outputs": {"structured_outputs": {"json": schema}},
        "text_behind_thoughts": {"structural_tag": {"format": {"type": "sequence", "elements": [
            {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
            {"type": "json_schema", "json_schema": schema},
        ]}}},
    }[field]  # fmt: skip
    with pytest.raises(InvalidRequest, match=r"cannot be (held to|compiled)") as caught:
        asked(**body)
    assert caught.value.param == ("format.elements[1].json_schema" if field == "text_behind_thoughts" else field)
    assert len(str(caught.value)) < 500


LOOP = {"type": "json_schema", "schema": LOOPS["itself"]}
OTHER_APIS = {
    "text.format": (RESPONSE, {"input": "a", "text": {"format": {"name": "x", **LOOP}}}),
    "output_format": (ANTHROPIC, {"messages": [USER], "max_tokens": 5, "output_format": LOOP}),
}  # fmt: skip


@pytest.mark.parametrize("field", OTHER_APIS)
def test_other_apis_name_a_schema_that_is_refused_as_they_do(welcome, field):
    endpoint, body = OTHER_APIS[field]
    failure = Preparation(Setup(welcome)).understand(endpoint, orjson.dumps(body)).failure
    assert failure.param == field
    assert f"the JSON schema in {field} cannot be held to" in failure.message


@pytest.mark.parametrize("field", ["guided_grammar", "structured_outputs"])
@pytest.mark.parametrize("grammar", ["start: start", "start: a\na: b\nb: a"])
def test_a_grammar_of_which_no_text_is_one_is_refused_before_it_runs(asked, grammar, field):
    value = grammar if field == "guided_grammar" else {"grammar": grammar}
    with pytest.raises(InvalidRequest, match="no text is one of it") as caught:
        asked(**{field: value})
    assert caught.value.param == field


TREE = {
    "$defs": {"node": {"type": "object", "properties": {"inner": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
                       "required": ["inner"], "additionalProperties": False}},
    "$ref": "#/$defs/node",
}  # fmt: skip


@pytest.mark.parametrize("schema", [TREE, {}, {"type": "null"}, {"const": ""}, {"type": "array", "maxItems": 0}])
def test_a_schema_that_comes_to_an_end_is_held_to_however_it_recurs_or_little_it_says(asked, schema):
    assert asked(response_format={"type": "json_schema", "json_schema": {"schema": schema}}) is not None
    assert asked(guided_grammar='start: ""') is not None


def test_tools_whose_grammar_is_too_large_are_named(asked):
    tools = [{"type": "function", "function": {"name": f"f{at}"}} for at in range(3000)]
    with pytest.raises(InvalidRequest, match=r"^what tools asks for is a grammar of .* fewer tools") as caught:
        asked(tools=tools, tool_choice="required")
    assert caught.value.param == "tools"


def test_no_loop_compiles_a_grammar_and_what_was_compiled_is_known(welcome):
    body = orjson.dumps({"prompt": "a", "guided_regex": "[a-z]{5}"})
    here, elsewhere = Preparation(Setup(welcome), compiles=False), Preparation(Setup(welcome))
    with pytest.raises(Elsewhere):
        here.understand(COMPLETION, body)
    answer = elsewhere.understand(COMPLETION, body)
    here.remember(answer.request.params)
    assert here.understand(COMPLETION, body) == answer


def test_without_the_library_the_sentence_says_what_to_install(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match=r"need the package llguidance.*pip install 'msi\[grammar\]'"):
        asked(guided_regex="some other")
    assert asked() is None


def test_literals_of_a_grammar_are_quoted():
    assert lark_string('a"\\\n') == '"a\\"\\\\\\n"'
    assert lark_regex("a/b\\/c\\\\/") == "/a\\/b\\/c\\\\\\//"
    assert lark_text("x<y>z", {}) == '"x<y>z"'
    assert lark_text("x<y>z<y><y>", {"<y>": 7, "<n>": 8}) == '"x" <[7]> "z" <[7]> <[7]>'
