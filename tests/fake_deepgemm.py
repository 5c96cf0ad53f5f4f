"""A module with the signatures that sgl-deep-gemm 0.2.5 has for products in float8, in plain float32.

It computes what the library documents, in the layouts that its kernels for Hopper take, and refuses what they refuse.
"""

from __future__ import annotations

import torch

ALIGNMENT = 128  # rows of a group begin at a multiple of it
BLOCK = 128


def get_mk_alignment_for_contiguous_layout():
    return ALIGNMENT


def _check_rows(values, scales):
    rows, depth = values.shape
    assert values.dtype is torch.float8_e4m3fn
    assert values.stride() == (depth, 1)
    assert scales.dtype is torch.float32
    assert scales.shape == (rows, depth // BLOCK)
    assert scales.stride(0) == 1, "else the library transposes them, in memory that it takes"
    assert scales.shape[1] == 1 or scales.stride(1) == -(-rows // 4) * 4


def _check_matrices(values, scales):
    *groups, outputs, depth = values.shape
    assert values.dtype is torch.float8_e4m3fn
    assert values.is_contiguous()
    assert scales.is_contiguous()
    assert scales.dtype is torch.float32
    assert list(scales.shape) == [*groups, -(-outputs // BLOCK), -(-depth // BLOCK)]
    assert outputs % 64 == depth % BLOCK == 0


def _matrix(values, scales):
    wide = scales.repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)
    return values.float() * wide[: values.shape[-2], : values.shape[-1]]


def product(values, scales, matrix):
    return values.float() * scales.repeat_interleave(BLOCK, dim=1) @ matrix.T


def fp8_gemm_nt(
    a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="", disable_ue8m0_cast=False, alpha=None,
    epilogue=None,
):  # fmt: skip
    _check_rows(*a)
    _check_matrices(*b)
    assert d.dtype is torch.bfloat16
    assert d.shape == (len(a[0]), len(b[0]))
    d.copy_(product(*a, _matrix(*b)))


def m_grouped_fp8_gemm_nt_contiguous(
    a, b, d, grouped_layout, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk", disable_ue8m0_cast=False,
    use_psum_layout=False, ensure_zero_padding=True, expected_m_for_psum_layout=None, epilogue=None,
):  # fmt: skip
    """It looks at a tile's first row alone: all rows of a tile are multiplied by that one's matrix, or none is."""
    _check_rows(*a)
    _check_matrices(*b)
    assert grouped_layout.dtype is torch.int32
    assert grouped_layout.is_contiguous()
    assert len(grouped_layout) == len(a[0]) == len(d)
    assert d.dtype is torch.bfloat16
    for first in range(0, len(d), ALIGNMENT):
        rows = slice(first, first + ALIGNMENT)
        group = int(grouped_layout[first])
        assert set(grouped_layout[rows].tolist()) <= {group, -1}, "a tile is of one matrix"
        if group >= 0:
            d[rows] = product(a[0][rows], a[1][rows], _matrix(b[0][group], b[1][group])).to(d.dtype)
