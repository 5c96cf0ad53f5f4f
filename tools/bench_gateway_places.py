#!/usr/bin/env python3
"""What a gateway beside a coordinator costs it: in a thread of the same process, and in a process of its own.

    tools/bench_gateway_places.py [--seconds 10]

A coordinator's stand-in, a loop with a 10 ms ticker, answers a real gateway (an engine that makes up tokens) while
eight clients stream and, in the second half, others send large bodies without a break. Printed for each arrangement:
how late the ticker was (worst, 99th percentile), time to the first token, and processor time per token of the gateway;
at the end, what of that it takes to count and time a token for /metrics.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi.control.client_messages import InstanceStatus, Welcome
from msi.engine import Engine
from msi.server.calls import observed
from msi.server.gateway import Gateway
from msi.server.metrics import Metrics
from msi.settings import DEMO_MODEL
from msi.types import Output, SamplingParams
from msi_launch.command_line import ScriptLine

TICK_S = 0.01
NUM_STREAMS = 8
NUM_TOKENS = 64
NUM_COUNTED = 100_000
TOKEN_EVERY_S = 0.005
HOSTILE: list[dict[str, Any]] = [
    {"prompt": "a word " * 700_000},
    {"prompt": [5] * 2_000_000},
    {"messages": [{"role": "user", "content": "a"}] * 200_000},
    {"prompt": "It is a truth " * 60, "logit_bias": {str(index): 1 for index in range(1000)}},
]


class MadeUp(Engine):
    """An engine without an instance: tokens come from nowhere, as often as a real one's."""

    def __init__(self) -> None:
        super().__init__()
        from msi.text.prompts import Prompts

        content = (DEMO_MODEL / "tokenizer.json").read_bytes()
        self._welcome = Welcome("demo", 2048, 1024, content)
        self._prompts = Prompts.of(content, 2048, 1024)

    async def generate(
        self,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        trace: str = "",
        thinking: Any = None,
        **urgency: Any,
    ) -> AsyncGenerator[Output, None]:
        for index in range(NUM_TOKENS):
            await asyncio.sleep(TOKEN_EVERY_S)
            is_last = index == NUM_TOKENS - 1
            yield Output("", " word", (5,), "length" if is_last else None, len(prompt))

    @property
    def status(self) -> tuple[bool, str]:
        return InstanceStatus(True, "ready", "").is_ready, "ready"


def serve(told: Callable[[str], None], asked: Callable[[], bool]) -> float:
    """A gateway until it is asked to end; processor seconds that its thread took."""

    async def main() -> float:
        gateway = Gateway(MadeUp(), host="127.0.0.1", port=0)
        await gateway.prepare()
        told(await gateway.start())
        while not asked():
            await asyncio.sleep(0.1)
        await gateway.close()
        return time.thread_time()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


async def tick(late_s: list[float], until: threading.Event) -> None:
    """The coordinator's stand-in."""
    while not until.is_set():
        before = time.monotonic()
        await asyncio.sleep(TICK_S)
        late_s.append(max(0.0, time.monotonic() - before - TICK_S))


def attack(url: str, seconds: float, figures: Connection) -> None:
    """Clients, in a process of their own: first the streams alone, then with the hostile bodies beside them."""

    async def main() -> None:
        for is_hostile in (False, True):
            first_s: list[float] = []
            ends_at = time.monotonic() + seconds / 2
            async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
                for _ in range(NUM_STREAMS):
                    tasks.create_task(_stream(session, url, ends_at, first_s))
                if is_hostile:
                    for body in HOSTILE:
                        tasks.create_task(_hostile(session, url, ends_at, body))
            figures.send((is_hostile, sorted(first_s)))

    os.nice(5)
    asyncio.run(main())


async def _stream(session: aiohttp.ClientSession, url: str, ends_at: float, first_s: list[float]) -> None:
    while time.monotonic() < ends_at:
        started = time.monotonic()
        body = {"prompt": "It is", "stream": True, "max_tokens": NUM_TOKENS}
        async with session.post(f"{url}/v1/completions", json=body) as response:
            await response.content.readline()
            first_s.append(time.monotonic() - started)
            await response.read()


async def _hostile(session: aiohttp.ClientSession, url: str, ends_at: float, body: dict[str, Any]) -> None:
    path = "chat/completions" if "messages" in body else "completions"
    data = json.dumps(body).encode()
    while time.monotonic() < ends_at:
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{url}/v1/{path}", data=_parts(data), headers=headers) as response:
            await response.read()


async def _parts(data: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), 1 << 18):
        yield data[start : start + (1 << 18)]


def measure(in_process: bool, seconds: float) -> None:
    """One arrangement."""
    name = "process" if in_process else "thread"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    ending = threading.Event()
    urls: list[str] = []
    cpu_s: list[float] = []
    gateway: Any
    if in_process:
        gateway = context.Process(target=_serve_apart, args=(theirs,))
        gateway.start()
        url = ours.recv()
    else:
        gateway = threading.Thread(target=lambda: cpu_s.append(serve(urls.append, ending.is_set)))
        gateway.start()
        while not urls:
            time.sleep(0.01)
        url = urls[0]
    our_figures, figures = context.Pipe()
    clients = context.Process(target=attack, args=(url, seconds, figures))
    late: dict[bool, list[float]] = {False: [], True: []}

    async def main() -> None:
        for is_hostile in (False, True):
            until = threading.Event()
            ticking = asyncio.ensure_future(tick(late[is_hostile], until))
            was_hostile, first_s = await asyncio.to_thread(our_figures.recv)
            until.set()
            await ticking
            assert was_hostile is is_hostile
            worst, often = max(late[is_hostile]), sorted(late[is_hostile])[int(0.99 * len(late[is_hostile]))]
            print(
                f"{name:8} {'hostile' if is_hostile else 'calm   '}  ticker late: worst {worst * 1e3:6.1f} ms, p99 "
                f"{often * 1e3:6.1f} ms   first token: median {first_s[len(first_s) // 2] * 1e3:6.1f} ms, worst "
                f"{first_s[-1] * 1e3:6.1f} ms   {len(first_s) * NUM_TOKENS / seconds * 2:.0f} tokens/s",
                flush=True,
            )

    clients.start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    clients.join()
    ending.set()
    if in_process:
        ours.send("end")
        cpu_s.append(ours.recv())
    gateway.join()
    print(
        f"{'process' if in_process else 'thread ':8} gateway's loop took {cpu_s[0]:.2f} s of processor time", flush=True
    )


async def counting_us() -> float:
    """Microseconds that an output takes longer where it is counted; the least of some tries."""

    async def made_up() -> AsyncGenerator[Output, None]:
        for _ in range(NUM_COUNTED):
            yield Output("", " word", (5,), None, 7)

    async def pass_all(outputs: AsyncGenerator[Output, None]) -> float:
        started = time.perf_counter()
        async for _ in outputs:
            pass
        return time.perf_counter() - started

    counted = min([await pass_all(observed(made_up(), Metrics().request)) for _ in range(5)])
    plain = min([await pass_all(made_up()) for _ in range(5)])
    return 1e6 * (counted - plain) / NUM_COUNTED


def _serve_apart(pipe: Connection) -> None:
    pipe.send(serve(pipe.send, pipe.poll))


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each half; 10")
    seconds: float = parser.parse_args().seconds
    for in_process in (False, True):
        measure(in_process, seconds)
    print(f"of a token's time in the gateway, counting for /metrics is {asyncio.run(counting_us()):.2f} us")


if __name__ == "__main__":
    main()
