"""Text to tokens and back: prompts, incremental detokenisation, and stop strings across token boundaries."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from msi.errors import ConfigError, InvalidRequest


def load_tokenizer(content: bytes) -> Tokenizer:
    """From the bytes of a tokenizer.json. Raises ConfigError."""
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(f"tokenizer.json cannot be read: {error}") from error


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Tokens of a prompt, by default with the special tokens that the tokenizer puts around it.

    Raises:
        InvalidRequest: the text holds lone surrogates, which no encoding can express.
    """
    try:
        # a batch of one, as that lets other threads run meanwhile
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the prompt is not valid Unicode text: {error.reason} at {error.start}") from error
    except TypeError as error:
        raise InvalidRequest(f"the prompt is not valid text: {error}") from error


class TextStream:
    """One request's tokens as text, as soon as it is certain.

    Bytes of an unfinished character are held back, and so is the end of a text that may turn out to be the beginning
    of a stop string.

    Args:
        min_tokens: before so many tokens no stop string counts.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...], min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stream: Any = None if tokenizer is None else DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._num_streamed = 0  # characters that the stream gave
        self._held = ""
        self.is_stopped = False

    def push(self, token_ids: tuple[int, ...]) -> str:
        """The text that these tokens make certain; once it `is_stopped`, that is all there will be."""
        if self._tokenizer is None:
            return ""
        early = ""  # what comes before a stop string counts
        for token_id in token_ids:
            new_text = self._stream.step(self._tokenizer, token_id) or ""
            self._token_ids.append(token_id)
            self._num_streamed += len(new_text)
            if len(self._token_ids) <= self._min_tokens:
                early += new_text
                continue
            self._held += new_text
            found = [(at, text) for text in self._stop if (at := self._held.find(text)) >= 0]
            if found:
                self.is_stopped = True
                certain, self._held = self._held[: min(found)[0]], ""
                return early + certain
        keep = self._possible_stop()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return early + certain

    def flush(self) -> str:
        """What was held back, once nothing follows; bytes of a character that stayed incomplete show as U+FFFD."""
        held, self._held = self._held, ""
        if self._tokenizer is None:
            return held
        return held + str(self._tokenizer.decode(self._token_ids))[self._num_streamed :]

    def _possible_stop(self) -> int:
        """The longest end of the text that begins a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self._stop):
                return length
        return 0
