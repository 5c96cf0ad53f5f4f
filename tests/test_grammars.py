"""Grammars over tokens of every kind of vocabulary: whatever is allowed, step by step, is text of the grammar."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import numpy as np
import pytest

from msi.attention.masks import make_masks
from msi.errors import InvalidRequest
from msi.sampling_params import SamplingParams
from msi.structured_outputs import StructuredOutputs
from msi.text.grammars import GrammarError, Grammars
from msi.text.text_stream import text_streams
from msi.text.vocabulary import Vocabulary
from msi.types import Constrained
from tests.vocabularies import KINDS, tokenizer_of

SUPPORTED = {
    "llama", "llama-without-strip", "metaspace-first", "metaspace-always", "metaspace-never", "byte-level",
    "byte-level-prefix",
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"truth": {"type": "string", "maxLength": 5}, "é": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["truth", "é"],
    "additionalProperties": False,
}
REGEX = r" ?(It is|a|日本語|🙂){2,3}( truth)?\n"


def grammars_of(tokenizer, vocab_size=0, eos=("</s>",)):
    size = tokenizer.get_vocab_size()
    return Grammars(tokenizer.to_str, vocab_size or size, [tokenizer.token_to_id(one) for one in eos])


def allowed(state, tokens, vocab_size):
    masks = make_masks([Constrained(3, state, tuple(tokens))], vocab_size)
    assert masks.rows == [3], masks.failures
    assert masks.bits.shape == (1, -(-vocab_size // 32))
    return np.flatnonzero(np.unpackbits(masks.bits[0].numpy().view(np.uint8), bitorder="little")).tolist()


def walked(grammars, tokenizer, asked, seed):
    """Tokens that somebody chose who knows nothing."""
    chance, state, tokens = random.Random(seed), grammars.begin(asked), []
    end = tokenizer.token_to_id("</s>")
    for _ in range(400):
        choices = allowed(state, tokens, tokenizer.get_vocab_size())
        token = chance.choice(choices)
        if token == end:
            return tokens
        tokens.append(token)
        if state.ends_with(token):
            return tokens
    raise AssertionError(tokens)


@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_any_way_through_a_grammar_is_its_text(kind):
    tokenizer = tokenizer_of(kind)
    grammars, vocabulary = grammars_of(tokenizer), Vocabulary(tokenizer)
    prompt = tokenizer.encode("It is a").ids
    for seed in range(12):
        for asked in (StructuredOutputs(regex=REGEX), StructuredOutputs(json=json.dumps(SCHEMA))):
            (stream,) = text_streams(vocabulary, prompt, SamplingParams())
            text = stream.push(walked(grammars, tokenizer, asked, seed), is_last=True).text
            if asked.regex:
                assert re.fullmatch(REGEX, text), text
            else:
                jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - SUPPORTED))
def test_other_tokenizers_are_refused_with_a_sentence(kind):
    tokenizer = tokenizer_of(kind)
    with pytest.raises(InvalidRequest, match="its tokenizer is not supported"):
        Grammars(tokenizer.to_str, tokenizer.get_vocab_size(), []).begin(StructuredOutputs(regex="a"))
    with pytest.raises(InvalidRequest, match=r"need a tokenizer\.json"):
        Grammars(lambda: "", 100, []).begin(StructuredOutputs(regex="a"))


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
@pytest.mark.parametrize("text", ["</s>", "x<unk>y", "<|im_start|>user", "<é>", "<tool call>"])
def test_text_that_looks_like_a_token_is_text(kind, text):
    tokenizer = tokenizer_of(kind)
    grammars, vocabulary = grammars_of(tokenizer), Vocabulary(tokenizer)
    for asked, expected in (
        (StructuredOutputs(choice=(text,)), text),
        (StructuredOutputs(json=json.dumps({"const": text})), json.dumps(text, ensure_ascii=False)),
        (StructuredOutputs(regex=re.escape(text).replace("\\ ", " ")), text),
    ):
        (stream,) = text_streams(vocabulary, tokenizer.encode("It").ids, SamplingParams())
        assert stream.push(walked(grammars, tokenizer, asked, 1), is_last=True).text == expected


@pytest.mark.parametrize("more", [-9, 0, 1, 77])
def test_the_mask_is_as_wide_as_the_logits(more):
    """A model may have fewer tokens than its tokenizer, or rows of logits that stand for none."""
    tokenizer = tokenizer_of("byte-level")
    size = tokenizer.get_vocab_size() + more
    state = grammars_of(tokenizer, size).begin(StructuredOutputs(regex="[a-z]+"))
    found = allowed(state, [], size)
    assert all(re.fullmatch("[a-z]+", tokenizer.decode([token])) for token in found)
    assert len(found) > 20


def test_every_end_of_sequence_is_allowed_where_the_answer_is_whole_and_nowhere_else():
    tokenizer = tokenizer_of("byte-level")
    ends = {tokenizer.token_to_id(one) for one in ("</s>", "<|im_start|>")}
    state = grammars_of(tokenizer, eos=("</s>", "<|im_start|>")).begin(StructuredOutputs(regex="ab?"))
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert not ends & set(allowed(state, [], 999))
    assert ends | {b} == set(allowed(state, [a], 999))
    assert not state.ends_with(min(ends))
    assert state.ends_with(b)


def test_what_counts_are_the_tokens_that_it_is_told():
    """A token that was chosen in a pass that came to nothing is forgotten, and so is what a preemption threw away."""
    tokenizer = tokenizer_of("byte-level")
    grammars = grammars_of(tokenizer)
    state = grammars.begin(StructuredOutputs(regex="q(z|x)j"))
    a, b, c, d = map(tokenizer.token_to_id, "qzxj")
    assert allowed(state, [], 999) == [a]
    assert not state.ends_with(a)
    assert set(allowed(state, [], 999)) == {a}
    assert not state.ends_with(a)
    assert set(allowed(state, [a], 999)) == {b, c}
    assert not state.ends_with(b)
    assert set(allowed(state, [a, c], 999)) == {d}
    assert set(allowed(grammars.begin(StructuredOutputs(regex="q(z|x)j")), [a, b], 999)) == {d}, "begun in the middle"
    with pytest.raises(GrammarError):
        state.allowed([d])
    masks = make_masks(
        [Constrained(0, state, (d,)), Constrained(2, grammars.begin(StructuredOutputs(regex="a")), ())], 9
    )
    assert masks.rows == [2]
    assert "cannot go on in its grammar" in masks.failures[0]


@pytest.mark.parametrize("rules", ['e e | "q"', 'e e e | e e | "q"'])
def test_a_grammar_that_becomes_too_complex_is_the_requests_fault(rules):
    tokenizer = tokenizer_of("byte-level")
    state, tokens = grammars_of(tokenizer).begin(StructuredOutputs(grammar=f"start: e\ne: {rules}")), []

    def walk():
        for _ in range(1000):
            state.allowed(tokens)
            tokens.append(tokenizer.token_to_id("q"))

    with pytest.raises(InvalidRequest, match="too complex behind") as found:
        walk()
    assert found.value.code == "grammar_too_complex"
    masks = make_masks([Constrained(0, state, tuple(tokens))], 9)
    assert isinstance(masks.failures[0], InvalidRequest)
    with pytest.raises(InvalidRequest):
        state.ends_with(tokenizer.token_to_id("q"))


def test_an_object_too_wide_for_the_parser_is_refused_before_its_answer_begins():
    tokenizer = tokenizer_of("byte-level")
    wide = {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(3000)}}
    with pytest.raises(InvalidRequest, match="cannot be compiled"):
        grammars_of(tokenizer).begin(StructuredOutputs(json=json.dumps(wide)))
