"""Small tokenizers of every kind that models ship, trained here on a few lines of text."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want.",
    "I don't think it's true; we've seen they'll say n't, do not you ?  Two  spaces,   three. .",
    "naïve café — “quoted” … 日本語の文章 привет мир 한국어 🙂🙃 👩‍👩‍👧 e\u0301 \u00a0 x\ty\n\nz",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


def _sentencepiece(tokenizer: Tokenizer, prepend: str | None, *, strips: bool) -> Tokenizer:
    """As Llama's and Mistral's tokenizer.json are written: `prepend` None is the old form, by normalisers."""
    if prepend is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return tokenizer


def _bytes() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos]
    )
    return tokenizer


def _spm_bpe(prepend: str | None, *, strips: bool = True) -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    _sentencepiece(trained, prepend, strips=strips)
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=480, special_tokens=[*SPECIAL, *_bytes()], limit_alphabet=45
    )
    trained.train_from_iterator(CORPUS, trainer)
    # byte tokens are ordinary ones; the trainer made them special
    model = trained.model
    again = Tokenizer(model)
    _sentencepiece(again, prepend, strips=strips)
    again.add_special_tokens(SPECIAL)
    return _with_bos(again)


def _unigram(*, byte_fallback: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    pieces = SPECIAL + (_bytes() if byte_fallback else [])
    trainer = trainers.UnigramTrainer(
        show_progress=False, vocab_size=len(pieces) + 90, special_tokens=pieces, unk_token="<unk>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    import json

    vocab = [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]
    again = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    again.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    metaspace = decoders.Metaspace("▁", prepend_scheme="always")
    again.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if byte_fallback else metaspace
    again.add_special_tokens(SPECIAL)
    return _with_bos(again)


def _byte_level(*, add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_piece(*, cleanup: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##", cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(show_progress=False, vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _suffix_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _words() -> Tokenizer:
    """Without a decoder, and with holes among its ids."""
    words = sorted({word for line in CORPUS for word in line.split()})
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {word: 3 * at + 4 for at, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {
    "llama": lambda: _spm_bpe(None),
    "llama-without-strip": lambda: _spm_bpe(None, strips=False),
    "metaspace-first": lambda: _spm_bpe("first"),
    "metaspace-always": lambda: _spm_bpe("always"),
    "metaspace-never": lambda: _spm_bpe("never", strips=False),
    "unigram": lambda: _unigram(byte_fallback=False),
    "unigram-bytes": lambda: _unigram(byte_fallback=True),
    "byte-level": lambda: _byte_level(add_prefix_space=False),
    "byte-level-prefix": lambda: _byte_level(add_prefix_space=True),
    "wordpiece": lambda: _word_piece(cleanup=True),
    "wordpiece-raw": lambda: _word_piece(cleanup=False),
    "suffix-bpe": _suffix_bpe,
    "words": _words,
}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """With added tokens of every sort, so none is without."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(["<|im_start|>", AddedToken("<|strip|>", lstrip=True, rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<tool call>", lstrip=True), AddedToken("<é>", rstrip=True, normalized=False)])
    return tokenizer
