"""Text of answers: whatever the tokenizer, the tokens and the cuts, it is what decode(prompt + answer) adds."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from msi.detokenizer import end_of_prompt
from msi.errors import ConfigError, InvalidRequest
from msi.text_stream import TextStream
from msi.tokenizer import encode, load_tokenizer
from msi.types import TokenLogprobs
from msi.vocabulary import Vocabulary
from tests.vocabularies import CORPUS, KINDS, tokenizer_of

TEXTS = [
    *CORPUS[:3],
    "🙂",
    "€",
    "é",
    "a\ufffdb",
    " leading",
    "trailing  ",
    "\u0001",
    "<|im_start|>user\n",
    "<tool call> x",
]


every_kind = pytest.mark.parametrize("kind", KINDS)


def vocabulary_of(kind, cache={}):  # noqa: B006
    if kind not in cache:
        cache[kind] = Vocabulary(tokenizer_of(kind))
    return cache[kind]


@st.composite
def ids_of(draw, kind, max_parts=6):
    """Random, sampled and adversarial ids."""
    tokenizer = tokenizer_of(kind)
    size = max(tokenizer.get_vocab().values()) + 1
    raw = [token for byte in range(256) if (token := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None]
    part = [
        st.integers(0, size + 2).map(lambda one: [one]),
        st.lists(st.integers(0, size + 2), max_size=5),
        st.sampled_from(TEXTS).map(lambda text: tokenizer.encode(text).ids[:12]),
        st.text(max_size=5).map(lambda text: tokenizer.encode(text, add_special_tokens=False).ids),
    ]
    if raw:
        part += [
            st.lists(st.sampled_from(raw), max_size=6),
            st.text(max_size=3).map(lambda text: [raw[byte] for byte in text.encode()]),
            st.text(min_size=1, max_size=2).map(lambda text: [raw[byte] for byte in text.encode()[:-1]]),
        ]
    return [one for some in draw(st.lists(st.one_of(part), max_size=max_parts)) for one in some]


def pushed(stream, ids, cuts=(), **last):
    """(pieces, token texts) of an answer that comes in these parts."""
    edges = [0, *sorted(cut % len(ids) for cut in cuts if ids), len(ids)]  # the last part is never empty
    pieces, texts = [], []
    for at, (begin, end) in enumerate(itertools.pairwise(edges)):
        part = ids[begin:end]
        is_last = at == len(edges) - 2
        new = stream.push(part, [TokenLogprobs(one, 0.0) for one in part], is_last=is_last, **(last if is_last else {}))
        pieces.append(new.text)
        texts += zip(new.logprobs, new.token_texts, strict=True)
        if stream.is_stopped:
            break
    return pieces, texts


def stream_of(kind, prompt, stop=(), min_tokens=0):
    vocabulary = vocabulary_of(kind)
    return TextStream(vocabulary, end_of_prompt(vocabulary, prompt), stop, min_tokens)


@every_kind
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_streamed_text_is_what_decoding_the_answer_behind_its_prompt_adds(kind, data):
    prompt, answer = data.draw(ids_of(kind)), data.draw(ids_of(kind))
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=8))
    decode = tokenizer_of(kind).decode
    before, whole = decode(prompt), decode(prompt + answer)
    pieces, texts = pushed(stream_of(kind, prompt), answer, cuts)
    text = "".join(pieces)
    if whole.startswith(before):
        assert text == whole[len(before) :]
    else:  # the prompt ends inside a character, or in bytes that become invalid
        assert whole.endswith(text)
    if answer:
        assert "".join(one.text for _, one in texts) == text
    assert [one.token_id for one, _ in texts] == answer
    assert "".join(pushed(stream_of(kind, prompt), answer, range(60))[0]) == text


# -- text to tokens --------------------------------------------------------------------------------------------------


@every_kind
def test_prompts_are_tokenised_as_in_transformers_whatever_truncation_and_padding_are_stored(kind, tmp_path):
    tokenizer = Tokenizer.from_str(tokenizer_of(kind).to_str())
    tokenizer.enable_truncation(4, stride=1)
    tokenizer.enable_padding(length=30, pad_id=0, pad_token=tokenizer.id_to_token(0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer((tmp_path / "tokenizer.json").read_bytes(), [tokenizer.id_to_token(0)])  # it pads, so it is
    for text in [*TEXTS, CORPUS[0] * 20, ""]:
        for special in (True, False):
            expected = reference(text, add_special_tokens=special)["input_ids"]
            assert list(encode(ours, text, special)) == expected
            assert ours.decode(expected) == reference.decode(expected, skip_special_tokens=True)


@every_kind
def test_tokens_that_the_model_names_are_special_whatever_tokenizer_json_says(kind, tmp_path):
    tokenizer = Tokenizer.from_str(tokenizer_of(kind).to_str())
    plain = [tokenizer.id_to_token(token) for token in encode(tokenizer, CORPUS[0], False)[2:4]]
    names = [*plain, "<tool call>", "<é>", "no such token"]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": names[0], "eos_token": names[1], "image_token": names[2], "pad_token": names[3]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer((tmp_path / "tokenizer.json").read_bytes(), names)
    for text in [*TEXTS, names[0] + "x" + names[1], f"a{names[2]} b {names[3]} c{names[0]}"]:
        expected = reference(text)["input_ids"]
        assert list(encode(ours, text)) == expected
        assert Vocabulary(ours).decode(expected) == reference.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"version": "1.0"}', b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read_is_said(content):
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(content)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        encode(tokenizer_of("llama"), "a\ud800b")
