"""All sections, in the order in which they are worth their time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch  # loaded once, before sections fork  # noqa: F401

from tools.gpu import (
    attention_tiles,
    ceilings,
    decode,
    kernels,
    machine,
    precision,
    sanitizer,
    stages,
    tokens,
    tuning,
    waits,
)
from tools.gpu.gates import gates
from tools.gpu.handles import handles
from tools.gpu.host_memory import host_memory
from tools.gpu.replays import replays
from tools.gpu.report import Add, Row, Value
from tools.gpu.runner import Place, Section
from tools.gpu.shapes import MIXTRAL, QWEN3, SMALL, SMALL_QWEN3
from tools.gpu.ways import WAYS


def by_rows(look: Callable[..., None]) -> Callable[[Place, Add], None]:
    """A section of what is given `row(name, value, unit, floor, note)` and whether the run is dry."""

    def run(place: Place, add: Add) -> None:
        def row(name: str, value: Value, unit: str = "", floor: float | None = None, note: str = "") -> None:
            add(Row(name, value, unit, floor, note=note))

        look(row, dry=place.is_dry)

    return run


SECTIONS = {
    section.name: section
    for section in (
        Section("machine", machine.run, 30),
        Section("ceilings", ceilings.run, 30),
        Section("gates", by_rows(gates), 45),
        Section("kernels", kernels.are_right, 90),
        Section("precision", precision.run, 60),
        Section("tuning", tuning.run, 100),
        Section("times", kernels.take_times, 90),
        Section("attention-tiles", attention_tiles.run, 60),
        *(Section("tokens" + way.ending, partial(tokens.run, way), 100) for way in WAYS),
        *(
            Section(f"{name}-{how}", run, 90)
            for name, shape, small in (("mixtral", MIXTRAL, SMALL), ("qwen3", QWEN3, SMALL_QWEN3))
            for how, run in decode.sections_of(shape, small).items()
        ),
        Section("waits", waits.run, 90),
        Section("host-memory", by_rows(host_memory), 30),
        Section("replays", by_rows(replays), 30),
        Section("handles", by_rows(handles), 30),
        Section("stages", stages.run, 120),
        Section("sanitizer", sanitizer.run, 150),
    )
}
