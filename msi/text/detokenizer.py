"""Tokens of one answer as text, token by token: together exactly what decode(prompt + answer) adds to decode(prompt).

A tokenizer decodes whole sequences only, and the text of a token may depend on its neighbours:

- The first token of a text loses its leading space. So each token is decoded behind the one before it, the first one
  behind the end of the prompt, and what is new is its text.
- A token may end inside a character. What would be U+FFFD is held back until the next token decides.
- A run of byte tokens (byte fallback) is one string if all of it is valid UTF-8; else each of its bytes is U+FFFD,
  those of whole characters included. So it is held back until another token ends it, or it is invalid for good.
  A run longer than `MAX_HELD_BYTES` is no accident: from there on its characters are given out as they come.

What is held back is bounded, and so is the cost of a token, whatever the tokens are. Where a tokenizer only joins the
bytes of tokens, as most do, a token of whole characters behind whole characters is its own text, and is not decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from msi.text.vocabulary import REPLACEMENT, Vocabulary, ends_inside_character, utf8_state

MAX_HELD_BYTES = 64
MAX_WINDOW = 8
MAX_PROMPT_END = 256
CHARACTER_BYTES = 4  # at most, in UTF-8


def end_of_prompt(vocabulary: Vocabulary, prompt_token_ids: Sequence[int]) -> tuple[int, ...]:
    """As much of a prompt as decides about the text behind it."""
    found: list[int] = []
    for token_id in reversed(prompt_token_ids):
        if vocabulary.is_visible(token_id):
            found.append(token_id)
            is_context = token_id not in vocabulary.byte_of and vocabulary.alone(token_id) != ""
            if (len(found) >= CHARACTER_BYTES and is_context) or len(found) == MAX_PROMPT_END:
                break
    return tuple(reversed(found))


class Detokenizer:
    """One answer's.

    Args:
        prompt_end: see `end_of_prompt`; it may end inside a character.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_end: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        decode = vocabulary.tokenizer.decode
        self._decode = decode if vocabulary.skips_special else partial(decode, skip_special_tokens=False)
        self._special = vocabulary.special
        self._byte_of = vocabulary.byte_of
        self._fixed = vocabulary.fixed
        self._is_settled = False  # all text so far was given out, and it ends with a whole character
        self._window: list[int] = []  # the tokens that the next one is decoded behind
        self._num_shown = 0  # characters of the window's text that were given out
        self._run = bytearray()  # the bytes of the run at the window's end, while it may turn out valid
        self._is_run_long = False
        self._is_run_invalid = False
        self._open: list[int | None] = []  # tokens that wait for their texts: their bytes, or None for no text at all
        self._num_prompt_open = 0  # those of them that are the prompt's
        self._prompt_rest = ""  # what decode(prompt) shows of a character that is cut
        for token_id in prompt_end:
            self.step(token_id)
        self._num_prompt_open = len(self._open)
        self._prompt_rest = self._unshown()
        if self._open or self._prompt_rest:
            self._is_settled = False

    def step(self, token_id: int) -> list[str]:
        """The texts that this token settles, in order: its own, after those of earlier ones that were held back."""
        if self._is_settled and (fixed := self._fixed.get(token_id)) is not None:
            self._window, self._num_shown = [token_id], len(fixed)
            return [fixed]
        if token_id in self._special:
            return self._without_text()
        byte = self._byte_of.get(token_id)
        if byte is not None:
            return self._step_byte(token_id, byte)
        window = self._window
        window.append(token_id)
        whole = self._decode(window)
        text = whole[self._num_shown :]
        is_within = self._run or self._is_run_invalid or (text and text[-1] == REPLACEMENT)
        if is_within and not self._vocabulary.is_visible(token_id):  # it does not part what is around it
            window.pop()
            return self._without_text()
        if text and text[-1] == REPLACEMENT and self._is_cut():
            text = text[:-1]
            self._num_shown += len(text)
            self._is_settled = False
            if len(window) > MAX_WINDOW:
                self._shorten(num_held=1)
        else:
            self._begin_window(token_id, whole)
            self._is_settled = bool(text)  # what a prompt had cut is done with, too
        if self._open:
            return self._share_out(text, num_others=1)
        if text and self._prompt_rest:
            text, self._prompt_rest = text.removeprefix(self._prompt_rest), ""
        return [text]

    def finish(self) -> tuple[list[str], str]:
        """Nothing follows: the texts of tokens that waited for them, and what is left where none did."""
        if self._open:
            return self._share_out(self._unshown(), num_others=0), ""
        return [], self._unshown().removeprefix(self._prompt_rest)

    # -- the window --------------------------------------------------------------------------------------------------

    def _begin_window(self, last: int, whole: str) -> None:
        """All of its text is given out: its last token is context enough from here on, if it shows at all."""
        alone = self._vocabulary.alone(last)
        if alone:
            self._window = [last]
            self._num_shown = len(alone)
        else:
            self._num_shown = len(whole)
            if len(self._window) > MAX_WINDOW:
                self._shorten(num_held=0)
        if self._run or self._is_run_invalid:
            self._run = bytearray()
            self._is_run_long = self._is_run_invalid = False

    def _shorten(self, num_held: int) -> None:
        """Keeps the first token, which stands for all text before, and those in which a character may be cut."""
        self._window = [self._window[0], *self._window[1 - CHARACTER_BYTES :]]
        self._num_shown = len(self._decode(self._window)) - num_held

    def _is_cut(self) -> bool:
        """Whether the window ends inside a character."""
        tail = [self._vocabulary.bytes_of(token_id) for token_id in self._window[1 - CHARACTER_BYTES :]]
        return tail[-1] is not None and ends_inside_character(b"".join(part or b"" for part in tail))

    def _unshown(self) -> str:
        """What the window's text has beyond what was given out."""
        if self._is_run_long and utf8_state(self._run) != "valid":
            return "".join(_texts_of(self._open))  # the characters before are not taken back
        return str(self._decode(self._window))[self._num_shown :]

    # -- runs of byte tokens -----------------------------------------------------------------------------------------

    def _step_byte(self, token_id: int, byte: int) -> list[str]:
        if self._is_run_invalid:  # what makes it so is in the window, and stays there
            return [str(self._decode([*self._window, token_id]))[self._num_shown :]]
        self._run.append(byte)
        self._window.append(token_id)
        self._open.append(byte)
        state = utf8_state(self._run)
        if state == "invalid":
            return self._give_up_run()
        if self._is_run_long or len(self._run) > MAX_HELD_BYTES:
            return self._release(num_cut=_length_of_cut(self._run))
        return []

    def _give_up_run(self) -> list[str]:
        """Nothing can make it valid; the shortest end of which that is true stands for it."""
        text = self._unshown()
        length = next(length for length in range(1, len(self._run) + 1) if utf8_state(self._run[-length:]) == "invalid")
        self._window = self._window[-length:]
        self._num_shown = len(self._decode(self._window))
        self._run = bytearray()
        self._is_run_long, self._is_run_invalid = False, True
        return self._share_out(text, num_others=0)

    def _release(self, num_cut: int) -> list[str]:
        """The whole characters of a long run; the last of them stays as context, as do bytes of the next."""
        end = len(self._window) - num_cut
        text = str(self._decode(self._window[:end]))[self._num_shown :]
        length = len(self._run[: len(self._run) - num_cut].decode()[-1].encode())
        self._window = self._window[end - length :]
        self._num_shown = len(self._decode(self._window[:length]))
        self._run = self._run[-length - num_cut :]
        self._is_run_long = True
        waiting = num_cut
        at = len(self._open)
        while waiting:
            at -= 1
            waiting -= self._open[at] is not None
        rest, self._open = self._open[at:], self._open[:at]
        texts = self._share_out(text, num_others=0)
        self._open = rest
        return texts

    # -- whose text it is --------------------------------------------------------------------------------------------

    def _without_text(self) -> list[str]:
        if not self._open:
            return [""]
        self._open.append(None)  # its turn is after those
        return []

    def _share_out(self, text: str, num_others: int) -> list[str]:
        """Each character of a run to the token that completes it; `num_others` (0 or 1) come behind the run."""
        texts = _texts_of(self._open)
        own = "".join(texts)
        if text == own or (num_others and text.startswith(own)):
            texts += [text[len(own) :]] * num_others
        elif texts or num_others:  # the tokenizer did something else to them
            texts = [""] * (len(texts) + num_others - 1) + [text]
        if self._num_prompt_open:
            texts = self._beyond_prompt(texts)
        self._open = []
        return texts

    def _beyond_prompt(self, texts: list[str]) -> list[str]:
        """Less those of the prompt's tokens, and what decode(prompt) shows already where that is another text."""
        whole, texts = "".join(texts), texts[self._num_prompt_open :]
        if texts and whole.startswith(self._prompt_rest):
            rest = whole[len(self._prompt_rest) :]
            if "".join(texts) != rest:
                texts = [""] * (len(texts) - 1) + [rest]
        self._num_prompt_open = max(0, self._num_prompt_open - len(self._open))
        self._prompt_rest = ""
        return texts


def _texts_of(run: Sequence[int | None]) -> list[str]:
    """What the tokens of a run are: all its characters, each where it is complete, or U+FFFD for every byte."""
    data = bytes(byte for byte in run if byte is not None)
    if utf8_state(data) != "valid":
        return ["" if byte is None else REPLACEMENT for byte in run]
    characters = iter(data.decode())
    character, num_missing, texts = "", 0, []
    for byte in run:
        if byte is None:
            texts.append("")
            continue
        if not num_missing:
            character = next(characters)
            num_missing = len(character.encode())
        num_missing -= 1
        texts.append("" if num_missing else character)
    return texts


def _length_of_cut(text: bytearray) -> int:
    """Bytes at the end that are no whole character yet."""
    return next(length for length in range(CHARACTER_BYTES) if utf8_state(text[: len(text) - length]) == "valid")
