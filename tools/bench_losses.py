#!/usr/bin/env python
"""How long it takes from the death of a local worker to its requests' errors, and from its stop (SIGSTOP), too.

    tools/bench_losses.py --rounds 5

Each round kills a worker while streams run on all, takes the time until the last lost stream has its error, and waits
until the instance serves again. One line per kind: median and worst.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time

from msi import Engine, RequestFailed, SamplingParams, Unavailable
from msi_launch.command_line import ScriptLine

LONG = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)


async def stream(engine: Engine, index: int, has_begun: asyncio.Event) -> tuple[str, float]:
    """How a request ended, and when."""
    try:
        async for _ in engine.generate([5 + index] * 8, LONG):
            has_begun.set()
    except (RequestFailed, Unavailable) as error:
        has_begun.set()
        return str(error), time.monotonic()
    return "", time.monotonic()


async def serves(engine: Engine) -> bool:
    try:
        async for _ in engine.generate([7, 8, 9], SHORT):
            pass
    except (RequestFailed, Unavailable):
        return False
    return engine.status[0]


async def loss_s(engine: Engine, worker_id: str, num_streams: int) -> tuple[float, float]:
    """Seconds from a kill to the last error, and to the first request that is served by everybody again."""
    begun = [asyncio.Event() for _ in range(num_streams)]
    streams = [asyncio.create_task(stream(engine, index, begun[index])) for index in range(num_streams)]
    await asyncio.gather(*(one.wait() for one in begun))
    pid = engine.pids[worker_id]
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    ends = [at for error, at in await asyncio.gather(*streams) if error]
    assert ends, "no stream was lost"
    while engine.pids[worker_id] == pid or not await serves(engine):
        await asyncio.sleep(0.05)
    return max(ends) - killed_at, time.monotonic() - killed_at


async def main() -> None:
    parser = ScriptLine(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=8)
    arguments = parser.parse_args()
    for worker_id in ("attention-1", "expert-1"):
        told, back = [], []
        async with Engine.local(attention_workers=2, expert_workers=2, micro_batches=2, threads_per_worker=1) as engine:
            for _ in range(arguments.rounds):
                told_s, back_s = await loss_s(engine, worker_id, arguments.streams)
                told.append(told_s)
                back.append(back_s)
        print(
            f"{worker_id} killed {arguments.rounds} times: its requests' errors after {statistics.median(told):.3f} s "
            f"(worst {max(told):.3f} s), served again after {statistics.median(back):.1f} s (worst {max(back):.1f} s)",
            flush=True,
        )


if __name__ == "__main__":
    asyncio.run(main())
