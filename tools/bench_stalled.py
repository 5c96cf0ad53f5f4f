#!/usr/bin/env python3
"""What streams pay for clients that do not read: 200 streams, 20 of them stalled, beside 200 that all read.

    tools/bench_stalled.py [MODEL] [--streams 200] [--stalled 20] [--rounds 6] [--tokens 64]

Serves a model (the demo model without one) by msi-launch. Rounds alternate: in one all clients read, in the other some
never do, half of them server-sent events and half requests of a WebSocket. Those ask for log-probabilities in both, and
their sockets hold little, so that what is not read waits in the gateway. Printed of each round: time per output token
of those that read all the time (median over the streams of each one's mean), and the memory of the gateway and of the
coordinator at its end; at the end the ratio of the medians (asked for: within 1.1), and what the two processes grew by
from the second round to the last.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi_launch.command_line import ScriptLine, integer
from tools.served import Served, served

PROMPT = "It was a fine morning"
NUM_LOGPROBS = 20
STALLED_TOKENS = 512
RECEIVE_BYTES = 4096
SEGMENT_BYTES = 536  # small ones keep the kernel from holding megabytes for a client that does not read
ROUND_S = 300.0
PROCESSES = ("gateway", "coordinator")


def small_socket(address: Any) -> socket.socket:
    """One that holds little."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    made.setblocking(False)
    return made


async def read(session: aiohttp.ClientSession, url: str, num_tokens: int) -> float:
    """A stream, read as it comes; mean seconds from a token to the next."""
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    first_at = last_at = 0.0
    num_events = 0
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                last_at = time.monotonic()
                first_at = first_at or last_at
                num_events += 1
    return (last_at - first_at) / (num_events - 1)


class Others:
    """Clients that ask for much at the round's beginning, and read it or not.

    Args:
        num_streams: half of them server-sent events, the others requests of one WebSocket.
    """

    def __init__(self, url: str, num_streams: int, *, is_stalled: bool) -> None:
        self._url = url
        self._num_events = num_streams // 2
        self._num_messages = num_streams - num_streams // 2
        self._is_stalled = is_stalled
        self._responses: list[aiohttp.ClientResponse] = []
        self._reading: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Others:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=small_socket), read_bufsize=RECEIVE_BYTES,
        )  # fmt: skip
        asked = {"prompt": PROMPT, "max_tokens": STALLED_TOKENS, "ignore_eos": True, "logprobs": NUM_LOGPROBS}
        for _ in range(self._num_events):
            response = await self._session.post(f"{self._url}/v1/completions", json={**asked, "stream": True})
            self._responses.append(response)
        self._socket = await self._session.ws_connect(f"{self._url}/v1/stream", max_msg_size=0)
        for number in range(self._num_messages):
            await self._socket.send_str(json.dumps({"type": "generate", "id": str(number), **asked}))
        if not self._is_stalled:
            self._reading = [asyncio.create_task(self._read(one)) for one in self._responses]
            self._reading.append(asyncio.create_task(self._receive()))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)
        for response in self._responses:
            response.close()
        self._socket._response.close()
        await self._session.close()

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        while await response.content.readany():
            pass

    async def _receive(self) -> None:
        async for _ in self._socket:
            pass


async def one_round(instance: Served, arguments: Any, *, is_stalled: bool) -> dict[str, float]:
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        asyncio.timeout(ROUND_S),
        aiohttp.ClientSession(connector=connector) as session,
        Others(instance.url, arguments.stalled, is_stalled=is_stalled),
    ):
        num_reading = arguments.streams - arguments.stalled
        reading = [read(session, instance.url, arguments.tokens) for _ in range(num_reading)]
        between_s = await asyncio.gather(*reading)
        resident = {name: instance.resident_bytes(name) for name in PROCESSES}
    return {
        "stalled": arguments.stalled if is_stalled else 0,
        "tpot_ms": 1e3 * statistics.median(between_s),
        **{f"{name}_mib": size / 2**20 for name, size in resident.items()},
    }


async def measure(arguments: Any) -> None:
    words = [arguments.model] if arguments.model else []
    words += ["--threads-per-worker", "1", "--max-num-seqs", str(arguments.streams)]
    found: list[dict[str, float]] = []
    async with served(*words) as instance:
        for number in range(arguments.rounds):
            found.append(await one_round(instance, arguments, is_stalled=number % 2 == 1))
            print(json.dumps({name: round(value, 2) for name, value in found[-1].items()}), flush=True)
    medians = [
        statistics.median(one["tpot_ms"] for one in found if bool(one["stalled"]) is is_stalled)
        for is_stalled in (False, True)
    ]
    growth = {f"{name}_grew": round(found[-1][f"{name}_mib"] / found[1][f"{name}_mib"], 3) for name in PROCESSES}
    print(json.dumps({"tpot_ratio": round(medians[1] / medians[0], 3), **growth}))


def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("model", nargs="?", help="the demo model without it")
    parser.add_argument("--streams", type=integer(2, 2000), default=200, metavar="N", help="at a time; 200")
    parser.add_argument("--stalled", type=integer(2, 1000), default=20, metavar="N", help="of them; 20")
    parser.add_argument("--rounds", type=integer(2, 100), default=6, metavar="N", help="of either kind in turn; 6")
    parser.add_argument("--tokens", type=integer(2, 512), default=64, metavar="N", help="of those that read; 64")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
