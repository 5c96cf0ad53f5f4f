"""A request that is asked whole, streamed or over the WebSocket has one answer, whatever its options."""

from __future__ import annotations

import json
import random

import aiohttp
import pytest
import pytest_asyncio

from tests.conftest import TEXT
from tests.edge import gateway, with_template
from tests.everyday import mostly_slow, thorough
from tests.test_engine import idle

pytestmark = pytest.mark.asyncio(loop_scope="module")
NUM_REQUESTS = 12
OPTIONS = {  # of which each request has some
    "n": [1, 2, 3],
    "temperature": [0, 0.7, 1.5],
    "logprobs": [0, 3],
    "prompt_logprobs": [0, 2],
    "stop": ["e", ["th", "\n"], ["nowhere in it"]],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True, False],
    "min_tokens": [1, 3],
    "skip_special_tokens": [False],
    "presence_penalty": [1.5],
    "logit_bias": [{"7": 5, "9": -100}],
    "truncate_prompt_tokens": [3],
    "structured_outputs": [{"regex": "[a-z ]{3,9}"}, {"choice": ["yes", "no"]}, {"json": {"enum": [1, "a", None]}}],
    "stream_options": [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}],
}
COMPLETIONS = {"prompt": [TEXT, [5, 6, 7], [TEXT, "It is"], [[5, 6], [7, 8, 9]]], "echo": [True]}
CHATS = {
    "messages": [
        [{"role": "user", "content": TEXT}],
        [{"role": "system", "content": "a"}, {"role": "user", "content": ""}],
    ]
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_model, tmp_path_factory):
    async with gateway(with_template(tiny_model, tmp_path_factory.mktemp("model"))) as (engine, url):
        async with aiohttp.ClientSession() as session:
            yield Asking(session, url)
        await idle(engine)


class Asking:
    def __init__(self, session, url):
        self._session, self._url = session, url

    async def whole(self, path, body):
        async with self._session.post(f"{self._url}/v1/{path}", json=body) as response:
            return response.status, await response.json()

    async def streamed(self, path, body):
        """(status, chunks or the error)"""
        async with self._session.post(f"{self._url}/v1/{path}", json=body | {"stream": True}) as response:
            if response.status != 200:
                return response.status, await response.json()
            lines = [line async for line in response.content if line.strip()]
        assert lines.pop() == b"data: [DONE]\n"
        assert all(line.startswith(b"data: ") for line in lines)
        return 200, [json.loads(line[6:]) for line in lines]

    async def messages(self, body):
        """All of the WebSocket; the last one is no output."""
        async with self._session.ws_connect(f"{self._url}/v1/stream", max_msg_size=0) as socket:
            await socket.send_json({"type": "generate", "id": "a"} | body)
            found = []
            while not found or found[-1]["type"] in ("output", "prompt"):
                found.append(await socket.receive_json(timeout=60))
            return found


def drawn(chance, own):
    """A request with some of the options."""
    (main, values), *rest = own.items()
    body = {main: chance.choice(values), "seed": chance.randrange(1000), "max_tokens": chance.choice([1, 5, 12])}
    for name, some in [*rest, *OPTIONS.items()]:
        if chance.random() < 0.3:
            body[name] = chance.choice(some)
    if main == "messages" and "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    if "min_tokens" in body:
        body["max_tokens"] = max(body["max_tokens"], body["min_tokens"])
    return body


def joined(chunks, has_logprobs):
    """Choices as a whole answer has them: text, reason, log-probabilities, those of the prompt."""
    found = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "reason": None, "logprobs": {}, "prompt": None})
            assert one["reason"] is None, "nothing follows the last"
            one["text"] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            one["reason"] = choice["finish_reason"]
            for name, items in (choice["logprobs"] or {}).items():
                one["logprobs"].setdefault(name, []).extend(items)
            one["prompt"] = choice.get("prompt_logprobs", one["prompt"])
            assert (choice["logprobs"] is None) or has_logprobs
    return [found[index] for index in sorted(found)]


def choices_of(whole):
    return [
        {
            "text": one["text"] if "text" in one else one["message"]["content"], "reason": one["finish_reason"],
            "logprobs": one["logprobs"] or {}, "prompt": one.get("prompt_logprobs"),
        }
        for one in whole["choices"]
    ]  # fmt: skip


def rounded(value):
    """What was computed in another batch differs in the last digits; order of the less probable with it."""
    if isinstance(value, float):
        return round(value, 2) + 0.0
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items() if key not in ("top_logprobs", "rank")}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def usage_of(values):
    """What does not depend on who has asked before."""
    return values["prompt_tokens"], values["completion_tokens"], values["total_tokens"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("seed", [*mostly_slow(range(4)), *map(thorough, range(4, 8))])
async def test_streams_and_wholes_say_the_same(served, path, seed):
    chance = random.Random(seed)
    num_answered = 0
    for _ in range(NUM_REQUESTS):
        body = drawn(chance, COMPLETIONS if path == "completions" else CHATS)
        options = body.pop("stream_options", {})
        status, whole = await served.whole(path, body)
        other_status, chunks = await served.streamed(path, body | {"stream_options": options})
        assert status == other_status, (body, whole, chunks)
        if status != 200:
            assert (status, whole["error"]) == (400, chunks["error"]), body
            continue
        num_answered += 1
        if path != "completions":
            (told,) = [chunk.pop("prompt_logprobs") for chunk in chunks if "prompt_logprobs" in chunk] or [None]
            assert rounded(told) == rounded(whole.get("prompt_logprobs")), body
        if options.get("include_usage"):
            last = chunks.pop()
            assert last["choices"] == []
            assert usage_of(last["usage"]) == usage_of(whole["usage"]), body
            is_continuous = options.get("continuous_usage_stats", False)
            assert {chunk["usage"] is not None for chunk in chunks} == {is_continuous}, body
        else:
            assert not any(chunk.get("usage") for chunk in chunks)
        assert rounded(joined(chunks, "logprobs" in body)) == rounded(choices_of(whole)), body
    assert num_answered > NUM_REQUESTS / 3


@pytest.mark.parametrize("own", [COMPLETIONS, CHATS], ids=["completions", "chats"])
@pytest.mark.parametrize("seed", [*mostly_slow(range(4)), *map(thorough, range(4, 8))])
async def test_the_websocket_says_the_same(served, own, seed):
    chance = random.Random(100 + seed)
    for _ in range(NUM_REQUESTS):
        body = drawn(chance, own)
        for name in ("stream_options", "echo"):
            body.pop(name, None)
        status, whole = await served.whole("completions" if own is COMPLETIONS else "chat/completions", body)
        *outputs, last = await served.messages(body)
        if status != 200:
            assert (last["type"], last["error"]) == ("error", whole["error"]), body
            assert outputs == []
            continue
        assert last["type"] == "done", (body, last)
        assert usage_of(last["usage"]) == usage_of(whole["usage"])
        for index, choice in enumerate(choices_of(whole)):
            mine = [one for one in outputs if one["index"] == index and one["type"] == "output"]
            assert "".join(one["text"] for one in mine) == choice["text"], body
            assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["reason"]], body
            told = [token["logprob"] for one in mine for token in (one["logprobs"] or {"content": []})["content"]]
            content = choice["logprobs"].get("content") or []
            expected = choice["logprobs"].get("token_logprobs") or [one["logprob"] for one in content]
            assert rounded(told) == rounded(expected), body
            parts = [one["prompt_logprobs"] for one in outputs if one["type"] == "prompt" and one["index"] == index]
            wanted = choice["prompt"] if own is COMPLETIONS else whole.get("prompt_logprobs")
            if index % body.get("n", 1) == 0:  # of a prompt's choices, the first tells them
                assert rounded([one for part in parts for one in part]) == rounded(wanted or []), body
