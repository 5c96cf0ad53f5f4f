"""Text to tokens: how a tokenizer is loaded and what it makes of a prompt. The way back is `msi.text.detokenizer`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import AddedToken, Tokenizer

from msi.errors import ConfigError, InvalidRequest


def load_tokenizer(content: bytes, special_tokens: Collection[str] = ()) -> Tokenizer:
    """From the bytes of a tokenizer.json. Truncation and padding that are stored in it are not obeyed.

    Args:
        special_tokens: tokens that are special because the model names them (as bos_token, say), whatever the file
            says; those that it does not have are nothing.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _make_special(tokenizer, special_tokens)
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise ConfigError(f"tokenizer.json cannot be read: {error}") from error
    return tokenizer


def _make_special(tokenizer: Tokenizer, texts: Collection[str]) -> None:
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for text in texts:
        if text and tokenizer.token_to_id(text) is not None and not (text in added and added[text].special):
            token = added.get(text) or AddedToken(text, normalized=False)
            token.special = True
            tokenizer.add_special_tokens([token])


def encode(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool = True, keep_last: int | None = None
) -> tuple[int, ...]:
    """Tokens of a prompt, by default with the special tokens that the tokenizer puts around it.

    Args:
        keep_last: at most so many, those around it among them; what goes is the text's beginning.

    Raises:
        InvalidRequest: the text holds lone surrogates, which no encoding can express, or the tokenizer fails on it.
    """
    try:
        # a batch of one, as that lets other threads run meanwhile
        if keep_last is None:
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return tuple(encoding.ids)
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        before, after = around(tokenizer) if add_special_tokens else ([], [])
        room = max(0, keep_last - len(before) - len(after))
        text_ids = encoding.ids
        return (*before, *text_ids[len(text_ids) - min(room, len(text_ids)) :], *after)[-keep_last:]
    except (UnicodeEncodeError, TypeError) as error:
        raise InvalidRequest(
            "the prompt is not valid Unicode text; it has half of a surrogate pair", param="prompt"
        ) from error
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise InvalidRequest(f"the tokenizer fails on the prompt: {error}", param="prompt") from error


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind a text."""
    encoding = tokenizer.encode("a")
    ids, is_own = encoding.ids, encoding.special_tokens_mask
    begin = is_own.index(0) if 0 in is_own else len(ids)
    return ids[:begin], [token for token, own in zip(ids[begin:], is_own[begin:], strict=True) if own]


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a prompt, special tokens included. Raises InvalidRequest: the tokenizer fails on it."""
    try:
        return str(tokenizer.decode(token_ids, skip_special_tokens=False))
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise InvalidRequest(f"the tokenizer cannot decode the prompt: {error}", param="prompt") from error


def is_library_error(error: BaseException) -> bool:
    """Whether something went wrong inside tokenizers, whose panics are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
