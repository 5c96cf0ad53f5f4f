"""What msi-profile measures of a layer of a known model's shape, beside floors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from msi.profiler.measure import Measuring, measure
from tools.gpu.report import Add, Row
from tools.gpu.runner import Place
from tools.gpu.shapes import MIXTRAL, SMALL

BATCHES, CONTEXTS = (32, 128, 256), (256, 1024)


def run(place: Place, add: Add) -> None:
    shape = SMALL if place.is_dry else replace(MIXTRAL, num_layers=2)
    with tempfile.TemporaryDirectory(prefix="msi-gpu-") as folder:
        found = measure(
            Measuring(
                model_dir=shape.save(Path(folder) / shape.model_type),
                device=place.device,
                load_format="dummy",
                threads=(1,),
                batches=() if place.is_dry else BATCHES,
                contexts=() if place.is_dry else CONTEXTS,
                transports=("inproc",) if place.is_dry else ("inproc", "shm"),
                repeat=1,
                patience_s=0.0,
                is_quick=place.is_dry,
            ),
            _begin,
        )
    bandwidth, rate = place.ceilings.get("bytes_per_s"), place.ceilings.get("flop_per_s")
    for point in found.attention:
        floor = bandwidth and shape.attention_layer_bytes(point.num_tokens, point.context_len) / bandwidth * 1e6
        name = f"{shape.name}, T_a of {point.num_tokens} sequences of {point.context_len} tokens, {point.contention}"
        add(Row(name, point.seconds * 1e6, "us", floor))
    for one in found.expert:
        floor = None
        if bandwidth and rate:
            read = shape.expert_layer_bytes() / shape.num_experts * one.num_active_experts / bandwidth
            floor = max(read, one.num_expert_rows * shape.expert_row_flop() / rate) * 1e6
        name = f"{shape.name}, T_e of {one.num_expert_rows} rows at {one.num_active_experts} experts, {one.contention}"
        add(Row(name, one.seconds * 1e6, "us", floor))
    for comm in found.comm:
        add(Row(f"{shape.name}, T_c over {comm.transport}, {comm.num_bytes} bytes", comm.seconds * 1e6, "us"))


def _begin(what: str, num_steps: int) -> Callable[[], None]:
    print(f"   {what}", flush=True)
    return lambda: None
