"""Choosing tokens on a GPU: those of the plain sampler, whose rows are sorted."""

from __future__ import annotations

import pytest
import torch

from msi.kernels.sampling import best, draw
from msi.kernels.triton import sampling
from tests.everyday import NUM_SEEDS, mostly_slow
from tests.kernels.device import DEVICE


def numbers_of(logits, generator, **given):
    """float64 [5, rows] of every kind of row."""
    rows, vocab_size = logits.shape

    def choose(*values):
        return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (rows,), generator=generator)]

    numbers = {
        "temperature": choose(0.01, 0.7, 1.0, 2.0, 50.0),
        "top_k": choose(1, 2, 7, vocab_size - 1, vocab_size),
        "top_p": choose(0.0, 0.1, 0.5, 0.9, 0.999, 1.0),
        "min_p": choose(0.0, 0.0, 0.05, 0.5, 1.0),
        "uniform": torch.rand(rows, dtype=torch.float64, generator=generator),
    }
    for name, value in given.items():
        numbers[name] = torch.full((rows,), value, dtype=torch.float64)
    return torch.stack(list(numbers.values()))


def is_close_call(logits, numbers):
    """Rows whose token another number, a millionth away, would change, or a top_p."""
    result = torch.zeros(len(logits), dtype=torch.bool)
    exact = draw(logits, numbers)
    for row in (2, 4):
        for change in (-1e-6, 1e-6):
            changed = numbers.clone()
            changed[row] = (changed[row] + change).clamp(0, 1 - 1e-12 if row == 4 else 1)
            result |= draw(logits, changed) != exact
    return result


@pytest.mark.parametrize("seed", mostly_slow(range(NUM_SEEDS // 2 - 1)))  # each of another width
@pytest.mark.parametrize("kind", ["any", "ties", "all equal", "few left", "zeros of both signs"])
def test_the_same_tokens_as_from_sorted_rows(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 5 + 61 * (seed % 5), generator=generator) * 4
    if kind == "ties":
        logits = logits.round()
    elif kind == "all equal":
        logits = logits * 0 - 2.5
    elif kind == "few left":
        few = torch.rand(logits.shape, generator=generator) < 0.9
        few[:, seed % logits.shape[1]] = False
        logits[few] = -torch.inf
    elif kind == "zeros of both signs":
        logits = logits.clamp(max=0.0)
        logits[:, ::2] = -logits[:, ::2].abs().clamp(max=0.0)
    numbers = numbers_of(logits, generator)
    expected = draw(logits, numbers)
    tokens = sampling.draw(logits.to(DEVICE), numbers.to(DEVICE)).cpu()
    differs = (tokens != expected) & ~is_close_call(logits, numbers)
    assert not differs.any(), (tokens[differs], expected[differs], numbers[:, differs])


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_the_ends_of_the_range_draw_the_first_and_the_last_that_is_left(uniform, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 50, generator=generator)
    numbers = numbers_of(logits, generator, uniform=uniform, top_p=top_p, min_p=0.0, temperature=1.0, top_k=20)
    assert torch.equal(sampling.draw(logits.to(DEVICE), numbers.to(DEVICE)).cpu(), draw(logits, numbers))


def test_rows_of_a_wider_tensor_and_no_rows():
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(6, 100, generator=generator)
    numbers = numbers_of(wide[:, :70], generator)
    tokens = sampling.draw(wide.to(DEVICE)[:, :70], numbers.to(DEVICE)).cpu()
    assert torch.equal(tokens, draw(wide[:, :70], numbers))
    assert sampling.draw(wide[:0].to(DEVICE), numbers[:, :0].to(DEVICE)).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["any", "flat", "all equal"])
def test_rows_that_many_programs_share(kind):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 2500, generator=generator) * (0.01 if kind == "flat" else 0 if kind == "all equal" else 4)
    numbers = numbers_of(logits, generator)
    differs = sampling.draw(logits.to(DEVICE), numbers.to(DEVICE)).cpu() != draw(logits, numbers)
    assert not (differs & ~is_close_call(logits, numbers)).any()


def test_a_token_does_not_depend_on_how_its_row_is_cut(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(2, 90, generator=generator) * 2).to(DEVICE)
    numbers = numbers_of(logits, generator, temperature=1.5, top_p=0.97, top_k=60).to(DEVICE)
    tokens = []
    for programs, block in [(1, 128), (264, 16)]:
        monkeypatch.setattr(sampling, "PROGRAMS", programs)
        monkeypatch.setattr(sampling, "MAX_BLOCK", block)
        tokens.append(sampling.draw(logits, numbers).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("vocab_size", [7, 2500])
def test_the_best_is_the_first_of_equal_ones_and_a_nan_counts_as_the_most(vocab_size):
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(4)).round()
    logits[1] = -torch.inf
    logits[2, [3, 5]] = torch.inf
    logits[3, 2], logits[3, 4] = torch.inf, torch.nan
    logits[4, 5] = -torch.nan
    logits[5] = torch.tensor([-0.0, 0.0]).repeat(vocab_size)[:vocab_size]
    tokens, values = sampling.best(logits.to(DEVICE))
    expected = best(logits)
    assert torch.equal(tokens.cpu(), expected[0])
    assert torch.equal(values.cpu().view(torch.int32), expected[1].view(torch.int32))
    assert [len(one) for one in sampling.best(logits[:0].to(DEVICE))] == [0, 0]
