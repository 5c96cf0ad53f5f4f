"""A process that attacks until it is told to stop: `python -m tools.hostility.attacker URL SEED [ATTACK ...]`.

It runs apart, and at a lower priority, so that making an attack does not delay those who watch. A line of JSON on
standard output for each attack; ends when standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import Awaitable, Callable

from tools.hostility import requests, sockets
from tools.hostility.conversations import conversations
from tools.hostility.processes import listening
from tools.hostility.report import Report
from tools.hostility.wire import Target

Attack = Callable[[Target, random.Random, Report], Awaitable[None]]
ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        requests.numbers, requests.extreme_sampling, requests.ids, requests.texts, requests.types, requests.grammars,
        requests.broken_json, requests.large, requests.large_chat, requests.too_large, requests.compressed,
        requests.heavy_but_allowed, conversations,
        requests.paths, requests.leavers, sockets.half_heads, sockets.smuggled, sockets.slow_bodies, sockets.deaf,
        sockets.flood, sockets.frames, sockets.websocket_requests,
    )
}  # fmt: skip
GARBAGE = "garbage"
NAMES = (*ATTACKS, GARBAGE)
NICENESS = 10
PAUSE_S = 0.05
AT_A_TIME = 3


async def attack(target: Target, seed: int, names: list[str], launcher: int) -> None:
    """Runs attacks in a random order, some at a time, until standard input ends."""
    chance = random.Random(seed)
    over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    async def one_after_another(own: random.Random) -> None:
        while not over.done():
            name = own.choice(names)
            report = Report(name)
            try:
                if name == GARBAGE:
                    await asyncio.to_thread(sockets.garbage, listening(launcher), own, report)
                else:
                    await ATTACKS[name](target, own, report)
            except TimeoutError:
                report.violation("no answer came")
            except OSError as error:
                report.count(type(error).__name__)  # refused or reset: others may have taken all places
            report.print()
            await asyncio.sleep(PAUSE_S)

    running = [asyncio.ensure_future(one_after_another(random.Random(chance.random()))) for _ in range(AT_A_TIME)]
    await over
    for one in running:
        one.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def main() -> None:
    os.nice(NICENESS)
    url, api_key, seed, launcher, *names = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(attack(Target.of(url, api_key), int(seed), names or list(NAMES), int(launcher)))


if __name__ == "__main__":
    main()
