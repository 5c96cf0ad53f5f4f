"""Changing logits on a GPU: masks, biases and penalties as the plain kernels and float64 have them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from msi.kernels import penalties as plain
from msi.kernels.triton import penalties
from tests.kernels.device import DEVICE

POISON = 0x7F7F7F7F
VOCABS = (1, 31, 32, 199, 1024, 2500)  # of less than a word of a mask, of no whole words, of no whole blocks


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that kernels take for themselves has something in it."""
    empty = torch.empty
    monkeypatch.setattr(penalties.torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(POISON))


def row_of(generator, num_rows, vocab_size):
    """Logits between others' memory, and all of it."""
    memory = torch.full((num_rows + 2, vocab_size + 7), torch.nan)
    logits = memory[1:-1, 3 : 3 + vocab_size]
    logits.copy_(torch.randn(num_rows, vocab_size, generator=generator) * 4)
    memory = memory.to(DEVICE)
    return memory[1:-1, 3 : 3 + vocab_size], memory


def check_others(memory, vocab_size):
    inside = torch.zeros(memory.shape, dtype=torch.bool)
    inside[1:-1, 3 : 3 + vocab_size] = True
    assert memory.cpu()[~inside].isnan().all(), "what is nobody's was written"


def packed(allowed):
    """int32 words of bool [n, vocab_size], bit by bit; bits behind the vocabulary are set, and mean nothing."""
    num_words = -(-allowed.shape[1] // 32)
    bits = torch.ones(len(allowed), num_words * 32, dtype=torch.int64)
    bits[:, : allowed.shape[1]] = allowed
    words = (bits.view(len(allowed), num_words, 32) << torch.arange(32)).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("kind", ["any", "one", "none", "all", "no rows"])
def test_what_is_not_allowed_is_minus_infinity_and_rows_without_a_mask_stay(vocab_size, kind):
    generator = torch.Generator().manual_seed(vocab_size)
    logits, memory = row_of(generator, 5, vocab_size)
    rows = torch.tensor([] if kind == "no rows" else [3, 0, 4], dtype=torch.int64)
    allowed = torch.rand(len(rows), vocab_size, generator=generator) < 0.4
    if kind in ("one", "none", "all"):
        allowed[:] = kind == "all"
        allowed[:, vocab_size // 2] = kind != "none"
    expected, bits = logits.cpu().clone(), packed(allowed)
    by_plain = expected.clone()
    for row, its in zip(rows.tolist(), allowed, strict=True):
        expected[row, ~its] = -torch.inf
    penalties.allow(logits, rows.to(DEVICE), bits.to(DEVICE))
    plain.allow(by_plain, rows, bits)
    assert torch.equal(logits.cpu(), expected)
    assert torch.equal(by_plain, expected)
    check_others(memory, vocab_size)


@pytest.mark.parametrize("module", [plain, penalties], ids=["plain", "triton"])
def test_no_mask_hides_what_is_broken(module):
    logits = torch.zeros(2, 40)
    logits[0, 5], logits[1, 33], logits[1, 34] = torch.nan, torch.inf, -torch.inf
    ours = logits.to(DEVICE)
    module.allow(ours, torch.tensor([0, 1], device=DEVICE), torch.zeros(2, 2, dtype=torch.int32, device=DEVICE))
    ours = ours.cpu()
    assert ours[0, 5].isnan()
    assert ours[1, 33] == torch.inf
    assert ours.isneginf().sum() == 2 * 40 - 2


@pytest.mark.parametrize(("num_rows", "num_biases"), [(1, 1), (4, 0), (3, 700)])
def test_biases_are_added_to_the_tokens_that_are_named_and_a_ban_is_one(num_rows, num_biases):
    generator = torch.Generator().manual_seed(num_biases)
    vocab_size = 301
    logits, memory = row_of(generator, num_rows, vocab_size)
    at = torch.randperm(num_rows * vocab_size, generator=generator)[:num_biases]
    at = torch.stack((at // vocab_size, at % vocab_size))
    bias = torch.randn(num_biases, generator=generator) * 10
    bias[::5] = -torch.inf
    expected = logits.cpu().clone()
    by_plain = expected.clone()
    for (row, token), its in zip(at.T.tolist(), bias.tolist(), strict=True):
        expected[row, token] += its
    penalties.add_bias(logits, at.to(DEVICE), bias.to(DEVICE))
    plain.add_bias(by_plain, at, bias)
    assert torch.equal(logits.cpu(), expected)
    assert torch.equal(by_plain, expected)
    check_others(memory, vocab_size)


def penalties_of(rows, numbers, prompts, outputs):
    """Of tokens as they came, some of them often."""
    entries = [(which, token, 0) for which, tokens in enumerate(prompts) for token in tokens]
    num_prompt = len(entries)
    entries += [(which, token, count) for which, tokens in enumerate(outputs) for token, count in tokens]
    return plain.Penalties(
        torch.tensor(rows, dtype=torch.int64, device=DEVICE),
        torch.tensor(numbers, dtype=torch.float32, device=DEVICE).view(-1, 3).T,
        torch.tensor(entries, dtype=torch.int64, device=DEVICE).view(-1, 3).T,
        num_prompt,
    )


def in_float64(logits, rows, numbers, prompts, outputs):
    changed = logits.double()
    for row, (repetition, frequency, presence), prompt, output in zip(rows, numbers, prompts, outputs, strict=True):
        counts = Counter()
        for token, count in output:
            counts[token] += count
        for token in {*prompt, *counts}:
            value = changed[row, token].item()
            value = value / repetition if value > 0 else value * repetition
            changed[row, token] = value - frequency * counts[token] - (presence if counts[token] else 0.0)
    return changed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("num_rows", "lengths"),
    [(1, [(3, 5)]), (6, [(700, 40), (0, 9), (1, 0), (40, 300)]), (2, [(0, 0)]), (3, [])],
    ids=["one row", "ragged", "nothing seen", "no rows"],
)
@pytest.mark.parametrize("vocab_size", [7, 301, 2500])
def test_what_rows_have_seen_is_penalised_as_in_float64(num_rows, lengths, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, memory = row_of(generator, num_rows, vocab_size)

    def some(num):
        return torch.randint(vocab_size, (num,), generator=generator).tolist()

    rows = torch.randperm(num_rows, generator=generator)[: len(lengths)].tolist()
    numbers = [((1.7, 0.4, 0.9), (1.0, -0.3, 0.0), (0.6, 0.0, 0.0), (1.0, 0.0, -1.5))[(seed + i) % 4] for i in rows]
    prompts = [some(prompt) for prompt, _ in lengths]
    outputs = [list(zip(some(output), [1 + count % 3 for count in some(output)], strict=True)) for _, output in lengths]
    before = logits.cpu().clone()
    expected = in_float64(before, rows, numbers, prompts, outputs)
    its = penalties_of(rows, numbers, prompts, outputs)
    by_plain = before.clone().to(DEVICE)
    plain.penalise(by_plain, its)
    penalties.penalise(logits, its)
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(by_plain.cpu().double(), expected, rtol=1e-6, atol=2e-4)  # which adds up in float32
    others = [row for row in range(num_rows) if row not in rows]
    assert torch.equal(logits.cpu()[others], before[others]), "rows without penalties stay"
    check_others(memory, vocab_size)


def test_banned_tokens_stay_banned_and_the_order_of_entries_changes_nothing():
    logits = torch.tensor([[1.0, -torch.inf, -2.0, torch.nan, 3.0]], device=DEVICE).repeat(2, 1)
    forwards, backwards = ([(token, 1) for token in tokens] for tokens in ([0, 1, 2, 3, 4, 4], [4, 3, 4, 2, 1, 0]))
    penalties.penalise(logits, penalties_of([0, 1], [(1.3, 0.1, 0.7)] * 2, [[0, 4], [4, 0]], [forwards, backwards]))
    first, second = logits.cpu()
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))
    assert first[1] == -torch.inf
    assert first[3].isnan()


def test_a_token_that_no_row_has_changes_nothing():
    logits, memory = row_of(torch.Generator().manual_seed(0), 2, 9)
    before = logits.cpu().clone()
    penalties.penalise(logits, penalties_of([1], [(2.0, 1.0, 1.0)], [[9, 10]], [[(-1, 3)]]))
    penalties.add_bias(logits, torch.tensor([[0], [9]], device=DEVICE), torch.ones(1, device=DEVICE))
    assert torch.equal(logits.cpu(), before)
    check_others(memory, 9)
