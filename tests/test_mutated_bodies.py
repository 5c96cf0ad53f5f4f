"""Bodies of every endpoint in which something is wrong: each is understood, or refused with a sentence on one line."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter

import pytest

from msi.control.client_messages import Welcome
from msi.server.prepare import (
    ANSWERS,
    ANTHROPIC,
    ANTHROPIC_COUNT,
    CHAT,
    COMPLETION,
    DETOKENIZE,
    MESSAGE,
    NOT_IN_MESSAGES,
    RESPONSE,
    TOKENIZE,
    NotUnderstood,
    Preparation,
    Setup,
)
from msi.settings import DEMO_MODEL
from tests.everyday import mostly_slow, thorough

NUM_BODIES = 2500
MAX_SENTENCE_CHARS = 900
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% for c in (m.tool_calls or []) %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}{# <tool_call> <think></think> #}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "a"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TAG = {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "x"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}], "stop": ["a"], "logit_bias": {"5": 1}, "max_tokens": 5,
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "stream": True, "temperature": 0.5, "n": 2,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "logprobs": True, "top_logprobs": 2,
        "chat_template_kwargs": {"a": 1}, "prompt_logprobs": 1, "seed": 1,
    },
    {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {
        "messages": [USER], "response_format": {
            "type": "structural_tag", "format": {
                "type": "sequence", "elements": [
                    {"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG], "at_least_one": True,
                     "excludes": ["x"]},
                    {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": ["</t>", "</u>"]},
                    {"type": "repeat", "min": 1, "max": 2, "content": {"type": "regex", "pattern": "a"}},
                ],
            },
        },
    },
    {
        "messages": [USER], "structured_outputs": {"regex": "a+", "whitespace_pattern": ""}, "bad_words": ["x"],
        "allowed_token_ids": [1, 2], "truncate_prompt_tokens": 5,
    },
]  # fmt: skip
COMPLETIONS = [
    {
        "prompt": ["a", [1, 2]], "echo": True, "logprobs": 2, "max_tokens": 1, "n": 2, "best_of": 2, "suffix": None,
        "stop_token_ids": [1], "guided_choice": ["a", "b"],
    },
    {"prompt": "a", "structured_outputs": {"grammar": 'start: "a"'}},
]  # fmt: skip
RESPONSES = [{
    "model": "demo", "instructions": "i", "tools": [{"type": "function", "strict": True, **FUNCTION}],
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "x"},
    ],
    "tool_choice": "auto", "parallel_tool_calls": True, "max_output_tokens": 5, "reasoning": {"effort": "low"},
    "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}, "stream": True, "store": False,
    "temperature": 1, "include": ["reasoning.encrypted_content"], "metadata": {"a": "b"}, "truncation": "disabled",
}]  # fmt: skip
MESSAGES = [{
    "model": "demo", "max_tokens": 5, "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "b"},
            {"type": "tool_use", "id": "u", "name": "f", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [{
            "type": "tool_result", "tool_use_id": "u", "content": [{"type": "text", "text": "r"}], "is_error": False,
        }]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}], "stop_sequences": ["x"], "stream": True,
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}, "top_k": 5, "top_p": 0.5,
    "thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "low"},
}]  # fmt: skip
BODIES = {
    CHAT: CHATS, COMPLETION: COMPLETIONS, RESPONSE: RESPONSES, ANTHROPIC: MESSAGES, ANTHROPIC_COUNT: MESSAGES,
    MESSAGE: [
        {"type": "generate", "id": "a"} | {name: value for name, value in one.items() if name not in NOT_IN_MESSAGES}
        for one in CHATS + COMPLETIONS
    ],
    TOKENIZE: [
        {"prompt": "a", "add_special_tokens": True, "return_token_strs": True},
        {name: CHATS[0][name] for name in ("messages", "tools", "chat_template_kwargs")},
    ],
    DETOKENIZE: [{"tokens": [1, 2]}],
}  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 1e308, 1.5, 1e-300, "", "a", "x" * 5000, "\x00", "\ufffd",
    "\u202e", [], {}, [[]], [None], {"a": None}, [{}], {"type": "text"}, {"type": 5}, {"": ""}, ["a"] * 70, [1] * 500,
    SCHEMA, {"type": "object", "properties": {"a": 5}}, {"$ref": "#"}, {"$ref": "#/$defs/x"}, {"type": "function"},
    "null", "{}", "<think>", "</s>", "<s>", "{{ 1/0 }}", {"anyOf": []}, {"enum": []}, {"not": {}}, {"pattern": "("},
    {"minItems": 5, "maxItems": 1}, {"type": "integer", "minimum": 5, "maximum": 1}, TAG, {"type": "any_text"},
]  # fmt: skip


def places(value, path=()):
    """Paths of all that stands in a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def mutated(body, chance):
    """With one to three changes anywhere in it."""
    body = copy.deepcopy(body)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if not (found := list(places(body))):
            break
        *path, last = chance.choice(found)
        holder = body
        for key in path:
            holder = holder[key]
        kind = chance.random()
        if kind < 0.6:
            holder[last] = copy.deepcopy(chance.choice(VALUES))
        elif kind < 0.75:
            del holder[last]
        elif isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        else:
            names = ["type", "a", "name", "content", "role", "", *map(str, holder)]
            holder[chance.choice(names)] = copy.deepcopy(holder[last])
    return body


@pytest.fixture(scope="module")
def preparation():
    tokenizer = (DEMO_MODEL / "tokenizer.json").read_bytes()
    return Preparation(Setup(Welcome("demo", 2048, 1024, tokenizer, {"default": TEMPLATE})))


@pytest.mark.parametrize("endpoint", BODIES)
def test_bodies_as_they_should_be_are_understood(preparation, endpoint):
    for body in BODIES[endpoint]:
        answer = preparation.understand(endpoint, json.dumps(body))
        assert not isinstance(answer, NotUnderstood), answer


@pytest.mark.parametrize("seed", [*mostly_slow(range(6)), *map(thorough, range(6, 12))])
def test_whatever_is_wrong_is_a_sentence(preparation, seed):
    chance, counted = random.Random(seed), Counter()
    for _ in range(NUM_BODIES):
        endpoint = chance.choice(list(BODIES))
        body = mutated(chance.choice(BODIES[endpoint]), chance)
        answer = preparation.understand(endpoint, json.dumps(body))
        assert ANSWERS.decode(ANSWERS.encode(answer)) == answer, "it crosses processes"
        is_refused = isinstance(answer, NotUnderstood)
        counted[endpoint, is_refused] += 1
        if is_refused:
            failure = answer.failure
            assert failure.kind in ("invalid_request", "model_not_found"), (endpoint, failure, body)
            assert "\n" not in failure.message, (endpoint, failure)
            assert 10 < len(failure.message) < MAX_SENTENCE_CHARS, (endpoint, failure)
    assert min(counted[endpoint, is_refused] for endpoint in BODIES for is_refused in (True, False)) > 10, counted
