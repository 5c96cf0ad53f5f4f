"""What single tokens look like. Texts of many are put together in `msi.text.detokenizer`.

Everything rests on `Tokenizer.decode`; of the way in which a tokenizer decodes only this is known here: which tokens
stand for single bytes ("<0xE2>", as SentencePiece writes them), and what bytes the tokens of a byte-level vocabulary
are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from msi.text.tokenizer import is_library_error
from msi.types import TokenText

REPLACEMENT = "\ufffd"  # what bytes that are no character become
MAX_ANCHOR_TRIES = 4096


class Vocabulary:
    """What tokens look like, one by one. Shared by all requests; remembers what was asked.

    Args:
        skips_special: special tokens are no part of an answer's text; else they are as any other.

    Attributes:
        special: tokens that are no part of an answer's text.
        byte_of: tokens that stand for one byte each, and whose neighbours decide what they look like.
        fixed: of tokens that were asked about, those that add the same whole characters to any text, and these.
    """

    def __init__(self, tokenizer: Tokenizer, *, skips_special: bool = True) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special and skips_special
        )
        self.skips_special = skips_special
        self._showing_special: Vocabulary | None = None
        decoder: bytes = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
        self.is_byte_level = b'"ByteLevel"' in decoder
        self.byte_of = _byte_tokens(tokenizer) if b'"ByteFallback"' in decoder else {}
        self._joins_bytes = bool(decoder) and json.loads(decoder)["type"] == "ByteLevel"  # and does nothing else
        self.fixed: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        self._texts: dict[int, TokenText] = {}
        self._anchor: list[int] | None = None

    @property
    def showing_special(self) -> Vocabulary:
        """The same, for texts of which special tokens are a part."""
        if self._showing_special is None:
            self._showing_special = Vocabulary(self.tokenizer, skips_special=False)
        return self._showing_special

    def decode(self, token_ids: Sequence[int]) -> str:
        """As transformers does."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=self.skips_special))

    def alone(self, token_id: int) -> str:
        """The text of this token where there is no other."""
        text = self._alone.get(token_id)
        if text is None:
            text = self._alone[token_id] = self.decode([token_id])
            if self._joins_bytes and self._is_whole(token_id, text):
                self.fixed[token_id] = text
        return text

    def _is_whole(self, token_id: int, text: str) -> bool:
        """Whether the token's bytes are characters that no neighbour takes part in."""
        return text != "" and REPLACEMENT not in text and self.bytes_of(token_id) == text.encode()

    def is_visible(self, token_id: int) -> bool:
        """Whether it takes part in a text at all: not if it is special, nor if the vocabulary has no such token."""
        return token_id not in self.special and self.tokenizer.id_to_token(token_id) is not None

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token that need not be whole characters; None for all that are made of text."""
        if self.is_byte_level:
            token = self.tokenizer.id_to_token(token_id)
            return None if token is None or token_id in self.special else _byte_level(token)
        byte = self.byte_of.get(token_id)
        return None if byte is None else bytes((byte,))

    def text_of(self, token_id: int) -> TokenText:
        """What the token would be behind some other text; special tokens, and those that cannot be decoded, by name."""
        found = self._texts.get(token_id)
        if found is None:
            try:
                found = self._named(token_id) if token_id in self.special else self._text_of(token_id)
            except BaseException as error:
                if not is_library_error(error):
                    raise
                found = self._named(token_id)
            self._texts[token_id] = found
        return found

    def _named(self, token_id: int) -> TokenText:
        text = self.tokenizer.id_to_token(token_id) or ""
        return TokenText(text, text.encode())

    def _text_of(self, token_id: int) -> TokenText:
        if self._anchor is None:
            self._anchor = self._find_anchor()
        text = self.decode([*self._anchor, token_id])[len(self.decode(self._anchor)) :]
        token_bytes = self.bytes_of(token_id)
        return TokenText(text, text.encode() if token_bytes is None else token_bytes)

    def _find_anchor(self) -> list[int]:
        """Some token behind which another one looks as it does inside a text; [] if there is none."""
        for token_id in range(min(self.tokenizer.get_vocab_size(), MAX_ANCHOR_TRIES)):
            if self.is_visible(token_id) and token_id not in self.byte_of:
                text = self.alone(token_id)
                if text.strip() and REPLACEMENT not in text:
                    return [token_id]
        return []


def ends_inside_character(text: bytes) -> bool:
    """Whether more bytes could complete a character of UTF-8 that has begun at the end of these."""
    for length in range(1, min(3, len(text)) + 1):
        if text[-length] & 0xC0 != 0x80:  # no continuation: here the last character begins
            return utf8_state(text[-length:]) == "incomplete"
    return False


def utf8_state(text: bytes | bytearray) -> str:
    """ "valid", "incomplete" (the beginning of something valid) or "invalid"."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return "incomplete" if error.reason == "unexpected end of data" else "invalid"
    return "valid"


def _byte_tokens(tokenizer: Tokenizer) -> dict[int, int]:
    found = {}
    for byte in range(256):
        for name in (f"<0x{byte:02X}>", f"<0x{byte:02x}>"):
            token_id = tokenizer.token_to_id(name)
            if token_id is not None and tokenizer.decode([token_id], skip_special_tokens=False) != name:
                found[token_id] = byte
    return found


def _byte_level(token: str) -> bytes:
    """A token of a byte-level vocabulary writes each byte as one printable character, or is text as it is."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest for what follows 255, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTE_OF_CHARACTER: dict[str, int] = _byte_characters()
