"""Tokens drawn from lists of flashinfer's, as a module of its signatures makes them: those of sorted rows."""

from __future__ import annotations

import sys

import pytest
import torch

from msi.attention.sampler import sample
from msi.kernels import flashinfer_draw
from msi.kernels.flashinfer import FlashinferKernels
from msi.kernels.sampling import draw
from msi.types import TokenSampling
from tests import fake_flashinfer
from tests.everyday import NUM_SEEDS, mostly_slow
from tests.kernels.test_sampling import numbers_of

CPU = torch.device("cpu")
VOCAB = 400


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(fake_flashinfer, "num_lists", 0)


def never(logits, numbers):
    raise AssertionError("drawn without the list")


def logits_of(kind, seed, rows=12):
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    if kind == "ties":
        return logits.round()
    if kind == "all equal":
        return logits * 0 - 2.5
    if kind == "zeros of both signs":  # half of each row is the best of it, of either sign
        logits = logits.clamp(max=0.0)
        logits[:, ::2] = -logits[:, ::2].abs().clamp(max=0.0)
    if kind == "few left":
        logits[:, 5:-3] = -torch.inf
    return logits


@pytest.mark.parametrize("seed", mostly_slow(range(NUM_SEEDS)))
@pytest.mark.parametrize("kind", ["any", "ties", "all equal", "few left", "zeros of both signs"])
def test_the_same_tokens_as_from_sorted_rows_ties_and_all(seed, kind):
    logits, generator = logits_of(kind, seed), torch.Generator().manual_seed(seed)
    numbers = numbers_of(logits, generator)
    numbers[1] = torch.tensor([1, 2, 7, 50, 256], dtype=torch.float64)[torch.randint(5, (12,), generator=generator)]
    listed = flashinfer_draw.ListedDraw(fake_flashinfer, never, False, never)
    expected = draw(logits, numbers)
    assert torch.equal(listed(logits, numbers), expected)
    assert fake_flashinfer.num_lists == 1


@pytest.mark.parametrize("left_out", ["tie_break", "deterministic", "zeros"])
def test_ties_differ_where_the_list_is_asked_for_any_other_way(left_out, monkeypatch):
    """So what is asked for is what makes tokens equal."""
    logits = logits_of("zeros of both signs" if left_out == "zeros" else "ties", 0, rows=40)
    numbers = torch.tensor([[1.0], [7], [1.0], [0.0], [0.0]], dtype=torch.float64).repeat(1, 40)
    numbers[4] = torch.linspace(0.01, 0.99, 40)
    top_k = fake_flashinfer.top_k

    class Library:
        topk = fake_flashinfer.topk

        @staticmethod
        def top_k(input, k, **asked):
            if left_out == "zeros":
                input = torch.where(input == 0, logits, input)
            else:
                asked[left_out] = {"tie_break": 0, "deterministic": False}[left_out]
            return top_k(input, k, **asked)

    listed = flashinfer_draw.ListedDraw(Library, never, False, never)
    assert not torch.equal(listed(logits, numbers), draw(logits, numbers))


def test_a_requests_tokens_do_not_depend_on_the_rows_beside_it():
    """Through the sampler: by seed and position alone, at whatever place of a pass, and those of a CPU."""
    kernels, logits = FlashinferKernels(CPU), logits_of("ties", 3, rows=6)
    sampling = [TokenSampling(0.9, 0.95, 20 + row, 7 * row, 11) for row in range(6)]
    together = sample(logits.clone(), sampling, kernels=kernels).token_ids
    assert fake_flashinfer.num_lists == 1
    assert together == sample(logits.clone(), sampling).token_ids, "those of a CPU"
    for order in ([3], [5, 3, 0], [0, 1, 2, 3]):
        chosen = sample(logits[order].clone(), [sampling[row] for row in order], kernels=kernels)
        assert chosen.token_ids == [together[row] for row in order]


def own_draw(logits, numbers):
    return torch.full((len(logits),), -1)


def test_rows_without_a_top_k_or_a_large_one_are_drawn_by_tritons_kernels():
    listed = flashinfer_draw.ListedDraw(fake_flashinfer, own_draw, False, never)
    logits = logits_of("any", 0, rows=2)
    numbers = torch.tensor([[1.0, 1], [7, VOCAB], [1, 1], [0, 0], [0.5, 0.5]], dtype=torch.float64)
    assert listed(logits, numbers).tolist() == [-1, -1], "one of the rows may end anywhere"
    assert listed(logits[:1], numbers[:, :1]).tolist() != [-1]
    assert listed(logits[:, :256], numbers[:, :1]).tolist() == [-1, -1], "all of a small vocabulary"
    assert listed(logits[:0], numbers[:, :0]).tolist() == []
    assert listed(logits[:1], numbers[:, :1].to("meta")).tolist() == [-1], "which only the device knows"


def test_gpus_with_too_little_shared_memory_have_tritons_kernels(monkeypatch):
    monkeypatch.setattr(fake_flashinfer.topk, "can_implement_filtered_topk", lambda: False)
    listed = flashinfer_draw.ListedDraw(fake_flashinfer, own_draw, False, never)
    numbers = torch.tensor([[1.0], [7], [1], [0], [0.5]], dtype=torch.float64)
    assert listed(logits_of("any", 0, rows=1), numbers).tolist() == [-1]


def test_measured_the_faster_draws_by_the_number_of_rows(caplog):
    times = iter((1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0, 1.0, 2.0, 1.0))  # Triton's before the list's, of each size

    def own(logits, numbers):
        own.rows.append(len(logits))
        return draw(logits, numbers)

    own.rows = []
    listed = flashinfer_draw.ListedDraw(fake_flashinfer, own, True, lambda work: next(times))
    numbers = torch.tensor([[1.0], [7], [1], [0], [0.5]], dtype=torch.float64)
    for num_rows, is_own in ((1, True), (3, False), (4, False), (5, True), (16, True), (64, False), (200, False)):
        logits, of_rows = logits_of("any", 0, num_rows), numbers.repeat(1, num_rows)
        own.rows.clear()
        assert torch.equal(listed(logits, of_rows), draw(logits, of_rows))
        assert (num_rows in own.rows[-1:]) == is_own, num_rows


def test_measured_what_gives_another_token_never_draws(monkeypatch, caplog):
    def own(logits, numbers):
        return draw(logits, numbers) * 0 + 1

    listed = flashinfer_draw.ListedDraw(fake_flashinfer, own, True, lambda work: 1.0)
    numbers = torch.tensor([[1.0], [7], [1], [0], [0.5]], dtype=torch.float64)
    assert listed(logits_of("any", 0, rows=1), numbers).tolist() == [1]
    assert "flashinfer is left out, as it is" in caplog.text
