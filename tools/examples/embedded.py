#!/usr/bin/env python3
"""An instance inside your own program: two requests at a time, streamed.

    tools/examples/embedded.py [MODEL]            # the demo model without it

Leaves no process, socket or shared memory behind. `Engine.connect("tcp://host:port")` in place of `Engine.local` uses
an instance that runs elsewhere.
"""

from __future__ import annotations

import asyncio
import sys

from msi import Engine, EngineError, SamplingParams

PROMPTS = ("It was a fine morning, and", "Mr. Darcy, who had")


async def main(model: str | None) -> None:
    async with Engine.local(model=model, attention_workers=1, expert_workers=2) as engine:
        texts = await asyncio.gather(*(told(engine, prompt) for prompt in PROMPTS))
    for text in texts:
        print(text)


async def told(engine: Engine, prompt: str) -> str:
    """The prompt and how it goes on. A request that fails raises an EngineError whose text is one sentence."""
    text = prompt
    async for output in engine.generate(prompt, SamplingParams(max_tokens=30, temperature=0.8, seed=1)):
        text += output.text
    return text


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
    except EngineError as error:
        sys.exit(str(error))
