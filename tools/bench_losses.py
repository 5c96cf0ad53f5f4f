#!/usr/bin/env python
"""What streams notice of a local worker that is killed, or stopped for a while: pauses, changed tokens.

    tools/bench_losses.py --rounds 5
    tools/bench_losses.py --rounds 5 --worker expert-1 --redundancy 0
    tools/bench_losses.py --rounds 5 --worker coordinator attention-1              # both at once
    tools/bench_losses.py --rounds 5 --worker coordinator --standby    # never to come back: another one takes over
    tools/bench_losses.py --rounds 5 --stop 1.5      # SIGSTOP, and SIGCONT so many seconds later

Each round runs greedy streams on all workers, kills or stops one in their midst, and then waits until all workers are
there again. A pause is the longest time between two outputs of a stream: one that began within a second of the loss;
later, while the dead worker starts anew beside the streams, and is connected; and before, when nothing was wrong.
Streams are compared with those of a round in which nothing was done to any.

With --standby processes are started each by itself, as on a cluster, with a coordinator that stands by for the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own folder is there, not the one above

from msi import Engine, RequestFailed, SamplingParams, Unavailable
from msi_launch.command_line import ScriptLine
from tools.hostility.cluster import MODULE, has_successor, share_secret
from tools.hostility.operators import coordinator_addresses
from tools.hostility.processes import family
from tools.hostility.server import Server

BACK_WITHIN_S = 120.0
AT_LOSS_S = 1.0
NUM_ATTENTION = NUM_EXPERT = 2
WHEN = ("before", "at_loss", "later")


@dataclass
class Stream:
    """When a stream's outputs came, what they were, and how it failed, "" if it did not."""

    came_at: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    failure: str = ""

    async def run(self, engine: Engine, index: int, num_tokens: int) -> None:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        try:
            async for output in engine.generate([5 + index] * 8, params):
                self.came_at.append(time.monotonic())
                self.token_ids += output.token_ids
        except (RequestFailed, Unavailable) as error:
            self.failure = str(error)

    def pauses_s(self, killed_at: float) -> dict[str, float]:
        """The longest of each part, see `WHEN`."""
        longest = dict.fromkeys(WHEN, 0.0)
        for begun, ended in zip(self.came_at, self.came_at[1:], strict=False):
            is_later = begun > killed_at + AT_LOSS_S
            part = "before" if ended <= killed_at else "later" if is_later else "at_loss"
            longest[part] = max(longest[part], ended - begun)
        return longest


@dataclass(frozen=True)
class Instance:
    """One that is measured. `pids`: those that run now, by name."""

    engine: Engine
    pids: Callable[[], dict[str, int]]
    has_standby: bool

    async def all_are_back(self) -> None:
        async with asyncio.timeout(BACK_WITHIN_S):
            while not await self._is_whole():
                await asyncio.sleep(0.05)

    async def _is_whole(self) -> bool:
        if self.has_standby and not has_successor(self.pids()):
            return False
        workers = (await self.engine.stats()).workers if self.engine.status[0] else []
        return sum(one.state == "ready" for one in workers) >= NUM_ATTENTION + NUM_EXPERT


@contextlib.asynccontextmanager
async def instance_of(arguments: argparse.Namespace) -> AsyncGenerator[Instance, None]:
    options: dict[str, Any] = {
        "attention_workers": NUM_ATTENTION, "expert_workers": NUM_EXPERT, "micro_batches": 2, "threads_per_worker": 1,
        "expert_redundancy": arguments.redundancy, "transport": arguments.transport,
        "hedge_after": arguments.hedge_after, "dtype": "float32",
    }  # fmt: skip
    if not arguments.standby:
        async with Engine.local(**options) as engine:
            yield Instance(engine, lambda: engine.pids, has_standby=False)
        return
    share_secret()
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    server = await Server.start(words, Path(os.devnull), MODULE)
    try:
        async with Engine.connect(coordinator_addresses(family(server.process.pid))) as engine:
            yield Instance(engine, lambda: family(server.process.pid), has_standby=True)
    finally:
        await server.stop()


async def played(
    instance: Instance, num_streams: int, num_tokens: int, kill: Sequence[str] = (), stop_s: float = 0.0
) -> tuple[list[Stream], float]:
    """All streams to their end, and when `kill` were killed, or stopped for `stop_s`: a third of the way."""
    streams = [Stream() for _ in range(num_streams)]
    running = asyncio.gather(*(one.run(instance.engine, index, num_tokens) for index, one in enumerate(streams)))
    killed_at = 0.0
    while not running.done():
        await asyncio.wait([running], timeout=0.01)
        if kill and not killed_at and min(len(one.token_ids) for one in streams) >= num_tokens // 3:
            pids = instance.pids()
            killed_at = time.monotonic()
            for pid in [pids[name] for name in kill]:
                os.kill(pid, signal.SIGSTOP if stop_s else signal.SIGKILL)
                if stop_s:
                    asyncio.get_running_loop().call_later(stop_s, os.kill, pid, signal.SIGCONT)
    await running
    if kill:
        await asyncio.sleep(stop_s)
    return streams, killed_at


async def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("--worker", nargs="+", default=["expert-1"], help="who is killed; expert-1")
    parser.add_argument("--redundancy", type=int, default=1, help="replicas of each expert")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--stop", type=float, default=0.0, help="seconds that it is stopped for instead")
    parser.add_argument("--hedge-after", type=int, default=150, help="milliseconds; see msi-launch")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--standby", action="store_true", help="a coordinator stands by for the other")
    arguments = parser.parse_args()
    pauses: dict[str, list[float]] = {part: [] for part in WHEN}
    num_failed = num_changed = 0
    async with instance_of(arguments) as instance:
        await played(instance, arguments.streams, 20)
        undisturbed, _ = await played(instance, arguments.streams, arguments.tokens)
        for _ in range(arguments.rounds):
            streams, killed_at = await played(
                instance, arguments.streams, arguments.tokens, arguments.worker, arguments.stop
            )
            for stream, expected in zip(streams, undisturbed, strict=True):
                num_failed += bool(stream.failure)
                num_changed += not stream.failure and stream.token_ids != expected.token_ids
                for part, pause_s in stream.pauses_s(killed_at).items():
                    pauses[part].append(pause_s)
            await instance.all_are_back()
    found = {
        "schema_version": 1,
        "num_streams": len(pauses["before"]),
        "num_failed": num_failed,
        "num_changed": num_changed,
        **{f"longest_pause_{part}_s": _tail(times) for part, times in pauses.items()},
    }
    what = f"{' and '.join(arguments.worker)} {f'stopped for {arguments.stop:g} s' if arguments.stop else 'killed'}"
    if arguments.json:
        print(json.dumps(found))
        return
    print(
        f"{what} {arguments.rounds} times under {arguments.streams} streams, {arguments.transport}, "
        f"redundancy {arguments.redundancy}{', a coordinator standing by' if arguments.standby else ''}: "
        f"{num_failed} failed, {num_changed} changed; longest pause of a stream "
        f"{_words(pauses['at_loss'])}, later {_words(pauses['later'])}, before {_words(pauses['before'])}"
    )


def _tail(pauses_s: list[float]) -> dict[str, float]:
    return {"p50_s": statistics.median(pauses_s), "p99_s": sorted(pauses_s)[int(0.99 * len(pauses_s))]}


def _words(pauses_s: list[float]) -> str:
    tail = _tail(pauses_s)
    return f"{1e3 * tail['p50_s']:.0f} ms (median), {1e3 * tail['p99_s']:.0f} ms (99th percentile)"


if __name__ == "__main__":
    asyncio.run(main())
