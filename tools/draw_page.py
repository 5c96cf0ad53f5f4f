#!/usr/bin/env python3
"""A picture of the page under load: an instance of the demo model, clients that keep it busy, and Chromium.

    tools/draw_page.py                                  # msi/server/page.png
    tools/draw_page.py --scheme light --width 390 --output narrow.png

Needs Chromium (of the distribution) and playwright: pip install -e '.[dev]'
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import socket
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from msi.errors import ConfigError
from msi_launch.command_line import ScriptLine

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BEGINNINGS = ("It was a fine morning, and", "Mr. Elton had", "The carriage stopped at", "She could not help")
STARTS_WITHIN_S = 120.0


def parse() -> argparse.Namespace:
    parser = ScriptLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "msi/server/page.png", help="a .png")
    parser.add_argument("--scheme", choices=("dark", "light"), default="dark", help="dark")
    parser.add_argument("--width", type=int, default=1400, help="of the window; its height is the page's")
    parser.add_argument("--clients", type=int, default=12, help="that ask all the time; 12")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load before the picture; 30")
    parser.add_argument("--workers", type=int, default=1, help="of each role; 1")
    parser.add_argument("--micro-batches", type=int, default=2, help="m; 2")
    parser.add_argument("--model", default="", help="the demo model without it")
    values: argparse.Namespace = parser.parse_args()
    return values


async def main(arguments: argparse.Namespace) -> None:
    """Raises ConfigError: something that it needs is not here."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise ConfigError("there is no Chromium here: apt-get install chromium")
    async with serving(arguments) as url, busy(url, arguments.clients):
        await draw(url, browser, arguments)
    print(arguments.output)


@contextlib.asynccontextmanager
async def serving(arguments: argparse.Namespace) -> AsyncGenerator[str, None]:
    """msi-launch, until it is left; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        *([arguments.model] if arguments.model else []), "--port", port, "--micro-batches", arguments.micro_batches,
        "--attention-workers", arguments.workers, "--expert-workers", arguments.workers, "--threads-per-worker", 1,
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "msi_launch", *map(str, words), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    said = ""
    try:
        async with asyncio.timeout(STARTS_WITHIN_S):
            while not re.search("ready: ", said):
                line = await process.stderr.readline()
                if not line:
                    raise ConfigError(f"the server did not start: {said[-500:]}")
                said += line.decode(errors="replace")
        reading = asyncio.ensure_future(process.stderr.read())
        yield f"http://127.0.0.1:{port}"
        reading.cancel()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def busy(url: str, num_clients: int) -> AsyncGenerator[None, None]:
    """Clients that ask all the time, until it is left."""

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        body: dict[str, Any] = {"max_tokens": 150 + 10 * number, "ignore_eos": True, "temperature": 0.8}
        while True:
            body["prompt"] = BEGINNINGS[number % len(BEGINNINGS)]
            async with session.post(f"{url}/v1/completions", json=body) as response:
                await response.read()

    async with aiohttp.ClientSession() as session:
        asking = [asyncio.ensure_future(ask(session, number)) for number in range(num_clients)]
        try:
            yield
        finally:
            for one in asking:
                one.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


async def draw(url: str, browser: str, arguments: argparse.Namespace) -> None:
    try:
        from playwright.async_api import async_playwright
    except ImportError:
        raise ConfigError("playwright is not installed: pip install -e '.[dev]'") from None
    async with async_playwright() as driver:
        started = await driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = await started.new_page(
            viewport={"width": arguments.width, "height": 700}, color_scheme=arguments.scheme, device_scale_factor=1
        )
        await page.goto(url)
        await asyncio.sleep(0.6 * arguments.seconds)
        await page.click("#send")
        await asyncio.sleep(0.4 * arguments.seconds)
        await page.screenshot(path=arguments.output, full_page=True)
        await started.close()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse()))
    except ConfigError as error:
        raise SystemExit(f"draw_page.py: {error}") from None
