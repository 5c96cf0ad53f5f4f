"""Calls that have to be made, and answers behind a thought: a random model writes them, its reader reads them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import jsonschema
import openai
import pytest
from tokenizers import Tokenizer

from msi import Engine
from msi.server.gateway import Gateway
from msi.server.parsing.choice import TOOL_PARSERS
from msi.server.parsing.writing import MOST_CALLS
from tests.edge import TEMPLATE
from tests.everyday import NUM_SEEDS, mostly_slow
from tests.test_bodies import USER
from tests.tiny import save_tiny

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 4, "pattern": "^[A-Z][a-z]*$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "kelvin"]},
        "hours": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 23}, "maxItems": 2},
        "where": {"$ref": "#/$defs/Where"},
    },
    "required": ["city", "days", "where"],
    "additionalProperties": False,
    "$defs": {
        "Where": {"type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"],
                  "additionalProperties": False},
    },
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather.get-1", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"weather.get-1": WEATHER, "now": {"type": "object", "maxProperties": 0}}
BAR, LOW = "\uff5c", "\u2581"
SPECIAL = {  # control tokens that the families' tokenizers have
    "mistral": ["[TOOL_CALLS]", "[ARGS]"],
    "deepseek_v3": [
        f"<{BAR}tool{LOW}calls{LOW}begin{BAR}>", f"<{BAR}tool{LOW}calls{LOW}end{BAR}>",
        f"<{BAR}tool{LOW}call{LOW}begin{BAR}>", f"<{BAR}tool{LOW}call{LOW}end{BAR}>", f"<{BAR}tool{LOW}sep{BAR}>",
    ],
    "kimi_k2": [
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
    ],
    "openai": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"],
}  # fmt: skip
SPECIAL["deepseek_v31"] = SPECIAL["deepseek_v3"]
CASES = [
    *((parser, False) for parser in (*TOOL_PARSERS, "none")), *((parser, True) for parser in SPECIAL),
]  # fmt: skip


@pytest.fixture(scope="module")
def model_of(tiny_model, tmp_path_factory):
    """A random model whose tokenizer has these tokens, too: special ones, and ones that are text."""

    def make(special=(), plain=(), template=TEMPLATE, **changes):
        path = tmp_path_factory.mktemp("model")
        tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
        tokenizer.add_special_tokens(list(special))
        tokenizer.add_tokens(list(plain))
        save_tiny(path, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=4096, **changes)
        tokenizer.save(str(path / "tokenizer.json"))
        values = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(values))
        return path

    return make


async def chats(model, *bodies, tool="none", reasoning="none"):
    """Answers to all of them."""
    options = {"tool_call_parser": tool, "reasoning_parser": reasoning, "transport": "inproc", "micro_batches": 1}
    async with Engine.local(model=model, served_model_name="tiny", **options) as engine:
        gateway = Gateway(engine, host="127.0.0.1", port=0)
        url = await gateway.start()
        try:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=60) as client:
                common = {"model": "tiny", "messages": [USER], "max_tokens": 3000}
                answers = (client.chat.completions.create(**common, **one) for one in bodies)
                return await asyncio.gather(*answers)
        finally:
            await gateway.close()


def calls_of(answer):
    """(name, arguments) of each call, all of which fit their schemas."""
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls", (choice.finish_reason, choice.message.content)
    assert not choice.message.content
    calls = [(one.function.name, json.loads(one.function.arguments)) for one in choice.message.tool_calls]
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])
    assert len({one.id for one in choice.message.tool_calls}) == len(calls)
    return calls


@pytest.mark.parametrize(("parser", "is_special"), mostly_slow(CASES))
async def test_forced_calls_are_read_back_whatever_way_the_family_writes_them(model_of, parser, is_special):
    model = model_of(SPECIAL[parser] if is_special else ())
    named = {"type": "function", "function": {"name": "weather.get-1"}}
    free, alone, one_tool = (NUM_SEEDS // 4, NUM_SEEDS // 4, NUM_SEEDS // 6)
    bodies = [{"tools": TOOLS, "tool_choice": "required", "seed": seed} for seed in range(free)]
    bodies += [{**bodies[0], "seed": seed, "parallel_tool_calls": False} for seed in range(alone)]
    bodies += [{**bodies[0], "tool_choice": named, "seed": seed} for seed in range(one_tool)]
    answers = await chats(model, *bodies, tool=parser)
    found = [calls_of(answer) for answer in answers]
    assert max(map(len, found)) <= MOST_CALLS
    for calls in found[free : free + alone]:
        assert len(calls) == 1
    for calls in found[free + alone :]:
        assert [name for name, _ in calls] == ["weather.get-1"]


# -- behind a thought ------------------------------------------------------------------------------------------------

NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}
FORMAT = {"type": "json_schema", "json_schema": {"name": "numbers", "strict": True, "schema": NUMBERS}}
THINKS = {  # reasoning parser, the markers' tokens, whether they are special
    "qwen3": (["<think>", "</think>"], False), "deepseek_r1": (["<think>", "</think>"], True),
    "mistral": (["[THINK]", "[/THINK]"], True), "minimax_m2_append_think": (["<think>", "</think>"], False),
}  # fmt: skip


def ending_a_thought(model, marker):
    """A bias under which a random model soon comes to the end of its thought."""
    return {"logit_bias": {str(Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(marker)): 5}}


@pytest.mark.parametrize("parser", mostly_slow(THINKS))
async def test_a_schema_holds_for_what_comes_behind_the_thought(model_of, parser):
    (start, end), is_special = THINKS[parser]
    model = model_of([start, end] if is_special else (), () if is_special else [start, end])
    bias = ending_a_thought(model, end)
    bodies = [{"response_format": FORMAT, "seed": seed, **bias} for seed in range(8)]
    answers = await chats(model, *bodies, reasoning=parser)
    thoughts = []
    for answer in answers:
        message = answer.choices[0].message
        content = message.content.rpartition(end)[2]
        jsonschema.validate(json.loads(content), NUMBERS)
        thoughts.append(message.content if parser.endswith("append_think") else getattr(message, "reasoning", ""))
    assert any(thoughts) or parser == "mistral", "some begin with one"


async def test_a_thought_that_the_prompt_has_ended_is_not_begun_again(model_of):
    model = model_of((), ["<think>", "</think>"])
    values = json.loads((model / "tokenizer_config.json").read_text())
    values["chat_template"] += "{{ '<think>\\n\\n</think>\\n\\n' }}"
    (model / "tokenizer_config.json").write_text(json.dumps(values))
    bias = ending_a_thought(model, "<think>")
    (answer,) = await chats(model, {"response_format": FORMAT, **bias}, reasoning="qwen3")
    jsonschema.validate(json.loads(answer.choices[0].message.content), NUMBERS)
    assert not getattr(answer.choices[0].message, "reasoning", "")


async def test_a_forced_call_may_follow_a_thought(model_of):
    model = model_of((), ["<think>", "</think>", "<tool_call>", "</tool_call>"])
    bias = ending_a_thought(model, "</think>")
    body = {"tools": TOOLS, "tool_choice": "required", **bias}
    answers = await chats(model, *({**body, "seed": seed} for seed in range(4)), tool="hermes", reasoning="deepseek_r1")
    assert all(calls_of(answer) for answer in answers)
    assert any(getattr(answer.choices[0].message, "reasoning", "") for answer in answers)


@pytest.mark.parametrize("is_special", mostly_slow([True, False]))
async def test_gpt_oss_thinks_and_answers_in_messages(model_of, is_special):
    tokens = SPECIAL["openai"]
    model = model_of(tokens if is_special else (), () if is_special else tokens)
    bias = ending_a_thought(model, "<|end|>")
    bodies = [{"response_format": FORMAT, "seed": seed, **bias} for seed in range(4)]
    bodies += [{"tools": TOOLS, "tool_choice": "required", "seed": seed, **bias} for seed in range(4)]
    answers = await chats(model, *bodies, tool="openai", reasoning="openai_gptoss")
    for answer in answers[:4]:
        jsonschema.validate(json.loads(answer.choices[0].message.content), NUMBERS)
    assert all(calls_of(answer) for answer in answers[4:])


async def test_gpt_oss_needs_no_more_than_its_own_template(model_of):
    pytest.importorskip("transformers", reason="makes the model")
    template = (Path(__file__).parent / "chat_templates" / "gpt_oss.jinja").read_text()
    model = model_of(SPECIAL["openai"], template=template, family="gpt_oss")
    bias = ending_a_thought(model, "<|end|>")
    tools = [one for one in TOOLS if "parameters" in one["function"]]  # which the template asks for
    bodies = [{"response_format": FORMAT}, {"tools": tools, "tool_choice": "required"}]
    structured, forced = await chats(
        model, *({**body, "seed": 1, **bias} for body in bodies), tool="auto", reasoning="auto"
    )
    jsonschema.validate(json.loads(structured.choices[0].message.content), NUMBERS)
    assert calls_of(forced)


@pytest.mark.parametrize("reasoning", mostly_slow(["qwen3", "none"]))
async def test_beside_a_schema_a_model_may_call_its_tools_all_the_same(model_of, reasoning):
    model = model_of((), ["<think>", "</think>", "<tool_call>", "</tool_call>"])
    bodies = [
        {"tools": TOOLS, "response_format": FORMAT, "seed": seed, "temperature": 2, **ending_a_thought(model, one)}
        for one in ("</think>", "<tool_call>")
        for seed in range(4)
    ]
    answers = await chats(model, *bodies, tool="hermes", reasoning=reasoning)
    calls = [answer for answer in answers if answer.choices[0].message.tool_calls]
    assert all(calls_of(answer) for answer in calls)
    others = [answer for answer in answers if answer not in calls]
    for answer in others:
        jsonschema.validate(json.loads(answer.choices[0].message.content), NUMBERS)
    assert calls
