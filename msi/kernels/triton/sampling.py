"""Drawing one token per row from logits, without sorting them: what a sorted row would be cut at is searched for.

A row's tokens in order are those by falling logit, and among equal ones by rising id. Each cut (top_k, top_p) keeps
those above a value and the first few of those that equal it; so does the draw itself, whose token is the last that is
kept. Such a value is found by looking at the whole row a few times, each time for several values at once, on float32
read as ordered integers.

Probabilities are float32 and their sums float64: the token is that of `msi.kernels.sampling.draw` unless the number
that is drawn with lies within about 1e-7 of the end of a token's share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _keys(x):
    """int64 in the order of float32 values, both zeros alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _load(row, start, vocab_size, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    return tl.load(row + at, mask=at < vocab_size, other=float("-inf")), at < vocab_size


@triton.jit
def _masses(x, is_token, best, temperature, min_p):
    """Of tokens beside the best's, which is 1."""
    mass = tl.exp(tl.div_rn(x - best, temperature))
    return tl.where(is_token & ((mass >= min_p) | (x == best)), mass, 0.0)


@triton.jit
def _amounts(row, vocab_size, best, temperature, min_p, low, step, IS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of tokens whose key is at least low + i * step, i = 1, 2, 3: how many, or their mass."""
    one = best.to(tl.float64) * 0.0
    two = one
    three = one
    for start in range(0, vocab_size, BLOCK):
        x, is_token = _load(row, start, vocab_size, BLOCK)
        key = _keys(x)
        if IS_COUNT:
            amount = is_token.to(tl.float32)
        else:
            amount = _masses(x, is_token, best, temperature, min_p)
        one += tl.sum(tl.where(key >= low + step, amount, 0.0), 0).to(tl.float64)
        two += tl.sum(tl.where(key >= low + 2 * step, amount, 0.0), 0).to(tl.float64)
        three += tl.sum(tl.where(key >= low + 3 * step, amount, 0.0), 0).to(tl.float64)
    return one, two, three


@triton.jit
def _find(
    row, vocab_size, best, temperature, min_p, low, target,
    IS_COUNT: tl.constexpr, IS_OVER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key such that tokens of at least it come to `target` (`IS_OVER`: to more), or `low`; and what those
    above it come to.
    """
    high = _keys(best) + 1  # not reached
    above = best.to(tl.float64) * 0.0
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        one, two, three = _amounts(row, vocab_size, best, temperature, min_p, low, step, IS_COUNT, BLOCK)
        if IS_OVER:
            is_one, is_two, is_three = one > target, two > target, three > target
        else:
            is_one, is_two, is_three = one >= target, two >= target, three >= target
        is_one = is_one & (low + step < high)
        is_two = is_two & (low + 2 * step < high)
        is_three = is_three & (low + 3 * step < high)
        if is_three:
            low = low + 3 * step
        elif is_two:
            if low + 3 * step < high:
                high = low + 3 * step
                above = three
            low = low + 2 * step
        elif is_one:
            if low + 2 * step < high:
                high = low + 2 * step
                above = two
            low = low + step
        else:
            high = low + step
            above = one
    return low, above


@triton.jit(do_not_specialize=["num_rows"])
def draw_kernel(logits, numbers, tokens, num_rows, vocab_size, row_stride, BLOCK: tl.constexpr):
    """numbers float64 [5, num_rows] as in `msi.kernels.sampling.draw`. Grid: rows."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    temperature = tl.load(numbers + index).to(tl.float32)
    top_k = tl.load(numbers + num_rows + index)
    top_p = tl.load(numbers + 2 * num_rows + index)
    min_p = tl.load(numbers + 3 * num_rows + index).to(tl.float32)
    uniform = tl.load(numbers + 4 * num_rows + index)

    best = tl.full([], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        x, _ = _load(row, start, vocab_size, BLOCK)
        best = tl.maximum(best, tl.max(x, 0))
    none = best.to(tl.float64) * 0.0
    # kept are tokens above `cut` and `ties` of those that equal it
    cut = _keys(tl.full([], float("-inf"), tl.float32))
    above = none
    ties = none + vocab_size
    if top_k < vocab_size:
        cut, above = _find(row, vocab_size, best, temperature, min_p, cut, top_k, True, False, BLOCK)
        ties = top_k - above

    above = none  # in mass from here on
    at_cut = none
    for start in range(0, vocab_size, BLOCK):
        x, is_token = _load(row, start, vocab_size, BLOCK)
        mass = _masses(x, is_token, best, temperature, min_p)
        above += tl.sum(tl.where(_keys(x) > cut, mass, 0.0), 0).to(tl.float64)
        at_cut = tl.maximum(at_cut, tl.max(tl.where(_keys(x) == cut, mass, 0.0), 0).to(tl.float64))
    num_equal = none
    for start in range(0, vocab_size, BLOCK):
        x, is_token = _load(row, start, vocab_size, BLOCK)
        num_equal += tl.sum((is_token & (_keys(x) == cut)).to(tl.int32), 0).to(tl.float64)
    ties = tl.minimum(ties, num_equal)
    total = above + ties * at_cut
    if top_p < 1.0:
        target = tl.maximum(top_p * total, 1e-300)
        if above >= target:
            cut, above = _find(row, vocab_size, best, temperature, min_p, cut, target, False, False, BLOCK)
            at_cut, num_equal = _equal(row, vocab_size, best, temperature, min_p, cut, BLOCK)
            ties = num_equal
        if at_cut > 0.0:
            ties = tl.minimum(ties, tl.maximum(tl.ceil((target - above) / at_cut), 1.0))
        total = above + ties * at_cut

    target = tl.minimum(uniform * total, total * (1.0 - 2.3e-16))  # less than all of it, however that was rounded
    if above > target:
        cut, above = _find(row, vocab_size, best, temperature, min_p, cut, target, False, True, BLOCK)
        at_cut, num_equal = _equal(row, vocab_size, best, temperature, min_p, cut, BLOCK)
        ties = num_equal
    tie = none
    if at_cut > 0.0:
        tie = tl.minimum(tl.floor((target - above) / at_cut), ties - 1.0)
    wanted = tl.maximum(tie, 0.0).to(tl.int32)
    if at_cut == 0.0:  # sums that were rounded apart ended on nothing
        cut = _keys(best)

    token = wanted * 0
    before = wanted * 0
    for start in range(0, vocab_size, BLOCK):
        x, is_token = _load(row, start, vocab_size, BLOCK)
        is_equal = (is_token & (_keys(x) == cut)).to(tl.int32)
        its = before + tl.cumsum(is_equal, 0) - 1
        token += tl.sum(tl.where((is_equal == 1) & (its == wanted), start + tl.arange(0, BLOCK), 0), 0)
        before += tl.sum(is_equal, 0)
    tl.store(tokens + index, token.to(tl.int64))


@triton.jit
def _equal(row, vocab_size, best, temperature, min_p, cut, BLOCK: tl.constexpr):
    """The mass of one token whose key is `cut`, and how many there are."""
    at_cut = best.to(tl.float64) * 0.0
    num_equal = at_cut
    for start in range(0, vocab_size, BLOCK):
        x, is_token = _load(row, start, vocab_size, BLOCK)
        is_equal = is_token & (_keys(x) == cut)
        mass = _masses(x, is_token, best, temperature, min_p)
        at_cut = tl.maximum(at_cut, tl.max(tl.where(is_equal, mass, 0.0), 0).to(tl.float64))
        num_equal += tl.sum(is_equal.to(tl.int32), 0).to(tl.float64)
    return at_cut, num_equal


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """As `msi.kernels.sampling.draw`."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        block = min(4096, triton.next_power_of_2(vocab_size))
        draw_kernel[(num_rows,)](
            logits, numbers.contiguous(), tokens, num_rows, vocab_size, logits.stride(0), BLOCK=block, num_warps=8
        )
    return tokens
