"""Greedy tokens of every family on the GPU against transformers' on a CPU, in float32, in each layout of one GPU.

With numbers in eight bits they are those of this server on a CPU, with as many expert workers, as answers of each are
rounded by themselves. A sum in another order may round one number in a million to the next, so a token that differs
then is no proof; many are.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from msi import Engine, SamplingParams
from msi.errors import EngineError
from tools.gpu.report import Add, Row
from tools.gpu.runner import NotHere, Place
from tools.gpu.ways import Way

PROMPTS, NUM_TOKENS = [1, 17, 64, 129], 12
DRY_PROMPTS, DRY_NUM_TOKENS = [5, 17], 4
LAYOUTS: dict[str, dict[str, Any]] = {  # first that whose many processes fill Triton's cache at once
    "1 + 1 processes that share the GPU": {"micro_batches": 2, "transport": "shm"},
    "colocated in one process": {"colocated": True, "transport": "inproc"},
    "2 + 2 workers in one process": {
        "attention_workers": 2, "expert_workers": 2, "micro_batches": 2, "transport": "inproc",
    },
}  # fmt: skip
ROUNDED_FAMILIES = ("mixtral", "qwen3", "gpt_oss")  # plainly, with normed heads, with sinks and biases
WITHIN_S = 40.0  # that an instance is given, its start included


def run(way: Way, place: Place, add: Add) -> None:
    try:
        reference: Any = importlib.import_module("tests.reference")
        importlib.import_module("transformers")
    except ImportError as error:
        raise NotHere(f"transformers and pytest are needed: {error}") from error
    families = ["mixtral"] if place.is_dry else list(ROUNDED_FAMILIES if way.is_rounded else reference.FAMILIES)
    prompts, num_tokens = (DRY_PROMPTS, DRY_NUM_TOKENS) if place.is_dry else (PROMPTS, NUM_TOKENS)
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        expected = {}
        for family in families:
            model = reference.save_tiny(Path(folder) / family, family=family)
            expected[family] = reference.references(model, prompts, num_tokens)
        asyncio.run(_compare(Path(folder), expected, way, place, add))


async def _compare(folder: Path, expected: dict[str, Any], way: Way, place: Place, add: Add) -> None:
    truth = "a CPU's" if way.is_rounded else "transformers'"
    of_workers = {}
    for layout, options in LAYOUTS.items():
        started = time.monotonic()
        num_workers = options.get("expert_workers", 1)
        if num_workers not in of_workers:
            of_workers[num_workers] = await _rounded(folder, expected, way, place, num_workers)
        wanted = of_workers[num_workers]

        async def one(
            family: str, options: dict[str, Any] = options, wanted: dict[str, Any] = wanted
        ) -> tuple[bool, str]:
            try:
                faulthandler.dump_traceback_later(WITHIN_S + 5)  # a loop that is blocked says where
                try:
                    async with asyncio.timeout(WITHIN_S):
                        found = await _tokens(folder / family, wanted[family], place, options | way.options)
                finally:
                    faulthandler.cancel_dump_traceback_later()
            except (EngineError, TimeoutError) as error:
                return False, f"{type(error).__name__}: {error}"[:200]
            wrong = sum(tokens != one.tokens for tokens, one in zip(found, wanted[family], strict=True))
            return not wrong, f"{wrong} of {len(found)} answers differ" if wrong else ""

        if options["transport"] == "inproc":
            ends = [await one(family) for family in expected]
        else:  # their processes take long to start, and little of the GPU
            ends = await asyncio.gather(*(one(family) for family in expected))
        for family, (is_equal, note) in zip(expected, ends, strict=True):
            add(Row(f"tokens equal {truth}: {family}, {layout}{way.label}", is_equal, note=note))
        print(f"   {layout}: {time.monotonic() - started:.1f} s", flush=True)


async def _rounded(folder: Path, expected: dict[str, Any], way: Way, place: Place, num_workers: int) -> dict[str, Any]:
    """What is expected; with numbers in eight bits, of instances on a CPU."""
    if not way.is_rounded:
        return expected
    place = replace(place, device="cpu", engine={})
    options = way.options | {"expert_workers": num_workers, "transport": "inproc"}
    found = {family: await _tokens(folder / family, one, place, options) for family, one in expected.items()}
    return {
        family: [replace(one, tokens=tokens) for one, tokens in zip(expected[family], found[family], strict=True)]
        for family in expected
    }


async def _tokens(model: Path, expected: Any, place: Place, options: dict[str, Any]) -> list[tuple[int, ...]]:
    params = SamplingParams(max_tokens=len(expected[0].tokens), temperature=0, ignore_eos=True)

    async def tokens_of(engine: Engine, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return tuple([token async for output in engine.generate(prompt, params) for token in output.token_ids])

    async with Engine.local(
        model=model,
        device=place.device,
        dtype="float32",
        slot_rows=48,
        num_gpu_blocks_override=128,
        threads_per_worker=1 if place.is_dry else 0,
        **(options | dict(place.engine)),
    ) as engine:
        return await asyncio.gather(*(tokens_of(engine, one.prompt) for one in expected))
