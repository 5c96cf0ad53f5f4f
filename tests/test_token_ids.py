"""Token ids in answers, prefixes that are kept apart, and one model's card: as vLLM's clients ask for them."""

from __future__ import annotations

import json

import aiohttp
import pytest

from tests.edge import gateway, with_template

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
ASKED = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


async def post(session, url, **body):
    async with session.post(url, json=body) as response:
        return response.status, await response.json()


async def events(session, url, **body):
    async with session.post(url, json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture
async def served(tiny_model, tmp_path):
    model = with_template(tiny_model, tmp_path / "model")
    async with gateway(model) as (engine, url), aiohttp.ClientSession() as session:
        yield engine, url, session


async def test_completions_tell_the_tokens_of_prompts_and_answers_streamed_or_not(served):
    _, url, session = served
    url = f"{url}/v1/completions"
    _, whole = await post(session, url, prompt=PROMPTS, n=2, **ASKED)
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    told = [choice["token_ids"] for choice in whole["choices"]]
    assert [len(one) for one in told] == [5] * 4
    streamed = {index: [] for index in range(4)}
    firsts = {}
    for event in await events(session, url, prompt=PROMPTS, n=2, echo=True, **ASKED):
        (choice,) = event["choices"]
        streamed[choice["index"]] += choice.get("token_ids", [])
        if "prompt_token_ids" in choice:
            assert choice["index"] not in firsts, "once"
            firsts[choice["index"]] = choice["prompt_token_ids"]
    assert [streamed[index] for index in range(4)] == told
    assert [firsts[index] for index in range(4)] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    _, plain = await post(session, url, prompt=PROMPTS[0], max_tokens=2)
    assert not {"token_ids", "prompt_token_ids"} & set(plain["choices"][0])


async def test_chats_tell_them_too(served):
    _, url, session = served
    messages = [{"role": "user", "content": "hello"}]
    _, tokens = await post(session, f"{url}/tokenize", messages=messages)
    url = f"{url}/v1/chat/completions"
    _, whole = await post(session, url, messages=messages, **ASKED)
    assert whole["prompt_token_ids"] == tokens["tokens"]
    (choice,) = whole["choices"]
    told = await events(session, url, messages=messages, **ASKED)
    assert [event.get("prompt_token_ids") for event in told] == [tokens["tokens"]] + [None] * (len(told) - 1)
    assert [token for event in told for token in event["choices"][0].get("token_ids", ())] == choice["token_ids"]
    assert len(choice["token_ids"]) == 5


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_name_tokens_by_their_ids(served, stream):
    _, url, session = served
    asked = {**ASKED, "return_tokens_as_token_ids": True}
    body = {"prompt": PROMPTS[0], "logprobs": 3, "echo": True, **asked}
    if stream:
        parts = [event["choices"][0] for event in await events(session, f"{url}/v1/completions", **body)]
        logprobs = {
            name: [one for part in parts for one in part["logprobs"][name]] for name in ("tokens", "text_offset")
        }
        tops = [one for part in parts for one in part["logprobs"]["top_logprobs"]]
        answer = [token for part in parts for token in part.get("token_ids", ())]
    else:
        _, whole = await post(session, f"{url}/v1/completions", **body)
        logprobs, answer = whole["choices"][0]["logprobs"], whole["choices"][0]["token_ids"]
        tops = logprobs["top_logprobs"]
        assert logprobs["text_offset"][-1] <= len(whole["choices"][0]["text"]), "offsets are the text's"
    ids = PROMPTS[0] + answer
    assert logprobs["tokens"] == [f"token_id:{token}" for token in ids]
    for token, best in zip(ids[1:], tops[1:], strict=True):
        assert f"token_id:{token}" in best
        assert all(name.startswith("token_id:") for name in best)
    messages = [{"role": "user", "content": "hello"}]
    chat = {"messages": messages, "logprobs": True, "top_logprobs": 2, **asked}
    if not stream:
        _, whole = await post(session, f"{url}/v1/chat/completions", **chat)
        (choice,) = whole["choices"]
        content = choice["logprobs"]["content"]
        assert [one["token"] for one in content] == [f"token_id:{token}" for token in choice["token_ids"]]
        assert (
            bytes(byte for one in content for byte in one["bytes"]).decode(errors="replace")
            == choice["message"]["content"]
        )
        assert all(top["token"].startswith("token_id:") for one in content for top in one["top_logprobs"])


async def test_a_salt_keeps_prefixes_apart(served):
    _, url, session = served
    url = f"{url}/v1/completions"
    prompt = [11 + index % 60 for index in range(64)]

    async def num_cached(**salt):
        status, answer = await post(session, url, prompt=prompt, max_tokens=2, temperature=0, **salt)
        assert status == 200, answer
        texts.add(answer["choices"][0]["text"])
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    texts = set()
    assert await num_cached() == 0
    known = await num_cached()
    assert known > 0
    assert await num_cached(cache_salt="a") == 0
    assert await num_cached(cache_salt="b") == 0
    assert await num_cached(cache_salt="a") == known
    assert await num_cached(cache_salt="") == await num_cached(cache_salt=None) == known
    assert len(texts) == 1
    for salt in (5, ["a"], "s" * 257):
        status, answer = await post(session, url, prompt=prompt, cache_salt=salt)
        assert (status, answer["error"]["param"]) == (400, "cache_salt")


async def test_one_model_has_a_card_of_its_own(served):
    _, url, session = served
    async with session.get(f"{url}/v1/models") as response:
        (card,) = (await response.json())["data"]
    async with session.get(f"{url}/v1/models/tiny") as response:
        assert (response.status, await response.json()) == (200, card)
    for name in ("other", "tiny/", "a/b", "", "%00", "x" * 5000):
        async with session.get(f"{url}/v1/models/{name}") as response:
            assert response.status == 404
            error = (await response.json())["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", 404)
            assert len(error["message"]) < 300
    async with session.post(f"{url}/v1/models/tiny") as response:
        assert (response.status, response.headers["Allow"]) == (405, "GET")


async def test_a_websocket_tells_the_prompts_tokens_once_and_names_by_ids(served):
    _, url, session = served
    async with session.ws_connect(f"{url}/v1/stream") as socket:
        asked = {**ASKED, "logprobs": 2, "return_tokens_as_token_ids": True}
        await socket.send_json({"type": "generate", "id": "a", "prompt": PROMPTS[0], **asked})
        outputs = []
        while (message := await socket.receive_json(timeout=30))["type"] == "output":
            outputs.append(message)
    assert message["type"] == "done"
    assert [one.get("prompt_token_ids") for one in outputs] == [PROMPTS[0]] + [None] * (len(outputs) - 1)
    for one in outputs:
        assert [entry["token"] for entry in one["logprobs"]["content"]] == [f"token_id:{t}" for t in one["token_ids"]]
