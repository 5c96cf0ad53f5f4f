"""Numbers in e4m3 on a GPU: how they are made, and rows of them with their scales.

Whoever reads one casts, for which GPUs have an instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """x float32, to the nearest, ties to even; beyond 448 either way 448, and a NaN stays one.

    In whole numbers, bit for bit what `msi.kernels.fp8.to_e4m3` makes: Triton's interpreter loses the carry of its own
    conversion, so 7.9 would be 4.
    """
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    large = (size + ((size >> 20) & 1) + 0x7FFFF - (120 << 23)) >> 20
    steps = size.to(tl.float32, bitcast=True) + 16384.0  # whose last bit is 2^-9, the least step of e4m3
    small = steps.to(tl.uint32, bitcast=True) - (141 << 23)
    code = tl.minimum(tl.where(size < (121 << 23), small, large), 0x7E)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def pack(x, BLOCK: tl.constexpr):
    """x float32 [BLOCK], whole groups of 128: e4m3 [BLOCK] and float32 scales [BLOCK // 128]."""
    groups = tl.reshape(x, [BLOCK // 128, 128])
    scales = tl.maximum(tl.max(tl.abs(groups), 1) / 448.0, 1e-12)
    has_nan = tl.max((groups != groups).to(tl.int32), 1) > 0  # which a maximum may pass over
    scales = tl.where(has_nan, float("nan"), scales)
    return tl.reshape(to_e4m3(groups / scales[:, None]), [BLOCK]), scales


@triton.jit
def unpack(row, columns, inside, SCALES_AT: tl.constexpr):
    """float32 of a packed row's columns, 0 outside; `row` is the address of its first byte, on a line of 16."""
    start = tl.multiple_of(row.to(tl.pointer_type(tl.float8e4nv)), 16)
    values = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
    scales = tl.load((row + SCALES_AT).to(tl.pointer_type(tl.float32)) + columns // 128, mask=inside, other=0.0)
    return values * scales


@triton.jit
def store_packed(row, x, first, SIZE: tl.constexpr, SCALES_AT: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [first, first + BLOCK) of a packed row of SIZE values, and their scales.

    Args:
        row: int64, the address of its first byte, on a line of 16.
        x: float32 [BLOCK], 0 past SIZE.
        first: a multiple of 128.
    """
    values, scales = pack(x, BLOCK)
    columns = first + tl.arange(0, BLOCK)
    to = tl.multiple_of(row.to(tl.pointer_type(tl.float8e4nv)), 16)
    tl.store(to + columns, values, mask=columns < SIZE)
    groups = first // 128 + tl.arange(0, BLOCK // 128)
    tl.store((row + SCALES_AT).to(tl.pointer_type(tl.float32)) + groups, scales, mask=groups * 128 < SIZE)
