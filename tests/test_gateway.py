"""HTTP: completions, server-sent events, and a clear sentence for whatever cannot be served."""

from __future__ import annotations

import asyncio
import io
import json
import socket

import aiohttp
import pytest

from msi import ConfigError, Engine, __version__
from msi.server.gateway import Gateway
from msi.server.request_body import MAX_BODY_BYTES
from tests.conftest import TEXT
from tests.test_engine import collect, idle

JSON = {"Content-Type": "application/json"}
GREEDY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def served(tiny_model):
    """(engine, url, session)"""
    async with (
        Engine.local(model=tiny_model, transport="inproc", served_model_name="tiny", micro_batches=1) as engine,
        aiohttp.ClientSession() as session,
    ):
        gateway = Gateway(engine, host="127.0.0.1", port=0)
        url = await gateway.start()
        yield engine, url, session
        await gateway.close()
        await idle(engine)


async def post(served, body, **options):
    _, url, session = served
    options = {"json": body, **options} if body is not None else {"headers": JSON, **options}
    async with session.post(f"{url}/v1/completions", **options) as response:
        return response.status, await response.json()


async def events(served, body):
    _, url, session = served
    found = []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        async for line in response.content:
            if line.strip():
                assert line.startswith(b"data: ")
                found.append(line[6:].strip())
    assert found[-1] == b"[DONE]"
    return [json.loads(item) for item in found[:-1]]


async def test_a_completion_is_the_engines_text(served):
    expected, tokens, _ = await collect(served[0], TEXT, **GREEDY)
    status, body = await post(served, {"model": "tiny", "prompt": TEXT, **GREEDY})
    assert status == 200
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["completion_tokens"] == len(tokens)
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + len(tokens)


async def test_a_stream_is_the_same_text_in_pieces(served):
    expected, _, _ = await collect(served[0], TEXT, **GREEDY)
    chunks = await events(served, {"prompt": TEXT, "stream": True, **GREEDY})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    assert len(chunks) > 10
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_prompts_may_be_token_ids_and_stop_a_string_or_several(served):
    whole, _, _ = await collect(served[0], [5, 6, 7], **GREEDY)
    for prompt in ([5, 6, 7], [[5, 6, 7]]):
        assert (await post(served, {"prompt": prompt, **GREEDY}))[1]["choices"][0]["text"] == whole
    stop = whole[4:7]
    for given in (stop, ["never", stop]):
        choice = (await post(served, {"prompt": [5, 6, 7], "stop": given, **GREEDY}))[1]["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


async def test_the_other_endpoints(served):
    _, url, session = served
    for path, expected in {
        "/health": {"status": "ok"},
        "/ready": {"ready": True, "status": "ready"},
        "/version": {"version": __version__},
    }.items():
        async with session.get(url + path) as response:
            assert (response.status, await response.json()) == (200, expected)
    async with session.get(f"{url}/v1/models") as response:
        (model,) = (await response.json())["data"]
        assert (model["id"], model["max_model_len"]) == ("tiny", 512)
    async with session.get(f"{url}/nothing") as response:
        assert response.status == 404
        assert "there is no /nothing" in (await response.json())["error"]["message"]
    async with session.get(f"{url}/v1/completions") as response:
        assert response.status == 405
        assert (await response.json())["error"]["code"] == 405


BAD = [
    ({"data": b"{nonsense"}, "not valid JSON"),
    ({"data": b'{"prompt": "\xff\xfe"}'}, "not valid JSON"),
    ({"data": b'{"prompt": "a", "temperature": NaN}'}, "not valid JSON"),
    ({"data": b"[1, 2]"}, "the body is an array; it must be a JSON object"),
    ({"data": b""}, "not valid JSON"),
    ({"json": {}}, "prompt is null; it must be a string, or an array of token ids"),
    ({"json": {"prompt": 5}}, "prompt is a number"),
    ({"json": {"prompt": ["a", 5]}}, "prompt[1] is a number; it must be a string"),
    ({"json": {"prompt": [1, 2.5]}}, "prompt[1] is a number; it must be a token id"),
    ({"json": {"prompt": ""}}, "the prompt is empty"),
    ({"json": {"prompt": [9999]}}, "token id 9999"),
    ({"json": {"prompt": [1] * 600}}, "maximum context length is 512 tokens"),
    ({"json": {"prompt": "a", "max_tokens": 0}}, "max_tokens is 0"),
    ({"json": {"prompt": "a", "max_tokens": "many"}}, "max_tokens is 'many'"),
    ({"json": {"prompt": "a", "temperature": -1}}, "temperature is -1"),
    ({"json": {"prompt": "a", "top_p": 2}}, "top_p is 2"),
    ({"json": {"prompt": "a", "seed": "x"}}, "seed is 'x'"),
    ({"json": {"prompt": "a", "stop": 3}}, "stop is a number"),
    ({"json": {"prompt": "a", "stop": [""]}}, "stop is"),
    ({"json": {"prompt": "a", "stream": "yes"}}, "stream is a string; it must be a boolean"),
    ({"json": {"prompt": "a", "n": 0}}, "n is 0; it must be an integer from 1 to 128"),
    ({"json": {"prompt": "a", "best_of": 2}}, "best_of must equal n"),
    ({"json": {"prompt": "a", "logit_bias": {"x": 1}}}, "logit_bias has the key 'x'"),
    ({"json": {"prompt": "a", "logit_bias": {"5": 200}}}, "logit_bias is"),
    ({"json": {"prompt": "a", "logit_bias": {"5000": 1}}}, "token id 5000 in logit_bias"),
    ({"json": {"prompt": "a", "stop_token_ids": 3}}, "stop_token_ids is a number; it must be an array"),
    ({"json": {"prompt": "a", "logprobs": 50}}, "logprobs is 50; it must be an integer from 0 to 20"),
    ({"json": {"prompt": "a", "prompt_logprobs": -1}}, "prompt_logprobs is -1; it must be an integer from 0 to 20"),
    ({"json": {"prompt": "a", "min_tokens": 99}}, "min_tokens is 99"),
    (
        {"json": {"prompt": "a", "stream_options": {"include_usage": True}}},
        'stream_options is only allowed with "stream": true',
    ),
    ({"json": {"prompt": "a", "stream": True, "stream_options": {"include_usage": 2}}}, "stream_options.include_usage"),
    ({"json": {"prompt": "a", "suffix": "b"}}, "suffix is 'b', which is not supported: text is only written after"),
]


@pytest.mark.parametrize(("options", "complaint"), BAD, ids=[complaint for _, complaint in BAD])
async def test_bad_requests_are_answered_with_a_sentence(served, options, complaint):
    status, body = await post(served, None, **options)
    assert status == 400
    assert complaint in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"
    assert (await post(served, {"prompt": [5], "max_tokens": 1}))[0] == 200, "nothing is lost"


async def test_another_model_is_not_found(served):
    status, body = await post(served, {"prompt": "a", "model": "other"})
    assert (status, body["error"]["code"]) == (404, 404)
    assert body["error"]["message"] == "model 'other' is not served here; this is 'tiny'"


async def test_a_bad_request_that_wanted_a_stream_is_an_http_error_too(served):
    status, body = await post(served, {"prompt": [1] * 600, "stream": True})
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "context_length_exceeded", "prompt")


async def test_an_oversized_body_is_refused(served):
    status, body = await post(served, None, data=io.BytesIO(b" " * (MAX_BODY_BYTES + 1)))
    assert status == 413
    assert "larger than" in body["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_request(served, stream):
    engine, url, session = served
    body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": stream}

    async def ask():
        async with session.post(f"{url}/v1/completions", json=body) as response:
            await response.read()

    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(ask(), 0.3)
    await idle(engine)


async def test_a_port_in_use_is_said(served):
    engine, url, _ = served
    port = int(url.rpartition(":")[2])
    other = Gateway(engine, host="127.0.0.1", port=port)
    with pytest.raises(ConfigError, match=f"cannot serve HTTP on 127.0.0.1:{port}: the port is in use; choose"):
        await other.start()
    await other.close()


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "no-such-host.invalid"])
async def test_a_host_that_is_not_this_machines_is_said(served, host):
    other = Gateway(served[0], host=host, port=0)
    with pytest.raises(ConfigError, match=r"cannot serve HTTP on \S+: .*; (give .* as `host`|choose another)"):
        await other.start()
    await other.close()


async def test_the_url_is_the_one_that_is_bound(served):
    hosts = {"127.0.0.1": "http://127.0.0.1:", "localhost": "http://localhost:"}
    if has_ipv6():
        hosts["::1"] = "http://[::1]:"
    for host, start in hosts.items():
        other = Gateway(served[0], host=host, port=0)
        url = await other.start()
        assert url.startswith(start)
        assert int(url.rpartition(":")[2]) > 0
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
            assert response.status == 200
        await other.close()


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True
