"""The page in a real browser: what a person sees while the instance works, loses a worker, or asks for a key."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal

import aiohttp
import pytest

from msi.control.client_messages import Stats, WorkerStats
from msi.control.worker_status import WorkerStatus
from msi.server.event_values import Hello, Load, Percentiles, numbers
from msi.server.events import sse
from msi.server.gateway import Gateway
from msi.types import StageTimes
from tests.edge import gateway, with_template
from tests.test_engine import idle
from tests.test_events import load
from tests.test_launch import free_port, launched
from tests.waiting import until

playwright = pytest.importorskip(
    "playwright.async_api", reason="the page is tried in a browser where playwright is: pip install -e '.[dev]'"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), "")
WITHIN_MS = 60_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not CHROMIUM, reason="the page is tried in Chromium, and there is none: apt-get install chromium"
    ),
]


class Visit:
    """A page, and whatever in it went wrong or was asked of others."""

    def __init__(self, page, url):
        self.page, self.url = page, url
        self.wrong = []
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url):
        if not url.startswith(self.url):
            self.wrong.append(f"{url} was asked for")

    async def has(self, selector, pattern):
        """Waits until something there has a text."""
        await playwright.expect(self.page.locator(selector).first).to_have_text(re.compile(pattern), timeout=WITHIN_MS)

    async def ask(self, *, tokens=60, times=1):
        await self.page.fill("#max-tokens", str(tokens))
        await self.page.fill("#times", str(times))
        await self.page.click("#send")

    async def is_painted(self, selector):
        """How many colours a canvas shows."""
        return await self.page.evaluate(
            """(selector) => {
              const canvas = document.querySelector(selector), context = canvas.getContext("2d");
              const { data } = context.getImageData(0, 0, canvas.width, canvas.height), colours = new Set();
              for (let at = 0; at < data.length; at += 4) colours.add(`${data[at]},${data[at + 1]},${data[at + 2]}`);
              return colours.size;
            }""",
            selector,
        )

    async def too_wide(self):
        """Pixels by which it would have to be scrolled sideways."""
        return await self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@contextlib.asynccontextmanager
async def visiting(url, events=b"", **options):
    """A page of a server; `events` in place of those that it tells."""
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            context = await browser.new_context(**options)
            visit = Visit(await context.new_page(), url)
            if events:
                told = {"body": events, "content_type": "text/event-stream"}
                await visit.page.route("**/v1/events", lambda route: route.fulfill(**told))
            await visit.page.goto(url + "/")
            yield visit
        finally:
            await browser.close()


async def test_a_person_asks_and_sees_the_ping_pong_the_numbers_and_the_answer(tiny_model):
    async with gateway(tiny_model, {"micro_batches": 2, "max_model_len": 512}) as (engine, url), visiting(url) as visit:
        await visit.has("#sentence", "^ready$")
        await visit.has("#model", "^tiny, context 512")
        await visit.has("#lanes", "m = 2")
        await visit.has("#workers tbody tr:nth-child(2)", "expert-0.*ready")
        await visit.has("#links tbody", "attention-0 → expert-0.*in this process")
        await visit.ask(tokens=400, times=4)
        await visit.has("#rate", r"^[1-9]|^0\.[0-9]*[1-9]")
        await playwright.expect(visit.page.locator("#pingpong")).to_have_attribute(
            "aria-label", re.compile("2 rows: attention busy .* %, experts .* %"), timeout=WITHIN_MS
        )
        await visit.has("#heat-note", "busiest: expert [0-9]+ of layer [0-9]+")
        await visit.has("#answer-note", "[0-9]+ tokens, first after .*; ended by (stop|length)")
        await visit.has("#ttft", "[0-9]+ (µs|ms|s)")
        await visit.has("#tpot", "[0-9]+ (µs|ms|s)")
        await visit.has("#stages", "T_a.*T_e.*T_c")
        await visit.has("#peers", "attention-0 → expert-0")
        assert await visit.is_painted("#pingpong") > 4
        assert await visit.is_painted("#heat") > 3
        for number in range(await visit.page.locator("details.about").count()):
            about = visit.page.locator("details.about").nth(number)
            await about.locator("summary").click()
            await playwright.expect(about.locator("p")).to_be_visible()
        assert visit.wrong == []
        await idle(engine)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_any_window_in_dark_and_light(tiny_model, scheme):
    async with (
        gateway(tiny_model) as (engine, url),
        aiohttp.ClientSession() as session,
        visiting(url, color_scheme=scheme) as visit,
    ):
        await visit.has("#sentence", "^ready$")
        async with load(session, url):
            await visit.has("#heat-note", "busiest")
            await visit.has("#pingpong-note", "attention busy .*, experts .*")
        await visit.ask(tokens=60)
        await visit.has("#answer-note", "ended by")
        for width in (320, 390, 700, 1000, 1400):
            await visit.page.set_viewport_size({"width": width, "height": 800})
            assert await visit.too_wide() <= 0, f"at {width} pixels"
            assert await visit.is_painted("#pingpong") > 3
        ground = await visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        levels = [int(level) for level in re.findall(r"\d+", ground)]
        assert max(levels) < 60 if scheme == "dark" else min(levels) > 200
        assert visit.wrong == []
        await idle(engine)


async def test_it_asks_for_the_key_and_keeps_it_in_its_tab(tiny_model, tmp_path):
    model = with_template(tiny_model, tmp_path / "model")
    async with gateway(model, api_keys=("a-key",)) as (engine, url), visiting(url) as visit:
        await visit.has("#key-why", "This server needs an API key")
        await visit.page.fill("#key-value", "another")
        await visit.page.press("#key-value", "Enter")
        await visit.has("#key-why", "That key is none of this server's")
        await visit.page.fill("#key-value", "a-key")
        await visit.page.press("#key-value", "Enter")
        await visit.has("#sentence", "^ready$")
        await playwright.expect(visit.page.locator("#key")).to_be_hidden()
        await visit.page.reload()
        await visit.has("#sentence", "^ready$")
        assert await visit.page.is_checked("#chat"), "the model has a template"
        await visit.ask(tokens=5)
        await visit.has("#answer-note", "5 tokens|ended by")
        assert await visit.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert all("401" in one for one in visit.wrong), visit.wrong
        await idle(engine)


async def test_stages_that_part_from_the_plan_are_marked_and_nothing_that_is_told_is_markup(tiny_model):
    status = WorkerStatus(0, 0, 1, 0, 9, StageTimes(0.003, 0.002, 0.0001, 0.9, 0.1))
    workers = (
        WorkerStats("attention-0", "attention", 7, "here", 0, "ready", status),
        WorkerStats("expert-0", "expert", 8, "here", 0, "lost", status, "<i>gone</i>"),
        WorkerStats("<b>expert-1</b>", "expert", 9, "here", 0, "ready", status),
    )
    drift = {"attention": 1.5, "expert": 1.02, "comm": 0.9, "alarms": 1.0}
    hello = Hello("1", "<script>alert(1)</script>", False, 512, False)
    load = Load(1.0, 2.0, Percentiles(), Percentiles())
    told = sse("hello", hello) + sse("numbers", numbers(True, "ready", load, Stats(2, 1, workers, drift)))
    async with gateway(tiny_model) as (_, url), visiting(url, told) as visit:
        await visit.has("#stages", "T_a; 1.50 of the plan's.*T_e; 1.02 of the plan's.*T_c; 0.90 of the plan's")
        assert await visit.page.locator("#stages .parted").count() == 1
        assert await visit.page.locator("#stages .mark").count() == 3
        await visit.has("#workers tbody", "<b>expert-1</b>.*lost: <i>gone</i>")
        await visit.has("#model", "^<script>alert")
        await visit.has("#trouble", "No news: the server ended the stream")
        assert visit.wrong == []


async def test_a_hidden_tab_listens_no_more_and_does_again_when_it_is_seen(tiny_model):
    gateways = []

    class Seen(Gateway):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            gateways.append(self)

    hide = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    async with gateway(tiny_model, kind=Seen) as (_, url), visiting(url) as visit:
        await visit.has("#sentence", "^ready$")
        events = gateways[0]._events
        assert events.num_listeners == 1
        await visit.page.clock.install()
        await visit.page.evaluate(hide, True)
        await visit.page.clock.fast_forward(61_000)
        await until(lambda: events.num_listeners == 0, 30)
        await visit.page.evaluate(hide, False)
        await until(lambda: events.num_listeners == 1, 30)
        await playwright.expect(visit.page.locator("#trouble")).to_be_hidden()
        assert visit.wrong == []


async def test_it_says_that_a_worker_was_killed_and_that_it_is_back(tiny_model):
    port = free_port()
    async with launched(tiny_model, "--port", port, "--threads-per-worker", 1) as child:
        await child.until_said("ready: ")
        victim = int(re.search(r"expert-0 (\d+)", child.said)[1])
        async with visiting(f"http://127.0.0.1:{port}") as visit:
            await visit.has("#sentence", "^ready$")
            await visit.has("#links tbody", "attention-0 → expert-0.*shared memory")
            os.kill(victim, signal.SIGKILL)
            await visit.has("#log", "expert-0 is lost: ")
            await visit.has("#log", "expert-0 began life")
            await visit.has("#sentence", "^ready$")
            await visit.has("#workers tbody", "expert-0ready")
            gone = int(re.search(r"gateway (\d+)", child.said)[1]) if "gateway" in child.said else None
            if gone is not None:
                os.kill(gone, signal.SIGKILL)
                await visit.has("#trouble", "No news: ")
                await visit.has("#sentence", "^ready$")
                await playwright.expect(visit.page.locator("#trouble")).to_be_hidden()
