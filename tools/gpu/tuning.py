"""How the experts' products are cut best: measured, kept for sections after this one, and told beside the floors."""

from __future__ import annotations

import os
from pathlib import Path

from tools.gpu.report import Add, Row
from tools.gpu.runner import NotHere, Place

LEFT_S = 8.0  # for what is begun when time is up


def run(place: Place, add: Add) -> None:
    """The table goes where the kernels look for it and, as on a machine that is lent, to $OUT."""
    from msi.kernels.triton import why_unavailable

    if (reason := why_unavailable()) is not None:
        raise NotHere(reason)
    from msi.kernels.triton.tiles import TUNED
    from tools.tune_kernels import DRY, SHAPES, tune, write

    found = tune((DRY,) if place.is_dry else SHAPES, place.left_s - LEFT_S, lambda line: print("  ", line, flush=True))
    for entry in found["shapes"]:
        for tiles in entry["tiles"]:
            cut = f"{tiles['gate_up_us']} us of gate and up, {tiles['down_and_answer_us']} of down and answers"
            name = f"tuned experts, {entry['name']}, {tiles['num_rows']} rows each: a wave"
            if place.is_dry:
                add(Row(name, True, note="went through"))
            else:
                add(Row(name, tiles["wave_us"], "us", tiles["floor_us"], tiles["asked"], note=cut))
        for wave in entry.get("float8", ()) if not place.is_dry else ():
            name = f"experts in float8, {entry['name']}, {wave['num_rows']} rows each: a wave"
            add(Row(name, wave["wave_us"], "us", wave["floor_us"], note=f"{wave['apart']} from bfloat16's answers"))
    if not place.is_dry and found["shapes"]:
        for folder in (TUNED, *([Path(os.environ["OUT"]) / "tuned"] if "OUT" in os.environ else [])):
            print("  ", write(found, folder), flush=True)
