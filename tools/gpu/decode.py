"""Decoding with dummy weights of known models' shapes: colocated and split on one GPU, and transformers beside it.

Of each model as many layers as are made up quickly and fit: times are per layer, tokens/s are of these layers and the
head. Two processes on one GPU take turns on it, so their throughput is no figure of a split instance with a GPU each.
"""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from msi import Engine
from tools.bench_decode import Run, Transformers, drive, run_ours
from tools.gpu.report import Add, Row
from tools.gpu.runner import NotHere, Place
from tools.gpu.shapes import Shape

BATCHES, INPUT_LEN, OUTPUT_LEN = (32, 128, 256), 128, 96
DRY_BATCHES, DRY_INPUT_LEN, DRY_OUTPUT_LEN = (2,), 4, 12
LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated": {"colocated": True, "transport": "inproc"},
    "split": {"micro_batches": 2, "transport": "shm"},
}
WARM_TOKENS = 6


def sections_of(shape: Shape, small: Shape) -> dict[str, Any]:
    """By name, what measures a shape; in a dry run the small one in its place."""
    sections: dict[str, Any] = {
        layout: functools.partial(_ours, shape, small, layout, options) for layout, options in LAYOUTS.items()
    }
    return sections | {"transformers": functools.partial(_theirs, shape, small)}


def _sizes(place: Place) -> tuple[tuple[int, ...], int, int]:
    if place.is_dry:
        return DRY_BATCHES, DRY_INPUT_LEN, DRY_OUTPUT_LEN
    return BATCHES, INPUT_LEN, OUTPUT_LEN


def _prompts(shape: Shape, batch: int, input_len: int) -> list[tuple[int, ...]]:
    chance = random.Random(0)
    return [tuple(chance.randrange(3, shape.vocab_size) for _ in range(input_len)) for _ in range(batch)]


# -- ours ------------------------------------------------------------------------------------------------------------


def _ours(shape: Shape, small: Shape, layout: str, options: dict[str, Any], place: Place, add: Add) -> None:
    shape = small if place.is_dry else shape
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        asyncio.run(_decode(shape, shape.save(Path(folder) / shape.model_type), layout, options, place, add))


async def _decode(shape: Shape, model: Path, layout: str, options: dict[str, Any], place: Place, add: Add) -> None:
    batches, input_len, output_len = _sizes(place)
    started = time.monotonic()
    async with Engine.local(
        model=model, device=place.device, load_format="dummy", max_num_seqs=max(batches), start_timeout_s=180,
        peer_timeout_s=30, gpu_memory_utilization=0.3, enable_prefix_caching=False,
        threads_per_worker=1 if place.is_dry else 0, **options,
    ) as engine:  # fmt: skip
        print(f"   started in {time.monotonic() - started:.1f} s", flush=True)
        for batch in batches:
            prompts = _prompts(shape, batch, input_len)
            await drive(engine, prompts, WARM_TOKENS)
            with Utilisation() as utilisation:
                run = await run_ours(engine, prompts, output_len)
                ended = time.monotonic()
            busy = utilisation.between(ended - run.tpot_s * (output_len - 2), ended)
            _add(shape, layout, batch, input_len + output_len // 2, run, busy, place, add)


def _add(
    shape: Shape, layout: str, batch: int, context_len: int, run: Run, busy: float | None, place: Place, add: Add
) -> None:
    in_one = -(-batch // max(1, run.num_micro_batches))  # sequences of a micro-batch
    how = f", m = {run.num_micro_batches}" if layout == "split" else ""
    at = f"{shape.label}, {layout}{how}, {batch} sequences"
    attention_floor = expert_floor = None
    if (bandwidth := place.ceilings.get("bytes_per_s")) is not None:
        attention_floor = shape.attention_layer_bytes(in_one, context_len) / bandwidth * 1e6
        active = shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** in_one)  # of random routing
        expert_floor = shape.expert_layer_bytes() / shape.num_experts * active / bandwidth * 1e6
        if (rate := place.ceilings.get("flop_per_s")) is not None:
            expert_floor = max(expert_floor, in_one * shape.top_k * shape.expert_row_flop() / rate * 1e6)
    add(Row(f"{at}: decoding", run.decode_tokens_per_s, "tokens/s", note=f"{run.tpot_s * 1e3:.2f} ms a pass"))
    add(Row(f"{at}: T_a of a layer", run.t_attention_s * 1e6, "us", attention_floor, note=f"{in_one} sequences"))
    add(Row(f"{at}: T_e of a layer", run.t_expert_s * 1e6, "us", expert_floor, note=f"{in_one} sequences"))
    if busy is not None:
        add(Row(f"{at}: GPU idle", 1 - busy, "", note="share of time in which no kernel ran, by the driver's samples"))


class Utilisation:
    """The share of time in which some kernel ran, as the driver's tool samples it. A context manager."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Utilisation:
        if shutil.which("nvidia-smi") is not None:
            command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=50"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit():
                self._samples.append((time.monotonic(), int(line) / 100))

    def between(self, begin: float, end: float) -> float | None:
        """None where there are no samples of that time."""
        inside = [value for at, value in self._samples if begin + 0.2 <= at <= end]
        return fmean(inside) if inside else None


# -- transformers ----------------------------------------------------------------------------------------------------


def _theirs(shape: Shape, small: Shape, place: Place, add: Add) -> None:
    try:
        import transformers
    except ImportError as error:
        raise NotHere("transformers is not installed") from error
    shape = small if place.is_dry else shape
    batches, input_len, output_len = _sizes(place)
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        config: Any = transformers.AutoConfig.from_pretrained(shape.save(Path(folder)))
    config.eos_token_id = None
    with torch.device(place.device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    peer = Transformers(model)
    how = getattr(config, "_experts_implementation", None)
    for batch in batches:
        prompts = _prompts(shape, batch, input_len)
        peer.run(prompts, WARM_TOKENS)
        found = peer.run(prompts, output_len)
        add(
            Row(
                f"{shape.label}, transformers' generate, {batch} sequences: decoding", found["decode_tokens_per_s"],
                "tokens/s", note=f"{found['tpot_s'] * 1e3:.2f} ms a pass; {transformers.__version__}, experts: {how}",
            )
        )  # fmt: skip
