"""Hostile connections, bodies and pages: refused with a sentence in JSON, in bounded time, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import io
import json
import socket
from collections import Counter

import aiohttp
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from msi import ConfigError, Engine
from msi.server import door, listening, request_body
from msi.server.gateway import Gateway
from msi.server.origins import Origins
from msi.server.prepare import Preparation
from tests.conftest import TEXT
from tests.edge import gateway, with_template
from tests.everyday import mostly_slow
from tests.test_engine import idle

KEY = "secret"
AUTHORISED = {"Authorization": f"Bearer {KEY}"}
GREEDY = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG = {"max_tokens": 480, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tiny_model, tmp_path_factory):
    """(engine, url) of a gateway that asks for a key."""
    model = with_template(tiny_model, tmp_path_factory.mktemp("model"))
    async with gateway(model, api_keys=(KEY,)) as (engine, url):
        yield engine, url
        await idle(engine)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@contextlib.asynccontextmanager
async def raw(url, sent=b""):
    """A plain connection: (reader, writer)."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def answer(reader):
    """(status, headers, JSON body) of what a server says before it closes, or of one answer."""
    async with asyncio.timeout(30):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines if line}
        body = await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers, json.loads(body)


async def closed(reader, within_s=30):
    async with asyncio.timeout(within_s):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass


async def works(url):
    async with (
        aiohttp.ClientSession(headers=AUTHORISED) as session,
        session.post(f"{url}/v1/completions", json={"prompt": TEXT, **GREEDY}) as response,
    ):
        assert response.status == 200


def head(method="POST", path="/v1/completions", **headers):
    lines = {"Host": "127.0.0.1", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return f"{method} {path} HTTP/1.1\r\n".encode() + b"".join(
        f"{name}: {value}\r\n".encode() for name, value in lines.items()
    )


JSON = {"Content_Type": "application/json"}


# -- bodies ----------------------------------------------------------------------------------------------------------


async def test_a_body_without_the_key_is_refused_unread_and_the_connection_closes(served):
    bomb = gzip.compress(b" " * 50_000_000)
    headers = head(**JSON, Content_Encoding="gzip", Content_Length=str(4_000_000_000)) + b"\r\n"
    async with raw(served[1], headers + bomb) as (reader, _):
        status, said, body = await answer(reader)
        assert (status, said["connection"], said["www-authenticate"]) == (401, "close", "Bearer")
        assert "needs an API key" in body["error"]["message"]
        await closed(reader)
    await works(served[1])


REFUSED_UNREAD = [
    ({**JSON, "Content_Length": str(17 * 2**20)}, 413, "larger than"),
    ({**JSON, "Content_Length": "5", "Content_Encoding": "gzip"}, 415, "Content-Encoding is 'gzip'"),
    ({**JSON, "Content_Length": "5", "Content_Encoding": "br"}, 415, "Content-Encoding is 'br'"),
    ({"Content_Length": "5", "Content_Type": "application/x-www-form-urlencoded"}, 415, "send the header"),
    ({"Content_Length": "5", "Content_Type": "text/plain"}, 415, "send the header `Content-Type: application/json`"),
    ({"Content_Length": "5"}, 415, "send the header `Content-Type: application/json`"),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "status", "complaint"), REFUSED_UNREAD)
async def test_what_headers_tell_is_refused_before_the_body_comes(served, headers, status, complaint):
    sent = head(**headers, Authorization=f"Bearer {KEY}") + b"\r\n"
    async with raw(served[1], sent) as (reader, _):
        got, said, body = await answer(reader)
        assert (got, said["connection"]) == (status, "close")
        assert complaint in body["error"]["message"]
        await closed(reader)


async def test_who_waits_for_100_continue_sends_nothing_that_is_refused(served):
    expecting = {**JSON, "Content_Length": "20", "Expect": "100-continue"}
    async with raw(served[1], head(**expecting) + b"\r\n") as (reader, _):
        assert (await answer(reader))[0] == 401
    async with raw(served[1], head(**expecting, Authorization=f"Bearer {KEY}") + b"\r\n") as (reader, writer):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b'{"prompt": "It is" }')
        assert (await answer(reader))[0] == 200


@pytest.mark.slow
async def test_a_body_that_dribbles_or_never_ends_is_given_up(served, monkeypatch):
    monkeypatch.setattr(request_body, "PART_WITHIN_S", 0.3)
    headers = head(**JSON, Content_Length="100", Authorization=f"Bearer {KEY}") + b"\r\n"
    async with raw(served[1], headers + b"{") as (reader, _):
        status, _, body = await answer(reader)
        assert (status, "the body must come within" in body["error"]["message"]) == (408, True)
        await closed(reader)
    chunked = head(**JSON, Transfer_Encoding="chunked", Authorization=f"Bearer {KEY}") + b"\r\n"
    async with raw(served[1], chunked) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                writer.write(b"100000\r\n" + b" " * 2**20 + b"\r\n")
                await writer.drain()
        assert (await answer(reader))[0] == 413
    await works(served[1])


async def test_bodies_together_have_a_limit(served):
    bodies = request_body.Bodies(max_bytes=1000_000, max_together_bytes=100_000)
    bodies._together_bytes = 100_001
    with pytest.raises(Exception, match="bodies of other requests"):
        bodies._check_room()


@pytest.mark.parametrize("path", mostly_slow(["/v1/chat/completions", "/v1/completions"]))
@pytest.mark.slow
async def test_large_bodies_are_understood_in_another_process(served, monkeypatch, path):
    seen = []
    understand = Preparation.understand
    monkeypatch.setattr(
        Preparation, "understand", lambda self, kind, body: (seen.append(len(body)), understand(self, kind, body))[1]
    )
    large = [
        {"prompt": "a word " * 800_000},
        {"prompt": "\U0001f600" * 1_000_000},
        {"prompt": [5] * 200_000, "n": 128},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 100_000}]},
        {"prompt": [["a"]] * 100_000},
    ]
    async with aiohttp.ClientSession(headers=AUTHORISED) as session:
        for body in large:
            sent = {"data": io.BytesIO(json.dumps(body).encode()), "headers": {"Content-Type": "application/json"}}
            async with session.post(served[1] + path, **sent) as response:
                assert (response.status, "error" in await response.json()) == (400, True)
    assert not seen
    await works(served[1])
    assert len(seen) == 1


async def test_a_large_message_of_a_websocket_is_understood_in_another_process_and_order_is_kept(served, monkeypatch):
    async with aiohttp.ClientSession(headers=AUTHORISED) as session, session.ws_connect(f"{served[1]}/v1/stream") as ws:
        await ws.send_json({"type": "generate", "id": "a", "prompt": "a word " * 500_000})
        await ws.send_json({"type": "cancel", "id": "a"})
        await ws.send_json({"type": "generate", "id": "b", "prompt": "It is", "user": "u" * 100_000, **GREEDY})
        await ws.send_json({"type": "cancel", "id": "b"})
        first = await ws.receive_json(timeout=60)
        assert (first["type"], first["id"], first["error"]["code"]) == ("error", "a", "context_length_exceeded")
        last = await ws.receive_json(timeout=60)
        while last["type"] == "output":
            last = await ws.receive_json(timeout=60)
        assert (last["type"], last["id"]) == ("cancelled", "b")


# -- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_half_headers_are_not_waited_for_for_ever(served, monkeypatch):
    monkeypatch.setattr(door, "HEADERS_WITHIN_S", 0.5)
    async with contextlib.AsyncExitStack() as stack:
        readers = [(await stack.enter_async_context(raw(served[1], head())))[0] for _ in range(200)]
        await works(served[1])
        for reader in readers:
            status, _, body = await answer(reader)
            assert (status, "headers" in body["error"]["message"]) == (408, True)
            await closed(reader)


async def test_silent_connections_give_their_places_to_new_ones(tiny_model, monkeypatch):
    monkeypatch.setattr("msi.server.gateway.max_connections", lambda: 20)
    async with gateway(tiny_model, api_keys=(KEY,)) as (_, url), contextlib.AsyncExitStack() as stack:
        silent = [(await stack.enter_async_context(raw(url, head())))[0] for _ in range(60)]
        for _ in range(5):
            await works(url)
        for reader in silent[:30]:
            await closed(reader)
        async with aiohttp.ClientSession(headers=AUTHORISED) as session, session.get(f"{url}/metrics") as response:
            assert "msi_connections_refused_total 4" in await response.text()


@pytest.mark.slow
async def test_a_reader_that_never_reads_is_cut_and_its_request_cancelled(served, monkeypatch):
    monkeypatch.setattr(door, "UNREAD_S", 1.0)
    engine, url = served
    body = json.dumps({"prompt": TEXT, **LONG, "n": 24, "logprobs": 20, "stream": True}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(head(**JSON, Content_Length=str(len(body)), Authorization=f"Bearer {KEY}") + b"\r\n" + body)
        async with asyncio.timeout(20):
            while not (await engine.stats()).num_requests:  # noqa: ASYNC110 - it may be understood late
                await asyncio.sleep(0.01)
        await works(url)
        await idle(engine)
        sock.settimeout(10)  # this is the gateway's thread
        read = b""
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(65536):
                read = read[-100:] + part
        assert b"[DONE]" not in read


NO_HTTP = [
           b"\x16\x03\x01\x02\x00\x01\x00\x01", b"hello\r\n\r\n",
           b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n",
           head("GET", "/health") + b"no colon\r\n\r\n", head("GET", "/" + "a" * 20_000) + b"\r\n",
           head("GET", "/health", X="b" * 20_000) + b"\r\n",
           head("GET", "/health") + b"".join(b"X%d: 1\r\n" % i for i in range(300)) + b"\r\n",
           head(**JSON, Content_Length="-1") + b"\r\n", head(**JSON, Content_Length="1e3") + b"\r\n",
           head(**JSON, Transfer_Encoding="chunked", Authorization=f"Bearer {KEY}") + b"\r\nZZZ\r\n"]  # fmt: skip


@pytest.mark.parametrize("sent", NO_HTTP, ids=range(len(NO_HTTP)))
async def test_what_is_no_http_is_an_error_in_json(served, sent):
    async with raw(served[1], sent) as (reader, _):
        status, _, body = await answer(reader)
        assert status == 400
        assert body["error"]["type"] == "invalid_request_error"
        assert "Traceback" not in body["error"]["message"]
        await closed(reader)


PIECES = [
    b"GET ", b"POST ", b"/v1/completions", b" HTTP/1.1\r\n", b"\r\n", b"Host: a\r\n", b"\r", b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Upgrade: websocket\r\n", b"Connection: upgrade\r\n", b"\x00", b"\xff" * 9,
    b"3\r\nabc\r\n", b"0\r\n\r\n", b"{}", b"Content-Type: application/json\r\n", b"Expect: 100-continue\r\n",
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14))
async def test_no_bytes_at_all_make_a_server_error(served, pieces):
    async with raw(served[1], b"".join(pieces)) as (reader, writer):
        writer.write_eof()
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(0.3):
                said = await reader.read(65536)
                assert b" 500 " not in said
                assert not said.startswith(b"HTTP/1.1 5")


async def test_paths_and_methods_that_are_not_there_are_named(served):
    async with aiohttp.ClientSession(headers=AUTHORISED) as session:
        for method, path, status in [
            ("GET", "/nothing", 404), ("DELETE", "/v1/completions", 405), ("GET", "/v1/completions", 405),
            ("POST", "/health", 405), ("PATCH", "/v1/stream", 405), ("GET", "/v1/stream", 426),
        ]:  # fmt: skip
            async with session.request(method, served[1] + path) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (status, status)
        async with session.head(f"{served[1]}/health") as response:
            assert response.status == 200


# -- pages -----------------------------------------------------------------------------------------------------------

PAGES = [
    ({"Host": "127.0.0.1:8000"}, (), ""),
    ({"Host": "localhost"}, (), ""),
    ({"Host": "[::1]:8000"}, (), ""),
    ({"Host": "a.localhost:1"}, (), ""),
    ({}, (), ""),
    ({"Host": "evil.example:8000"}, (), "the Host header names 'evil.example:8000'"),
    ({"Host": "127.0.0.1.evil.example"}, (), "the Host header names"),
    ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, (), "the Host header names"),
    ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, (), ""),
    ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:9000"}, (), "web pages from 'http://127.0.0.1:9000'"),
    ({"Host": "127.0.0.1:8000", "Origin": "https://evil.example"}, (), "web pages from 'https://evil.example'"),
    ({"Host": "127.0.0.1:8000", "Origin": "null"}, (), "web pages from 'null'"),
    ({"Origin": "null"}, (), "web pages from 'null'"),
    ({"Host": "127.0.0.1", "Origin": "https://chat.example"}, ("https://chat.example",), ""),
    ({"Host": "chat.example", "Origin": "https://chat.example"}, ("https://chat.example",), ""),
    ({"Host": "127.0.0.1", "Origin": "https://chat.example.evil"}, ("https://chat.example",), "web pages from"),
    ({"Host": "evil.example", "Origin": "https://evil.example"}, ("*",), ""),
]


@pytest.mark.parametrize(("headers", "allowed", "complaint"), PAGES)
async def test_pages_of_other_origins_and_names_that_only_point_here_are_refused(headers, allowed, complaint):
    refusal = Origins(allowed).refusal(headers)
    assert refusal.startswith(complaint)
    assert bool(refusal) == bool(complaint)


async def test_a_network_address_or_a_key_needs_no_known_host_name():
    for origins in (Origins(host="0.0.0.0"), Origins(host="10.0.0.5"), Origins(has_key=True)):
        assert not origins.refusal({"Host": "llm.example"})
        assert origins.refusal({"Host": "llm.example", "Origin": "https://evil.example"})
    with pytest.raises(ConfigError, match=r"`allowed_origins` 'chat.example' is not one"):
        Origins(("chat.example",))


async def test_a_page_that_is_allowed_can_read_and_another_cannot(tiny_model):
    page = "https://chat.example"
    async with (
        gateway(tiny_model, allowed_origins=(page,)) as (_, url),
        aiohttp.ClientSession() as session,
    ):
        sdk = "authorization,content-type,x-stainless-os"
        asked = {"Origin": page, "Access-Control-Request-Headers": sdk}
        async with session.options(f"{url}/v1/completions", headers=asked) as response:
            assert response.headers["Access-Control-Allow-Headers"] == sdk
        async with session.options(f"{url}/v1/completions", headers={"Origin": page}) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (204, page)
            assert "Content-Type" in response.headers["Access-Control-Allow-Headers"]
        for path, given, status in [("/v1/models", page, 200), ("/v1/models", "https://evil.example", 403)]:
            async with session.get(url + path, headers={"Origin": given}) as response:
                assert response.status == status
                assert response.headers.get("Access-Control-Allow-Origin") == (page if status == 200 else None)
                assert ("X-Request-Id" in response.headers.get("Access-Control-Expose-Headers", "")) == (status == 200)
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await session.ws_connect(f"{url}/v1/stream", headers={"Origin": "https://evil.example"})


# -- failures that nobody foresaw ------------------------------------------------------------------------------------


async def test_a_bug_of_ours_is_an_error_object_everywhere_and_ends_one_request(served, monkeypatch):
    engine, url = served
    generate = engine.generate

    async def broken(prompt, params=None, **context):
        count = 0
        async for output in generate(prompt, params, **context):
            count += 1
            if params.seed == 13 and count > params.top_k:
                raise RuntimeError("a bug with a /secret/path")
            yield output

    monkeypatch.setattr(engine, "generate", broken)
    body = {"prompt": TEXT, **GREEDY, "seed": 13}
    async with aiohttp.ClientSession(headers=AUTHORISED) as session:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            said = await response.json()
        assert (response.status, said["error"]["type"]) == (500, "server_error")
        assert "secret" not in said["error"]["message"]
        async with session.post(f"{url}/v1/completions", json={**body, "top_k": 2, "stream": True}) as response:
            events = [line[6:] for line in (await response.read()).split(b"\n\n") if line]
        assert events[-1] == b"[DONE]"
        assert json.loads(events[-2])["error"]["code"] == 500
        async with session.ws_connect(f"{url}/v1/stream") as socket:
            await socket.send_json({"type": "generate", "id": "good", "prompt": TEXT, **GREEDY})
            for _ in range(2):  # the id is free again
                await socket.send_json({"type": "generate", "id": "bad", **body})
                last = await socket.receive_json(timeout=60)
                while last["id"] != "bad":
                    assert last["type"] in ("output", "done")
                    last = await socket.receive_json(timeout=60)
                assert (last["type"], last["error"]["code"]) == ("error", 500)
            await socket.send_json({"type": "generate", "id": "later", "prompt": TEXT, **GREEDY})
            while (last := await socket.receive_json(timeout=60))["id"] != "later" or last["type"] == "output":
                pass
            assert last["type"] == "done"


# -- old clients -----------------------------------------------------------------------------------------------------


async def test_a_client_of_http_1_0_is_streamed_the_same_events_without_chunks(served):
    body = json.dumps({"prompt": TEXT, "stream": True, **GREEDY}).encode()
    head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    head += f"Authorization: Bearer {KEY}\r\nX-Request-Id: same\r\nConnection: close\r\n\r\n"
    texts = []
    for version in ("1.0", "1.1"):
        async with raw(served[1], f"POST /v1/completions HTTP/{version}\r\n{head}".encode() + body) as (reader, _):
            answer = await asyncio.wait_for(reader.read(), 60)
        start, _, events = answer.partition(b"\r\n\r\n")
        assert (b"chunked" in start) is (version == "1.1")
        if version == "1.1":
            sizes_and_parts = events.split(b"\r\n")
            sizes, parts = sizes_and_parts[:-1:2], sizes_and_parts[1:-1:2]
            assert [int(size, 16) for size in sizes] == [len(part) for part in parts]
            events = b"".join(parts)
        assert events.startswith(b"data: {")
        assert events.endswith(b"data: [DONE]\n\n")
        texts.append([json.loads(one[6:])["choices"] for one in events.split(b"\n\n")[:-2]])
    assert texts[0] == texts[1]
    assert len(texts[0]) == GREEDY["max_tokens"]


# -- the end ---------------------------------------------------------------------------------------------------------


async def test_at_the_end_what_runs_is_given_time_and_then_told(tiny_model):
    fixed = {"model": tiny_model, "transport": "inproc", "served_model_name": "tiny", "micro_batches": 1}
    async with Engine.local(**fixed) as engine, aiohttp.ClientSession() as session:
        ours = Gateway(engine, host="127.0.0.1", port=0)
        url = await ours.start()
        body = {"prompt": TEXT, **LONG, "n": 8}
        stream = await session.post(f"{url}/v1/completions", json={**body, "stream": True})
        await stream.content.readline()
        plain = asyncio.ensure_future(session.post(f"{url}/v1/completions", json=body))
        short = asyncio.ensure_future(session.post(f"{url}/v1/completions", json={"prompt": TEXT, "max_tokens": 1}))
        socket = await session.ws_connect(f"{url}/v1/stream")
        await socket.send_json({"type": "generate", "id": "a", **body})
        await socket.receive_json(timeout=60)
        ending = asyncio.ensure_future(ours.close(grace_s=0.2))
        events = [line[6:] for line in (await stream.read()).split(b"\n\n") if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]"
        assert "shut down" in json.loads(events[-2])["error"]["message"]
        response = await plain
        assert (response.status, "shut down" in (await response.json())["error"]["message"]) == (503, True)
        assert (await short).status == 200
        said = await socket.receive_json(timeout=60)
        while said["type"] == "output":
            said = await socket.receive_json(timeout=60)
        assert (said["type"], said["id"], "shut down" in said["error"]["message"]) == ("error", "a", True)
        assert (await socket.receive(timeout=60)).data == 1001
        await ending
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{url}/health")
        await idle(engine)


async def test_at_the_end_connections_without_a_request_are_not_waited_for(tiny_model, monkeypatch):
    monkeypatch.setattr("msi.server.gateway.ENDS_WITHIN_S", 600.0)
    connector = aiohttp.TCPConnector(keepalive_timeout=600)
    async with aiohttp.ClientSession(connector=connector) as session, gateway(tiny_model) as (_, url):
        for _ in range(3):
            async with session.get(f"{url}/v1/models") as response:
                assert response.status == 200


@pytest.mark.parametrize("path", mostly_slow(["/v1/chat/completions", "/v1/completions"]))
@pytest.mark.slow
async def test_a_large_answer_is_what_its_stream_says(served, path):
    body = {"max_tokens": 100, "n": 8, "seed": 3, "ignore_eos": True}
    if "chat" in path:
        body |= {"messages": [{"role": "user", "content": "It is"}], "logprobs": True, "top_logprobs": 20}
    else:
        body |= {"prompt": "It is", "logprobs": 20, "echo": False}
    async with aiohttp.ClientSession(headers=AUTHORISED) as session:
        async with session.post(served[1] + path, json=body) as response:
            raw_body = await response.read()
            assert int(response.headers["Content-Length"]) == len(raw_body) > 256 * 1024
            whole = json.loads(raw_body)
        async with session.post(served[1] + path, json={**body, "stream": True}) as response:
            events = [json.loads(line[6:]) for line in (await response.read()).split(b"\n\n")[:-2]]
    texts, logprobs = {}, {}
    for choice in (choice for event in events for choice in event["choices"]):
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + text
        for name, items in (choice["logprobs"] or {}).items():
            logprobs.setdefault(choice["index"], {}).setdefault(name, []).extend(items)
    assert [choice["index"] for choice in whole["choices"]] == list(range(8))
    for choice in whole["choices"]:
        index = choice["index"]
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) == texts[index]
        assert choice["logprobs"].keys() == logprobs[index].keys()
        for name, items in choice["logprobs"].items():
            assert len(items) == len(logprobs[index][name]) == 100
        tokens = choice["logprobs"].get("tokens") or [one["token"] for one in choice["logprobs"]["content"]]
        assert "".join(tokens) == texts[index]
        assert choice["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 800


async def test_a_flood_comes_in_a_few_at_a_time_and_the_others_are_served_between(monkeypatch):
    """Every turn of the loop has few of them, however many knock; and closing the entrance ends it."""
    loop = asyncio.get_running_loop()
    (listener,) = listening.listen("127.0.0.1", 0)
    came, turns = [], 0

    class Guest(asyncio.Protocol):
        def connection_made(self, transport):
            came.append(turns)
            transport.abort()

    def turn():
        nonlocal turns
        turns += 1
        if not listener._closed:
            loop.call_soon(turn)

    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(listener.getsockname(), timeout=5))
        entrance = listening.Entrance([listener], Guest)
        turn()
        async with asyncio.timeout(20):
            while len(came) < 300:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        entrance.close()
    assert max(Counter(came).values()) <= listening.TAKEN_AT_ONCE


async def test_without_descriptors_connections_wait_instead_of_spinning(monkeypatch):
    monkeypatch.setattr(listening, "AGAIN_AFTER_S", 0.05)
    tries = 0

    class Poor(socket.socket):
        def accept(self):
            nonlocal tries
            tries += 1
            if tries < 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    listener = Poor()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    came = asyncio.Event()

    class Guest(asyncio.Protocol):
        def connection_made(self, transport):
            came.set()
            transport.abort()

    entrance = listening.Entrance([listener], Guest)
    with socket.create_connection(listener.getsockname(), timeout=5):
        await asyncio.wait_for(came.wait(), 10)
    entrance.close()
    assert tries <= 4
