"""Ways to cut the experts' matrix products that `tools/tune_kernels.py` tries, by rows of an expert; the plain first.

All of them fit an H100: compiled with Triton 3.6 for sm_90, none spills a register.
"""

from __future__ import annotations

from msi.kernels.triton.tiles import Product


def _product(
    block_n: int, block_k: int, num_warps: int, num_stages: int, per_sm: int = 1, splits: int = 1, how: str = ""
) -> Product:
    return Product(block_n, block_k, num_warps, num_stages, per_sm, splits, "s" in how, "t" in how, "f" in how)


# (block_n, block_k, warps, stages): what is tried, the plainest first
GATE_UP = {
    16: [
        _product(64, 128, 4, 3, per_sm=2),
        _product(64, 128, 4, 3, per_sm=3),
        _product(64, 128, 4, 4, per_sm=2),
        _product(32, 128, 4, 4, per_sm=3),
        _product(64, 256, 4, 2, per_sm=2),
        _product(128, 128, 4, 3),
        _product(64, 128, 4, 3, per_sm=2, how="t"),
        _product(64, 128, 4, 3, per_sm=2, how="st"),
        _product(128, 64, 8, 5, how="st"),
    ],
    64: [
        _product(64, 64, 4, 4, per_sm=2),
        _product(64, 128, 4, 3),
        _product(128, 64, 8, 4),
        _product(64, 64, 4, 4, per_sm=2, how="t"),
        _product(64, 128, 4, 4, how="st"),
        _product(128, 64, 8, 5, how="st"),
    ],
    128: [
        _product(64, 64, 8, 4),
        _product(64, 64, 8, 3, per_sm=2),
        _product(128, 64, 8, 4),
        _product(64, 64, 8, 5, how="t"),
        _product(64, 128, 8, 3),
        _product(64, 128, 8, 3, how="t"),
        _product(64, 64, 8, 3, per_sm=2, how="t"),
        _product(128, 64, 8, 4, how="t"),
        _product(64, 64, 4, 4, how="st"),
    ],
    1024: [
        _product(128, 64, 8, 4),
        _product(128, 64, 8, 3),
        _product(128, 64, 8, 4, how="t"),
        _product(64, 64, 4, 4, per_sm=2, how="t"),
    ],
}
DOWN = {
    16: [
        _product(64, 128, 4, 4, per_sm=2, splits=1),
        _product(64, 128, 4, 4, per_sm=3, splits=1),
        _product(128, 128, 4, 3, per_sm=3, splits=1),
        _product(64, 256, 4, 3, per_sm=2, splits=1),
        _product(64, 128, 4, 4, per_sm=3, splits=1, how="t"),
        _product(64, 128, 4, 4, per_sm=3, splits=1, how="f"),
        _product(64, 128, 4, 4, per_sm=3, splits=4),
        _product(64, 256, 4, 3, per_sm=2, splits=4),
        _product(64, 128, 4, 4, per_sm=3, splits=8),
    ],
    64: [
        _product(128, 64, 4, 4, per_sm=2, splits=1),
        _product(128, 64, 4, 3, per_sm=3, splits=1),
        _product(64, 128, 4, 3, per_sm=2, splits=1),
        _product(64, 64, 4, 4, per_sm=3, splits=1),
        _product(128, 64, 4, 4, per_sm=2, splits=1, how="t"),
        _product(128, 64, 4, 4, per_sm=2, splits=1, how="f"),
        _product(64, 128, 4, 4, per_sm=2, splits=2),
        _product(64, 128, 4, 3, per_sm=2, splits=4),
        _product(128, 64, 4, 4, per_sm=2, splits=5),
    ],
    128: [
        _product(128, 64, 8, 4, splits=1),
        _product(128, 64, 8, 3, per_sm=2, splits=1),
        _product(64, 64, 8, 4, per_sm=2, splits=1),
        _product(128, 64, 8, 3, per_sm=2, splits=1, how="t"),
        _product(128, 64, 8, 3, per_sm=2, splits=1, how="f"),
        _product(256, 64, 8, 4, splits=1, how="t"),
        _product(256, 64, 8, 4, splits=1, how="tf"),
        _product(64, 64, 4, 4, per_sm=2, splits=2),
        _product(256, 64, 8, 4, splits=5, how="t"),
        _product(256, 64, 8, 4, splits=11, how="t"),
        _product(128, 128, 8, 3, splits=8, how="t"),
        _product(128, 64, 8, 4, splits=8, how="t"),
    ],
    1024: [
        _product(128, 64, 8, 4),
        _product(128, 64, 8, 3, per_sm=2, how="t"),
        _product(256, 64, 8, 4, how="t"),
        _product(256, 64, 8, 4, how="tf"),
        _product(128, 64, 8, 4, how="t"),
    ],
}
BLOCK_M = {16: 16, 64: 64, 128: 128, 1024: 128}
