#!/usr/bin/env python3
"""What one types into a notebook: `LLM` waits for whole answers, also where a loop runs already.

tools/examples/notebook.py [MODEL]            # the demo model without it
"""

from __future__ import annotations

import asyncio
import sys

from msi import LLM, SamplingParams

PROMPTS = ["It was a fine morning, and", "Mr. Darcy, who had"]


async def cells() -> None:
    """Runs on a loop, as the cells of a notebook do."""
    with LLM(sys.argv[1] if len(sys.argv) > 1 else None, expert_workers=2) as llm:
        for answer in llm.generate(PROMPTS, SamplingParams(max_tokens=30, temperature=0.8, seed=1)):
            print(f"{answer.prompt}{answer.outputs[0].text}")
        (answer,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8, temperature=0, logprobs=1))
        print(f"log-probability of{answer.outputs[0].text!r}: {answer.outputs[0].cumulative_logprob:.2f}")


if __name__ == "__main__":
    asyncio.run(cells())
