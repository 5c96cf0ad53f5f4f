"""Greedy tokens of every family on the GPU against transformers' on a CPU, in float32, in each layout of one GPU."""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import tempfile
import time
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
WITHIN_S = 40.0  # that an instance is given, its start included


def run(way: Way, place: Place, add: Add) -> None:
    try:
        reference: Any = importlib.import_module("tests.reference")
        importlib.import_module("transformers")
    except ImportError as error:
        raise NotHere(f"transformers and pytest are needed: {error}") from error
    families = ["mixtral"] if place.is_dry else list(reference.FAMILIES)
    prompts, num_tokens = (DRY_PROMPTS, DRY_NUM_TOKENS) if place.is_dry else (PROMPTS, NUM_TOKENS)
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        expected = {}
        for family in families:
            model = reference.save_tiny(Path(folder) / family, family=family)
            expected[family] = reference.references(model, prompts, num_tokens)
        asyncio.run(_compare(Path(folder), expected, way, place, add))


async def _compare(folder: Path, expected: dict[str, Any], way: Way, place: Place, add: Add) -> None:
    for layout, options in LAYOUTS.items():
        started = time.monotonic()

        async def one(family: str, options: dict[str, Any] = options) -> tuple[bool, str]:
            try:
                faulthandler.dump_traceback_later(WITHIN_S + 5)  # a loop that is blocked says where
                try:
                    async with asyncio.timeout(WITHIN_S):
                        found = await _tokens(folder / family, expected[family], place, options | way.options)
                finally:
                    faulthandler.cancel_dump_traceback_later()
            except (EngineError, TimeoutError) as error:
                return False, f"{type(error).__name__}: {error}"[:200]
            wrong = sum(tokens != one.tokens for tokens, one in zip(found, expected[family], strict=True))
            return not wrong, f"{wrong} of {len(found)} answers differ" if wrong else ""

        if options["transport"] == "inproc":
            ends = [await one(family) for family in expected]
        else:  # their processes take long to start, and little of the GPU
            ends = await asyncio.gather(*(one(family) for family in expected))
        for family, (is_equal, note) in zip(expected, ends, strict=True):
            add(Row(f"tokens equal transformers': {family}, {layout}{way.label}", is_equal, note=note))
        print(f"   {layout}: {time.monotonic() - started:.1f} s", flush=True)


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
