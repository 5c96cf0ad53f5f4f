"""What real clients send, against a real gateway: arrays of prompts, usage, ids, defaults, errors with their fields."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
import pytest_asyncio

from msi import SamplingParams
from msi.errors import Unavailable
from tests.conftest import TEXT
from tests.edge import gateway, with_template
from tests.test_engine import collect, idle

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREEDY = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "It is"}], **GREEDY}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_model, tmp_path_factory):
    """(engine, url, session)"""
    model = with_template(tiny_model, tmp_path_factory.mktemp("model"))
    async with gateway(model) as (engine, url), aiohttp.ClientSession() as session:
        yield engine, url, session
        await idle(engine)


async def post(served, path, body, **headers):
    """(status, JSON, headers)"""
    _, url, session = served
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    async with session.post(f"{url}/v1/{path}", data=data, headers=headers) as response:
        return response.status, await response.json(), response.headers


async def events(served, path, body):
    _, url, session = served
    async with session.post(f"{url}/v1/{path}", json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        lines = [line.removeprefix(b"data: ").strip() async for line in response.content if line.strip()]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


# -- several prompts -------------------------------------------------------------------------------------------------


async def test_several_prompts_are_answered_in_their_order(served):
    prompts = [TEXT, "It is", [5, 6, 7], "a"]
    expected = [(await collect(served[0], prompt, **GREEDY))[0] for prompt in prompts]
    status, body, _ = await post(served, "completions", {"prompt": prompts, **GREEDY})
    assert status == 200
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == list(enumerate(expected))
    single = [(await post(served, "completions", {"prompt": one, **GREEDY}))[1]["usage"] for one in prompts]
    assert body["usage"]["prompt_tokens"] == sum(one["prompt_tokens"] for one in single)
    assert body["usage"]["completion_tokens"] == 32
    texts = [""] * 4
    for chunk in await events(served, "completions", {"prompt": prompts, **GREEDY}):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == expected


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(served):
    asked = {"n": 2, "seed": 3, "max_tokens": 4, "ignore_eos": True}
    prompts = ["It is", "a truth"]
    single = [(await post(served, "completions", {"prompt": one, **asked}))[1]["choices"] for one in prompts]
    _, body, _ = await post(served, "completions", {"prompt": prompts, **asked, "echo": True})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    expected = [prompt + choice["text"] for prompt, choices in zip(prompts, single, strict=True) for choice in choices]
    assert [choice["text"] for choice in body["choices"]] == expected


async def test_one_prompt_of_several_that_cannot_be_served_refuses_the_request(served):
    for bad in ([9999], [1] * 600):
        status, body, _ = await post(served, "completions", {"prompt": [[5], bad, [6]], **GREEDY})
        assert status == 400
        assert body["error"]["param"] == "prompt"
    await idle(served[0])


# -- usage -----------------------------------------------------------------------------------------------------------


async def test_usage_tells_what_the_prefix_cache_had(served):
    prompt = [3 + (7 * index) % 200 for index in range(100)]
    usages = [(await post(served, "completions", {"prompt": prompt, **GREEDY}))[1]["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 96]
    options = {"stream_options": {"include_usage": True}}
    last = (await events(served, "completions", {"prompt": prompt, **GREEDY, **options}))[-1]
    assert last["usage"] == usages[1]


@pytest.mark.parametrize(("path", "body"), [("completions", {"prompt": TEXT, **GREEDY}), ("chat/completions", CHAT)])
async def test_continuous_usage_is_in_every_chunk_and_rises(served, path, body):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await events(served, path, {**body, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[-1], chunks[-1]["choices"]) == (8, [])
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    plain = await events(served, path, {**body, "stream_options": {"continuous_usage_stats": True}})
    assert not any(chunk.get("usage") for chunk in plain), "usage was not asked for"


# -- ids and headers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "kind"), [("completions", "cmpl-"), ("chat/completions", "chatcmpl-")])
async def test_a_clients_own_id_comes_back_in_header_and_answer(served, path, kind):
    body = {"prompt": "a", **GREEDY} if path == "completions" else CHAT
    _, answer, headers = await post(served, path, body, **{"X-Request-Id": "bench-7_a.b:c"})
    assert (headers["X-Request-Id"], answer["id"]) == ("bench-7_a.b:c", f"{kind}bench-7_a.b:c")
    _, answer, headers = await post(served, path, body)
    assert answer["id"] == kind + headers["X-Request-Id"]
    for odd in ("a b", "x" * 129, "\u00e9", "a\tb", '"'):
        _, answer, headers = await post(served, path, body, **{"X-Request-Id": odd})
        assert headers["X-Request-Id"] != odd
        assert answer["id"] == kind + headers["X-Request-Id"]
    status, _, headers = await post(served, path, b"{}", **{"X-Request-Id": "r1"})
    assert (status, headers["X-Request-Id"]) == (400, "r1")


async def test_every_answer_has_an_id(served):
    _, url, session = served
    for path in ("/health", "/v1/models", "/metrics", "/nothing"):
        async with session.get(url + path, headers={"X-Request-Id": "r2"}) as response:
            assert response.headers["X-Request-Id"] == "r2"
    async with session.post(f"{url}/v1/completions", json={"prompt": "a", "stream": True, **GREEDY}) as response:
        first = (await response.content.readline()).removeprefix(b"data: ")
        assert json.loads(first)["id"] == "cmpl-" + response.headers["X-Request-Id"]
    async with session.ws_connect(f"{url}/v1/stream", headers={"X-Request-Id": "r3"}) as socket:
        assert socket._response.headers["X-Request-Id"] == "r3"


async def test_the_same_id_twice_at_a_time_confuses_nobody(served):
    bodies = [{"prompt": prompt, **GREEDY} for prompt in (TEXT, "It is", "a", [5, 6, 7])]
    expected = [(await collect(served[0], body["prompt"], **GREEDY))[0] for body in bodies]
    answers = await asyncio.gather(*(post(served, "completions", body, **{"X-Request-Id": "same"}) for body in bodies))
    assert [answer["choices"][0]["text"] for _, answer, _ in answers] == expected


async def test_who_cannot_be_served_now_is_told_when_to_try_again(served, monkeypatch):
    def unavailable(*_):
        raise Unavailable("1024 requests wait here already; try again later")

    monkeypatch.setattr(type(served[0]), "_require_client", unavailable)
    status, body, headers = await post(served, "completions", {"prompt": "a"})
    assert (status, headers["Retry-After"], body["error"]["type"]) == (503, "1", "server_error")


# -- errors ----------------------------------------------------------------------------------------------------------


async def test_a_prompt_that_leaves_no_room_is_refused_in_vllms_words(served):
    long = {"role": "user", "content": "a b c d " * 300}
    for path, field, body in (
        ("completions", "prompt", {"prompt": [1] * 600, **GREEDY}),
        ("chat/completions", "messages", {"messages": [long]}),
    ):
        status, answer, _ = await post(served, path, body)
        assert answer["error"]["param"] == field
        error = answer["error"]
        assert (status, error["code"], error["type"]) == (400, "context_length_exceeded", "invalid_request_error")
        assert error["message"].startswith("This model's maximum context length is 512 tokens. However, you requested ")
        assert "input tokens" in error["message"]


HOSTILE = [
    (b'{"prompt":' + b"[" * 1000 + b"]" * 1000 + b"}", None),
    (b'{"prompt":' + b"[" * 100_000 + b"}", None),
    (b'{"prompt":"a","logit_bias":{"' + b"9" * 5000 + b'":1}}', "logit_bias"),
    (b'{"prompt":"a","logit_bias":{"5":' + b"9" * 300 + b"}}", "logit_bias"),
    (b'{"prompt":"a","logit_bias":{"4000000000":1}}', "logit_bias"),
    (b'{"prompt":"a","logit_bias":{"300000":1}}', "logit_bias"),
    (b'{"prompt":"a","stop_token_ids":[300000]}', "stop_token_ids"),
    (b'{"prompt":[300000]}', "prompt"),
    (b'{"prompt":"a","max_tokens":"16 tokens"}', "max_tokens"),
    (b'{"prompt":"a","max_tokens":1.5}', "max_tokens"),
    (b'{"prompt":"a","max_tokens":' + b"9" * 300 + b"}", "max_tokens"),
    (b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}", None),
    (b'{"prompt":"a","seed":1e300}', "seed"),
    (b'{"prompt":"a","temperature":"0,5"}', "temperature"),
    (b'{"prompt":"a","temperature":1e308}', "temperature"),
    (b'{"prompt":"a","stop":["' + b'","'.join([b"a"] * 99) + b'"]}', "stop"),
    (b'{"prompt":"a","stop":"' + b"a" * 100_000 + b'"}', "stop"),
    (b'{"prompt":"a","n":129}', "n"),
    (b'{"prompt":"a","model":"' + b"m" * 100_000 + b'"}', "model"),
    (b'{"prompt":"a","model":7}', "model"),
    (b'{"prompt":"a","stream":true,"stream_options":[1]}', "stream_options"),
]


@pytest.mark.parametrize(("body", "param"), HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_bodies_are_a_sentence_with_their_field(served, body, param):
    status, answer, _ = await post(served, "completions", body)
    assert status in (400, 404)
    assert answer["error"]["param"] == param
    assert 0 < len(answer["error"]["message"]) < 400
    _, url, session = served
    async with session.ws_connect(f"{url}/v1/stream") as socket:
        await socket.send_str(
            body.decode().replace("{", '{"type":"generate","id":"a",', 1).replace('"stream":true,', "")
        )
        assert (await socket.receive_json(timeout=60))["error"]["param"] == param
        await socket.send_json({"type": "generate", "id": "a", "prompt": "a", "max_tokens": 1})
        assert (await socket.receive_json(timeout=60))["type"] == "output", "the connection goes on"


async def test_unknown_fields_are_logged_once_per_name(served, caplog):
    caplog.set_level("INFO")
    for _ in range(3):
        assert (await post(served, "completions", {"prompt": "a", "frobnicate": 1, "\n" * 200: 2, **GREEDY}))[0] == 200
    lines = [record.getMessage() for record in caplog.records if "not known here" in record.getMessage()]
    assert len(lines) == 2
    assert lines[0] == "field 'frobnicate' of requests is not known here and is ignored"
    assert all(len(line) < 200 and "\n" not in line for line in lines)


# -- the model's own defaults ----------------------------------------------------------------------------------------


async def test_the_models_defaults_hold_where_a_request_says_nothing(tiny_model, tmp_path):
    model = with_template(tiny_model, tmp_path / "model")
    says = {"temperature": 0.0, "max_new_tokens": 5, "repetition_penalty": 1.5}
    (model / "generation_config.json").write_text(json.dumps(says))
    async with gateway(model) as (engine, url), aiohttp.ClientSession() as session:
        served = engine, url, session
        explicit = {"temperature": 0, "max_tokens": 5, "repetition_penalty": 1.5, "ignore_eos": True}
        expected = await collect(engine, TEXT, **explicit)
        _, body, _ = await post(served, "completions", {"prompt": TEXT, "ignore_eos": True})
        assert body["choices"][0]["text"] == expected[0]
        assert body["usage"]["completion_tokens"] == 5
        _, body, _ = await post(served, "chat/completions", {**CHAT, "max_tokens": None, "temperature": None})
        assert body["usage"]["completion_tokens"] == 5
        async with session.ws_connect(f"{url}/v1/stream") as socket:
            await socket.send_json({"type": "generate", "id": "a", "prompt": TEXT, "ignore_eos": True})
            while (message := await socket.receive_json(timeout=60))["type"] == "output":
                pass
            assert message["usage"]["completion_tokens"] == 5
        tokens = [token async for output in engine.generate(TEXT) for token in output.token_ids]
        assert len(tokens) <= 5
        assert tuple(tokens) == tuple(expected[1])[: len(tokens)]
        given = SamplingParams(max_tokens=7, temperature=0, ignore_eos=True)
        assert len([1 async for output in engine.generate(TEXT, given) for _ in output.token_ids]) == 7
    async with gateway(model, engine={"generation_config": "vllm"}) as (engine, _):
        assert engine.sampling_defaults.values() == {}
