"""Choosing one token per row from logits, without sorting them: every row is split over many programs.

    best        the best of each part of a row, then of the row: all that greedy rows need
    histogram   how many tokens, and what mass of probability, lie in each of BINS steps below the best
    gather      which bins the cuts (top_k, top_p) and the draw end in; the tokens of those, and no others, into a list
    draw        each end exactly, within the list

A row's tokens in order are those by falling logit, and among equal ones by rising id; each cut, and the draw, is the
first token at which a sum along that order reaches an amount. Masses are whole numbers, so that no sum depends on the
order in which parts are added: a row's token is the same however it is split. A token's mass is a float32 of 24 bits
beside the best's, so the token is that of `msi.kernels.sampling.draw` unless the number that is drawn with lies within
about 1e-7 of the end of a token's share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # that a launch has at least, where rows are long enough: two for each multiprocessor of a large GPU
MAX_BLOCK = 1024  # tokens that a program looks at at a time
BINS = 2048
MAX_VOCAB = 1 << 18

_ONE = tl.constexpr(1 << 44)  # the mass of a row's best: the sum over MAX_VOCAB tokens is still an int64
_DEPTH = tl.constexpr(30.5)  # in nats below the best, the mass is 0 from here on
_NAN_KEY = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _keys(x):
    """int64 in the order of float32 values: both zeros alike, a NaN above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return tl.where(x == x, keys, _NAN_KEY)


@triton.jit
def _masses(x, best, temperature, min_p, BINS: tl.constexpr):
    """int64, and the bin, of tokens: both follow the order of logits."""
    below = tl.div_rn(x - best, temperature)
    share = tl.exp(below)
    share = tl.where((share >= min_p) | (x == best), share, 0.0)
    mass = (share * _ONE).to(tl.int64)
    depth = tl.where(mass > 0, -below, 0.0)
    return mass, tl.minimum((depth * (BINS / _DEPTH)).to(tl.int32), BINS - 1)


@triton.jit
def _part(row_length, num_parts, BLOCK: tl.constexpr):
    """Where this program's part of its row starts and ends: whole blocks."""
    length = tl.cdiv(tl.cdiv(row_length, BLOCK), num_parts) * BLOCK
    start = tl.program_id(1) * length
    return start, tl.minimum(start + length, row_length)


@triton.jit(do_not_specialize=["num_parts"])
def best_kernel(logits, keys, tokens, vocab_size, row_stride, num_parts, BLOCK: tl.constexpr):
    """Of each part: int64 [rows, parts] the highest key, and the lowest id that has it. Grid: rows, parts."""
    row = logits + tl.program_id(0).to(tl.int64) * row_stride
    start, end = _part(vocab_size, num_parts, BLOCK)
    key = tl.full([], -(1 << 40), tl.int64)
    token = tl.full([], 0, tl.int32)
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        its = tl.where(at < end, _keys(tl.load(row + at, mask=at < end, other=0.0)), -(1 << 40))
        highest = tl.max(its, 0)
        if highest > key:
            key = highest
            token = tl.min(tl.where(its == highest, at, 1 << 30), 0).to(tl.int32)
    out = tl.program_id(0) * num_parts + tl.program_id(1)
    tl.store(keys + out, key)
    tl.store(tokens + out, token.to(tl.int64))


@triton.jit(do_not_specialize=["num_parts"])
def merge_best_kernel(logits, keys, tokens, best_tokens, best_values, row_stride, num_parts, PARTS: tl.constexpr):
    """The row's, of its parts': int64 and float32 [rows]. Grid: rows."""
    index = tl.program_id(0)
    part = tl.arange(0, PARTS)
    its = tl.load(keys + index * num_parts + part, mask=part < num_parts, other=-(1 << 40))
    token = tl.load(tokens + index * num_parts + part, mask=part < num_parts, other=1 << 30)
    token = tl.min(tl.where(its == tl.max(its, 0), token, 1 << 30), 0)
    tl.store(best_tokens + index, token)
    tl.store(best_values + index, tl.load(logits + index.to(tl.int64) * row_stride + token))


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def histogram_kernel(
    logits, best_values, numbers, counts, masses, vocab_size, row_stride, num_rows, num_parts,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts int32 and masses int64 [rows, BINS], 0 before. Grid: rows, parts."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    best = tl.load(best_values + index)
    temperature = tl.load(numbers + index).to(tl.float32)
    min_p = tl.load(numbers + 3 * num_rows + index).to(tl.float32)
    start, end = _part(vocab_size, num_parts, BLOCK)
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < end, other=float("-inf"))
        mass, bin = _masses(x, best, temperature, min_p, BINS)
        out = index * BINS + bin
        tl.atomic_add(masses + out, mass, mask=mass > 0, sem="relaxed")
        tl.atomic_add(counts + out, 1, mask=mass > 0, sem="relaxed")


@triton.jit
def _reached(sums, amount, target, BINS: tl.constexpr):
    """The bin at which a sum reaches an amount, and the sum before it and with it."""
    bin = tl.minimum(tl.sum((sums < target).to(tl.int32), 0), BINS - 1)
    is_it = tl.arange(0, BINS) == bin
    with_it = tl.sum(tl.where(is_it, sums, 0), 0)
    return bin, with_it - tl.sum(tl.where(is_it, amount, 0), 0), with_it


@triton.jit
def _kept_by_top_p(total, top_p):
    """What the kept come to at least: the first token at which that is reached is the last that is kept."""
    return tl.minimum(tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1), total)


@triton.jit
def _drawn(total, uniform):
    """The first token at which this is reached is the one that is drawn."""
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1) + 1


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def gather_kernel(
    logits, best_values, numbers, counts, masses, ends, lengths, ids, values, vocab_size, row_stride, num_rows,
    num_parts, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ends int64 [rows, 8] for `draw_kernel`; ids int32 and values float32 [rows, vocab_size] of the tokens that it
    looks at, in any order, of which lengths int32 [rows], 0 before, says how many. Grid: rows, parts.
    """
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    best = tl.load(best_values + index)
    temperature = tl.load(numbers + index).to(tl.float32)
    top_k = tl.load(numbers + num_rows + index).to(tl.int64)
    top_p = tl.load(numbers + 2 * num_rows + index)
    min_p = tl.load(numbers + 3 * num_rows + index).to(tl.float32)
    uniform = tl.load(numbers + 4 * num_rows + index)
    bins = index * BINS + tl.arange(0, BINS)
    count = tl.load(counts + bins).to(tl.int64)
    mass = tl.load(masses + bins)
    sums = tl.cumsum(mass, 0)
    # what is kept comes to between these
    most = tl.sum(mass, 0)
    least = most
    k_bin, k_before, k_with = _reached(tl.cumsum(count, 0), count, top_k, BINS)
    if k_with >= top_k:
        most = tl.sum(tl.where(tl.arange(0, BINS) <= k_bin, mass, 0), 0)
        least = tl.maximum(tl.sum(tl.where(tl.arange(0, BINS) < k_bin, mass, 0), 0), _ONE)
    else:  # no token is cut off
        k_bin = -1
    p_first, p_before, _ = _reached(sums, mass, _kept_by_top_p(least, top_p), BINS)
    p_last, _, p_with = _reached(sums, mass, _kept_by_top_p(most, top_p), BINS)
    if top_p < 1.0:
        least = _kept_by_top_p(least, top_p)
        most = tl.minimum(most, p_with)
    else:
        p_last = -1
    u_first, u_before, _ = _reached(sums, mass, _drawn(least, uniform), BINS)
    u_last, _, _ = _reached(sums, mass, _drawn(most, uniform), BINS)
    if tl.program_id(1) == 0:
        out = ends + index * 8
        tl.store(out, k_bin.to(tl.int64))
        tl.store(out + 1, k_before)
        tl.store(out + 2, p_first.to(tl.int64))
        tl.store(out + 3, p_last.to(tl.int64))
        tl.store(out + 4, p_before)
        tl.store(out + 5, u_first.to(tl.int64))
        tl.store(out + 6, u_last.to(tl.int64))
        tl.store(out + 7, u_before)

    start, end = _part(vocab_size, num_parts, BLOCK)
    its_list = index.to(tl.int64) * vocab_size
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < end, other=float("-inf"))
        its, bin = _masses(x, best, temperature, min_p, BINS)
        is_end = (bin == k_bin) | ((bin >= p_first) & (bin <= p_last)) | ((bin >= u_first) & (bin <= u_last))
        is_end = (is_end & (its > 0)).to(tl.int32)
        num = tl.sum(is_end, 0)
        if num > 0:
            place = tl.atomic_add(lengths + index, num, sem="relaxed") + tl.cumsum(is_end, 0) - 1
            tl.store(ids + its_list + place, at, mask=is_end == 1)
            tl.store(values + its_list + place, x, mask=is_end == 1)


@triton.jit
def _end(
    values, length, best, temperature, first, last, before, target, min_p, IS_COUNT: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the listed token in bins `first` to `last` at which a sum that starts with `before`, of counts or of masses,
    reaches `target`: its logit; how many of those equal to it are reached with it; and with `before` if that is mass,
    the mass of these bins up to and with those.
    """
    lowest = tl.full([], float("inf"), tl.float32)
    top = tl.full([], float("-inf"), tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(values + at, mask=at < length, other=float("-inf"))
        mass, bin = _masses(x, best, temperature, min_p, BINS)
        is_in = (mass > 0) & (bin >= first) & (bin <= last)
        lowest = tl.minimum(lowest, tl.min(tl.where(is_in, x, float("inf")), 0))
        top = tl.maximum(top, tl.max(tl.where(is_in, x, float("-inf")), 0))
    low = _keys(lowest)  # reaches the target
    high = _keys(top) + 1  # does not
    above = before
    mass_above = before * 0
    while high - low > 1:
        middle = (high + low) // 2
        bits = middle.to(tl.int32)
        least = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        amount = before
        mass = mass_above * 0
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(values + at, mask=at < length, other=float("-inf"))
            is_in = (x >= least) & (x <= top)
            its = (tl.exp(tl.div_rn(x - best, temperature)) * _ONE).to(tl.int64)
            mass += tl.sum(tl.where(is_in, its, 0), 0)
            if IS_COUNT:
                amount += tl.sum(is_in.to(tl.int64), 0)
        if not IS_COUNT:
            amount += mass
        if amount >= target:
            low = middle
        else:
            high = middle
            above = amount
            mass_above = mass
    bits = low.to(tl.int32)
    value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    one = tl.maximum((tl.exp(tl.div_rn(value - best, temperature)) * _ONE).to(tl.int64), 1)
    if IS_COUNT:
        num = target - above
    else:
        num = (target - above + one - 1) // one
        mass_above = above
    return value, num, mass_above + num * one


@triton.jit(do_not_specialize=["num_rows"])
def draw_kernel(
    best_values, numbers, masses, ends, lengths, ids, values, tokens, vocab_size, num_rows,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """numbers float64 [5, num_rows] as in `msi.kernels.sampling.draw`. Grid: rows."""
    index = tl.program_id(0)
    best = tl.load(best_values + index)
    temperature = tl.load(numbers + index).to(tl.float32)
    top_k = tl.load(numbers + num_rows + index).to(tl.int64)
    top_p = tl.load(numbers + 2 * num_rows + index)
    min_p = tl.load(numbers + 3 * num_rows + index).to(tl.float32)
    uniform = tl.load(numbers + 4 * num_rows + index)
    its_list = index.to(tl.int64) * vocab_size
    ids, values = ids + its_list, values + its_list
    length = tl.load(lengths + index)
    ends = ends + index * 8
    bin = tl.arange(0, BINS)
    mass = tl.load(masses + index * BINS + bin)

    total = tl.sum(mass, 0)
    k_bin = tl.load(ends)
    if k_bin >= 0:
        _, _, total = _end(
            values, length, best, temperature, k_bin, k_bin, tl.load(ends + 1), top_k, min_p, True, BINS, BLOCK
        )
        total += tl.sum(tl.where(bin < k_bin, mass, 0), 0)
    if top_p < 1.0:
        _, _, total = _end(
            values, length, best, temperature, tl.load(ends + 2), tl.load(ends + 3), tl.load(ends + 4),
            _kept_by_top_p(total, top_p), min_p, False, BINS, BLOCK,
        )  # fmt: skip
    value, num, _ = _end(
        values, length, best, temperature, tl.load(ends + 5), tl.load(ends + 6), tl.load(ends + 7),
        _drawn(total, uniform), min_p, False, BINS, BLOCK,
    )  # fmt: skip

    low = tl.full([], 1 << 30, tl.int32)
    high = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(values + at, mask=at < length, other=float("-inf"))
        token = tl.load(ids + at, mask=at < length, other=0)
        low = tl.minimum(low, tl.min(tl.where(x == value, token, 1 << 30), 0))
        high = tl.maximum(high, tl.max(tl.where(x == value, token, 0), 0))
    low -= 1
    while high - low > 1:  # to the `num`th lowest id of those
        middle = (high + low) // 2
        num_up_to = num * 0
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(values + at, mask=at < length, other=float("-inf"))
            token = tl.load(ids + at, mask=at < length, other=0)
            num_up_to += tl.sum(((x == value) & (token <= middle)).to(tl.int64), 0)
        if num_up_to >= num:
            high = middle
        else:
            low = middle
    tl.store(tokens + index, high.to(tl.int64))


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `msi.kernels.sampling.best`."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        block, num_parts = _cut(num_rows, vocab_size)
        keys, of_parts = torch.empty(2, num_rows, num_parts, dtype=torch.int64, device=logits.device)
        best_kernel[(num_rows, num_parts)](
            logits, keys, of_parts, vocab_size, logits.stride(0), num_parts, BLOCK=block, num_warps=4
        )
        merge_best_kernel[(num_rows,)](
            logits, keys, of_parts, tokens, values, logits.stride(0), num_parts,
            PARTS=triton.next_power_of_2(num_parts), num_warps=1,
        )  # fmt: skip
    return tokens, values


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """As `msi.kernels.sampling.draw`."""
    num_rows, vocab_size = logits.shape
    assert vocab_size <= MAX_VOCAB, f"masses of {vocab_size} tokens do not fit an int64"
    tokens, values = best(logits)
    if not num_rows:
        return tokens
    numbers = numbers.contiguous()
    block, num_parts = _cut(num_rows, vocab_size)
    new = logits.new_empty
    masses = logits.new_zeros(num_rows, BINS, dtype=torch.int64)
    counts = logits.new_zeros(num_rows * (BINS + 1), dtype=torch.int32)
    lengths = counts[num_rows * BINS :]
    listed, listed_values = new(num_rows, vocab_size, dtype=torch.int32), new(num_rows, vocab_size)
    ends = new(num_rows, 8, dtype=torch.int64)
    histogram_kernel[(num_rows, num_parts)](
        logits, values, numbers, counts, masses, vocab_size, logits.stride(0), num_rows, num_parts,
        BINS=BINS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    gather_kernel[(num_rows, num_parts)](
        logits, values, numbers, counts, masses, ends, lengths, listed, listed_values, vocab_size, logits.stride(0),
        num_rows, num_parts, BINS=BINS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    draw_kernel[(num_rows,)](
        values, numbers, masses, ends, lengths, listed, listed_values, tokens, vocab_size, num_rows,
        BINS=BINS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return tokens


def _cut(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Tokens of a block, and parts of a row."""
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab_size))
    return block, min(triton.cdiv(PROGRAMS, num_rows), triton.cdiv(vocab_size, block))
