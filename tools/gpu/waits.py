"""Whether a layer waits for the device, or asks the driver for memory: neither may, once an instance decodes.

torch raises where one of its operators would wait; only programs that read values, and the first answer, which loads
what it needs, may.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from msi import Engine, SamplingParams
from msi.device.cuda_driver import CudaDriver
from msi.errors import EngineError
from tools.gpu.batches import prompts_of
from tools.gpu.report import Add, Row
from tools.gpu.runner import Place
from tools.gpu.shapes import SMALL, SMALL_QWEN3

WAYS: dict[str, dict[str, Any]] = {"piece by piece": {}, "captured graphs": {"enforce_eager": False}}
NUM_SEQS, PROMPT_LEN, NUM_TOKENS = 4, 20, 24
WITHIN_S = 40.0
LIMITS = {"max_num_seqs": NUM_SEQS, "max_model_len": 128, "slot_rows": 48, "num_gpu_blocks_override": 128}


def run(place: Place, add: Add) -> None:
    launch = CudaDriver.launch
    for shape in (SMALL, SMALL_QWEN3):
        with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
            model = shape.save(Path(folder) / shape.model_type)
            for way, options in WAYS.items():
                watched = Watched(launch)
                CudaDriver.launch = watched.launch  # type: ignore[method-assign,assignment]
                try:
                    asyncio.run(_decode(f"{shape.model_type}, {way}", model, options, place, watched, add))
                finally:
                    CudaDriver.launch = launch  # type: ignore[method-assign]


class Watched:
    """Programs as the driver is given them; attribute `is_strict`: those that read nothing must not wait."""

    def __init__(self, launch: Callable[..., None]) -> None:
        self.is_strict = False
        self.num_watched = 0
        watched = self

        def strict(driver: CudaDriver, stream: Any, work: Callable[[], object], reads: bool = False) -> None:
            if reads or not watched.is_strict:
                launch(driver, stream, work, reads)
                return
            watched.num_watched += 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                launch(driver, stream, work, reads)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        self.launch = strict


async def _decode(what: str, model: Path, options: dict[str, Any], place: Place, watched: Watched, add: Add) -> None:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)

    async def answers(engine: Engine) -> None:
        async def one(prompt: tuple[int, ...]) -> None:
            async for _ in engine.generate(prompt, params):
                pass

        async with asyncio.timeout(WITHIN_S):
            await asyncio.gather(*map(one, prompts_of(SMALL, NUM_SEQS, PROMPT_LEN)))

    async with Engine.local(
        model=model, device=place.device, load_format="dummy", transport="inproc", micro_batches=2,
        **(LIMITS | options | dict(place.engine)),
    ) as engine:  # fmt: skip
        await answers(engine)
        watched.is_strict, before = True, _asked(place)
        try:
            await answers(engine)
        except (EngineError, TimeoutError) as error:
            add(Row(f"no layer waits for the device: {what}", False, note=f"{type(error).__name__}: {error}"[:200]))
            return
        finally:
            watched.is_strict = False
        if place.is_dry:
            add(Row(f"no layer waits for the device: {what}", "not in a dry run"))
            return
        note = f"{watched.num_watched} programs were watched"
        add(Row(f"no layer waits for the device: {what}", watched.num_watched > 0, note=note))
        add(Row(f"times that the driver was asked for memory: {what}", _asked(place) - before, note="asked: 0"))


def _asked(place: Place) -> int:
    return 0 if place.is_dry else int(torch.cuda.memory_stats()["num_device_alloc"])
