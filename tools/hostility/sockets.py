"""Attacks by how bytes come: half requests, silence, floods, WebSocket frames, and the instance's own sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import Sequence
from typing import Any

from tools.hostility.report import Report
from tools.hostility.wire import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Connection,
    Target,
    connected,
    frame,
    read_frame,
    request_bytes,
    upgrade,
)

COMPLETIONS = "/v1/completions"


async def half_heads(target: Target, chance: random.Random, report: Report) -> None:
    """Connections that begin a request, or nothing at all, and stay."""
    beginnings = (
        b"", b"P", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01\x02\x00\x01",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100, b"GET /" + b"a" * 20_000, b"A: b\r\n" * 3000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000,
    )  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(chance.choice([5, 100, 300])):
            try:
                connection = await stack.enter_async_context(connected(target))
            except OSError:
                report.count("refused")
                continue
            await connection.send(chance.choice(beginnings))
            report.count("opened")
        await asyncio.sleep(chance.uniform(0.1, 2.0))


async def smuggled(target: Target, chance: random.Random, report: Report) -> None:
    """Requests about whose length the headers disagree, and pipelines of them."""
    body = b'{"prompt": "It is", "max_tokens": 1}'
    variants: tuple[dict[str, str], ...] = (
        {"Transfer-Encoding": "chunked", "Content-Length": "5"}, {"Content-Length": "-1"}, {"Content-Length": "1e3"},
        {"Content-Length": "9" * 40}, {"Transfer-Encoding": "chunked, chunked", "Content-Length": ""},
        {"Content-Length": "+5"},
        {"Expect": "100-continue"}, {"Connection": "close, upgrade"}, {"Content-Type": "text/plain"},
        {"Content-Type": "x" * 500},
    )  # fmt: skip
    for headers in chance.sample(variants, 5):
        async with connected(target) as connection:
            request = request_bytes(target, "POST", COMPLETIONS, body, headers)
            await connection.send(request * chance.choice([1, 20]))
            connection.writer.write_eof()
            report.answer(await connection.answer(), may_close=True)


async def slow_bodies(target: Target, chance: random.Random, report: Report) -> None:
    """A byte now and then."""
    async with connected(target) as connection:
        head = request_bytes(target, "POST", COMPLETIONS, headers={"Content-Length": "1000"})
        for at in range(0, len(head), 40):
            await connection.send(head[at : at + 40])
            await asyncio.sleep(0.05)
        await connection.send(b'{"prompt"')
        await asyncio.sleep(chance.uniform(0.5, 3.0))
    report.count("left")


async def deaf(target: Target, chance: random.Random, report: Report) -> None:
    """Readers of long streams that never read."""
    body = json.dumps(
        {"prompt": "It is", "max_tokens": 900, "stream": True, "ignore_eos": True, "logprobs": 20, "n": 4}
    )
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            connection = await stack.enter_async_context(connected(target, buffer_bytes=4096))
            await connection.send(request_bytes(target, "POST", COMPLETIONS, body.encode()))
        await asyncio.sleep(chance.uniform(2.0, 8.0))
    report.count("left")


async def flood(target: Target, chance: random.Random, report: Report) -> None:
    """As many idle connections as we may open."""
    opened: list[socket.socket] = []
    try:
        for _ in range(1500):
            one = socket.socket()
            one.setblocking(False)
            with contextlib.suppress(OSError):
                one.connect_ex((target.host, target.port))
            opened.append(one)
            if len(opened) % 100 == 0:
                await asyncio.sleep(0.02)
        await asyncio.sleep(1.0)
    except OSError:
        report.count("out of descriptors")
    finally:
        for one in opened:
            one.close()
    report.count("flooded")


# -- WebSocket ------------------------------------------------------------------------------------------------------


async def frames(target: Target, chance: random.Random, report: Report) -> None:
    """Frames that break the protocol; what follows is the server's to decide, but no other connection's to feel."""
    generate = json.dumps({"type": "generate", "id": "a", "prompt": "It is", "max_tokens": 3}).encode()
    payloads = (
        frame(TEXT, b"\xff\xfe"), frame(BINARY, os.urandom(100)), frame(3, b"x"), frame(TEXT, b"x", is_masked=False),
        frame(TEXT, b"", length=1 << 62), frame(PING, b"x" * 126), frame(CLOSE, b"x"), frame(0, b"x"),
        frame(TEXT, b"{" * 100_000), frame(TEXT, generate, is_last=False), frame(PONG, b""), os.urandom(500),
        frame(PING, b"") * 5000, frame(TEXT, b"[" * 200_000),
    )  # fmt: skip
    for _ in range(5):
        async with connected(target) as connection:
            answer = await upgrade(target, connection)
            report.answer(answer, may_close=True)
            for payload in chance.sample(payloads, 3):
                await connection.send(payload)
            await asyncio.sleep(0.05)


async def websocket_requests(target: Target, chance: random.Random, report: Report) -> None:
    """Every id ends exactly once, whatever was asked under it; duplicates end nothing."""
    asked: tuple[dict[str, Any], ...] = (
        {"prompt": "It is", "max_tokens": 3}, {"prompt": "It is", "temperature": 1e-50, "max_tokens": 2},
        {"prompt": [10**9]},
        {"prompt": "a" * 3_000_000}, {"messages": "x"}, {"prompt": None}, {}, {"prompt": "x", "n": 10**30},
        {"prompt": "x", "stream": True}, {"messages": [{"role": "user", "content": None}], "max_tokens": 2},
        {"prompt": "x", "logprobs": 5, "max_tokens": 2}, {"prompt": "\0\ufffd"}, {"prompt": "It is",
        "max_tokens": 10**9},
    )  # fmt: skip
    async with connected(target) as connection:
        if (answer := await upgrade(target, connection)).status != 101:
            report.answer(answer)
            return
        names = [str(index) for index in range(10)]
        for name in names:
            message = {"type": "generate", "id": name, **chance.choice(asked)}
            await connection.send(frame(TEXT, json.dumps(message).encode("utf-8", "surrogatepass")))
        odd_ones: tuple[Any, ...] = (
            {"type": "cancel", "id": "nobody"}, {"type": "x", "id": 7}, {"id": "z" * 9999}, [], {"type": None},
        )  # fmt: skip
        for odd in odd_ones:
            await connection.send(frame(TEXT, json.dumps(odd).encode()))
        for name in chance.sample(names, 3):
            await connection.send(frame(TEXT, json.dumps({"type": "cancel", "id": name}).encode()))
        await _all_end(connection, set(names), report)


async def _all_end(connection: Connection, waiting: set[str], report: Report) -> None:
    while waiting:
        try:
            kind, payload = await read_frame(connection)
        except TimeoutError:
            report.violation(f"WebSocket: requests {sorted(waiting)} never ended")
            return
        if kind in (0, CLOSE):
            report.count("closed")
            report.violation(f"WebSocket: closed with requests {sorted(waiting)} still running")
            return
        if kind == TEXT:
            message = json.loads(payload)
            if message["type"] in ("done", "error", "cancelled"):
                report.count(message["type"])
                if message["type"] == "error" and message["error"]["code"] in (500, 501, 502, 504):
                    report.violation(f"WebSocket: {message['error']}")
                waiting.discard(message.get("id") or "")


# -- the instance's own sockets ---------------------------------------------------------------------------------------


def garbage(addresses: Sequence[str], chance: random.Random, report: Report) -> None:
    """Bytes for every socket that the instance's processes listen on: "unix:PATH" (or "unix:@NAME"), "tcp:PORT"."""
    greetings = (
        b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(64), b"\xff" + b"\0" * 8 + b"\x7f\x03\0NULL" + b"\0" * 48,
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL" + b"\0" * 48 + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER" +
        b"\0\x05\x91\xa1x\x00\x01", b"\0" * 4096, b"\xff" * 4096,
    )  # fmt: skip
    for address in addresses:
        for _ in range(5):
            kind, _, where = address.partition(":")
            one = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
            one.settimeout(0.5)
            try:
                path = "\0" + where[1:] if where.startswith("@") else where
                one.connect(path if kind == "unix" else ("127.0.0.1", int(where)))
                one.sendall(chance.choice(greetings))
                with contextlib.suppress(TimeoutError):
                    one.recv(100)
                report.count(kind)
            except OSError:
                report.count(f"{kind} refused")
            finally:
                one.close()
