"""Log-probabilities of prompts over HTTP: OpenAI's echo, and vLLM's `prompt_logprobs`."""

from __future__ import annotations

import json

import aiohttp
import pytest

from msi import SamplingParams
from msi.errors import InvalidRequest
from msi.server import echoes
from msi.server.completions import parse_completion
from msi.server.echoes import Echoes, check_size
from msi.text.prompts import Prompts
from tests.conftest import TEXT
from tests.edge import gateway, with_template
from tests.vocabularies import CORPUS, KINDS, tokenizer_of

GREEDY = {"temperature": 0, "ignore_eos": True}
IDS = [11, 200, 35, 77]


@pytest.fixture
async def served(tiny_model, tmp_path):
    """(engine, post)"""
    model = with_template(tiny_model, tmp_path / "model")
    async with gateway(model) as (engine, url), aiohttp.ClientSession() as session:

        async def post(path="completions", **body):
            async with session.post(f"{url}/v1/{path}", json=GREEDY | body) as response:
                if not body.get("stream"):
                    return response.status, await response.json()
                lines = [line async for line in response.content if line.strip()]
                assert lines[-1] == b"data: [DONE]\n"
                return response.status, [json.loads(line[6:]) for line in lines[:-1]]

        yield engine, post


async def scored(engine, prompt, num_top):
    """The engine's own: (token ids, logprobs, None first)."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=num_top)
    (output,) = [one async for one in engine.generate(prompt, params)]
    return engine.encode(prompt), [None, *output.prompt_logprobs.tokens()]


async def test_an_echo_has_the_prompts_log_probabilities_in_openais_shape(served):
    engine, post = served
    status, body = await post(prompt=TEXT, echo=True, logprobs=2, max_tokens=3)
    assert status == 200
    (choice,) = body["choices"]
    tokens, expected = await scored(engine, TEXT, 2)
    assert choice["text"].startswith(TEXT)
    shown = choice["logprobs"]
    assert set(shown) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(values) for values in shown.values()} == {len(tokens) + 3}
    assert "".join(shown["tokens"]) == choice["text"]
    ends = [offset + len(token) for offset, token in zip(shown["text_offset"], shown["tokens"], strict=True)]
    assert [0, *ends] == [*shown["text_offset"], len(choice["text"])]
    assert (shown["token_logprobs"][0], shown["top_logprobs"][0]) == (None, None)
    for at, one in enumerate(expected[1:], 1):
        assert shown["token_logprobs"][at] == pytest.approx(one.logprob)
        top = shown["top_logprobs"][at]
        assert top[shown["tokens"][at]] == shown["token_logprobs"][at]
        assert max(top.values()) == pytest.approx(one.top_logprobs[0])
        assert len(top) == 2 + (tokens[at] not in one.top_token_ids)
    _, plain = await post(prompt=TEXT, logprobs=2, max_tokens=3)
    alone = plain["choices"][0]["logprobs"]
    assert shown["tokens"][-3:] == alone["tokens"]
    assert shown["token_logprobs"][-3:] == pytest.approx(alone["token_logprobs"], abs=1e-5)
    assert shown["top_logprobs"][-3:] == [pytest.approx(top, abs=1e-5) for top in alone["top_logprobs"]]
    assert body["usage"]["prompt_tokens"] == len(tokens)
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("logprobs", [None, 0, 1])
async def test_no_token_is_generated_where_none_is_asked_for(served, logprobs):
    engine, post = served
    _, body = await post(prompt=TEXT, echo=True, logprobs=logprobs, max_tokens=0)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    num_tokens = len(engine.encode(TEXT))
    usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert usage == {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}
    if logprobs is None:
        assert choice["logprobs"] is None
    else:
        assert len(choice["logprobs"]["token_logprobs"]) == num_tokens


async def test_a_stream_begins_with_the_prompt_of_each_choice(served):
    _, post = served
    asked = {"prompt": [TEXT, IDS], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 3, "seed": 1, "temperature": 1}
    _, whole = await post(**asked)
    _, chunks = await post(**asked, stream=True, stream_options={"include_usage": True})
    assert chunks.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [one["choices"][0] for one in chunks if one["choices"][0]["index"] == choice["index"]]
        prompt = TEXT if choice["index"] < 2 else None
        if prompt is not None:
            assert parts[0]["text"] == prompt
        assert parts[0]["logprobs"]["token_logprobs"][0] is None
        assert "".join(part["text"] for part in parts) == choice["text"]
        joined = {name: [one for part in parts for one in part["logprobs"][name]] for name in choice["logprobs"]}
        for name in ("tokens", "text_offset"):
            assert joined[name] == choice["logprobs"][name]
        values = joined["token_logprobs"]
        assert values[1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-5)
        assert [top and list(top) for top in joined["top_logprobs"]] == [
            top and list(top) for top in choice["logprobs"]["top_logprobs"]
        ]
        assert [part["finish_reason"] for part in parts][-1] == "length"


async def test_arrays_of_prompts_and_choices_are_numbered_prompt_by_prompt(served):
    engine, post = served
    _, body = await post(prompt=[IDS, TEXT], echo=True, logprobs=0, max_tokens=1, n=2, seed=4)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for choice in body["choices"]:
        tokens, expected = await scored(engine, IDS if choice["index"] < 2 else TEXT, 0)
        values = choice["logprobs"]["token_logprobs"]
        assert len(values) == len(tokens) + 1
        assert values[1:-1] == pytest.approx([one.logprob for one in expected[1:]])
    assert body["choices"][0]["text"].startswith(engine.decode(IDS))


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_prompt_logprobs_come_in_vllms_shape(served, path):
    engine, post = served
    asked = {"prompt": TEXT} if path == "completions" else {"messages": [{"role": "user", "content": TEXT}]}
    _, body = await post(path, **asked, prompt_logprobs=2, max_tokens=1, n=2)
    holders = body["choices"] if path == "completions" else [body]
    for holder in holders:
        shown = holder["prompt_logprobs"]
        assert len(shown) == body["usage"]["prompt_tokens"]
        assert shown[0] is None
        for entries in shown[1:]:
            assert 2 <= len(entries) <= 3
            first = next(iter(entries.values()))
            assert set(first) == {"logprob", "rank", "decoded_token"}
            ranked = sorted(entries.values(), key=lambda entry: entry["rank"])
            assert [entry["rank"] for entry in ranked][:2] == [1, 2]
            assert ranked == sorted(entries.values(), key=lambda entry: -entry["logprob"])
    if path == "completions":
        tokens, expected = await scored(engine, TEXT, 2)
        for token, entries, one in zip(tokens[1:], holders[0]["prompt_logprobs"][1:], expected[1:], strict=True):
            entry = entries[str(token)]
            assert (entry["logprob"], entry["rank"]) == (pytest.approx(one.logprob), one.rank)
            assert entry["decoded_token"] == engine.token_text(token).text
    assert all("prompt_logprobs" not in holder for holder in (await post(path, **asked))[1]["choices"])


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_a_stream_begins_with_the_same_prompt_logprobs(served, path):
    _, post = served
    one = {"prompt": [TEXT, IDS]} if path == "completions" else {"messages": [{"role": "user", "content": TEXT}]}
    asked = {**one, "prompt_logprobs": 1, "max_tokens": 2, "n": 2}
    _, whole = await post(path, **asked)
    _, chunks = await post(path, **asked, stream=True)
    if path == "completions":
        told = [choice for chunk in chunks for choice in chunk["choices"] if "prompt_logprobs" in choice]
        expected = sorted(whole["choices"], key=lambda choice: choice["index"])
        assert all(choice["logprobs"] is None and choice["text"] == "" for choice in told)
        told.sort(key=lambda choice: choice["index"])
        assert [choice["index"] for choice in told] == [0, 1, 2, 3]
    else:
        told, expected = [chunk for chunk in chunks if "prompt_logprobs" in chunk], [whole]
        assert told == chunks[:1]
    for found, wanted in zip(told, expected, strict=True):
        assert [one and list(one) for one in found["prompt_logprobs"]] == [
            one and list(one) for one in wanted["prompt_logprobs"]
        ]


async def test_both_shapes_at_once_have_each_its_own_number(served):
    _, post = served
    _, body = await post(prompt=TEXT, echo=True, logprobs=0, prompt_logprobs=3, max_tokens=0)
    (choice,) = body["choices"]
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
    assert all(3 <= len(entries) <= 4 for entries in choice["prompt_logprobs"][1:])


async def test_too_much_is_refused_with_a_sentence(served, monkeypatch):
    _, post = served
    monkeypatch.setattr(echoes, "MAX_PROMPT_LOGPROBS", 100)
    for asked in (
        {"prompt": IDS * 13, "echo": True, "logprobs": 1}, {"prompt": [IDS] * 13, "prompt_logprobs": 1},
        {"prompt": IDS, "n": 9, "prompt_logprobs": 2},
    ):  # fmt: skip
        status, body = await post(**asked)
        assert (status, body["error"]["param"]) == (400, "prompt")
        assert "at most 100 are allowed in one answer" in body["error"]["message"]
    assert (await post(prompt=IDS, prompt_logprobs=1))[0] == 200
    with pytest.raises(InvalidRequest):
        check_size(101, SamplingParams(prompt_logprobs=0))
    check_size(10**9, SamplingParams(logprobs=5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*CORPUS[:3], "🙂", "a<|im_start|>b <tool call> c", " ", "<s>x"])
def test_tokens_cut_their_text_into_pieces_that_join_to_it(kind, text):
    tokenizer = tokenizer_of(kind)
    cutter = Echoes(Prompts(tokenizer, vocab_size=1000, max_model_len=1000))
    for add_special_tokens in (False, True):
        tokens = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        whole, ends = cutter.cut(tokens, is_text=add_special_tokens)
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        assert whole == tokenizer.decode(bare, skip_special_tokens=False)
        assert len(ends) == len(tokens)
        assert [0, *ends] == sorted([0, *ends])
        assert not tokens or ends[-1] == len(whole)
    if kind in ("byte-level", "llama", "metaspace-always") and text in (*CORPUS, "🙂"):
        assert whole == text


@pytest.mark.parametrize("logprobs", [None, 0])
def test_of_token_ids_that_are_truncated_those_that_are_taken_come_back(logprobs):
    tokenizer = tokenizer_of("byte-level")
    prompts = Prompts(tokenizer, vocab_size=1000, max_model_len=1000)
    ids = tokenizer.encode("It is a truth").ids
    body = {"prompt": [ids, ids[:1]], "echo": True, "logprobs": logprobs, "truncate_prompt_tokens": 2}
    asked = parse_completion(body)
    taken = [prompts.encode(one, truncate=2) for one in asked.prompts]
    assert list(taken[0]) == ids[-2:]
    echoes, _ = Echoes(prompts).of(asked, taken)
    assert echoes == (tokenizer.decode(ids[-2:]).encode(), tokenizer.decode(ids[:1]).encode())


def test_a_model_without_tokenizer_echoes_nothing():
    whole, ends = Echoes(Prompts(None, vocab_size=9, max_model_len=9)).cut((1, 2, 3), is_text=False)
    assert (whole, list(ends)) == ("", [0, 0, 0])
