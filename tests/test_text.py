"""Text of answers: whatever the tokenizer, the tokens and the cuts, it is what decode(prompt + answer) adds."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from msi import SamplingParams
from msi.errors import ConfigError, InvalidRequest, RequestFailed
from msi.server.completions import CompletionAnswer
from msi.text.detokenizer import MAX_HELD_BYTES, end_of_prompt
from msi.text.text_stream import TextStream, text_streams
from msi.text.tokenizer import encode, load_tokenizer
from msi.text.vocabulary import REPLACEMENT, Vocabulary
from msi.types import Output, TokenLogprobs, TokenText
from tests.everyday import mostly_slow
from tests.installed import transformers
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
some_kinds = pytest.mark.parametrize("kind", mostly_slow(KINDS, keep=3))


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


def stream_of(kind, prompt, stop=(), min_tokens=0, *, shows_special=False, includes_stop=False):
    vocabulary = vocabulary_of(kind)
    if shows_special:
        vocabulary = vocabulary.showing_special
    return TextStream(vocabulary, end_of_prompt(vocabulary, prompt), stop, min_tokens, includes_stop=includes_stop)


@some_kinds
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


@some_kinds
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_special_tokens_are_part_of_the_text_where_that_is_wanted(kind, data):
    prompt, answer = data.draw(ids_of(kind)), data.draw(ids_of(kind))
    tokenizer = tokenizer_of(kind)
    before, whole = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (prompt, prompt + answer))
    pieces, texts = pushed(stream_of(kind, prompt, shows_special=True), answer, data.draw(st.lists(st.integers(0, 60))))
    text = "".join(pieces)
    if whole.startswith(before):
        assert text == whole[len(before) :]
    else:
        assert whole.endswith(text)
    if answer:
        assert "".join(one.text for _, one in texts) == text


@some_kinds
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_stop_string_may_be_part_of_the_text_which_then_waits_for_nothing(kind, data):
    answer = data.draw(ids_of(kind))
    whole = "".join(pushed(stream_of(kind, ()), answer)[0])
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = (whole[begin : begin + data.draw(st.integers(1, 5))] or "never",)
    without = "".join(pushed(stream_of(kind, (), stop), answer)[0])
    pieces, texts = pushed(stream_of(kind, (), stop, includes_stop=True), answer, range(60))
    assert "".join(pieces) == without + stop[0] * (stop[0] in whole)
    if answer:
        assert "".join(one.text for _, one in texts) == "".join(pieces)
    plain = pushed(stream_of(kind, ()), answer, range(60))[0]
    assert pieces[:-1] == plain[: max(0, len(pieces) - 1)], "nothing is held back"


@some_kinds
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_stop_strings_end_the_text_wherever_tokens_and_pushes_are_cut(kind, data):
    prompt, answer = data.draw(ids_of(kind, 2)), data.draw(ids_of(kind))
    whole = "".join(pushed(stream_of(kind, prompt), answer)[0])
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = tuple({whole[begin : begin + data.draw(st.integers(1, 5))] or "never", data.draw(st.text(min_size=1))})
    cuts = data.draw(st.lists(st.integers(0, 60), max_size=8))
    pieces, texts = pushed(stream_of(kind, prompt, stop), answer, cuts)
    one_by_one = pushed(stream_of(kind, prompt, stop), answer, range(60))
    text = "".join(pieces)
    assert whole.startswith(text)
    assert not any(one in text for one in stop)
    if any(one in whole for one in stop):
        assert any(whole.startswith(one, len(text)) for one in stop)
    else:
        assert text == whole
    assert text == "".join(one_by_one[0])
    assert "".join(one.text for _, one in texts) == text == "".join(one.text for _, one in one_by_one[1])


def test_a_text_goes_on_behind_its_prompt_with_its_first_space():
    tokenizer = tokenizer_of("llama")
    prompt, answer = encode(tokenizer, "It is"), encode(tokenizer, "the truth", add_special_tokens=False)
    pieces, texts = pushed(stream_of("llama", prompt), answer, range(60))
    assert "".join(pieces) == " the truth"
    assert texts[0][1].text.startswith(" ")
    assert "".join(pushed(stream_of("llama", prompt[:1]), answer)[0]) == "the truth", "nothing stands before it"


BYTES = [tokenizer_of("llama").token_to_id(f"<0x{byte:02X}>") for byte in range(256)]


def llama_bytes(data):
    return [BYTES[byte] for byte in data]


def test_bytes_that_are_no_text_are_told_at_once():
    stream = stream_of("llama", ())
    pieces = [stream.push([token]).text for token in llama_bytes(b"\xff" * 50 + b"a" * 50)]
    assert pieces == [REPLACEMENT] * 100, "as the whole run is invalid"


@pytest.mark.parametrize("character", ["a", "é", "€", "🙂"])
def test_a_long_run_of_bytes_is_told_as_it_comes(character):
    data = character.encode() * 200
    stream = stream_of("llama", ())
    told = b""
    for at, token in enumerate(llama_bytes(data)):
        told += stream.push([token]).text.encode()
        assert data.startswith(told)
        assert at + 1 - len(told) <= MAX_HELD_BYTES
    assert stream.push(llama_bytes(b"\xe2")).text == ""
    assert stream.push([], is_last=True).text == REPLACEMENT, "and what was told is not taken back"


HOSTILE = {
    "cut": ("byte-level", "â"), "bytes": ("llama", "<0xE2>"), "spaces": ("llama", "▁"), "special": ("llama", "<s>"),
    "metaspace": ("metaspace-first", "▁"), "nothing": ("llama", None), "replacement": ("byte-level", "ï¿½"),
}  # fmt: skip


def counted(vocabulary):
    """How many tokens each call of its tokenizer's decode is about, from now on."""
    tokenizer, lengths = vocabulary.tokenizer, []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, token_ids, **options):
            lengths.append(len(token_ids))
            return tokenizer.decode(token_ids, **options)

    vocabulary.tokenizer = Counting()
    return lengths


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_token_costs_does_not_grow_with_the_answer(name, monkeypatch):
    kind, token = HOSTILE[name]
    vocabulary = Vocabulary(tokenizer_of(kind))
    ids = [99_999] if token is None else [tokenizer_of(kind).token_to_id(token)]
    if ids == [None]:
        ids = encode(tokenizer_of(kind), REPLACEMENT)
    lengths = counted(vocabulary)
    stream = TextStream(vocabulary, (), ())
    pieces = [stream.push([one]).text for one in [*ids] * 500]
    assert max(lengths, default=0) <= MAX_HELD_BYTES + 8
    assert sum(lengths) <= 500 * len(ids) * 20
    text = "".join(pieces) + stream.push([], is_last=True).text
    assert text == tokenizer_of(kind).decode([*ids] * 500)


@pytest.mark.parametrize("text", ["It is a truth, 日本 é 🙂", "<tool call> x<é>", "\x00 \u2028"])
def test_a_token_of_whole_characters_behind_whole_characters_is_not_decoded_again(text):
    tokenizer = tokenizer_of("byte-level")
    vocabulary = Vocabulary(tokenizer)
    ids = encode(tokenizer, text)
    lengths = counted(vocabulary)
    TextStream(vocabulary, (), ()).push(ids)
    before = len(lengths)
    stream = TextStream(vocabulary, (), ())
    assert "".join(stream.push([one]).text for one in [*ids] * 50) == tokenizer.decode([*ids] * 50)
    num_cut = sum(vocabulary.bytes_of(one) != tokenizer.decode([one]).encode() for one in ids)
    assert len(lengths) - before <= 1 + 50 * 3 * num_cut


def test_a_tokenizer_that_panics_ends_that_answer_with_an_error():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "bb": 1, "c": 2}, "a"))
    tokenizer.decoder = decoders.Strip("a", 1, 1)  # cuts more than there is
    vocabulary = Vocabulary(tokenizer)
    stream = TextStream(vocabulary, (), ())
    assert stream.push([1]).text == "bb"
    with pytest.raises(RequestFailed, match="the tokenizer cannot decode the answer"):
        stream.push([0])
    with pytest.raises(InvalidRequest, match="the tokenizer cannot decode the prompt"):
        text_streams(vocabulary, [0, 1], SamplingParams())
    for odd in (-1, 2**40):
        with pytest.raises(RequestFailed, match="the tokenizer cannot decode the answer"):
            TextStream(vocabulary, (), ()).push([odd])


# -- what single tokens are ------------------------------------------------------------------------------------------


def test_tokens_of_a_cut_character_have_their_bytes_and_the_last_one_its_text():
    for kind, ids in (("llama", llama_bytes("€".encode())), ("byte-level", encode(tokenizer_of("byte-level"), "€"))):
        _, texts = pushed(stream_of(kind, ()), ids, range(60))
        assert [one.text for _, one in texts] == ["", "", "€"]
        assert [one.data for _, one in texts] == [b"\xe2", b"\x82", b"\xac"]


def test_alternatives_keep_their_spaces_bytes_and_names():
    for kind, token, text, data in [
        ("llama", "▁a", " a", b" a"), ("llama", "<0xE2>", REPLACEMENT, b"\xe2"), ("llama", "</s>", "</s>", b"</s>"),
        ("byte-level", "Ġa", " a", b" a"), ("byte-level", "â", REPLACEMENT, b"\xe2"),
        ("metaspace-first", "▁a", " a", b" a"), ("unigram", "▁", " ", b" "), ("wordpiece", "##t", "t", b"t"),
        ("wordpiece", "it", " it", b" it"), ("words", "truth", " truth", b" truth"),
    ]:  # fmt: skip
        found = vocabulary_of(kind).text_of(tokenizer_of(kind).token_to_id(token))
        assert (found.text, found.data) == (text, data), (kind, token)
    assert vocabulary_of("llama").text_of(99_999) == TokenText("", b"")


def test_a_token_that_ends_the_answer_adds_nothing_and_those_behind_a_stop_string_neither():
    tokenizer = tokenizer_of("llama")
    ids = encode(tokenizer, "It is a", add_special_tokens=False)
    _, texts = pushed(stream_of("llama", ()), [*ids, 2], is_ended_by_token=True)
    assert (texts[-1][1], "".join(one.text for _, one in texts)) == (TokenText("", b""), "It is a")
    _, texts = pushed(stream_of("llama", (), ("is",)), [*ids, 2])
    assert "".join(one.text for _, one in texts) == "It "
    assert b"".join(one.data for _, one in texts) == b"It "
    assert len(texts) == len(ids) + 1


def test_completions_lose_no_alternative_where_texts_are_the_same():
    vocabulary = vocabulary_of("llama")
    one = TokenLogprobs(BYTES[0xE2], -1.0, (BYTES[0x82], BYTES[0xE2], BYTES[0xFF], 1), (-0.5, -1.0, -2.0, -3.0))
    answer = CompletionAnswer("r", "m", 0, vocabulary.text_of, 1, ["echo"], has_logprobs=True)
    output = Output("r", "", (one.token_id,), logprobs=(one,), token_texts=(TokenText("", b"\xe2"),))
    logprobs = answer.chunk(output)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"": -1.0, REPLACEMENT: -0.5, f"token_id:{BYTES[0xFF]}": -2.0, "<s>": -3.0}]
    assert (logprobs["tokens"], logprobs["text_offset"]) == ([""], [4])


# -- text to tokens --------------------------------------------------------------------------------------------------


@every_kind
def test_prompts_are_tokenised_as_in_transformers_whatever_truncation_and_padding_are_stored(kind, tmp_path):
    tokenizer = Tokenizer.from_str(tokenizer_of(kind).to_str())
    tokenizer.enable_truncation(4, stride=1)
    tokenizer.enable_padding(length=30, pad_id=0, pad_token=tokenizer.id_to_token(0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reference = transformers().PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
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
    reference = transformers().AutoTokenizer.from_pretrained(tmp_path)
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
