"""Sampling: what is kept, what is drawn, and that randomness belongs to the request alone."""

from __future__ import annotations

import collections

import pytest
import torch

from msi.attention.sampler import sample
from msi.sampling import uniform_of
from msi.types import TokenSampling


def draw(logits, count=4000, **changes):
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 7}
    sampling = [TokenSampling(**{**values, **changes}, position=position) for position in range(count)]
    return collections.Counter(sample(logits.expand(count, -1).clone(), sampling).token_ids)


def test_temperature_zero_is_greedy():
    assert sample(torch.tensor([[0.1, 3.0, 2.9]]), [TokenSampling(0, 1, 0, 1, 0)]).token_ids == [1]


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    seen = draw(logits)
    for token, probability in enumerate(torch.softmax(logits, -1).tolist()):
        assert seen[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens():
    assert draw(torch.tensor([0.0, 1.0, 2.0]), temperature=0.1)[2] > 3990


def test_top_k_keeps_the_k_best():
    assert set(draw(torch.tensor([0.0, 1.0, 2.0, 1.5]), top_k=2)) == {2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert set(draw(logits, top_p=0.5)) == {0}
    assert set(draw(logits, top_p=0.51)) == {0, 1}
    assert set(draw(logits, top_p=0.9)) == {0, 1, 2}


def test_a_choice_depends_on_seed_and_position_alone():
    torch.manual_seed(0)
    rows = torch.randn(6, 50)
    sampling = [TokenSampling(1.0, 0.9, 0, seed, seed * 3) for seed in range(6)]
    together = sample(rows.clone(), sampling).token_ids
    alone = [sample(rows[index : index + 1].clone(), [sampling[index]]).token_ids[0] for index in range(6)]
    backwards = sample(rows.flip(0), sampling[::-1]).token_ids[::-1]
    assert together == alone == backwards


def test_greedy_and_random_rows_mix():
    rows = torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    assert sample(rows, [TokenSampling(0, 1, 0, 1, 0), TokenSampling(0.01, 1, 0, 1, 0)]).token_ids == [1, 0]


def test_the_numbers_are_even():
    numbers = [uniform_of(seed, position) for seed in range(50) for position in range(50)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 2500
    assert sum(numbers) / 2500 == pytest.approx(0.5, abs=0.02)
    assert uniform_of(-1, 0) == uniform_of(2**64 - 1, 0)
