"""Requests to a server that streams completions, all of the same kind, and what their tokens' times say."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from statistics import median, quantiles

import aiohttp

LIMIT_S = 600.0
Prompt = Sequence[int]


def prompts(seed: int, count: int, length: int, vocab_size: int) -> list[Prompt]:
    """Others for every seed, so that no cache of prefixes has a part of them."""
    chance = random.Random(seed)
    return [[chance.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


async def stream(session: aiohttp.ClientSession, url: str, prompt: Prompt, num_tokens: int) -> tuple[list[float], str]:
    """When each piece of the answer came, and its text. Raises ValueError: an error, or an answer that is cut."""
    body = {
        "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    times, text = [], []
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise ValueError(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if line.startswith((b'data: {"error"', b'{"error"', b"error:")):  # a text may have the word, too
                raise ValueError(line.decode()[:300])
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
                text.append(line)
    if not times:
        raise ValueError("there was no answer")
    return times, b"".join(text).decode()


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=LIMIT_S), connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20
    )


async def batch(url: str, asked: Sequence[Prompt], num_tokens: int) -> dict[str, float]:
    """All at once. Decode counts the time in which all of them decode, end to end all of it."""
    async with session() as client:
        started = time.monotonic()
        streams = await asyncio.gather(*(stream(client, url, prompt, num_tokens) for prompt in asked))
    return figures_of_batch(started, [times for times, _ in streams], num_tokens)


def figures_of_batch(started: float, streams: Sequence[Sequence[float]], num_tokens: int) -> dict[str, float]:
    """Of when pieces came, each of so many tokens as the number of pieces says.

    Of decoding nothing is said where never all did at once.
    """
    firsts = [times[0] for times in streams]
    begin, end = max(firsts), min(times[-1] for times in streams)
    counted = sum(sum(begin < at <= end for at in times) * num_tokens / len(times) for times in streams)
    return ({"decode_tokens_per_s": counted / (end - begin)} if counted else {}) | {
        "end_to_end_tokens_per_s": len(streams) * num_tokens / (max(times[-1] for times in streams) - started),
        "ttft_s": median(firsts) - started,
    }


async def poisson(url: str, asked: Sequence[Prompt], num_tokens: int, rate: float, seed: int) -> dict[str, float]:
    """So many requests a second in the mean, at the same moments whoever is asked."""
    chance = random.Random(seed)
    waits = [0.0, *(chance.expovariate(rate) for _ in asked[1:])]
    async with session() as client:

        async def one(prompt: Prompt) -> tuple[float, list[float]]:
            arrived = time.monotonic()
            times, _ = await stream(client, url, prompt, num_tokens)
            return arrived, times

        started, tasks = time.monotonic(), []
        for wait, prompt in zip(waits, asked, strict=True):
            await asyncio.sleep(wait)
            tasks.append(asyncio.ensure_future(one(prompt)))
        answers = await asyncio.gather(*tasks)
    ttfts = [times[0] - arrived for arrived, times in answers]
    tpots = [(times[-1] - times[0]) / (num_tokens - 1) for _, times in answers]
    return {
        "poisson_ttft_s": median(ttfts),
        "poisson_ttft_p90_s": quantiles(ttfts, n=10)[8] if len(ttfts) > 1 else ttfts[0],
        "poisson_tpot_s": median(tpots),
        "poisson_requests_per_s": len(asked) / (time.monotonic() - started),
    }
