#!/usr/bin/env python
"""How long streams stand still when a local attention worker dies, and until errors come when an expert worker does.

    tools/bench_losses.py --rounds 5

Each round kills a worker while streams run on all, takes the longest wait for a token (an attention worker: its streams
go on elsewhere) or the time until the last lost stream has its error (an expert worker), and waits until the instance
serves again. One line per kind: median and worst.
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


async def stream(engine: Engine, index: int, has_begun: asyncio.Event) -> tuple[str, float, float]:
    """How a request ended, when, and the longest wait for a token behind the first."""
    last_at = worst_s = 0.0
    try:
        async for _ in engine.generate([5 + index] * 8, LONG):
            has_begun.set()
            now = time.monotonic()
            worst_s = max(worst_s, now - last_at if last_at else 0.0)
            last_at = now
    except (RequestFailed, Unavailable) as error:
        has_begun.set()
        return str(error), time.monotonic(), worst_s
    return "", time.monotonic(), worst_s


async def serves(engine: Engine) -> bool:
    try:
        async for _ in engine.generate([7, 8, 9], SHORT):
            pass
    except (RequestFailed, Unavailable):
        return False
    return engine.status[0]


async def loss_s(engine: Engine, worker_id: str, num_streams: int) -> tuple[float, float]:
    """Seconds that streams stood still, or from a kill to the last error; and until everybody serves again."""
    begun = [asyncio.Event() for _ in range(num_streams)]
    streams = [asyncio.create_task(stream(engine, index, begun[index])) for index in range(num_streams)]
    await asyncio.gather(*(one.wait() for one in begun))
    pid = engine.pids[worker_id]
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    ended = await asyncio.gather(*streams)
    noticed_s = max((at - killed_at for error, at, _ in ended if error), default=max(worst_s for *_, worst_s in ended))
    while engine.pids[worker_id] == pid or not await serves(engine):
        await asyncio.sleep(0.05)
    return noticed_s, time.monotonic() - killed_at


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
            f"{worker_id} killed {arguments.rounds} times: noticed for {statistics.median(told):.3f} s "
            f"(worst {max(told):.3f} s), served again after {statistics.median(back):.1f} s (worst {max(back):.1f} s)",
            flush=True,
        )


if __name__ == "__main__":
    asyncio.run(main())
