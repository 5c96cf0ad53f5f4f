"""The page without a browser: what /v1/events tells, who may listen, and that nobody listening costs nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re

import aiohttp
import pytest

from msi.server import events as events_module
from msi.server.event_values import Hello, Link, Load, Numbers, Percentiles, WorkerNow
from msi.server.page import FOLDER, POLICY, Page
from msi.server.pingpong import ExpertRows, Held, Pingpong, Row
from tests.conftest import TEXT
from tests.edge import gateway
from tests.test_engine import idle

BODY = {"prompt": TEXT, "max_tokens": 200, "ignore_eos": True}
KEY = {"Authorization": "Bearer secret"}


async def told(response):
    """(kind, value) of each event."""
    kind = ""
    async for line in response.content:
        if line.startswith(b"event: "):
            kind = line[7:].strip().decode()
        elif line.startswith(b"data: "):
            yield kind, json.loads(line[6:])


@contextlib.asynccontextmanager
async def listening(session, url, **options):
    async with session.get(f"{url}/v1/events", **options) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        yield response


@contextlib.asynccontextmanager
async def load(session, url):
    """Requests, one after the other."""

    async def ask():
        while True:
            async with session.post(f"{url}/v1/completions", json=BODY, headers=KEY) as response:
                assert response.status == 200
                await response.read()

    asking = asyncio.ensure_future(ask())
    try:
        yield
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def until(response, *wanted):
    """The first event of which each condition says that it will do, by kind."""
    found = {}
    async with asyncio.timeout(60):
        async for kind, value in told(response):
            for of, condition in wanted:
                if kind == of and of not in found and condition(value):
                    found[of] = value
            if len(found) == len(wanted):
                return found
    raise AssertionError(f"the stream ended with {list(found)}")


def has_everything(numbers):
    load, ways = numbers["load"], [link["way"] for link in numbers["links"]]
    return load["tokens_per_s"] and load["per_token"]["count"] and any(ways)


def has_fields(value, kind):
    return value.keys() == {field.name for field in dataclasses.fields(kind)}


async def test_a_listener_is_told_numbers_spans_and_rows_of_experts(tiny_model):
    async with gateway(tiny_model, {"micro_batches": 2}) as (engine, url), aiohttp.ClientSession() as session:
        async with listening(session, url) as response, load(session, url):
            found = await until(
                response,
                ("hello", bool),
                ("numbers", has_everything),
                ("pingpong", lambda one: len(one["rows"]) == 2 and all(row["bars"] for row in one["rows"])),
                ("experts", bool),
            )
        await idle(engine)
    hello, numbers, pingpong, experts = (found[kind] for kind in ("hello", "numbers", "pingpong", "experts"))
    assert has_fields(hello, Hello)
    assert (hello["model"], hello["has_chat"], hello["needs_key"]) == ("tiny", False, False)
    assert has_fields(numbers, Numbers)
    assert (numbers["is_ready"], numbers["sentence"], numbers["num_lanes"]) == (True, "ready", 2)
    assert numbers["drift"] is None
    assert has_fields(numbers["load"], Load)
    assert has_fields(numbers["load"]["first_token"], Percentiles)
    assert 0 < numbers["load"]["per_token"]["p50_s"] <= numbers["load"]["per_token"]["p99_s"]
    assert [one["worker_id"] for one in numbers["workers"]] == ["attention-0", "expert-0"]
    for one in numbers["workers"]:
        assert has_fields(one, WorkerNow)
        assert (one["state"], one["reason"]) == ("ready", "")
    (link,) = numbers["links"]
    assert has_fields(link, Link)
    assert (link["worker_id"], link["peer"], link["way"]) == ("attention-0", "expert-0", "in this process")
    assert has_fields(pingpong, Pingpong)
    assert 0 < pingpong["until_us"] <= 400_000
    for row, role in zip(pingpong["rows"], ("attention", "expert"), strict=True):
        assert has_fields(row, Row)
        assert row["role"] == role
        assert 0 < row["busy"] <= 1
        for name, lane, start_us, duration_us in row["bars"]:
            assert pingpong["names"][name] in ("attention", "sample", "experts")
            assert lane in (0, 1)
            assert start_us < pingpong["until_us"]
            assert start_us + duration_us > 0
    assert all(pingpong["names"][bar[0]] == "expert-0" for bar in pingpong["rows"][0]["away"])
    assert has_fields(experts, ExpertRows)
    assert sum(map(sum, experts["rows"])) == sum(one["rows"] for one in experts["workers"]) > 0
    assert [set(one) for one in experts["workers"]] == [{field.name for field in dataclasses.fields(Held)}]


async def test_workers_keep_spans_only_while_somebody_listens(tiny_model, monkeypatch):
    monkeypatch.setattr("msi.control.membership.WATCHED_FOR_S", 1.0)
    async with gateway(tiny_model) as (engine, url), aiohttp.ClientSession() as session:
        workers = engine._instance.workers

        def are_watched():
            life = [one.life for one in workers if one.life is not None and one.life.attention is not None]
            watches = [one.attention.links.link.turns.exchange_watch for one in life]
            return {one._watching.spans is not None for one in workers} | {watch is not None for watch in watches}

        async def wait_for(expected):
            async with asyncio.timeout(30):
                while are_watched() != {expected}:  # noqa: ASYNC110  # heartbeats bring it
                    await asyncio.sleep(0.05)

        assert are_watched() == {False}
        await engine.stats()
        assert are_watched() == {False}
        async with listening(session, url) as response:
            await until(response, ("pingpong", bool))
            await wait_for(True)
        await wait_for(False)
        assert all(one.status.watched is None for one in (await engine.stats()).workers)


async def test_who_reads_slowly_is_skipped_forward_and_the_others_are_not_kept(tiny_model, monkeypatch):
    monkeypatch.setattr(events_module, "EVERY_S", 0.01)
    async with (
        gateway(tiny_model) as (_, url),
        aiohttp.ClientSession(read_bufsize=1024) as session,
        listening(session, url) as slow,
        listening(session, url) as quick,
    ):
        assert (await until(slow, ("numbers", bool)))["numbers"]["sentence"] == "ready"  # and it reads no more
        count = 0
        async with asyncio.timeout(60):
            async for _ in told(quick):
                count += 1
                if count == 30:
                    break


async def test_events_need_the_key_and_the_page_does_not(tiny_model):
    async with gateway(tiny_model, api_keys=("secret",)) as (_, url), aiohttp.ClientSession() as session:
        for headers, status in (({}, 401), ({"Authorization": "Bearer other"}, 401)):
            async with session.get(f"{url}/v1/events", headers=headers) as response:
                assert response.status == status
        async with listening(session, url, headers=KEY) as response:
            assert (await until(response, ("hello", bool)))["hello"]["needs_key"] is True
        for path in Page().paths:
            async with session.get(url + path) as response:
                assert response.status == 200
                assert response.headers["Content-Security-Policy"] == POLICY
                assert response.headers["X-Content-Type-Options"] == "nosniff"
                assert b"tiny" not in await response.read(), "it holds nothing of the instance"


async def test_without_the_page_there_is_neither_it_nor_its_events(tiny_model):
    async with gateway(tiny_model, has_page=False) as (_, url), aiohttp.ClientSession() as session:
        for path in ("/", "/page/main.js", "/v1/events"):
            async with session.get(url + path) as response:
                assert response.status == 404
                assert "there is no" in (await response.json())["error"]["message"]
        async with session.get(f"{url}/openapi.json") as response:
            described = (await response.json())["paths"]
            assert "/v1/models" in described
            assert not {"/", "/v1/events"} & set(described)


async def test_only_so_many_listen_and_a_shutdown_ends_all_streams(tiny_model, monkeypatch):
    monkeypatch.setattr(events_module, "MAX_LISTENERS", 2)
    async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as stack:
        async with gateway(tiny_model) as (_, url):
            async with session.head(f"{url}/v1/events") as response:
                assert response.status == 200
            streams = [await stack.enter_async_context(listening(session, url)) for _ in range(2)]
            async with session.get(f"{url}/v1/events") as response:
                assert response.status == 503
                assert "2 listen to this server's events already" in (await response.json())["error"]["message"]
            await streams[0].content.readline()
        async with asyncio.timeout(30):
            for stream in streams:
                await stream.read()


# -- the files ---------------------------------------------------------------------------------------------------------

FILES = {one.name: one.read_text() for one in FOLDER.iterdir()}


def test_nobody_else_is_asked_for_anything():
    for name, text in FILES.items():
        urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'>]*", text)) - {"http://www.w3.org/2000/svg"}
        assert not urls, f"{name} names {urls}"
        assert "@import" not in text
        assert not re.search(r"\b(eval|Function|innerHTML|outerHTML|insertAdjacentHTML|write)\b\s*[(=]", text), name


def test_the_policy_lets_all_of_it_work():
    """Nothing inline: no styles, scripts or handlers; and every file that is named is there."""
    assert "unsafe" not in POLICY
    assert POLICY.startswith("default-src 'none'")
    html = FILES["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)|javascript:", html)
    named = set(re.findall(r'(?:src|href)="([^"]+)"', html))
    named |= {f"/page/{one}" for text in FILES.values() for one in re.findall(r'from "\./([\w.]+)"', text)}
    assert named == Page().paths - {"/"}, "all that is there is used, and the other way round"


def test_scripts_and_markup_agree_on_ids():
    html = FILES["index.html"]
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    scripts = "".join(text for name, text in FILES.items() if name.endswith(".js"))
    used = set(re.findall(r'\bat\("([^"]+)"\)', scripts))
    assert used <= set(ids), used - set(ids)


def test_dark_and_light_know_the_same_colours():
    light, dark = re.findall(r":root \{(.*?)\}", FILES["page.css"], flags=re.DOTALL)
    names = [set(re.findall(r"--[\w-]+(?=:)", text)) for text in (light, dark)]
    assert names[0] == names[1]
    used = set(re.findall(r"var\((--[\w-]+)\)", FILES["page.css"]))
    assert used <= names[0]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".html")])
def test_every_panel_says_what_its_numbers_mean(name):
    panels = re.findall(r"<section.*?</section>", FILES[name], flags=re.DOTALL)
    assert len(panels) >= 7
    for panel in panels:
        assert '<details class="about">' in panel
        assert re.search(r"<summary aria-label=", panel)
