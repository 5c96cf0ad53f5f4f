"""Numbers that no arithmetic survives are refused where requests come in; a row that goes wrong anyway goes alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msi import InvalidRequest, SamplingParams
from msi.attention.sampler import sample, sample_each
from msi.types import LogitChanges, SamplingExtras, TokenSampling

VOCAB = 23
NUMBERS = [
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
]  # fmt: skip
INTEGERS = ["max_tokens", "top_k", "seed", "min_tokens", "logprobs", "n"]
ABSURD = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1e300": 1e300, "10**400": 10**400, "10**5000": 10**5000,
    "-10**400": -(10**400), "2**64": 2**64, "below int64": -(2**63) - 1,
}  # fmt: skip  # by name: Python writes no integer of 5000 digits


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("name", [*NUMBERS, *INTEGERS])
def test_an_absurd_number_is_refused_by_name_in_one_line(name, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: ABSURD[value]})
    assert str(caught.value).startswith(f"{name} is ")
    assert caught.value.param == name
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids", "stop"])
@pytest.mark.parametrize("value", [*ABSURD, -1, 2**40, "\ud800", "a" * 5000, None, b"x", [], {}], ids=ascii)
def test_an_absurd_member_of_a_list_is_refused_by_name_in_one_line(name, value):
    value = ABSURD.get(value, value) if isinstance(value, str) else value
    given_value = {0: value} if name == "logit_bias" and value != -1 else (value,)
    with pytest.raises(InvalidRequest, match=f"^{name} is ") as caught:
        SamplingParams(**{name: given_value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-50}, {"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 1e-5},
        {"top_p": 1e-50}, {"top_p": 5e-324}, {"min_p": 1.0}, {"min_p": 5e-324}, {"top_k": 2**63 - 1},
        {"max_tokens": 2**63 - 1}, {"max_tokens": 2**31, "min_tokens": 2**31}, {"seed": 2**64 - 1}, {"seed": -(2**63)},
        {"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"presence_penalty": 1e-300},
        {"logit_bias": {0: 5e-324, 2**31 - 1: 100}},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_at_the_bounds_are_taken(params):
    SamplingParams(**params)


@pytest.mark.parametrize("temperature", [1e-50, 1e-40, 1e-20, 9e-6, 1e-5, 1e-4, 0.01])
def test_a_tiny_temperature_chooses_as_greedy_does(temperature):
    torch.manual_seed(0)
    logits = torch.randn(8, VOCAB) * 4
    sampled = sample(logits.clone(), [TokenSampling(temperature, 1, 0, 1, row) for row in range(8)])
    assert sampled.token_ids == logits.argmax(-1).tolist()
    assert not sampled.failures


@pytest.mark.parametrize("top_p", [1e-50, 1e-40, 5e-324])
def test_a_tiny_top_p_keeps_the_best_token(top_p):
    logits = torch.tensor([[0.0, 0.5, 0.2]])
    assert sample(logits, [TokenSampling(1.0, top_p, 0, 1, 0)]).token_ids == [1]


# -- rows that go wrong anyway ---------------------------------------------------------------------------------------

extremes = st.sampled_from([
    0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 1e30, -1e30, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 7.25, 30.0, 88.0,
])  # fmt: skip
absurd_floats = st.floats() | extremes
rows_of_logits = (
    st.lists(st.floats(-30, 30), min_size=VOCAB, max_size=VOCAB)
    | st.lists(extremes, min_size=VOCAB, max_size=VOCAB)
    | extremes.map(lambda value: [value] * VOCAB)
)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=2 * VOCAB).map(tuple)
changes = st.none() | st.builds(
    LogitChanges, absurd_floats, absurd_floats, absurd_floats, tokens, tokens,
    st.dictionaries(st.integers(0, VOCAB - 1), absurd_floats, max_size=4),
    tokens | st.just(tuple(range(VOCAB))),
)  # fmt: skip
samplings = st.builds(
    TokenSampling,
    temperature=absurd_floats,
    top_p=absurd_floats,
    top_k=st.integers(-(2**70), 2**70),
    seed=st.integers(-(2**70), 2**70),
    position=st.integers(0, 2**40),
    extras=st.none() | st.builds(SamplingExtras, absurd_floats, changes, st.none() | st.integers(0, 20)),
)


@pytest.mark.parametrize("logprobs", [None, 0, 3])
@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_ban_does_not_hide_a_logit_that_is_not_finite(broken, logprobs):
    logits = torch.zeros(2, VOCAB)
    logits[1, 5] = broken
    banned = SamplingExtras(changes=LogitChanges(banned_token_ids=(5,)), logprobs=logprobs)
    sampled = sample(logits, [TokenSampling(0, 1, 0, 1, 0, banned)] * 2)
    assert set(sampled.failures) == {1}
    assert "not finite" in sampled.failures[1]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(rows_of_logits, samplings), min_size=1, max_size=5))
@pytest.mark.slow
def test_no_row_hurts_another_whatever_its_logits_and_parameters(rows):
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float32)
    together = sample(logits.clone(), [sampling for _, sampling in rows])
    assert len(together.token_ids) == len(rows)
    assert set(together.failures) <= set(range(len(rows)))
    for index, (_, sampling) in enumerate(rows):
        alone = sample(logits[index : index + 1].clone(), [sampling])
        assert str(together.failures.get(index)) == str(alone.failures.get(0))
        if index in together.failures:
            assert together.failures[index]
            continue
        assert 0 <= together.token_ids[index] < VOCAB
        assert together.token_ids[index] == alone.token_ids[0]
        assert together.logprobs.get(index) == alone.logprobs.get(0)
        if index in together.logprobs:
            one = together.logprobs[index]
            assert all(math.isfinite(value) for value in (one.logprob, *one.top_logprobs))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("others", [math.nan, 0.0])
def test_logits_that_are_not_finite_are_said_greedy_or_not(temperature, damage, others):
    logits = torch.full((3, VOCAB), 1.0)
    logits[:, 5] = 9.0
    logits[1] = others
    logits[1, 3] = damage
    sampled = sample(logits, [TokenSampling(temperature, 1, 1, 1, row) for row in range(3)])
    assert [sampled.token_ids[row] for row in (0, 2)] == [5, 5]
    assert list(sampled.failures) == [1]
    assert "not finite" in sampled.failures[1]


def test_a_row_whose_tokens_are_all_banned_says_so():
    banned = SamplingExtras(changes=LogitChanges(banned_token_ids=tuple(range(VOCAB))))
    sampled = sample(torch.zeros(2, VOCAB), [TokenSampling(0.7, 1, 1, 1, 0, banned), TokenSampling(0, 1, 0, 1, 0)])
    assert list(sampled.failures) == [0]
    assert isinstance(sampled.failures[0], InvalidRequest)
    assert "no token can follow" in str(sampled.failures[0])
    nothing = sample(torch.full((1, VOCAB), -math.inf), [TokenSampling(0, 1, 0, 1, 0)])
    assert "not finite" in nothing.failures[0], "which is the model's doing"


def test_where_choosing_for_all_at_once_raises_each_row_is_chosen_alone(monkeypatch):
    def uniform(seed, position):
        if seed == 13:
            raise ArithmeticError("unlucky\nnumber")
        return 0.5

    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB)
    sampling = [TokenSampling(temperature, 1, 0, 1, 0, SamplingExtras(logprobs=1)) for temperature in (0, 0.5, 0.5, 1)]
    expected = sample(logits.clone(), sampling)
    monkeypatch.setattr("msi.attention.sampler.uniform_of", uniform)
    expected = sample(logits.clone(), sampling)
    sampling[2] = TokenSampling(0.5, 1, 0, 13, 0)
    with pytest.raises(ArithmeticError):
        sample(logits.clone(), sampling)
    sampled = sample_each(logits.clone(), sampling)
    assert sampled.failures == {2: "choosing its next token failed: ArithmeticError: unlucky number"}
    for row in (0, 1, 3):
        assert sampled.token_ids[row] == expected.token_ids[row]
        assert sampled.logprobs[row] == expected.logprobs[row]


members = st.one_of(
    st.integers(-2, 2**31), st.floats(), st.booleans(), st.none(), st.text(max_size=1), st.integers(2**31, 2**70)
)


@given(st.lists(members, max_size=4))
def test_listed_tokens_are_judged_all_together_as_each_alone(tokens):
    def is_token(one):
        return isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31

    if all(map(is_token, tokens)):
        assert SamplingParams(stop_token_ids=tuple(tokens)).stop_token_ids == tuple(tokens)
    else:
        with pytest.raises(InvalidRequest, match="stop_token_ids is "):
            SamplingParams(stop_token_ids=tuple(tokens))


@given(st.lists(members, max_size=4))
def test_biases_are_judged_all_together_as_each_alone(values):
    def is_bias(one):
        return isinstance(one, int | float) and not isinstance(one, bool) and -100 <= one <= 100

    bias = dict(enumerate(values))
    if all(map(is_bias, values)):
        assert SamplingParams(logit_bias=bias).logit_bias == bias
    else:
        with pytest.raises(InvalidRequest, match="logit_bias is "):
            SamplingParams(logit_bias=bias)
