"""The live streams that no attack may touch: each asks for the same greedy text again and again, and is timed."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tools.hostility.wire import CLOSE, TEXT, Target, connected, frame, read_frame, request_bytes, upgrade

PROMPTS = ("It was a fine morning", "She had never", "Mr. Elliot was", "The weather in Bath")
AGAIN_S = 0.3
MOST_KEPT = 200  # errors and wrong texts of a stream; more are only counted
BUCKET_S = 0.1


@dataclass(frozen=True, slots=True)
class Gap:
    """Time between two pieces of text of one answer."""

    ended_at: float
    seconds: float


@dataclass(slots=True)
class LiveStream:
    """One client that behaves.

    Attributes:
        text: what it must be told every time, once it is known.
        gaps: waits for a piece of text longer than `slow_s`: kept small, as the watcher must not be late itself.
        errors: (begun, ended, what): answers that ended with an error, or not as they should; `num_errors` of them.
        wrong: texts that were not `text`; `num_wrong` of them.
    """

    name: str
    target: Target
    prompt: str
    max_tokens: int
    is_websocket: bool = False
    text: str | None = None
    slow_s: float = 0.0
    num_answers: int = 0
    gaps: list[Gap] = field(default_factory=list)
    errors: list[tuple[float, float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    num_errors: int = 0
    num_wrong: int = 0

    async def run(self) -> None:
        """For ever; cancel it."""
        while True:
            begun_at = time.monotonic()
            try:
                text = await (self._over_websocket() if self.is_websocket else self._over_http())
            except (OSError, TimeoutError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
                self.num_errors += 1
                if len(self.errors) < MOST_KEPT:
                    self.errors.append((begun_at, time.monotonic(), f"{type(error).__name__}: {error}"[:300]))
                await asyncio.sleep(AGAIN_S)
                continue
            self.num_answers += 1
            if self.text is None:
                self.text = text
            elif text != self.text:
                self.num_wrong += 1
                if len(self.wrong) < MOST_KEPT:
                    self.wrong.append(text)

    def _asked(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True}

    def _heard(self, last_at: float | None) -> float:
        now = time.monotonic()
        if last_at is not None and now - last_at > self.slow_s:
            self.gaps.append(Gap(now, now - last_at))
        return now

    async def _over_http(self) -> str:
        body = json.dumps(self._asked() | {"stream": True}).encode()
        pieces: list[str] = []
        last_at, is_over = None, False
        async with connected(self.target) as connection:
            await connection.send(request_bytes(self.target, "POST", "/v1/completions", body))
            head = (await connection.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            if " 200 " not in head.split("\r\n")[0]:
                raise ValueError(head.split("\r\n")[0] + (await connection.reader.read(300)).decode(errors="replace"))
            while not is_over:
                async with asyncio.timeout(60.0):
                    line = (await connection.reader.readuntil(b"\n")).strip()
                if line == b"data: [DONE]":
                    is_over = True
                elif line.startswith(b"data: "):
                    values = json.loads(line[6:])
                    if "error" in values:
                        raise ValueError(values["error"]["message"])
                    last_at = self._heard(last_at)
                    pieces.append(values["choices"][0]["text"])
        return "".join(pieces)

    async def _over_websocket(self) -> str:
        pieces: list[str] = []
        last_at = None
        async with connected(self.target) as connection:
            answer = await upgrade(self.target, connection)
            if answer.status != 101:
                raise ValueError(f"{answer.status}: {answer.body[:300]!r}")
            message = {"type": "generate", "id": "a", **self._asked()}
            await connection.send(frame(TEXT, json.dumps(message).encode()))
            while True:
                kind, payload = await read_frame(connection)
                if kind in (0, CLOSE):
                    raise ValueError(f"the connection was closed: {payload!r}")
                if kind != TEXT:
                    continue
                values = json.loads(payload)
                if values["type"] == "error":
                    raise ValueError(values["error"]["message"])
                if values["type"] == "done":
                    return "".join(pieces)
                last_at = self._heard(last_at)
                pieces.append(values["text"])


def live_streams(target: Target, max_tokens: int) -> list[LiveStream]:
    """One for each prompt, the last over WebSocket."""
    last = len(PROMPTS) - 1
    return [
        LiveStream(f"stream-{index}", target, prompt, max_tokens, is_websocket=index == last)
        for index, prompt in enumerate(PROMPTS)
    ]


@dataclass(slots=True)
class PacedStream(LiveStream):
    """One whose pieces are counted. `pieces`: of all streams, by the tenth of a second (`BUCKET_S`) they came in."""

    pieces: Counter[int] = field(default_factory=Counter)

    def forget_gaps(self, before: float) -> None:
        """Those that ended before."""
        self.gaps = [gap for gap in self.gaps if gap.ended_at >= before]

    def _heard(self, last_at: float | None) -> float:
        now = LiveStream._heard(self, last_at)
        self.pieces[int(now / BUCKET_S)] += 1
        return now


def paced_streams(target: Target, count: int, max_tokens: int) -> list[PacedStream]:
    """With texts of their own."""
    pieces = Counter[int]()
    return [
        PacedStream(f"stream-{index}", target, f"{PROMPTS[index % len(PROMPTS)]}{' indeed' * (index // len(PROMPTS))}",
                    max_tokens, is_websocket=index % len(PROMPTS) == len(PROMPTS) - 1, slow_s=0.05, pieces=pieces)
        for index in range(count)
    ]  # fmt: skip
