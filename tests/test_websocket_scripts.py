"""Whatever a WebSocket client sends in whatever order, each of its messages is answered once, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import aiohttp
import pytest
import pytest_asyncio

from tests.edge import gateway, with_template
from tests.everyday import mostly_slow, thorough
from tests.test_engine import idle

pytestmark = pytest.mark.asyncio(loop_scope="module")
NUM_MESSAGES = 60
IDS = ["a", "b", "c", "null", "0", "é" * 9]
USER = {"role": "user", "content": "It is"}
ASKED = [  # of a message under an id: it is answered by an end, or by an error about the id that is in use
    {"prompt": "It is", "max_tokens": 1},
    {"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 3, "prompt_logprobs": 1},
    {"prompt": "It is", "max_tokens": 200, "ignore_eos": True},
    {"messages": [USER], "max_tokens": 200, "ignore_eos": True, "logprobs": True},
    {"messages": [USER], "max_tokens": 40, "structured_outputs": {"regex": "[a-z]{3}"}},
    {"prompt": "It is", "max_tokens": -1},
    {"prompt": "It is", "guided_regex": "("},
    {"prompt": [10**9]},
    {"messages": [USER], "tool_choice": "required"},
    {"type": "jump"},
    {"type": None},
    {"prompt": "It is", "stream": True},
    {},
]
UNNAMED = ["", "{", "[]", "5", '{"type": "generate", "prompt": "a"}', '{"id": 5}', '{"id": ""}', "{}", '"a"', "\x00"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_model, tmp_path_factory):
    async with gateway(with_template(tiny_model, tmp_path_factory.mktemp("model"))) as (engine, url):
        yield engine, url
        await idle(engine)


async def send(socket, chance, sent):
    """One message; counts what has to be answered, by id."""
    kind, name = chance.random(), chance.choice(IDS)
    if kind < 0.6:
        await socket.send_json({"type": "generate", "id": name, **chance.choice(ASKED)})
        sent[name] += 1
    elif kind < 0.85:
        await socket.send_json({"type": "cancel", "id": name})
    elif kind < 0.95:
        await socket.send_str(chance.choice(UNNAMED))
        sent[None] += 1
    else:
        await socket.send_bytes(b"\xff\x00")
        sent[None] += 1


def check(message, ended):
    """Counts what ends something, or is an error about it."""
    if message["type"] in ("output", "prompt"):
        return
    assert message["type"] in ("done", "cancelled", "error")
    if message["type"] == "error":
        assert set(message["error"]) == {"message", "type", "param", "code"}
        assert message["error"]["type"] == "invalid_request_error"
    name = message.get("refers_to", message["id"])
    assert name is None or name in IDS
    ended[name] += 1


@pytest.mark.parametrize("seed", [*mostly_slow(range(4)), *map(thorough, range(4, 10))])
async def test_each_message_is_answered_once(served, seed):
    engine, url = served
    chance = random.Random(seed)
    sent, ended = Counter(), Counter()
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/v1/stream") as socket:

        async def read():
            while sum(ended.values()) < sum(sent.values()) or not is_all_sent:
                check(json.loads((await socket.receive(timeout=60)).data), ended)

        is_all_sent = False
        reading = asyncio.ensure_future(read())
        for _ in range(NUM_MESSAGES):
            await send(socket, chance, sent)
            if chance.random() < 0.3:
                await asyncio.sleep(0.01 * chance.random())
        is_all_sent = True
        sent[None] += 1
        await socket.send_str("the last")
        await asyncio.wait_for(reading, 60)
        assert ended == sent
        for name in IDS:
            await socket.send_json({"type": "generate", "id": name, "prompt": "a", "max_tokens": 1})
        left = set(IDS)
        while left:
            message = await socket.receive_json(timeout=60)
            assert message["type"] in ("output", "done"), message
            if message["type"] == "done":
                left.remove(message["id"])
    await idle(engine)


@pytest.mark.parametrize("seed", [*mostly_slow(range(2)), *map(thorough, (2, 3))])
async def test_clients_that_leave_in_the_middle_leave_nothing(served, seed):
    engine, url = served
    chance = random.Random(seed)
    async with aiohttp.ClientSession() as session:
        for _ in range(8):
            async with session.ws_connect(f"{url}/v1/stream") as socket:
                for _ in range(chance.randrange(12)):
                    await send(socket, chance, Counter())
                if chance.random() < 0.5:
                    await asyncio.sleep(0.02 * chance.random())
                if chance.random() < 0.5:
                    socket._response.connection.transport.abort()  # no farewell
    await idle(engine)
