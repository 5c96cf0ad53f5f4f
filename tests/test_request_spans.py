"""OpenTelemetry spans: one trace through gateway, coordinator and attention worker; nothing where they are off."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import aiohttp
import pytest
from aiohttp import web

from msi import ConfigError
from msi.request_spans import open_spans
from tests.conftest import TEXT
from tests.edge import gateway
from tests.test_engine import idle

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: pip install 'msi[otel]'")


@contextlib.asynccontextmanager
async def collector():
    """(endpoint, spans by process): takes what OTLP sends."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    found = []

    async def take(request):
        sent = ExportTraceServiceRequest.FromString(await request.read())
        for resource in sent.resource_spans:
            (process,) = [
                one.value.string_value for one in resource.resource.attributes if one.key == "service.instance.id"
            ]
            found.extend((process, span) for scope in resource.scope_spans for span in scope.spans)
        return web.Response()

    server = web.Server(take)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/traces", found
    finally:
        listening.close()
        await server.shutdown(1)


async def test_a_request_is_one_trace_through_all_its_processes(tiny_model):
    asked = {"prompt": TEXT, "max_tokens": 5, "ignore_eos": True}
    async with collector() as (endpoint, found):
        spans = await asyncio.to_thread(open_spans, endpoint, "gateway")
        async with (
            gateway(tiny_model, {"otlp_traces_endpoint": endpoint}, spans=spans) as (engine, url),
            aiohttp.ClientSession() as session,
        ):
            for body, headers in ((asked, {"traceparent": PARENT}), ({**asked, "n": 2}, {"traceparent": "nonsense"})):
                async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
                    assert response.status == 200
            endless = {**asked, "max_tokens": 400, "stream": True}
            async with session.post(f"{url}/v1/completions", json=endless) as response:
                await response.content.readline()
            await idle(engine)
            async with asyncio.timeout(30):
                while len(spans):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    traces = {}
    for process, span in found:
        traces.setdefault(span.trace_id.hex(), []).append((process, span))
    assert len(traces) == 3, "one for each request"
    ours = dict(traces.pop(TRACE))
    assert ours.keys() == {"gateway", "coordinator", "attention-0"}
    above = bytes.fromhex(PARENT.split("-")[2])
    for process in ("gateway", "coordinator", "attention-0"):
        assert ours[process].parent_span_id == above
        assert ours[process].start_time_unix_nano <= ours[process].end_time_unix_nano
        above = ours[process].span_id
    assert [event.name for event in ours["attention-0"].events] == ["admitted", "first token"]
    told = {one.key: one.value for one in ours["gateway"].attributes}
    assert told["gen_ai.usage.completion_tokens"].int_value == 5
    assert told["gen_ai.latency.time_to_first_token"].double_value > 0
    by_number = sorted(traces.values(), key=len)
    assert [len(one) for one in by_number] == [3, 5], "two choices are two requests of the instance"
    left = dict(by_number[0])
    assert all(span.status.code == 2 for span in left.values()), "it was cancelled"
    assert {span.status.code for _, span in by_number[1]} == {0}


@pytest.mark.slow
async def test_a_collector_that_is_not_there_changes_no_answer_and_ends_in_time(tiny_model):
    async with collector() as (endpoint, _):
        pass
    spans = await asyncio.to_thread(open_spans, endpoint, "gateway")
    async with (
        gateway(tiny_model, {"otlp_traces_endpoint": endpoint}, spans=spans) as (_, url),
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json={"prompt": TEXT, "max_tokens": 5}) as response,
    ):
        assert response.status == 200


def test_off_nothing_is_imported_or_made():
    assert open_spans("", "gateway") is None


def test_without_the_library_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(
        ConfigError, match=r"needs OpenTelemetry, which is not installed here: pip install 'msi\[otel\]'"
    ):
        open_spans("http://127.0.0.1:4318/v1/traces", "gateway")
