"""Penalties, bias, bans, min-p and log-probabilities: against transformers' processors and plain definitions."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from msi import Engine, InvalidRequest, SamplingParams
from msi.attention.logit_changes import change
from msi.attention.sampler import PLAIN, sample
from msi.sampling import SeenTokens, choices_of, completing, has_extras, sampling_extras, seed_of_choice
from msi.text.prompts import Prompts
from msi.text.text_stream import TextStream
from msi.text.vocabulary import Vocabulary
from msi.types import LogitChanges, SamplingExtras, TokenLogprobs, TokenSampling
from tests.conftest import TEXT
from tests.installed import transformers
from tests.test_engine import collect, idle

VOCAB = 40
EOS = (2, 3)
token_lists = st.lists(st.integers(0, VOCAB - 1), max_size=12).map(tuple)
penalties = st.floats(-2, 2).map(lambda value: round(value, 2))
changes_of_a_row = st.none() | st.builds(
    LogitChanges,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    prompt_token_ids=token_lists,
    output_token_ids=token_lists,
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
    banned_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    allowed_token_ids=token_lists,
)


def changed_one_by_one(row, changes):
    """The definition, one token after the other."""
    row = row.clone()
    for token in range(VOCAB):
        row[token] += changes.logit_bias.get(token, 0.0)
        if token in changes.banned_token_ids or (changes.allowed_token_ids and token not in changes.allowed_token_ids):
            row[token] = -torch.inf
        if token in changes.prompt_token_ids + changes.output_token_ids:
            row[token] *= changes.repetition_penalty if row[token] <= 0 else 1 / changes.repetition_penalty
        count = changes.output_token_ids.count(token)
        row[token] -= changes.frequency_penalty * count + changes.presence_penalty * (count > 0)
    return row


@settings(max_examples=60, deadline=None)
@given(st.lists(changes_of_a_row, min_size=1, max_size=4), st.integers(0, 1000))
def test_a_micro_batch_is_changed_as_each_row_would_be_token_by_token(changes, seed):
    torch.manual_seed(seed)
    logits = torch.randn(len(changes), VOCAB) * 3
    expected = [row if one is None else changed_one_by_one(row, one) for row, one in zip(logits, changes, strict=True)]
    ours = logits.clone()
    change(ours, [(row, one) for row, one in enumerate(changes) if one is not None], PLAIN)
    torch.testing.assert_close(ours, torch.stack(expected))


def test_the_repetition_penalty_is_transformers():
    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB)
    tokens = [[1, 5, 5, 9], [7, 7, 8, 0]]
    expected = transformers().RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(tokens), logits.clone())
    changes = [LogitChanges(1.7, prompt_token_ids=tuple(one[:2]), output_token_ids=tuple(one[2:])) for one in tokens]
    change(logits, list(enumerate(changes)), PLAIN)
    torch.testing.assert_close(logits, expected)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=30), num_prompt=st.integers(1, 30), steps=st.integers(1, 5),
    penalties=st.tuples(st.sampled_from([0.5, 1.0, 1.3]), penalties, penalties),
)  # fmt: skip
def test_tokens_that_are_read_once_each_are_penalised_as_all_of_them_are(tokens, num_prompt, steps, penalties):
    num_prompt = min(num_prompt, len(tokens))
    repetition, presence, frequency = penalties
    params = SamplingParams(
        seed=1, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    seen = SeenTokens()
    for end in range(num_prompt, len(tokens) + 1, steps):
        logits = torch.arange(VOCAB)[None] / 7 - 1.0
        whole = LogitChanges(repetition, presence, frequency, tuple(tokens[:num_prompt]), tuple(tokens[num_prompt:end]))
        expected = changed_one_by_one(logits[0], whole)
        changes = sampling_extras(params, tokens[:end], num_prompt, EOS, seen).changes
        if changes is not None:
            for ids in (changes.prompt_token_ids, changes.output_token_ids):
                assert len(set(ids)) == len(ids)
            change(logits, [(0, changes)], PLAIN)
        torch.testing.assert_close(logits[0], expected)


short = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@given(sequences=st.lists(short, min_size=1, max_size=6), tokens=st.lists(st.integers(0, 3), max_size=8))
def test_what_may_not_be_completed_is_transformers(sequences, tokens):
    processor = transformers().NoBadWordsLogitsProcessor([list(one) for one in sequences])
    before = [VOCAB - 1] * 4  # transformers looks only for sequences that are no longer than what there is
    row = processor(torch.tensor([before + tokens]), torch.zeros(1, VOCAB))[0]
    assert set(completing(sequences, before + tokens, 0)) == set(row.isinf().nonzero().flatten().tolist())
    behind_prompt = {one[-1] for one in sequences if len(one) == 1}
    assert set(completing(sequences, before + tokens, 4 + len(tokens))) == behind_prompt


def test_no_ban_and_no_list_of_what_is_allowed_hides_a_broken_row():
    logits = torch.zeros(3, VOCAB)
    logits[0, 5] = torch.nan
    logits[1, 5] = torch.inf
    changes = LogitChanges(allowed_token_ids=(1, 2))
    sampled = sample(logits, [TokenSampling(0, 1, 0, 1, 0, SamplingExtras(changes=changes))] * 3)
    assert sorted(sampled.failures) == [0, 1]
    assert sampled.token_ids[2] == 1


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("top_k", [0, 5, 12])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_what_can_be_drawn_is_what_transformers_warpers_leave(temperature, top_p, top_k, min_p):
    torch.manual_seed(1)
    logits = torch.randn(VOCAB) * 1.5
    theirs = transformers()
    warpers = theirs.LogitsProcessorList([theirs.TemperatureLogitsWarper(temperature)])
    if min_p:
        warpers.append(theirs.MinPLogitsWarper(min_p))
    if top_k:
        warpers.append(theirs.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(top_p))
    left = torch.softmax(warpers(None, logits[None].clone()), dim=-1)[0]
    count = 4000
    extras = SamplingExtras(min_p=min_p)
    sampling = [TokenSampling(temperature, top_p, top_k, 5, position, extras) for position in range(count)]
    seen = torch.bincount(torch.tensor(sample(logits.repeat(count, 1), sampling).token_ids), minlength=VOCAB) / count
    assert not seen[left == 0].any()
    torch.testing.assert_close(seen, left.float(), atol=0.035, rtol=0)


def test_logprobs_are_of_the_models_own_distribution():
    torch.manual_seed(2)
    logits = torch.randn(4, VOCAB)
    raw = torch.log_softmax(logits, dim=-1)
    sampling = [
        TokenSampling(0, 1, 0, 1, 0),
        TokenSampling(0, 1, 0, 1, 0, SamplingExtras(logprobs=0)),
        TokenSampling(0.5, 1, 3, 1, 0, SamplingExtras(changes=LogitChanges(logit_bias={7: 100.0}), logprobs=3)),
        TokenSampling(0, 1, 0, 1, 0, SamplingExtras(changes=LogitChanges(logit_bias={8: 100.0}), logprobs=1)),
    ]
    sampled = sample(logits.clone(), sampling)
    assert sampled.token_ids[2:] == [7, 8]
    assert sorted(sampled.logprobs) == [1, 2, 3]
    for row, one in sampled.logprobs.items():
        count = sampling[row].extras.logprobs
        values, tokens = raw[row].topk(count)
        assert one.token_id == sampled.token_ids[row]
        assert one.top_token_ids == tuple(tokens.tolist())
        assert (one.logprob, *one.top_logprobs) == pytest.approx([raw[row, one.token_id].item(), *values.tolist()])


def test_plain_rows_beside_rows_with_features_are_untouched():
    torch.manual_seed(3)
    logits = torch.randn(3, VOCAB)
    plain = [TokenSampling(temperature, 0.9, 0, 4, 9) for temperature in (0.0, 0.8, 1.2)]
    alone = [sample(logits[row : row + 1].clone(), plain[row : row + 1]).token_ids[0] for row in range(3)]
    changes = LogitChanges(2.0, 1.0, 1.0, (1, 2), (3, 3))
    mixed = [plain[0], TokenSampling(0.0, 1, 0, 1, 1, SamplingExtras(0.1, changes, 2)), *plain[1:]]
    beside = sample(logits[[0, 0, 1, 2]].clone(), mixed).token_ids
    assert [beside[0], *beside[2:]] == alone


def test_requests_without_features_carry_nothing():
    plain = {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "stop": ("x",), "stop_token_ids": (9,), "n": 2}
    assert not has_extras(SamplingParams(seed=1, **plain))
    features = {"logprobs": 0, "min_p": 0.1, "min_tokens": 1, "repetition_penalty": 1.1, "presence_penalty": 1,
                "frequency_penalty": -1, "logit_bias": {1: 0}, "allowed_token_ids": (1,),
                "bad_words_token_ids": ((1, 2),)}  # fmt: skip
    assert all(has_extras(SamplingParams(seed=1, **{name: value})) for name, value in features.items())


def test_tokens_travel_for_those_penalties_alone_that_need_them():
    def changes(**params):
        return sampling_extras(SamplingParams(seed=1, **params), [5, 6, 7], 2, EOS).changes

    prompt, output = array("q", (5, 6)), array("q", (7,))
    assert changes(presence_penalty=0.5) == LogitChanges(presence_penalty=0.5, output_token_ids=output)
    assert changes(repetition_penalty=2) == LogitChanges(2, prompt_token_ids=prompt, output_token_ids=output)
    assert changes(logit_bias={4: 1}) == LogitChanges(logit_bias={4: 1})
    assert changes(logprobs=2) is None


def test_min_tokens_bars_the_end_until_enough_tokens_are_there():
    params = SamplingParams(seed=1, max_tokens=5, min_tokens=2, stop_token_ids=(9,))
    sampled = [sampling_extras(params, [5] * count, 3, EOS).changes for count in (3, 4, 5)]
    assert sampled == [LogitChanges(banned_token_ids=(2, 3, 9))] * 2 + [None]


def test_choices_have_seeds_of_their_own():
    seeds = [seed_of_choice(11, index) for index in range(128)]
    assert seeds[0] == 11
    assert len(set(seeds)) == 128
    assert all(SamplingParams(seed=seed).seed == seed for seed in seeds)
    assert seeds == [seed_of_choice(11, index) for index in range(128)]
    assert seeds[1:] != [seed_of_choice(12, index) for index in range(1, 128)]


@pytest.mark.parametrize("max_tokens", [16, 17, 70_000, 2**63 - 1])
def test_no_choice_is_taken_to_need_more_tokens_than_the_context_has_room_for(max_tokens):
    params = SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, n=3)
    choices = choices_of(params, 11, 16)
    assert [(one.max_tokens, one.min_tokens, one.n) for one in choices] == [(16, 16, 1)] * 3
    assert [one.seed for one in choices] == [seed_of_choice(11, index) for index in range(3)]
    assert choices_of(SamplingParams(max_tokens=5, min_tokens=2), 11, 16)[0].max_tokens == 5


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"min_p": 1.5}, r"min_p is 1\.5; it must be a number from 0 to 1"),
        ({"presence_penalty": -3}, "presence_penalty is -3; it must be a number from -2 to 2"),
        ({"frequency_penalty": "high"}, "frequency_penalty is 'high'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number from 0.01 to 100"),
        ({"logit_bias": {5: 101}}, "logit_bias is .5: 101.; it must be a map of up to 1024 token ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias is"),
        ({"logit_bias": [5]}, "logit_bias is"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias is"),
        ({"min_tokens": 17}, "min_tokens is 17; it must be an integer from 0 to max_tokens, which is 16"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is"),
        ({"stop_token_ids": (True,)}, "stop_token_ids is"),
        ({"logprobs": 21}, "logprobs is 21; it must be an integer from 0 to 20"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids is"),
        ({"allowed_token_ids": (1,) * 5000}, "allowed_token_ids is .*; it must be up to 4096 token ids"),
        ({"bad_words": ("",)}, "bad_words is .*; it must be up to 128 strings of 1 to 256 characters, not all spaces"),
        ({"bad_words": ("  ",)}, "bad_words is"),
        ({"bad_words": ("a", 5)}, "bad_words is"),
        ({"bad_words_token_ids": ((),)}, "bad_words_token_ids is"),
        ({"bad_words_token_ids": ((1, "a"),)}, "bad_words_token_ids is"),
        ({"skip_special_tokens": 1}, "skip_special_tokens is 1; it must be true or false"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output is 'yes'"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0; it must be an integer >= 1, -1 for all"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens is -2"),
        ({"n": 0}, "n is 0; it must be an integer from 1 to 128"),
    ],
)
def test_parameters_that_make_no_sense_are_named(params, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        SamplingParams(**params)


@pytest.fixture(scope="module")
def characters():
    """A tokenizer of the alphabet: token 0 is "a"."""
    tokenizer = Tokenizer(models.WordLevel({chr(97 + n): n for n in range(26)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize("min_tokens", [0, 2, 3, 5])
def test_no_stop_string_counts_before_min_tokens(characters, min_tokens):
    stream = TextStream(Vocabulary(characters), (), ("bc",), min_tokens)
    text = ""
    for character in "abcdebcd":
        text += stream.push((ord(character) - 97,)).text
        if stream.is_stopped:
            break
    assert text == {0: "a", 2: "abcde", 3: "abcde", 5: "abcde"}[min_tokens]


# -- through a whole instance ----------------------------------------------------------------------------------------

GREEDY = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def engine(tiny_model):
    async with Engine.local(model=tiny_model, expert_workers=2, transport="inproc", micro_batches=2) as engine:
        yield engine
        await idle(engine)


async def test_stop_tokens_end_the_text_before_themselves(engine):
    whole, tokens, _ = await collect(engine, TEXT, **GREEDY)
    at = next(index for index in range(4, 24) if tokens[index] not in tokens[:index])
    text, fewer, reason = await collect(engine, TEXT, stop_token_ids=(tokens[at],), **GREEDY)
    assert (fewer, reason) == (tokens[: at + 1], "stop")
    assert whole.startswith(text)
    assert len(text) < len(whole)
    barred = {**GREEDY, "stop_token_ids": (tokens[at],), "min_tokens": 24}
    _, others, reason = await collect(engine, TEXT, **barred)
    assert (tokens[at] in others, len(others), reason) == (False, 24, "length")


async def test_bias_and_penalties_reach_the_sampler(engine):
    _, tokens, _ = await collect(engine, TEXT, **GREEDY)
    _, biased, _ = await collect(engine, TEXT, logit_bias={17: 100}, **GREEDY)
    assert biased == [17] * 24
    _, forbidden, _ = await collect(engine, TEXT, logit_bias={tokens[0]: -100}, **GREEDY)
    assert tokens[0] not in forbidden
    # a bias keeps token 17 in front until the penalties for it add up
    _, penalised, _ = await collect(engine, TEXT, logit_bias={17: 9.5}, frequency_penalty=2, **GREEDY)
    assert penalised[0] == 17
    assert len(set(penalised)) > 1


async def test_only_what_is_allowed_is_chosen_and_no_bad_word_is_completed(engine):
    _, tokens, _ = await collect(engine, TEXT, **GREEDY)
    allowed = tuple(sorted(set(tokens)))[:3]
    _, chosen, _ = await collect(engine, TEXT, allowed_token_ids=allowed, frequency_penalty=2, seed=3, **GREEDY)
    assert set(chosen) <= set(allowed)
    assert len(set(chosen)) > 1, "penalties work among them"
    _, others, _ = await collect(engine, TEXT, bad_words_token_ids=(tuple(tokens[2:5]), (9, 9, 9)), **GREEDY)
    assert others[:4] == tokens[:4]
    assert others[4] != tokens[4]
    assert not any(others[at : at + 3] == tokens[2:5] for at in range(24))
    with pytest.raises(InvalidRequest, match="min_tokens is 2, and allowed_token_ids has no token"):
        await collect(engine, TEXT, allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=2)


async def test_a_word_is_banned_with_a_space_before_it_and_without(engine, tiny_model):
    """Its sequences are vLLM's."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    checked = Prompts(tokenizer, vocab_size=10**4, max_model_len=9).checked(SamplingParams(bad_words=(" man", "z")))
    bare, spaced, other = (tuple(tokenizer.encode(word).ids) for word in ("man", " man", "z"))
    assert checked.bad_words_token_ids == (bare, *[spaced] * (len(bare) == len(spaced)), other)
    assert checked.bad_words == ()
    _, tokens, _ = await collect(engine, TEXT, **GREEDY)
    token = next(one for one in tokens if tokenizer.encode(engine.decode([one])).ids == [one])
    _, others, _ = await collect(engine, TEXT, bad_words=(engine.decode([token]),), **GREEDY)
    assert token not in others


async def test_logprobs_come_with_their_tokens(engine):
    outputs = [output async for output in engine.generate(TEXT, SamplingParams(logprobs=2, **GREEDY))]
    for output in outputs:
        assert [one.token_id for one in output.logprobs] == list(output.token_ids)
        for one in output.logprobs:
            assert isinstance(one, TokenLogprobs)
            assert one.top_token_ids[0] == one.token_id, "greedy"
            assert one.logprob == pytest.approx(one.top_logprobs[0])
            assert len(one.top_token_ids) == 2
    plain = [output async for output in engine.generate(TEXT, SamplingParams(**GREEDY))]
    assert all(output.logprobs == () for output in plain)


async def test_choices_are_requests_with_derived_seeds(engine):
    params = {"max_tokens": 12, "seed": 5, "ignore_eos": True}
    found = {0: [], 1: [], 2: []}
    async for output in engine.generate(TEXT, SamplingParams(n=3, **params), request_id="three"):
        assert output.request_id == "three"
        found[output.index] += output.token_ids
    for index, tokens in found.items():
        alone = await collect(engine, TEXT, **{**params, "seed": seed_of_choice(5, index)})
        assert tokens == alone[1]


async def test_a_choice_that_meets_a_stop_string_ends_alone(engine):
    whole, _, _ = await collect(engine, TEXT, max_tokens=40, seed=5, ignore_eos=True)
    stop, reasons = whole[5:8], {}
    params = SamplingParams(max_tokens=40, seed=5, ignore_eos=True, n=2, stop=(stop,))
    texts = {0: "", 1: ""}
    async for output in engine.generate(TEXT, params):
        assert output.index not in reasons, "nothing follows the end"
        texts[output.index] += output.text
        if output.finish_reason:
            reasons[output.index] = output.finish_reason
    assert texts[0] == whole[: whole.index(stop)]
    assert (reasons[0], sorted(reasons)) == ("stop", [0, 1])


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
async def test_tokens_beyond_the_vocabulary_are_refused(engine, name):
    value = {9999: 1.0} if name == "logit_bias" else (9999,)
    with pytest.raises(InvalidRequest, match=f"token id 9999 in {name}"):
        await collect(engine, TEXT, **{name: value})
