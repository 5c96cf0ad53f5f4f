"""Attacks by what a request says: numbers, types, texts, sizes, encodings. Each asks and reports."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import string
from collections.abc import Callable
from typing import Any

from msi.server import chat, completions
from tools.hostility.report import Report
from tools.hostility.wire import Target, ask, connected, post, request_bytes

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NUMBERS: tuple[Any, ...] = (
    0, -0.0, 1, -1, 2, 1e-50, 1e-45, 1e-40, 1e-38, 5e-324, 1e-7, 0.009999, 1e38, 3.5e38, 1e300, float("nan"),
    float("inf"),
    -float("inf"), 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400,
    0.5, 1.0,
    99.999, 100, 100.0001, True, False, None, "1", "", [], {}, [1], {"a": 1},
)  # fmt: skip
FIELDS = tuple(sorted(completions.FIELDS | chat.FIELDS | {"best_of", "suffix", "user"}))
TEXTS = (
    "", " ", "\0", "\n" * 50, "a" * 3000, "\ud800", "\udfff\ud800", "é" * 500, "👩‍👩‍👧‍👦" * 300, "\u202e\u2066abc",
    "</s>", "<s>", "<unk>",
    "<|im_start|>system\n", "<0x00>", "<0xE2><0x82>", "▁▁▁", "\ufffd" * 100, "{{ 7 * 7 }}{% for x in y %}",
    "'; DROP TABLE requests; --", "\x1b[31mred\x07", "ﬃ" * 200, "a\u0301" * 400, "\U0010ffff" * 50,
)  # fmt: skip


def _short(chance: random.Random) -> dict[str, Any]:
    return {"prompt": "It was a fine morning", "max_tokens": chance.randrange(1, 5)}


async def numbers(target: Target, chance: random.Random, report: Report) -> None:
    """Sampling parameters at and beyond every bound."""
    for _ in range(12):
        body = _short(chance) | {name: chance.choice(NUMBERS) for name in chance.sample(FIELDS, chance.randrange(1, 4))}
        body.setdefault("prompt", "x")
        report.answer(await post(target, COMPLETIONS, body))


async def extreme_sampling(target: Target, chance: random.Random, report: Report) -> None:
    """Values that are allowed, or nearly so, and end in the sampler."""
    for _ in range(8):
        body = _short(chance) | {
            "temperature": chance.choice([0, 1e-50, 1e-30, 1e-6, 0.01, 1.0, 100.0]),
            "repetition_penalty": chance.choice([1e-38, 1e-6, 0.5, 1.0, 2.0, 100.0]),
            "top_p": chance.choice([1e-300, 1e-8, 0.5, 1.0]),
            "min_p": chance.choice([0.0, 1e-40, 1.0]),
            "top_k": chance.choice([-1, 0, 1, 2**31 - 1, 2**62]),
            "logit_bias": {str(chance.randrange(0, 4000)): chance.choice([-100, 100, 0.0]) for _ in range(5)},
            "logprobs": chance.choice([None, 0, 5, 20]),
        }
        report.answer(await post(target, COMPLETIONS, body))


async def ids(target: Target, chance: random.Random, report: Report) -> None:
    """Token ids of every kind, in every place where ids may stand."""
    kinds: tuple[Any, ...] = (-1, 0, 2047, 2048, 10**6, 2**31, 2**63, 2**70, 1.5, True, "7", None, [1], {})
    for _ in range(10):
        some = [chance.choice(kinds) for _ in range(chance.randrange(0, 5))]
        place = chance.choice(["prompt", "stop_token_ids", "logit_bias", "allowed_token_ids"])
        value = {str(one): 1 for one in some} if place == "logit_bias" else some
        report.answer(await post(target, COMPLETIONS, _short(chance) | {place: value}))


async def texts(target: Target, chance: random.Random, report: Report) -> None:
    """Texts that tokenizers, templates and terminals stumble over."""
    for _ in range(8):
        text = "".join(chance.choices(TEXTS, k=chance.randrange(1, 3)))
        body = _short(chance) | {"prompt": text, "stop": chance.choices(TEXTS, k=2), "echo": chance.random() < 0.3}
        report.answer(await post(target, COMPLETIONS, body))
        messages = [{"role": chance.choice(["system", "user", "assistant", "tool", text]), "content": text}]
        report.answer(await post(target, CHAT, {"messages": messages, "max_tokens": 2}))


async def types(target: Target, chance: random.Random, report: Report) -> None:
    """Values of random types under known and unknown names."""
    for _ in range(12):
        body = {chance.choice(FIELDS): anything(chance, 3) for _ in range(chance.randrange(1, 6))}
        if chance.random() < 0.3:
            body["".join(chance.choices(string.printable, k=chance.choice([1, 30, 5000])))] = anything(chance, 2)
        report.answer(await post(target, chance.choice([COMPLETIONS, CHAT]), body))


def anything(chance: random.Random, depth: int) -> Any:
    """A JSON value, more or less."""
    kind = chance.randrange(8 if depth else 6)
    if kind < 3:
        return chance.choice(NUMBERS)
    if kind < 6:
        return chance.choice(TEXTS)
    if kind == 6:
        return [anything(chance, depth - 1) for _ in range(chance.randrange(4))]
    return {chance.choice(FIELDS): anything(chance, depth - 1) for _ in range(chance.randrange(4))}


async def grammars(target: Target, chance: random.Random, report: Report) -> None:
    """Forms of answers that are wrong, huge, or mean one text in very many ways."""
    forms: tuple[dict[str, Any], ...] = (
        {"regex": "("}, {"regex": "(a{1,5000}b){1,5000}"}, {"regex": "a" * 100_000},
        {"grammar": 'start: a\na: a a | "x" | ""'}, {"grammar": "root ::= root root"}, {"grammar": "\0"},
        {"choice": ["a" * 1000 + str(index) for index in range(100)]}, {"choice": [chance.choice(TEXTS)]},
        {"json": {"$ref": "#"}}, {"json": {"enum": list(range(5000))}}, {"json": chance.choice(TEXTS)},
        {"json": {"type": "object", "properties": {f"p{index}": {} for index in range(3000)}}},
        {"json": {"type": "array", "minItems": 10**9}}, {"json": {"type": "integer", "multipleOf": 10**18 + 1}},
    )  # fmt: skip
    for form in chance.sample(forms, 6):
        body = {"prompt": "It is", "max_tokens": 40, "structured_outputs": form}
        report.answer(await post(target, COMPLETIONS, body))


async def broken_json(target: Target, chance: random.Random, report: Report) -> None:
    """What is no JSON, or JSON of a kind that parsers end at."""
    deep = chance.choice([500, 5_000, 100_000])
    bodies = (
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe{}", b"{'prompt': 1}", b'{"prompt": "a", "prompt": "b"}', b"NaN",
        b"[" * deep, b'{"prompt":' + b"[" * deep + b"]" * deep + b"}", b'{"a":' * deep + b"1" + b"}" * deep,
        b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"max_tokens": ' + b"9" * 5000 + b', "prompt": "a"}',
        b'{"prompt": "\\ud800"}', b'{"prompt": "\xed\xa0\x80"}', b"\0" * 1000,
        b'{"prompt": "' + b"\\u0000" * 400 + b'"}',
    )  # fmt: skip
    for body in chance.sample(bodies, 8):
        report.answer(await ask(target, "POST", chance.choice([COMPLETIONS, CHAT]), body))


async def large(target: Target, chance: random.Random, report: Report) -> None:
    """Prompts far beyond the context, of every make."""
    makes: tuple[Callable[[], Any], ...] = (
        lambda: "morning walk in the rain " * 220_000,
        lambda: "a" * 8_000_000,
        lambda: "😀" * 1_300_000,
        lambda: " " * 10_000_000,
        lambda: [chance.randrange(2048) for _ in range(200_000)],
        lambda: [[1, 2, 3]] * 50_000,
        lambda: ["It is"] * 100_000,
    )
    body = {"prompt": chance.choice(makes)(), "max_tokens": 4, "n": chance.choice([1, 128])}
    report.answer(await post(target, COMPLETIONS, body))


async def large_chat(target: Target, chance: random.Random, report: Report) -> None:
    """Conversations of many messages, of many parts, of one huge part."""
    makes: tuple[Callable[[], list[Any]], ...] = (
        lambda: [{"role": "user", "content": "yes"}] * 120_000,
        lambda: [{"role": "user", "content": [{"type": "text", "text": "no "}] * 150_000}],
        lambda: [{"role": "system", "content": "x" * 12_000_000}],
        lambda: [{"role": "user", "content": "hi", "tool_calls": [{}] * 100_000}],
    )
    report.answer(await post(target, CHAT, {"messages": chance.choice(makes)(), "max_tokens": 2}))


async def too_large(target: Target, chance: random.Random, report: Report) -> None:
    """Bodies above any limit, said and unsaid; the answer should come before the body has."""
    size = chance.choice([17, 64]) * 1024 * 1024
    async with connected(target) as connection:
        head = request_bytes(target, "POST", COMPLETIONS, headers={"Content-Length": str(size)})
        sending = asyncio.ensure_future(connection.send(head + b'{"prompt": "' + b"a" * size))
        report.answer(await connection.answer(), may_close=True)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def compressed(target: Target, chance: random.Random, report: Report) -> None:
    """Small bodies that inflate to gigabytes, with and without a key, and encodings that are lies."""
    bomb = gzip.compress(b'{"prompt": "' + b"a" * (64 << 20) + b'"}', 6) * chance.choice([1, 8])
    for encoding in chance.sample(["gzip", "deflate", "br", "zstd", "gzip, gzip", "identity", "x"], 3):
        headers = {"Content-Encoding": encoding}
        if chance.random() < 0.5:
            headers["Authorization"] = "Bearer wrong"
        report.answer(await ask(target, "POST", COMPLETIONS, bomb, headers), may_close=True)


async def heavy_but_allowed(target: Target, chance: random.Random, report: Report) -> None:
    """Requests that must be served, and are as expensive as requests may be."""
    bodies: tuple[dict[str, Any], ...] = (
        {"prompt": "It is", "max_tokens": 16, "n": 16, "temperature": 1.0},
        {"prompt": "It is", "max_tokens": 48, "logprobs": 20, "temperature": 1.0},
        {"prompt": "walk " * 400, "max_tokens": 4},
        {"prompt": "It is", "max_tokens": 32, "stop": ["zzzz" * 20 + str(index) for index in range(16)]},
        {"prompt": "It is", "max_tokens": 32, "logit_bias": {str(token): 1 for token in range(1000)}},
    )
    report.answer(await post(target, COMPLETIONS, chance.choice(bodies)))


async def paths(target: Target, chance: random.Random, report: Report) -> None:
    """Paths, methods and headers that nobody should send."""
    where = (
        "/", "//", "/..%2f..%2fetc/passwd", "/v1/completions/", "/v1/%00", "/" + "a" * 7000,
        "/v1/models?" + "x=1&" * 1000,
        "/metrics", "/health", "/ready", "/version", "*", "http://elsewhere/", "/v1/stream", "/v1/\udc80",
    )  # fmt: skip
    for _ in range(8):
        method = chance.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH", "CONNECT", "BREW"])
        headers = chance.choice(
            [{}, {"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"X-Request-Id": "é\t" * 99}]
        )
        path = chance.choice(where)
        if method == "HEAD":
            continue  # its answer has a length and no body
        report.answer(await ask(target, method, path, b"", headers), may_close=True)


async def leavers(target: Target, chance: random.Random, report: Report) -> None:
    """Clients that ask for a lot and leave: before, while and after it comes, politely and not."""
    for _ in range(6):
        body = {"prompt": "It is", "max_tokens": 400, "stream": chance.random() < 0.7, "ignore_eos": True}
        async with connected(target) as connection:
            await connection.send(request_bytes(target, "POST", COMPLETIONS, json.dumps(body).encode()))
            await asyncio.sleep(chance.choice([0, 0.01, 0.2]))
            if chance.random() < 0.5:
                connection.reset()
        report.count("left")
