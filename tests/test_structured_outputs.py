"""Answers held to a schema or a grammar, from a random model: what comes out fits, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import re

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msi import Engine, InvalidRequest, SamplingParams, StructuredOutputs
from tests.conftest import TEXT
from tests.everyday import mostly_slow
from tests.schemas import answers
from tests.test_engine import collect, idle

OPTIONS = {"transport": "inproc", "expert_workers": 2, "micro_batches": 2, "threads_per_worker": 1}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ARITHMETIC = """start: sum
sum: product ("+" product){0,2}
product: NUMBER | "(" NUMBER "*" NUMBER ")"
NUMBER: /[1-9][0-9]{0,2}/
"""
GBNF = 'root ::= "yes" | "no" digit\ndigit ::= [0-9]'


def asking(schema=None, **given):
    return StructuredOutputs(**({"json": json.dumps(schema)} if schema is not None else given))


@pytest.fixture
async def engine(tiny_model):
    async with Engine.local(model=tiny_model, **OPTIONS) as engine:
        yield engine
        await idle(engine)
        for worker in engine._instance.workers:
            if worker.life.attention is not None:
                worker.life.attention.requests.check_integrity()
                assert worker.life.attention.counters().kv_blocks_lost == 0


def of_many(model, asked, **params):
    """Answers to all of them, side by side, in an engine of their own."""

    async def run():
        async with Engine.local(model=model, **OPTIONS) as engine:
            return await asyncio.gather(
                *(
                    collect(engine, TEXT, structured_outputs=one, seed=seed, max_tokens=450, **params)
                    for seed, one in enumerate(asked)
                )
            )

    return asyncio.run(run())


# -- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", mostly_slow(range(4)))
def test_a_random_model_writes_json_of_any_schema(tiny_model, number):
    @settings(max_examples=1, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(answers, min_size=25, max_size=25))
    def check(schemas):
        found = of_many(tiny_model, map(asking, schemas), temperature=1.0)
        for schema, (text, _, reason) in zip(schemas, found, strict=True):
            assert reason == "stop", (schema, text)
            jsonschema.validate(json.loads(text), schema)

    check()


FORMS = {
    "regex": ({"regex": r"[a-f]{3}-\d{2}(/x|\.)?"}, r"[a-f]{3}-\d{2}(/x|\.)?"),
    "choice": ({"choice": ("yes", "no", 'say "no"\n', "nobody", "ja/nein")}, r'yes|no|say "no"\n|nobody|ja/nein'),
    "lark": ({"grammar": ARITHMETIC}, r"[\d(][\d()*+]*"),
    "gbnf": ({"grammar": GBNF}, r"yes|no[0-9]"),
    "characters": ({"regex": "[日本語🙂]{4}"}, "[日本語🙂]{4}"),
    "one token": ({"choice": ("a",)}, "a"),
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_random_model_writes_what_the_form_says(engine, form):
    asked, expected = FORMS[form]
    found = await asyncio.gather(
        *(collect(engine, TEXT, structured_outputs=asking(**asked), max_tokens=100, seed=seed) for seed in range(8))
    )
    for text, _, reason in found:
        assert re.fullmatch(expected, text), text
        assert reason == "stop"
        if form == "lark":
            eval(text)
    assert len({text for text, _, _ in found}) > (form != "one token"), "each has its own"


async def test_any_json_object_and_its_white_space(engine):
    bias = {"logit_bias": {engine.encode("}")[0]: 30.0}, "max_tokens": 300}
    text, _, _ = await collect(engine, TEXT, structured_outputs=asking(json_object=True), **bias)
    assert isinstance(json.loads(text), dict)
    compact = StructuredOutputs(json=json.dumps(PERSON), disable_any_whitespace=True)
    texts = [(await collect(engine, TEXT, structured_outputs=compact, seed=seed, max_tokens=200))[0] for seed in (1, 2)]
    for text in texts:
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) or "\\" in text


@pytest.mark.parametrize("temperature", [0, 1.0])
async def test_choices_each_go_their_own_way_and_log_probabilities_stay_the_models(engine, temperature):
    params = SamplingParams(
        max_tokens=200, temperature=temperature, seed=3, n=4, logprobs=2, structured_outputs=asking(PERSON)
    )
    texts, reasons, logprobs = [""] * 4, [None] * 4, 0
    async for output in engine.generate(TEXT, params):
        texts[output.index] += output.text
        reasons[output.index] = output.finish_reason
        logprobs += len(output.logprobs)
    assert reasons == ["stop"] * 4
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) == (1 if temperature == 0 else 4)
    assert logprobs


async def test_streamed_text_is_whole_and_the_last_token_is_part_of_it(engine):
    for extra in ({}, {"ignore_eos": True}, {"include_stop_str_in_output": True}, {"min_tokens": 150}):
        asked = asking(choice=("never",))
        text, tokens, reason = await collect(engine, TEXT, structured_outputs=asked, max_tokens=200, **extra)
        assert (text, reason) == ("never", "stop"), extra
        assert engine.decode(tokens) == "never", "no pass for an end of sequence"


async def test_an_end_of_sequence_comes_only_where_the_answer_is_whole(engine):
    asked = asking(regex="[ab]{3,40}")
    for seed in range(6):
        for extra in ({}, {"ignore_eos": True}):
            text, _, reason = await collect(engine, TEXT, structured_outputs=asked, seed=seed, max_tokens=99, **extra)
            assert re.fullmatch("[ab]{3,40}", text)
            assert reason == "stop"
    text, _, _ = await collect(engine, TEXT, structured_outputs=asked, max_tokens=99, min_tokens=30, temperature=0.5)
    assert len(text) >= 20


async def test_a_stop_string_and_the_room_end_it_before(engine):
    text, _, reason = await collect(engine, TEXT, structured_outputs=asking(choice=("abcdef",)), stop=("cd",))
    assert (text, reason) == ("ab", "stop")
    text, tokens, reason = await collect(engine, TEXT, structured_outputs=asking(PERSON), max_tokens=3)
    assert (len(tokens), reason) == (3, "length")


# -- others ----------------------------------------------------------------------------------------------------------


async def test_rows_without_a_grammar_keep_their_tokens_beside_rows_with_one(engine):
    params = {"max_tokens": 60, "seed": 5, "ignore_eos": True}
    alone = [await collect(engine, TEXT, **params, temperature=one) for one in (0, 1.3)]
    held = [
        asyncio.ensure_future(
            collect(engine, TEXT[: 5 + seed], structured_outputs=asking(PERSON), seed=seed, max_tokens=200)
        )
        for seed in range(10)
    ]
    beside = await asyncio.gather(*(collect(engine, TEXT, **params, temperature=one) for one in (0, 1.3)))
    assert beside == alone
    for text, _, _ in await asyncio.gather(*held):
        jsonschema.validate(json.loads(text), PERSON)


async def test_preempted_answers_go_on_where_they_were(tiny_model):
    """The KV cache holds a third of what they need, so they are thrown out and computed again."""
    asked = [asking({"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3})] * 8
    async with Engine.local(model=tiny_model, num_gpu_blocks_override=36, **OPTIONS) as engine:
        crowded = await asyncio.gather(
            *(
                collect(engine, TEXT, structured_outputs=one, seed=seed, max_tokens=400)
                for seed, one in enumerate(asked)
            )
        )
        stats = await engine.stats()
        assert sum(worker.status.counters.get("preemptions", 0) for worker in stats.workers) > 0
        alone = [
            await collect(engine, TEXT, structured_outputs=one, seed=seed, max_tokens=400)
            for seed, one in enumerate(asked[:2])
        ]
    assert crowded[:2] == alone
    for text, _, _ in crowded:
        jsonschema.validate(json.loads(text), {"type": "array", "items": PERSON})


async def test_where_nothing_can_follow_the_request_ends_alone_with_a_sentence(engine):
    live = asyncio.ensure_future(collect(engine, TEXT, max_tokens=60, temperature=0, ignore_eos=True))
    only = {"allowed_token_ids": (engine.encode("q")[0],)}
    with pytest.raises(InvalidRequest, match="no token can follow") as found:
        await collect(engine, TEXT, structured_outputs=asking(choice=("abc",)), **only)
    assert found.value.code == "no_token_allowed"
    assert (await live)[2] == "length"


AMBIGUOUS = ["start: a\na: a a a | a a | /[a-z]/", 'start: a\na: "x" a "y" | b\nb: b b | /[a-z]/']


@pytest.mark.parametrize("grammar", AMBIGUOUS)
async def test_rules_that_mean_one_text_in_very_many_ways_end_before_they_cost_others_much(engine, grammar):
    live = asyncio.ensure_future(collect(engine, TEXT, max_tokens=60, temperature=0, ignore_eos=True))
    bias = {"logit_bias": {2: -100}, "max_tokens": 300}
    with pytest.raises(InvalidRequest, match=r"grammar.*(Too many items|Current row)"):
        await collect(engine, TEXT, structured_outputs=asking(grammar=grammar), **bias)
    assert (await live)[2] == "length"


async def test_what_cannot_be_compiled_is_refused_and_nothing_is_lost(engine):
    bad = [
        asking({"type": "object", "properties": {"a": {"not": {}}}}), asking(regex="("), asking(regex="(?=a)b"),
        asking(grammar="start: nothing"), asking(json="[]"), asking(json="{"), asking(grammar='{"grammars": 5}'),
        asking(grammar='root ::= "unclosed'),
    ]  # fmt: skip
    for one in bad:
        with pytest.raises(InvalidRequest) as caught:
            await collect(engine, TEXT, structured_outputs=one)
        assert caught.value.param == "structured_outputs"
        assert "\n" not in str(caught.value)
    assert (await collect(engine, TEXT, structured_outputs=asking(choice=("a",))))[0] == "a"


async def test_requests_that_wait_for_their_grammar_can_be_cancelled(engine):
    tasks = [
        asyncio.create_task(collect(engine, TEXT, structured_outputs=asking(regex=f"[a-c]{{{n},}}"), max_tokens=400))
        for n in range(1, 20)
    ]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await idle(engine)


# -- the value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "has nothing; give exactly one of"),
        ({"json": "{}", "regex": "a"}, "has json and regex; give exactly one of"),
        ({"regex": 5}, "regex of structured_outputs is 5"),
        ({"regex": "a" * 200_000}, "up to 131072 bytes"),
        ({"choice": ("a", "")}, "strings that are not empty"),
        ({"choice": ["a"]}, "choice of structured_outputs"),
        ({"json": "\ud800"}, "json of structured_outputs"),
        ({"json_object": 1}, "true or false"),
    ],
)
def test_a_wrong_value_is_refused_by_name(given, complaint):
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        StructuredOutputs(**given)
    assert caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 400


def test_parameters_take_no_other_type():
    with pytest.raises(InvalidRequest, match="structured_outputs is"):
        SamplingParams(structured_outputs={"json": "{}"})
