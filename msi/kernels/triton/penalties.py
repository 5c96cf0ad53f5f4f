"""Changing logits on a GPU before a token is chosen: the kernels of `msi.kernels.penalties`, in place.

A mask is read as it is packed, and its row read and written once. Penalties touch the tokens that are named and no
others: counts of a row's tokens lie in memory as wide as the logits, of which only the entries that are named are
cleared, added up and taken; whoever takes a count applies its penalties, so a token that is named often is changed
once, and the sum of whole numbers depends on no order.

A token that no row of logits has is left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msi.kernels.penalties import Penalties

MAX_BLOCK = 1024  # tokens of a row that a program looks at
ENTRIES = 256  # that a program changes
_TAKEN = tl.constexpr(-1)


@triton.jit
def allow_kernel(logits, rows, bits, vocab_size, row_stride, num_words, BLOCK: tl.constexpr):
    """bits int32 [rows, num_words]. Grid: rows, blocks."""
    index = tl.program_id(0)
    row = logits + tl.load(rows + index) * row_stride
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row + at, mask=at < vocab_size, other=0.0)
    words = tl.load(bits + index.to(tl.int64) * num_words + at // 32, mask=at < vocab_size, other=0)
    is_allowed = ((words >> (at % 32)) & 1) == 1
    is_whole = x < float("inf")
    tl.store(row + at, tl.where(is_whole & (is_allowed == 0), float("-inf"), x), mask=at < vocab_size)


@triton.jit(do_not_specialize=["num"])
def add_bias_kernel(logits, at, bias, num, vocab_size, row_stride, BLOCK: tl.constexpr):
    """at int64 [2, num]. Grid: blocks of entries."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(at + entry, mask=entry < num, other=0)
    token = tl.load(at + num + entry, mask=entry < num, other=-1)
    is_one = (token >= 0) & (token < vocab_size)
    where = logits + row * row_stride + token
    tl.store(where, tl.load(where, mask=is_one) + tl.load(bias + entry, mask=is_one), mask=is_one)


@triton.jit
def _entry(seen, num, vocab_size, BLOCK: tl.constexpr):
    """This program's: which, where its row's row lies, its token, and whether it is one."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(seen + entry, mask=entry < num, other=0)
    token = tl.load(seen + num + entry, mask=entry < num, other=-1)
    return entry, row, token, (token >= 0) & (token < vocab_size)


@triton.jit(do_not_specialize=["num"])
def clear_kernel(counts, seen, num, vocab_size, BLOCK: tl.constexpr):
    """counts int32 [rows, vocab_size], where an entry says. Grid: blocks of entries."""
    _, row, token, is_one = _entry(seen, num, vocab_size, BLOCK)
    tl.store(counts + row * vocab_size + token, 0, mask=is_one)


@triton.jit(do_not_specialize=["num"])
def count_kernel(counts, seen, num, vocab_size, BLOCK: tl.constexpr):
    """Grid: blocks of entries."""
    entry, row, token, is_one = _entry(seen, num, vocab_size, BLOCK)
    its = tl.load(seen + 2 * num + entry, mask=is_one, other=0).to(tl.int32)
    tl.atomic_add(counts + row * vocab_size + token, its, mask=is_one & (its > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num", "num_rows"])
def penalise_kernel(
    logits, counts, rows, numbers, seen, num, num_rows, vocab_size, row_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """numbers float32 [3, num_rows]. Grid: blocks of entries."""
    _, row, token, is_one = _entry(seen, num, vocab_size, BLOCK)
    count = tl.atomic_xchg(counts + row * vocab_size + token, _TAKEN, mask=is_one, sem="relaxed")
    is_one = is_one & (count >= 0)
    where = logits + tl.load(rows + row, mask=is_one, other=0) * row_stride + token
    x = tl.load(where, mask=is_one, other=0.0)
    repetition = tl.load(numbers + row, mask=is_one, other=1.0)
    frequency = tl.load(numbers + num_rows + row, mask=is_one, other=0.0)
    presence = tl.load(numbers + 2 * num_rows + row, mask=is_one, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x -= frequency * count.to(tl.float32)
    x -= tl.where(count > 0, presence, 0.0)
    tl.store(where, x, mask=is_one)


def allow(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """As `msi.kernels.penalties.allow`."""
    vocab_size = logits.shape[-1]
    assert bits.shape[1] * 32 >= vocab_size, (bits.shape, vocab_size)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab_size))
    if len(rows):
        allow_kernel[(len(rows), triton.cdiv(vocab_size, block))](
            logits, rows, bits.contiguous(), vocab_size, logits.stride(0), bits.shape[1], BLOCK=block, num_warps=4
        )


def add_bias(logits: Tensor, at: Tensor, bias: Tensor) -> None:
    """As `msi.kernels.penalties.add_bias`."""
    if len(bias):
        add_bias_kernel[_blocks(len(bias))](
            logits, at.contiguous(), bias, len(bias), logits.shape[-1], logits.stride(0), BLOCK=ENTRIES, num_warps=4
        )


def penalise(logits: Tensor, penalties: Penalties) -> None:
    """As `msi.kernels.penalties.penalise`."""
    seen, num_rows, vocab_size = penalties.seen.contiguous(), len(penalties.rows), logits.shape[-1]
    num = seen.shape[1]
    if not num:
        return
    counts = torch.empty(num_rows, vocab_size, dtype=torch.int32, device=logits.device)
    clear_kernel[_blocks(num)](counts, seen, num, vocab_size, BLOCK=ENTRIES, num_warps=4)
    count_kernel[_blocks(num)](counts, seen, num, vocab_size, BLOCK=ENTRIES, num_warps=4)
    penalise_kernel[_blocks(num)](
        logits, counts, penalties.rows, penalties.numbers.contiguous(), seen, num, num_rows, vocab_size,
        logits.stride(0), BLOCK=ENTRIES, num_warps=4,
    )  # fmt: skip


def _blocks(num: int) -> tuple[int]:
    return (triton.cdiv(num, ENTRIES),)
