"""How the experts' matrix products are cut: by how many rows an expert has, for a shape, a dtype and a device.

What a device has been measured to like lies in `tuned/`, one JSON file for each device, made by
`tools/tune_kernels.py`; without one, tiles that fit every device of its kind.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"
SMALL_SHARED_BYTES, LARGE_SHARED_BYTES = 128 * 1024, 200 * 1024  # of a program: less than the one, at least the other


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product.

    Attributes:
        block_n, block_k: of a tile of weights.
        per_sm: programs that one multiprocessor is given.
        splits: parts that the long way is cut into (only of the second product).
        is_swapped: weights are the tall operand.
        is_tma: weights come by descriptors.
        is_flat: a unit's loads begin before the one before it ends.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int = 1
    splits: int = 1
    is_swapped: bool = False
    is_tma: bool = False
    is_flat: bool = False


@dataclass(frozen=True, slots=True)
class Tiles:
    """For experts of up to `rows` rows each; both products have `block_m` of them in a tile."""

    rows: int
    block_m: int
    gate_up: Product
    down: Product


TINY = (Tiles(1 << 30, 16, Product(32, 32, 4, 2), Product(32, 32, 4, 2)),)  # float32: for tests of equality
SMALL = (
    Tiles(16, 16, Product(64, 64, 4, 3, per_sm=2), Product(64, 64, 4, 4, per_sm=2, splits=4)),
    Tiles(64, 64, Product(64, 64, 4, 3), Product(64, 64, 4, 3, splits=2)),
    Tiles(1 << 30, 64, Product(64, 64, 4, 3), Product(128, 64, 4, 3)),
)
LARGE = (
    Tiles(16, 16, Product(64, 128, 4, 3, per_sm=2), Product(64, 128, 4, 4, per_sm=2, splits=4)),
    Tiles(32, 32, Product(64, 128, 4, 3, per_sm=2), Product(64, 128, 4, 3, per_sm=2, splits=4)),
    Tiles(64, 64, Product(64, 64, 4, 4, per_sm=2), Product(128, 64, 4, 4, splits=4)),
    Tiles(128, 128, Product(64, 64, 8, 4), Product(128, 64, 8, 4, splits=4)),
    Tiles(1 << 30, 128, Product(128, 64, 8, 4), Product(128, 64, 8, 4)),
)


MEDIUM = (  # the first product of many rows is narrower, for registers would not hold it
    *LARGE[:2],
    Tiles(64, 64, Product(64, 64, 8, 4, per_sm=2), Product(128, 64, 4, 4, splits=4)),
    LARGE[3],
    Tiles(1 << 30, 128, Product(64, 64, 8, 4), Product(128, 64, 8, 4)),
)


def default_tiles(dtype: torch.dtype, shared_bytes: int) -> tuple[Tiles, ...]:
    """Without measurements; `shared_bytes` of memory a program can have."""
    if dtype.itemsize > 2:
        return TINY
    if shared_bytes < SMALL_SHARED_BYTES:
        return SMALL
    is_wide = shared_bytes >= LARGE_SHARED_BYTES and dtype.itemsize == 2
    return tuple(_fitted(one, shared_bytes) for one in (LARGE if is_wide else MEDIUM))


def _fitted(tiles: Tiles, shared_bytes: int) -> Tiles:
    """With as few stages as there is shared memory for."""

    def fitted(product: Product, num_weights: int) -> Product:
        stage_bytes = 2 * product.block_k * (tiles.block_m + num_weights * product.block_n)
        return replace(product, num_stages=min(product.num_stages, shared_bytes // stage_bytes))

    return replace(tiles, gate_up=fitted(tiles.gate_up, 2), down=fitted(tiles.down, 1))


def tiles_for(device: str, hidden: int, inner: int, dtype: torch.dtype, shared_bytes: int) -> tuple[Tiles, ...]:
    """What was measured on this device for experts of this shape, else the default.

    Args:
        device: its name, as the driver says it.
    """
    path = TUNED / f"{file_name(device)}.json"
    if path.exists():
        for entry in json.loads(path.read_text())["shapes"]:
            is_as_wide = getattr(torch, entry["dtype"]).itemsize == dtype.itemsize
            if is_as_wide and (entry["hidden"], entry["inner"]) == (hidden, inner):
                return tuple(from_json(one) for one in entry["tiles"])
    return default_tiles(dtype, shared_bytes)


def choose(tiles: tuple[Tiles, ...], rows_per_expert: float) -> Tiles:
    return next((one for one in tiles if rows_per_expert <= one.rows), tiles[-1])


def expected_rows(num_rows: int, k: int, num_experts: int, num_model_experts: int) -> float:
    """Of an expert here, of a wave's rows, which chose k of all experts of the model and at least one of ours each."""
    share = num_experts / num_model_experts
    return min(float(num_rows), num_rows * k / num_model_experts / (1.0 - (1.0 - share) ** k))


def from_json(entry: dict[str, Any]) -> Tiles:
    return Tiles(entry["rows"], entry["block_m"], Product(**entry["gate_up"]), Product(**entry["down"]))


def to_json(tiles: Tiles) -> dict[str, Any]:
    return asdict(tiles)


def file_name(device: str) -> str:
    return "".join(one if one.isalnum() else "_" for one in device)
