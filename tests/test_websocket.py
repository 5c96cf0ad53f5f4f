"""WebSocket /v1/stream: many requests on one connection, each under the client's own id."""

from __future__ import annotations

import contextlib
import json

import aiohttp
import pytest
import pytest_asyncio

from msi.server import prompt_answers, websocket
from tests.conftest import TEXT
from tests.edge import gateway, with_template
from tests.test_engine import collect, idle

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREEDY = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
LONG = {"max_tokens": 480, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_model, tmp_path_factory):
    """(engine, url)"""
    async with gateway(with_template(tiny_model, tmp_path_factory.mktemp("model"))) as (engine, url):
        yield engine, url
        await idle(engine)


@contextlib.asynccontextmanager
async def connected(served):
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{served[1]}/v1/stream") as socket:
        yield socket


async def results(socket, *ids):
    """The outputs of these requests and their last messages, by id."""
    outputs, last = {name: [] for name in ids}, {}
    while len(last) < len(ids):
        message = await socket.receive_json(timeout=60)
        assert message["id"] not in last, "nothing follows the last message"
        if message["type"] in ("output", "prompt"):
            outputs[message["id"]].append(message)
        else:
            last[message["id"]] = message
    return outputs, last


async def test_requests_run_side_by_side_and_answer_under_their_ids(served):
    engine, _ = served
    prompts = {"a": TEXT, "b": [5, 6, 7], "c": "It is"}
    async with connected(served) as socket:
        for name, prompt in prompts.items():
            await socket.send_json({"type": "generate", "id": name, "prompt": prompt, **GREEDY})
        outputs, last = await results(socket, *prompts)
    for name, prompt in prompts.items():
        text, tokens, reason = await collect(engine, prompt, **GREEDY)
        assert "".join(one["text"] for one in outputs[name]) == text
        assert [token for one in outputs[name] for token in one["token_ids"]] == tokens
        assert [one["finish_reason"] for one in outputs[name]] == [None] * (len(outputs[name]) - 1) + [reason]
        assert (last[name]["type"], last[name]["usage"]["completion_tokens"]) == ("done", len(tokens))


async def test_chats_choices_and_logprobs_go_the_same_way(served):
    messages = [{"role": "user", "content": "It is"}]
    async with connected(served) as socket:
        await socket.send_json(
            {"type": "generate", "id": "chat", "messages": messages, "n": 2, "logprobs": True, "top_logprobs": 1}
            | {**GREEDY, "temperature": 1}
        )
        outputs, last = await results(socket, "chat")
    assert {one["index"] for one in outputs["chat"]} == {0, 1}
    assert last["chat"]["usage"]["completion_tokens"] == 20
    assert all(len(one["logprobs"]["content"]) == len(one["token_ids"]) for one in outputs["chat"])


# token 1 is "<s>"
SPECIAL = {"max_tokens": 4, "temperature": 0, "logit_bias": {"1": 100}, "truncate_prompt_tokens": 3, "ignore_eos": True}


@pytest.mark.parametrize(
    ("fields", "text", "num_tokens"),
    [
        ({}, "", 4),
        ({"skip_special_tokens": False}, "<s><s><s><s>", 4),
        ({"skip_special_tokens": False, "stop": ["s>"]}, "<", 1),
        ({"skip_special_tokens": False, "stop": ["s>"], "include_stop_str_in_output": True}, "<s>", 1),
        ({"skip_special_tokens": False, "stop_token_ids": [1]}, "", 1),
        ({"skip_special_tokens": False, "stop_token_ids": [1], "include_stop_str_in_output": True}, "<s>", 1),
        ({"skip_special_tokens": False, "bad_words": ["<s>"], "allowed_token_ids": [0, 1, 1]}, "<u><u><u><u>", 4),
    ],
)
async def test_what_is_part_of_the_text_is_said_the_same_way_here_and_over_http(served, fields, text, num_tokens):
    body = {"prompt": TEXT, **SPECIAL, **fields}
    async with connected(served) as socket, aiohttp.ClientSession() as session:
        await socket.send_json({"type": "generate", "id": "a", **body})
        outputs, last = await results(socket, "a")
        async with session.post(f"{served[1]}/v1/completions", json=body) as response:
            answer = await response.json()
    usage = last["a"]["usage"]
    assert ("".join(one["text"] for one in outputs["a"]), usage["completion_tokens"]) == (text, num_tokens)
    assert answer["choices"][0]["text"] == text
    assert usage["prompt_tokens"] == answer["usage"]["prompt_tokens"] == 3


async def test_a_request_can_be_cancelled_alone_and_its_id_used_again(served):
    engine, _ = served
    async with connected(served) as socket:
        await socket.send_json({"type": "generate", "id": "long", "prompt": TEXT, **LONG})
        assert (await socket.receive_json(timeout=60))["type"] == "output"
        await socket.send_json({"type": "generate", "id": "short", "prompt": TEXT, **GREEDY})
        await socket.send_json({"type": "cancel", "id": "long"})
        _, last = await results(socket, "long", "short")
        assert last["long"] == {"type": "cancelled", "id": "long"}
        assert last["short"]["type"] == "done"
        await idle(engine)
        await socket.send_json({"type": "generate", "id": "long", "prompt": TEXT, **GREEDY})
        assert (await results(socket, "long"))[1]["long"]["type"] == "done"


async def test_log_probabilities_of_prompts_come_before_their_outputs_in_messages_that_are_small(served, monkeypatch):
    monkeypatch.setattr(prompt_answers, "TOKENS_AT_A_TIME", 3)
    engine, url = served
    prompts = [engine.encode(TEXT)[:10], [5, 6, 7]]
    async with connected(served) as socket:
        asked = {"prompt": prompts, "prompt_logprobs": 1, "n": 2}
        await socket.send_json({"type": "generate", "id": "a", **asked, **GREEDY})
        await socket.send_json({"type": "generate", "id": "b", "prompt": TEXT, **GREEDY})
        messages = (await results(socket, "a", "b"))[0]
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=asked) as response:
        choices = (await response.json())["choices"]
    for at, prompt in enumerate(prompts):
        mine = [one for one in messages["a"] if one["index"] // 2 == at]
        parts = [one["prompt_logprobs"] for one in mine if one["type"] == "prompt"]
        assert len(parts) == -(-len(prompt) // 3)
        assert {one["type"] for one in mine[: len(parts)]} == {"prompt"}
        assert [one["type"] for one in mine[len(parts) :]].count("prompt") == 0
        found = [entries and set(entries) for part in parts for entries in part]
        assert found == [entries and set(entries) for entries in choices[2 * at]["prompt_logprobs"]]
    assert {one["type"] for one in messages["b"]} == {"output"}


async def test_a_request_can_be_cancelled_before_it_began(served):
    engine, _ = served
    async with connected(served) as socket:
        for _ in range(20):
            await socket.send_json({"type": "generate", "id": "a", "prompt": TEXT, **LONG})
            await socket.send_json({"type": "cancel", "id": "a"})
            assert (await results(socket, "a"))[1]["a"]["type"] == "cancelled"
    await idle(engine)


async def test_a_connection_that_ends_cancels_what_runs_on_it(served):
    engine, _ = served
    async with connected(served) as socket:
        for name in "abc":
            await socket.send_json({"type": "generate", "id": name, "prompt": TEXT, **LONG})
        await socket.receive_json(timeout=60)
    await idle(engine)


BAD = [
    ("{nonsense", None, "not valid JSON"),
    ("[1]", None, "the body is an array; it must be a JSON object"),
    ('{"type": "generate", "prompt": "a"}', None, "id is null; it must be a string of 1 to 256 characters"),
    ('{"type": "generate", "id": "", "prompt": "a"}', None, "id is 0 characters long"),
    ('{"type": "jump", "id": "x"}', "x", 'type is \'jump\'; it must be "generate" or "cancel"'),
    ('{"type": "generate", "id": "x"}', "x", "prompt is null"),
    ('{"type": "generate", "id": "x", "prompt": "a", "stream": true}', "x", "stream is not a field"),
    ('{"type": "generate", "id": "x", "prompt": "a", "model": "other"}', "x", "model 'other' is not served"),
    ('{"type": "generate", "id": "x", "prompt": [9999]}', "x", "token id 9999"),
    ('{"type": "generate", "id": "x", "messages": []}', "x", "messages is missing or empty"),
]


async def test_what_cannot_be_served_is_an_error_under_its_id_and_nothing_else_suffers(served):
    async with connected(served) as socket:
        for text, name, complaint in BAD:
            await socket.send_str(text)
            message = await socket.receive_json(timeout=60)
            assert (message["type"], message["id"]) == ("error", name)
            assert complaint in message["error"]["message"]
            assert message["error"]["type"] == "invalid_request_error"
        await socket.send_bytes(b"\x00")
        assert "binary frame" in (await socket.receive_json(timeout=60))["error"]["message"]
        await socket.send_json({"type": "cancel", "id": "nobody"})
        await socket.send_json({"type": "generate", "id": "ok", "prompt": TEXT, **GREEDY})
        assert (await results(socket, "ok"))[1]["ok"]["type"] == "done"


async def test_an_id_in_use_and_too_many_requests_are_refused(served, monkeypatch):
    monkeypatch.setattr(websocket, "MAX_REQUESTS", 2)
    engine, _ = served
    async with connected(served) as socket:
        for name in ("a", "a", "b", "c"):
            await socket.send_json({"type": "generate", "id": name, "prompt": TEXT, **LONG})
        refused = []
        while len(refused) < 2:
            message = await socket.receive_json(timeout=60)
            if message["type"] == "error":
                refused.append((message["id"], message.get("refers_to"), message["error"]["message"]))
        assert refused[0] == (None, "a", "id 'a' is in use on this connection")
        assert refused[1][:2] == ("c", None)
        assert "2 requests run on this connection already" in refused[1][2]
    await idle(engine)


async def test_an_error_about_an_id_that_runs_is_not_the_end_of_its_request(served):
    messages = [
        {"type": "generate", "id": "a", "prompt": TEXT, **GREEDY},
        {"type": "generate", "id": "a"},
        {"type": "jump", "id": "a"},
        {"type": "generate", "id": "a", "prompt": [[[]]], "temperature": "hot"},
    ]
    async with connected(served) as socket:
        await socket.send_json({"type": "generate", "id": "a", "prompt": TEXT, **GREEDY})
        for message in messages:
            await socket.send_json(message)
        ends, marked = [], []
        while not ends:
            message = await socket.receive_json(timeout=60)
            (ends if message["type"] in ("done", "error") and message["id"] == "a" else marked).append(message)
        assert ends[0]["type"] == "done"
        marked = [one for one in marked if one["type"] == "error"]
        assert [(one["id"], one["refers_to"]) for one in marked] == [(None, "a")] * len(messages)
        assert [one["error"]["code"] for one in marked] == ["id_in_use", "id_in_use", 400, "id_in_use"]


async def test_the_protocol_in_the_docstring_is_json():
    examples = [line.strip() for line in websocket.__doc__.splitlines() if line.strip().startswith('{"type": "cancel')]
    assert [json.loads(line.partition("  ")[0])["id"] for line in examples] == ["a", "a"]
