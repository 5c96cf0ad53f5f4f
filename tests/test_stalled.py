"""Clients that do not read: what is made for them is bounded, by bytes and by outputs, and others get theirs."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest_asyncio

from msi.control.client_messages import InstanceStatus, Welcome
from msi.engine import Engine
from msi.server.gateway import Gateway
from msi.settings import DEMO_MODEL
from msi.text.prompts import Prompts
from msi.types import Output

TEXT = "a word " * 1200
MANY = 10_000  # outputs of 8 KB: far more than all buffers on the way hold
FEW = 50
HELD_BYTES = 256 * 1024  # of a connection in this process: the loop's bound, aiohttp's, and an event
ON_THE_WAY = 16 * 1024 * 1024  # that the kernel and the client may hold, too
NUM_REQUESTS = 40  # of a WebSocket


class Ready(Engine):
    """Makes outputs whenever somebody wants one: as many as the prompt's first token says; counts those of each."""

    def __init__(self):
        super().__init__()
        content = (DEMO_MODEL / "tokenizer.json").read_bytes()
        self._welcome = Welcome("demo", 2048, 1024, content)
        self._prompts = Prompts.of(content, 2048, 1024)
        self.made = []

    async def generate(self, prompt, params=None, *, request_id="", thinking=None, **urgency):
        mine = len(self.made)
        self.made.append(0)
        wanted = MANY if prompt[0] == 5 else FEW
        for number in range(wanted):
            self.made[mine] += 1
            yield Output("", TEXT, (5,), "length" if number == wanted - 1 else None, 1)
            await asyncio.sleep(0)

    @property
    def status(self):
        return InstanceStatus(True, "ready", "").is_ready, "ready"


@pytest_asyncio.fixture
async def served():
    """(engine, gateway, url, session)"""
    engine = Ready()
    gateway = Gateway(engine, host="127.0.0.1", port=0)
    url = await gateway.start()
    async with aiohttp.ClientSession() as session:
        yield engine, gateway, url, session
    await gateway.close()


async def settled(engine, num_requests):
    """Until nothing more is made: whoever does not read has all that it gets."""
    async with asyncio.timeout(60):
        before = None
        while len(engine.made) < num_requests or engine.made != before:
            before = list(engine.made)
            await asyncio.sleep(0.2)


def check_bounded(engine, gateway, num_connections):
    unread = sorted(connection.unread_bytes for connection in gateway._door._open)
    assert unread[-1] <= HELD_BYTES, unread
    assert sum(size > 0 for size in unread) == num_connections, "they do not read"
    assert sum(engine.made) * len(TEXT) <= num_connections * (ON_THE_WAY + HELD_BYTES)


async def read_whole(url, session):
    body = {"prompt": [6], "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        return (await response.read()).count(b"data: ")


async def test_streams_that_nobody_reads_are_not_made_and_stop_no_other(served):
    engine, gateway, url, session = served
    responses = [
        await session.post(f"{url}/v1/completions", json={"prompt": [5], "stream": True, "max_tokens": 64})
        for _ in range(4)
    ]
    await settled(engine, 4)
    check_bounded(engine, gateway, 4)
    assert await read_whole(url, session) == FEW + 1
    before = sum(engine.made)
    for _ in range(MANY // 4):
        assert await responses[0].content.readline()
    assert sum(engine.made) > before, "whoever reads again gets more"
    for response in responses:
        response.close()


async def test_a_websocket_that_nobody_reads_holds_no_more_however_many_requests_it_has(served):
    engine, gateway, url, session = served
    socket = await session.ws_connect(f"{url}/v1/stream", max_msg_size=0)
    for number in range(NUM_REQUESTS):
        await socket.send_json({"type": "generate", "id": f"r{number}", "prompt": [5], "max_tokens": 64})
    await settled(engine, NUM_REQUESTS)
    check_bounded(engine, gateway, 1)
    assert await read_whole(url, session) == FEW + 1
    before = sum(engine.made)
    for _ in range(MANY // 4):
        assert (await socket.receive_json(timeout=30))["type"] == "output"
    assert sum(engine.made) > before
    socket._response.close()


async def test_a_client_that_leaves_while_it_is_behind_ends_its_requests(served):
    engine, gateway, url, session = served
    response = await session.post(f"{url}/v1/completions", json={"prompt": [5], "stream": True})
    socket = await session.ws_connect(f"{url}/v1/stream")
    await socket.send_json({"type": "generate", "id": "a", "prompt": [5]})
    await settled(engine, 2)
    response.close()
    socket._response.close()
    async with asyncio.timeout(30):
        while len(gateway._running):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
