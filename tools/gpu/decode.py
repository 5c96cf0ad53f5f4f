"""Decoding with dummy weights of known models' shapes: colocated and split on one GPU.

Of each model as many layers as are made up quickly and fit: times are per layer, tokens/s are of these layers and the
head. Two processes on one GPU take turns on it, so their throughput is no figure of a split instance with a GPU each.
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from msi import Engine
from tools.bench_decode import Run, drive, run_ours
from tools.gpu import peers
from tools.gpu.batches import WARM_TOKENS, prompts_of, sizes
from tools.gpu.idle import Utilisation, profiled_idle
from tools.gpu.report import Add, Row
from tools.gpu.runner import Place
from tools.gpu.shapes import Shape
from tools.gpu.ways import DEFAULT, GRAPHS, PLAIN, Way

LAYOUTS: dict[str, dict[str, Any]] = {
    "colocated": {"colocated": True, "transport": "inproc"},
    "split": {"micro_batches": 2, "transport": "shm"},
}
PROFILED_BATCH = 128
HEARTBEAT_S = 1.2


def sections_of(shape: Shape, small: Shape) -> dict[str, Any]:
    """By name, what measures a shape; in a dry run the small one in its place."""
    sections: dict[str, Any] = {
        layout + way.ending: functools.partial(_ours, shape, small, layout, way)
        for layout in LAYOUTS
        for way in (PLAIN, DEFAULT)
    }
    return sections | {
        "colocated" + GRAPHS.ending: functools.partial(_ours, shape, small, "colocated", GRAPHS),
        "transformers": functools.partial(peers.generate, shape, small),
        "continuous": functools.partial(peers.generate_batch, shape, small),
        "vllm": functools.partial(peers.vllm, shape, small),
    }


def _ours(shape: Shape, small: Shape, layout: str, way: Way, place: Place, add: Add) -> None:
    shape = small if place.is_dry else shape
    options = LAYOUTS[layout] | way.options | dict(place.engine)
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        model = shape.save(Path(folder) / shape.model_type)
        asyncio.run(_decode(shape, model, layout + way.label, options, place, add))


async def _decode(shape: Shape, model: Path, layout: str, options: dict[str, Any], place: Place, add: Add) -> None:
    batches, input_len, output_len = sizes(place)
    started = time.monotonic()
    async with Engine.local(
        model=model, device=place.device, load_format="dummy", max_num_seqs=max(batches), start_timeout_s=180,
        peer_timeout_s=30, gpu_memory_utilization=0.3, enable_prefix_caching=False,
        threads_per_worker=1 if place.is_dry else 0, **options,
    ) as engine:  # fmt: skip
        print(f"   started in {time.monotonic() - started:.1f} s", flush=True)
        for batch in batches:
            prompts = prompts_of(shape, batch, input_len)
            await drive(engine, prompts, WARM_TOKENS)
            with Utilisation() as utilisation:
                run = await run_ours(engine, prompts, output_len)
                ended = time.monotonic()
            busy = utilisation.between(ended - run.tpot_s * (output_len - 2), ended)
            await asyncio.sleep(HEARTBEAT_S)  # with the medians of the last turns
            stats = await engine.stats()
            times = next(worker for worker in stats.workers if worker.role == "attention").status.times
            run = replace(run, t_attention_s=times.attention_s, t_expert_s=times.expert_s)
            _add(shape, layout, batch, input_len + output_len // 2, run, busy, place, add)
        if options["transport"] == "inproc" and not place.is_dry:
            await _idle(shape, layout, engine, prompts_of(shape, PROFILED_BATCH, input_len), add)


async def _idle(shape: Shape, layout: str, engine: Engine, prompts: list[tuple[int, ...]], add: Add) -> None:
    name = f"{shape.label}, {layout}, {len(prompts)} sequences: GPU idle"
    try:
        add(
            Row(
                name, await profiled_idle(engine, prompts), "", note="by the profiler, which slows launches; asked: 5 %"
            )
        )
    except Exception as error:  # the profiler's own, of many kinds; what was measured before stays
        add(Row(name, "not measured", note=f"{type(error).__name__}: {error}"[:200]))


def _add(
    shape: Shape, layout: str, batch: int, context_len: int, run: Run, busy: float | None, place: Place, add: Add
) -> None:
    in_one = -(-batch // max(1, run.num_micro_batches))  # sequences of a micro-batch
    how = f", m = {run.num_micro_batches}" if layout.startswith("split") else ""
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
        add(Row(f"{at}: GPU idle", 1 - busy, "", note="by the driver's samples; asked: 5 %"))
