"""Prompts as the engine takes them: token ids that the model knows, and not more of them than it can hold.

Length is judged before anything is tokenised: a text of more bytes than the longest token times the context cannot
fit, whatever its tokens are.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from msi.errors import InvalidRequest, context_exceeded, shown
from msi.text.tokenizer import decode, encode, load_tokenizer
from msi.types import SamplingParams

COMPOSED = 3  # NFC makes at most so many bytes into one
KEEPS = {"ByteLevel", "Metaspace", "Prepend", "Digits"}  # steps that drop nothing of a text


class Prompts:
    """Of one model.

    Args:
        tokenizer: None for a model that has none.
        bytes_per_token: the most that a token stands for, 0 where nobody knows; see `most_bytes_per_token`.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, *, vocab_size: int, max_model_len: int, bytes_per_token: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._bytes_per_token = bytes_per_token

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def special_tokens(self) -> frozenset[str]:
        """Texts that a text has only where special tokens are shown."""
        added = {} if self._tokenizer is None else self._tokenizer.get_added_tokens_decoder()
        return frozenset(token.content for token in added.values() if token.special)

    @staticmethod
    def of(content: bytes, vocab_size: int, max_model_len: int, special_tokens: Collection[str] = ()) -> Prompts:
        """From the bytes of a tokenizer.json, b"" for none, and what the model names its tokens. Raises ConfigError."""
        if not content:
            return Prompts(None, vocab_size=vocab_size, max_model_len=max_model_len)
        tokenizer = load_tokenizer(content, special_tokens)
        longest = most_bytes_per_token(json.loads(content))
        return Prompts(tokenizer, vocab_size=vocab_size, max_model_len=max_model_len, bytes_per_token=longest)

    def encode(
        self,
        prompt: str | Sequence[int],
        *,
        add_special_tokens: bool = True,
        max_tokens: int = 1,
        truncate: int | None = None,
    ) -> tuple[int, ...]:
        """A prompt's tokens; with those that the tokenizer puts around a text.

        Args:
            max_tokens: of the answer, for the sentence that refuses a prompt.
            truncate: as `SamplingParams.truncate_prompt_tokens`.

        Raises:
            InvalidRequest: it is empty, too long, or has tokens that the model lacks.
        """
        keep_last = truncate
        if truncate == -1:
            room = self._max_model_len - max_tokens
            keep_last = room if room > 0 else max(1, self._max_model_len - 1)
        if isinstance(prompt, str):
            if keep_last is None:
                self._check_length(prompt, max_tokens)
            token_ids = self.tokens_of(prompt, add_special_tokens=add_special_tokens, keep_last=keep_last)
        else:
            token_ids = prompt if isinstance(prompt, tuple) else ids_of(prompt)
            if keep_last is not None:
                token_ids = token_ids[-keep_last:]
        if len(token_ids) + min(1, max_tokens) > self._max_model_len:
            raise context_exceeded(self._max_model_len, len(token_ids), max_tokens)
        self.check_tokens("the prompt", token_ids)
        return token_ids

    def tokens_of(self, text: str, *, add_special_tokens: bool, keep_last: int | None = None) -> tuple[int, ...]:
        """A text's tokens, however many and of whatever ids, or the last of them. Raises InvalidRequest."""
        if self._tokenizer is None:
            raise InvalidRequest("this model has no tokenizer.json; give the prompt as token ids", param="prompt")
        return encode(self._tokenizer, text, add_special_tokens, keep_last)

    def names_of(self, token_ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls these tokens; "" for those that it lacks."""
        if self._tokenizer is None:
            return [""] * len(token_ids)
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def check_tokens(self, where: str, token_ids: Collection[int]) -> None:
        """Raises InvalidRequest: the model lacks one of them."""
        if token_ids and not (set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and self._has(max(token_ids))):
            bad = next(one for one in token_ids if type(one) is not int or one < 0 or not self._has(one))
            raise InvalidRequest(
                f"token id {self._named(bad)} in {where}; ids are integers from 0 to {self._vocab_size - 1}",
                param=where.removeprefix("the "),
            )

    def checked(self, params: SamplingParams) -> SamplingParams:
        """The same, with bad_words as the tokens that they are.

        Raises:
            InvalidRequest: they name tokens that the model lacks, need a tokenizer that it lacks, or more context.
        """
        if params.stop and self._tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer.json, which this model lacks", param="stop")
        self.check_tokens("logit_bias", params.logit_bias)
        self.check_tokens("stop_token_ids", params.stop_token_ids)
        self.check_tokens("allowed_token_ids", params.allowed_token_ids)
        if (limit := params.truncate_prompt_tokens or 0) > self._max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {limit}; the context is {self._max_model_len} tokens",
                param="truncate_prompt_tokens",
            )
        if params.structured_outputs is not None and self._tokenizer is None:
            raise InvalidRequest(
                "structured_outputs need a tokenizer.json, which this model lacks", param="structured_outputs"
            )
        if not params.bad_words and not params.bad_words_token_ids:
            return params
        sequences = params.bad_words_token_ids + self._sequences_of(params.bad_words)
        self.check_tokens("bad_words", list(chain.from_iterable(sequences)))
        return replace(params, bad_words=(), bad_words_token_ids=sequences)

    def _sequences_of(self, words: Collection[str]) -> tuple[tuple[int, ...], ...]:
        """As vLLM: each word as it begins a text, and as it goes on behind a space where that is as many tokens."""
        if words and self._tokenizer is None:
            raise InvalidRequest("bad_words need a tokenizer.json, which this model lacks", param="bad_words")
        sequences: list[tuple[int, ...]] = []
        for word in words:
            bare, spaced = (
                self.tokens_of(space + word.lstrip(), add_special_tokens=False) for space in ("", " ")
            )  # fmt: skip
            if not bare:
                raise InvalidRequest(f"bad_words has {shown(word)}, for which there is no token", param="bad_words")
            sequences.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        return tuple(sequences)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included; "" for a model without tokenizer. Raises InvalidRequest."""
        return "" if self._tokenizer is None else decode(self._tokenizer, token_ids)

    def _named(self, token_id: object) -> str:
        """With its text where the tokenizer knows more tokens than the model has."""
        text = None
        if self._tokenizer is not None and type(token_id) is int and 0 <= token_id < 2**32:
            text = self._tokenizer.id_to_token(token_id)
        return shown(token_id) if text is None else f"{token_id} ({shown(text)})"

    def _has(self, token_id: int) -> bool:
        return token_id < self._vocab_size

    def _check_length(self, text: str, max_tokens: int) -> None:
        longest = self._bytes_per_token * self._max_model_len
        if self._bytes_per_token and len(text) * 4 > longest:  # no text has more bytes
            num_bytes = len(text.encode(errors="surrogatepass"))
            if num_bytes > longest:
                least = num_bytes // self._bytes_per_token
                raise context_exceeded(self._max_model_len, least, max_tokens, is_at_least=True)


def ids_of(prompt: object) -> tuple[int, ...]:
    """Token ids out of whatever holds them in an order, numpy's and torch's arrays among it. Raises InvalidRequest."""
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray | memoryview | Mapping | Set):
        raise InvalidRequest(
            f"the prompt is of the type {type(prompt).__name__}; give a text, or a sequence of token ids",
            param="prompt",
        )
    items = tuple(prompt)
    return items if all(kind in (int, bool) for kind in set(map(type, items))) else tuple(map(_as_id, items))


def _as_id(item: Any) -> Any:
    """An integer that is not Python's own as one that is; whatever else it is, as it is."""
    try:
        return item if type(item) is bool else operator.index(item)
    except TypeError:
        return item


def most_bytes_per_token(values: dict[str, Any]) -> int:
    """An upper bound of the bytes of text that one token stands for, from tokenizer.json; 0 where there is none.

    There is none where steps drop or merge what they read: whitespace, accents, runs of unknown characters.
    """
    factor = 1
    for step in _steps(values.get("normalizer")):
        if step.get("type") == "NFC":
            factor = COMPOSED
        elif step.get("type") == "Replace":
            pattern = step.get("pattern", {}).get("String", "")
            if not pattern or len(step.get("content", "").encode()) < len(pattern.encode()):
                return 0
        elif step.get("type") not in KEEPS:
            return 0
    for step in _steps(values.get("pre_tokenizer")):
        if step.get("type") == "Split":
            if step.get("behavior") == "Removed":
                return 0
        elif step.get("type") not in KEEPS:
            return 0
    model, added = values.get("model", {}), values.get("added_tokens") or []
    vocab = model.get("vocab", {})
    texts = set(vocab if isinstance(vocab, dict) else (one[0] for one in vocab))
    if any(one.get("lstrip") or one.get("rstrip") for one in added):
        return 0
    is_byte_level = any(
        step.get("type") == "ByteLevel" for name in ("normalizer", "pre_tokenizer") for step in _steps(values.get(name))
    )
    has_all_bytes = is_byte_level and texts.issuperset(ByteLevel.alphabet())
    if not has_all_bytes and not model.get("byte_fallback"):  # characters that it lacks may vanish, or become one token
        return 0
    longest = max(map(len, texts)) if is_byte_level else max(len(text.encode()) for text in texts)
    return factor * max([longest, *(len(one["content"].encode()) for one in added)])


def _steps(step: Any) -> list[dict[str, Any]]:
    """The steps of a sequence, however deep."""
    if not isinstance(step, dict):
        return []
    parts = step.get("normalizers") or step.get("pretokenizers")
    return [step] if parts is None else [one for part in parts for one in _steps(part)]
