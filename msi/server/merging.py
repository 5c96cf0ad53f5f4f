"""The outputs of several prompts as those of one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from msi.types import Output

MAX_AHEAD = 64  # outputs that nobody has taken yet; what comes then waits in the engine, packed


async def merged(outputs: Sequence[AsyncGenerator[Output, None]], num_choices: int) -> AsyncGenerator[Output, None]:
    """Outputs as they come, choices numbered prompt by prompt. Closing it closes all; so does the failure of one.

    Args:
        outputs: of each prompt.
        num_choices: of each prompt.
    """
    queue: asyncio.Queue[Output | BaseException | None] = asyncio.Queue(MAX_AHEAD)

    async def forward(prompt: int) -> None:
        try:
            async for output in outputs[prompt]:
                await queue.put(output._replace(index=prompt * num_choices + output.index))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
        finally:
            await outputs[prompt].aclose()

    tasks: list[asyncio.Task[None]] = []
    num_running = len(outputs)
    try:
        for prompt in range(len(outputs)):
            tasks.append(asyncio.create_task(forward(prompt)))
            await asyncio.sleep(0)  # each takes its time to begin: nobody waits for all of them
        while num_running:
            match await queue.get():
                case None:
                    num_running -= 1
                case Output() as output:
                    yield output
                case error:
                    raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
